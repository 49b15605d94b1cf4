"""train.py --shard: two processes (gloo, on this machine), each with a part of all, train the same
run as one."""

import io
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import refusal
from torch.distributed.tensor import DTensor, distribute_tensor

import train
from batches import Batches
from checkpoint import load_expert, step_of_run
from conftest import CPU, TINY_RUN
from extras import parallel
from loading import load_llm
from model import ImageExpert

pytestmark = pytest.mark.slow


# -------------------------------------------------------------------------------------------------
# what each of two processes does


def work(rank: int, port: int, task, *args):
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    parallel.ASKED.clear()
    with redirect_stdout(io.StringIO()), exact_muon():
        done = task(*args)
    torch.distributed.destroy_process_group()
    return done


@pytest.fixture(scope="module")
def two_processes():
    """A task and its arguments -> what it gives in each of two processes, which stay."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:

        def run(task, *args) -> list:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            pools = enumerate((first, second))
            jobs = [pool.submit(work, k, port, task, *args) for k, pool in pools]
            return [job.result(timeout=120) for job in jobs]

        yield run


@contextmanager
def exact_muon() -> Iterator[None]:
    """Newton-Schulz in float32: in bfloat16 the last bit of a gradient is a thousandth of a step,
    with --shard and without."""
    rounding = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda x: x.float().clone()
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = rounding


def shard_run(flags: list[str]) -> train.Run:
    args, metadata, tensors = train.settings([*flags, "--shard"])
    rank, ranks = parallel.join(args)
    run = train.prepare(args, metadata, tensors)
    run.rank = rank
    run.ranks = ranks
    return run


def train_until(flags: list[str], step: int) -> None:
    train.train(shard_run(flags), step)


def train_and_stop(flags: list[str]) -> int:
    """The second one gets a signal in its third step. -> how many it has done."""
    run = shard_run(flags)
    step = train.train_step

    def interrupted(*args):
        if run.rank == 1 and run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    train.train_step = interrupted
    try:
        train.train(run)
    except KeyboardInterrupt:
        return run.step
    finally:
        train.train_step = step


def parts_of(flags: list[str]) -> dict[str, float]:
    """Which share of all numbers this process keeps after a step; "gathered": of each run of the
    last block, in which dtype blocks were whole."""
    run = shard_run(flags)
    whole = []

    def look(module, inputs) -> None:
        weights = [block.qkv.weight for block in run.expert.blocks]
        whole.append([p.dtype for p in weights if not isinstance(p, DTensor)])

    run.expert.blocks[-1].down.register_forward_pre_hook(look)
    batches = Batches(run.source, run.llm, 8, run.args.draws, 0, run.rank, run.ranks)
    train.train_step(run, run.expert, *next(batches))
    batches.close()
    moments = []
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            moments += [x for x in state.values() if x.dim()]
    kinds = {
        "expert": list(run.expert.parameters()),
        "average": list(run.ema.parameters()),
        "moments": moments,
        "layers of the LLM": list(run.llm.model.model.layers.parameters()),
    }
    shares = {"gathered": whole}
    for kind, tensors in kinds.items():
        here = sum(x.to_local().numel() for x in tensors)
        shares[kind] = here / sum(x.numel() for x in tensors)
    return shares


def read_captions(flags: list[str], captions: list[list[str]]) -> list[torch.Tensor]:
    """Each process has others."""
    run = shard_run(flags)
    context = run.llm.context(captions[run.rank])
    again = run.llm.context(captions[run.rank])  # out of its cache
    assert torch.equal(context.keys[0], again.keys[0])
    return [*context.keys, *context.values]


SHAPES = [(8, 4), (5, 3), (1, 6), (4, 4)]  # some divide by two, and the third is with one alone


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def muon_steps(muon: type, weights: list) -> list[torch.Tensor]:
    """Two steps with the same gradients; the last matrix has none in the first."""
    optimizer = muon(weights, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
        if not step:
            weights[-1].grad = None
        optimizer.step()
    kept = [optimizer.state[p]["momentum_buffer"] for p in weights]
    return [x.detach() for x in (*weights, *kept)]


def muon_in_parts() -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    from extras.shard import ShardedMuon

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weights = [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in matrices()]
    return [x.full_tensor() for x in muon_steps(ShardedMuon, weights)]


# -------------------------------------------------------------------------------------------------
# the same run


def words(*flags) -> list[str]:
    return [str(flag) for flag in flags]


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Of the tensors of two runs' states."""
    one = load_file(ours / "train_state.safetensors")
    two = load_file(theirs / "train_state.safetensors")
    assert one.keys() == two.keys()
    return {name: (one[name] - two[name]).abs().amax().item() for name in one if one[name].numel()}


def last_line(out: Path) -> dict:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


TOWERS = {
    "mot": [],
    "mot, computed twice": ["--checkpointing", "--accumulate", "2", "--draws", "2"],
    "mirror": ["--bridge", "mirror"],
    "metaqueries": ["--bridge", "metaqueries:queries=4"],  # with a gradient through the LLM
}


def flags_of(tower: str, llm_folder, out: Path) -> list[str]:
    flags = words("--llm", llm_folder("qwen2"), *TINY_RUN, *TOWERS[tower], "--steps", 4)
    if tower == "mirror":
        at = flags.index("--width")  # it has the LLM's
        del flags[at : at + 4]
    return [*flags, "--out", str(out)]


