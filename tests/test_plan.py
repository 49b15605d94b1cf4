"""The plan of a run against the run itself: exactly where it can be, in megabytes where the system
counts them."""

from pathlib import Path

import pytest
import torch
from test_train import start, steps

import train
from extras.counting import Live
from extras.plan import plan_of

ROOT = Path(__file__).parent.parent
MIRROR = "--device cpu --dtype float32 --batch-size 8 --image-size 16 --patch 4 --bridge mirror"


def planned(*flags):
    return plan_of(train.parse_args([str(flag) for flag in (*flags, "--plan")]))


def bytes_in(tensors) -> int:
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("tower", ["mot", "mirror"])
def test_what_is_kept_is_what_a_run_keeps(tower, tiny_run, llm_folder, tmp_path):
    """The weights and the optimizers' memory, to the byte."""
    flags = tiny_run
    if tower == "mirror":
        flags = ["--llm", llm_folder("llama"), "--out", tmp_path / "run", *MIRROR.split(), "--caption-dropout", 0]
    plan = planned(*flags)
    assert not (tmp_path / "run").exists(), "a plan writes nothing"
    run = start(*flags)
    steps(run, 1)
    kept = []
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            kept += [x for x in state.values() if isinstance(x, torch.Tensor)]
    rows = {what: size for what, (size, _) in plan.device.items()}
    assert rows["LLM, frozen"] == bytes_in(run.llm.model.parameters()) > 0
    assert rows["expert"] == bytes_in(run.expert.parameters()) > 0
    assert rows["its moving average"] == bytes_in(run.ema.parameters())
    assert rows["optimizers"] == bytes_in(kept)
    assert plan.step["gradients"][0] == bytes_in(run.expert.parameters())


def test_eight_that_share_keep_an_eighth_each(tiny_run):
    alone = planned(*tiny_run, "--batch-size", 64, "--draws", 1).device
    flags = [*tiny_run, "--batch-size", 512, "--draws", 1, "--plan", 8, "--shard"]
    shared = plan_of(train.parse_args([str(flag) for flag in flags])).device
    for what in ("expert", "its moving average", "optimizers"):
        assert shared[what][0] == alone[what][0] / 8 > 0
    assert alone["LLM, frozen"][0] / 8 < shared["LLM, frozen"][0] < alone["LLM, frozen"][0]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--checkpointing"],
        ["--accumulate", 2],
        ["--objective", "ddpm"],
        ["--dtype", "bfloat16"],
        ["--bridge", "mirror"],
    ],
    ids=lambda more: " ".join(map(str, more)) or "plain",
)
def test_a_real_step_has_as_much_at_once(more, tiny_run, llm_folder, tmp_path):
    """Counted in the same way, on real tensors: train_step as it is, its second step."""
    more = [*more, "--caption-dropout", 0]
    flags = [*tiny_run, "--draws", 1, "--image-size", 32, *more]
    if "mirror" in more:
        flags = ["--llm", llm_folder("llama"), "--out", tmp_path / "run", *MIRROR.split(), "--caption-dropout", 0]
    plan = planned(*flags)
    run = start(*flags)
    batches = train.Batches(run.source, run.llm, 8, run.args.draws, 0)
    steps(run, 1)
    # the plan is of a batch with the longest of the first captions
    first = [next(batches) for _ in range(8)]
    batches.close()
    longest = max(first, key=lambda batch: run.llm.context(batch[0]).keys[0].shape[2])
    live = Live([*run.expert.parameters(), *run.ema.parameters()])
    with live:
        train.train_step(run, run.expert, *longest)
    assert plan.device["a step, at its most"][0] == pytest.approx(live.most, rel=0.05)
