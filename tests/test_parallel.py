"""Several processes (gloo, on this machine) train the same run as one."""

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import refusal

import train
from checkpoint import step_of_run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def work(rank: int, port: int, flags: list[str]) -> None:
    """What one of two processes does that torchrun has started."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with redirect_stdout(io.StringIO()) as out:
        own = sys.stdout
        train.main(flags)
        sys.stdout = own
    torch.distributed.destroy_process_group()
    assert (out.getvalue() == "") == (rank == 1), "the first one speaks"


@pytest.fixture(scope="module")
def two_processes():
    """flags -> train.py in two processes, which stay for the next one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:

        def run(*flags) -> None:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            words = [str(flag) for flag in flags]
            jobs = [pool.submit(work, k, port, words) for k, pool in enumerate((first, second))]
            for job in jobs:
                job.result(timeout=120)

        yield run


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "train_state.safetensors")


def losses_of(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").open())
    return [(line["step"], line["loss"], line["images"]) for line in lines]


@pytest.mark.parametrize(
    "task",
    [
        [],
        ["--data", "edits", "--draws", "2", "--accumulate", "2"],
        ["--bridge", "metaqueries:queries=4"],
    ],
)
def test_two_processes_have_the_gradients_of_one(task, two_processes, tiny_run, tmp_path):
    """Of the joined batch, in float32: what the optimizers keep after a step is the gradient."""
    flags = [*tiny_run, *task, "--steps", "1"]
    two_processes(*flags, "--out", tmp_path / "two")
    train.main([*flags, "--accumulate", "1", "--out", str(tmp_path / "one")])
    one = state_of(tmp_path / "one")
    two = state_of(tmp_path / "two")
    assert one.keys() == two.keys()
    kept = [name for name in one if name.startswith(("exp_avg.", "momentum_buffer."))]
    size = max(one[name].abs().max() for name in kept)
    error = max((one[name] - two[name]).abs().max() for name in kept)
    assert len(kept) > 10 and error < 1e-6 * max(1, size), f"{error:.1e} of {size:.1e}"


def test_a_run_goes_on_with_more_processes(two_processes, tiny_run, tmp_path):
    """With the data and the noise that it would have had."""
    flags = [*tiny_run, "--steps", "10", "--save-every", "5", "--sample-every", "100"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    cut = [*flags, "--out", str(tmp_path / "cut")]
    train.train(train.prepare(*train.settings(cut)), until=5)
    two_processes("--resume", "--out", tmp_path / "cut")
    for ours, theirs in zip(
        losses_of(tmp_path / "cut"), losses_of(tmp_path / "whole"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4), "a loss of other data is another"


def test_all_stop_after_the_same_step(tiny_run, tmp_path):
    """Through torchrun itself."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [ROOT / "train.py", *tiny_run, "--steps", "100000", "--sample-every", "5"]
    process = subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not list(out.glob("samples-*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    said, errors = process.communicate(timeout=60)
    step = step_of_run(str(out))
    assert f"saved at step {step} of 100000" in said, errors
    assert errors.count("train.py: stopped") == 2
    assert losses_of(out)[-1][0] == step, "a line of the last steps, too"


def test_a_batch_that_does_not_divide_is_refused(tiny_run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = refusal(capsys, train.main, *tiny_run)  # 8 pictures, 4 of each caption
    assert "expected a multiple of --draws 4 times the 3 processes" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(capsys, train.main, *tiny_run, "--accumulate", "2")
    assert said.endswith("times the 2 processes times --accumulate 2")