@pytest.fixture(scope="module")
def in_parts(two_processes, llm_folder, tmp_path_factory):
    """tower -> the folder of a run in two processes, made once."""
    made = {}

    def get(tower: str) -> Path:
        if tower not in made:
            made[tower] = tmp_path_factory.mktemp(tower)
            two_processes(train_until, flags_of(tower, llm_folder, made[tower]), 4)
        return made[tower]

    return get


@pytest.mark.parametrize("tower", TOWERS)
def test_two_processes_with_parts_train_what_one_does(tower, in_parts, llm_folder, tmp_path):
    """Weights, their average and all moments, to 1e-5 in float32; the norm before clipping; the
    pictures of the average; and the expert's file."""
    one = tmp_path
    two = in_parts(tower)
    with exact_muon():
        train.main(flags_of(tower, llm_folder, one))
    found = differences(one, two)
    assert all(x < 1e-5 for x in found.values()), max(found, key=found.get)
    assert len(found) > 50
    assert last_line(two)["grad_norm"] == pytest.approx(last_line(one)["grad_norm"], rel=1e-5)
    drawn = [np.asarray(Image.open(out / "samples-000004.png")) / 255 for out in (one, two)]
    assert np.abs(drawn[0] - drawn[1]).max() < 0.05
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    experts = [load_expert(str(out), CPU) for out in (one, two)]
    assert type(experts[0]) is type(experts[1]) and isinstance(experts[0], ImageExpert)


def test_a_run_goes_on_with_it_and_without(two_processes, tiny_run, tmp_path):
    flags = [*tiny_run, "--steps", "6", "--sample-every", "100"]
    cut = ["--resume", "--out", str(tmp_path / "cut")]
    with exact_muon():
        train.main(words(*flags, "--out", tmp_path / "whole"))
        args = train.settings(words(*flags, "--out", tmp_path / "cut"))
        train.train(train.prepare(*args), until=2)
        two_processes(train_until, cut, 4)
        train.main(cut)
    found = differences(tmp_path / "whole", tmp_path / "cut")
    assert all(x < 1e-5 for x in found.values()), max(found, key=found.get)


def test_a_run_with_parts_goes_on_bit_for_bit(two_processes, in_parts, llm_folder, tmp_path):
    two_processes(train_until, flags_of("mot", llm_folder, tmp_path), 2)
    two_processes(train_until, ["--resume", "--out", str(tmp_path)], 4)
    assert set(differences(in_parts("mot"), tmp_path).values()) == {0.0}


def test_all_stop_after_the_same_step_and_save(two_processes, tiny_run):
    assert two_processes(train_and_stop, words(*tiny_run, "--steps", 100000)) == [3, 3]
    assert step_of_run(tiny_run[tiny_run.index("--out") + 1]) == 3


# -------------------------------------------------------------------------------------------------
# in parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_process_keeps_half_and_one_block_is_whole(dtype, two_processes, tiny_run):
    """That one in the dtype in which it is used."""
    flags = words(*tiny_run, "--steps", 2, "--dtype", str(dtype).removeprefix("torch."))
    first, second = two_processes(parts_of, flags)
    for found in (first, second):
        assert found.pop("gathered") == [[dtype]]
    for kind in first:
        assert first[kind] + second[kind] == pytest.approx(1), kind
        assert 0.45 < first[kind] < 0.55, kind


def test_muon_makes_the_same_steps_of_matrices_in_parts(two_processes):
    with exact_muon():
        wanted = muon_steps(torch.optim.Muon, matrices())
    for found in two_processes(muon_in_parts):
        errors = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
        assert all(error < 1e-6 for error in errors), errors


def test_processes_with_different_captions_read_them_together(two_processes, llm_folder, tiny_run):
    """One has captions of three lengths, the other none that is new; the LLM stops early."""
    captions = [["a red circle", "a red circle left of a blue square", "red"], [""]]
    flags = [*tiny_run, "--llm", llm_folder("deep"), "--layers", "1,2"]
    whole = load_llm(str(llm_folder("deep")), CPU, torch.float32)
    whole.keep([1, 2])
    for own, found in zip(captions, two_processes(read_captions, words(*flags), captions)):
        context = whole.context(own)
        for theirs, ours in zip([*context.keys, *context.values], found, strict=True):
            assert ours.shape == theirs.shape
            assert ((ours - theirs).abs() < 1e-6).all()


# -------------------------------------------------------------------------------------------------
# what cannot be


def test_one_process_is_refused(tiny_run, capsys):
    said = refusal(capsys, train.main, *tiny_run, "--shard")
    assert "--shard" in said and "torchrun" in said
    assert "--compile" in refusal(capsys, train.main, *tiny_run, "--shard", "--compile")


@pytest.mark.parametrize(
    "flags",
    [
        ["--describe", "0.5"],
        ["--data", "edits"],
        ["--read", "think:4:frame=FRAME"],
        ["--bridge", "mirror:separation=none"],
        ["--bridge", "mirror:lr-ratio=0.5"],
    ],
)
def test_what_cannot_be_in_parts_is_refused(flags, tiny_run, tmp_path):
    (tmp_path / "frame").write_text("{} is")
    flags = [flag.replace("FRAME", str(tmp_path / "frame")) for flag in flags]
    tiny = tiny_run[: tiny_run.index("--width")] if "--bridge" in flags else tiny_run
    args = train.settings([*tiny, "--image-size", "16", *flags, "--shard"])
    with pytest.raises(ValueError, match="--shard does not go with .*leave one out"):
        train.prepare(*args)
    assert not (tmp_path / "run").exists()
