"""train.py --from: the weights of one run are where another begins, and nothing else is."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_train import start, steps

import assemble
import checkpoint
import sample
import train
from checkpoint import load_expert
from conftest import CPU

OWN = ["--device", "cpu", "--dtype", "float32", "--batch-size", "8", "--warmup", "2"]


@pytest.fixture
def first(tiny_run, tmp_path):
    """The folder of a run of 40 steps, and its mean loss of the last ten."""
    run = start(*tiny_run, "--steps", 40, "--lr", 5e-3, "--out", tmp_path / "first")
    losses = losses_of(run, 40)
    checkpoint.save_run(run)
    return str(tmp_path / "first"), np.mean(losses[-10:])


def losses_of(run: train.Run, n: int) -> list[float]:
    losses = []
    batches = train.Batches(run.source, run.llm, run.args.batch_size, run.args.draws, run.step)
    for _, (captions, pictures) in zip(range(n), batches):
        losses.append(train.train_step(run, run.expert, captions, pictures)[0].mean().item())
    return losses


def test_a_run_begins_with_the_weights_of_another(first, tiny_run, tmp_path, monkeypatch):
    ckpt, last = first
    run = start("--from", ckpt, *OWN, "--steps", 20, "--seed", 5, "--out", tmp_path / "second")
    origin = load_expert(ckpt, CPU).state_dict()
    for tower in (run.expert, run.ema):
        assert tower.state_dict().keys() == origin.keys()
        assert all(torch.equal(a, origin[name]) for name, a in tower.state_dict().items())
    assert run.step == 0
    assert not any(optimizer.state for optimizer in run.optimizers)
    assert run.args.width == 32 and len(run.expert.blocks) == 2
    made_for = run.expert.made_for
    assert made_for["from"]["name"] == ckpt and len(made_for["from"]["sha256"]) == 64
    assert made_for["llm_fingerprint"] == load_expert(ckpt, CPU).made_for["llm_fingerprint"]

    # where the other run has come to, and not where a fresh one begins
    begins = np.mean(losses_of(run, 4))
    fresh = start(*tiny_run, "--seed", 5, "--steps", 20, "--out", tmp_path / "fresh")
    fresh_begins = np.mean(losses_of(fresh, 4))
    assert last < 0.5 * fresh_begins, f"{last:.3f} {fresh_begins:.3f}: the first run has learned"
    assert begins < 1.5 * last, f"{begins:.3f} {last:.3f}"

    # its folder has a name of its own, and what it draws is its own business
    monkeypatch.chdir(tmp_path)
    assert train.parse_args(["--from", "first"]).out == "runs/shapes-from-first"


def test_a_started_run_resumes_bit_for_bit_without_its_origin(first, tmp_path):
    ckpt, _ = first
    flags = ["--from", ckpt, *OWN, "--steps", 8, "--lr", 1e-3, "--caption-dropout", 0.3]
    whole = start(*flags, "--out", tmp_path / "whole")
    steps(whole, 8)
    part = start(*flags, "--out", tmp_path / "part")
    steps(part, 5)
    checkpoint.save_run(part)
    shutil.rmtree(ckpt)
    resumed = start("--resume", "--out", tmp_path / "part")
    assert resumed.step == 5
    steps(resumed, 3)
    for tower in ("expert", "ema"):
        ours = getattr(resumed, tower).state_dict()
        for name, weight in getattr(whole, tower).state_dict().items():
            assert torch.equal(weight, ours[name]), name
    assert resumed.expert.made_for["from"] == whole.expert.made_for["from"]


def test_other_data_and_another_size(first, tmp_path):
    """The same weights serve any size that divides; the folder holds what was trained."""
    ckpt, _ = first
    own = [*OWN, "--steps", "2", "--out", str(tmp_path / "larger")]
    train.main(["--from", ckpt, "--data", "shapes:one-object", "--image-size", "32", *own])
    expert = load_expert(str(tmp_path / "larger"), CPU)
    assert expert.image_size == 32 and "one_object" in expert.made_for
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    assert sample.draw(expert, llm, ["a red circle"], [0], 2).shape == (1, 32, 32, 3)
    train.main(["--resume", "--out", str(tmp_path / "larger"), "--steps", "3"])


def test_what_contradicts_the_checkpoint_is_refused(first, llm_folder, tmp_path):
    ckpt, _ = first
    out = tmp_path / "second"
    (tmp_path / "empty").mkdir()
    moved = tmp_path / "moved"
    shutil.copytree(llm_folder("qwen2"), moved)
    leave = "leave it out, or start without --from"
    cases = [
        (["--width", "64"], f"--width 64: {ckpt} has 32; {leave}"),
        (["--depth", "3"], f"--depth 3: {ckpt} has 2; "),
        (["--heads", "2"], f"--heads 2: {ckpt} has "),
        (["--patch", "8"], f"--patch 8: {ckpt} has 4; "),
        (["--prediction", "velocity"], f"--prediction velocity: {ckpt} has clean; "),
        (["--size", "tiny"], f"--size tiny: {ckpt} has its own; "),
        (["--layers", "all"], f"--layers all: {ckpt} has "),
        (["--bridge", "lap"], f"--bridge lap: {ckpt} has mot; "),
        (["--template", "draw {}"], "has {}; leave"),
        (["--read", "think:4"], f"--read think:4: {ckpt} has its own; "),
        (["--random-llm"], f"--random-llm: {ckpt} has its own; "),
        (["--image-size", "18"], "--image-size 18 does not divide by --patch 4"),
        (["--llm", llm_folder("llama")], "was trained with .* not with .*llama"),
        (["--resume"], "--from starts a new run, and --resume goes on with one"),
        (["--from", tmp_path / "nowhere"], "--from .*nowhere: expected the folder of a run"),
        (["--from", tmp_path / "empty"], "--from .*empty: expected the folder of a run"),
        (["--out", ckpt], "already holds a run"),
    ]
    for flags, message in cases:
        with pytest.raises(ValueError, match=message):
            start("--from", ckpt, *OWN, "--out", out, *flags)
        assert not out.exists(), f"{flags} left {list(out.iterdir())}"
    agrees = ["--width", 32, "--patch", 4, "--prediction", "clean", "--llm", moved]
    run = start("--from", ckpt, *OWN, "--steps", 2, "--out", out, *agrees)
    assert run.expert.made_for["llm"] == str(moved), "an LLM that has moved is the same LLM"


@pytest.mark.slow
@pytest.mark.parametrize("bridge", ["last", "hsi", "lap:no-refiner", "kv", "mirror"])
def test_other_towers_start_too(bridge, tiny_run, tmp_path):
    """And what is measured of the captions (mean and deviation) is kept on resuming."""
    flags = [*tiny_run, "--bridge", bridge, "--steps", "2", "--out", tmp_path / "first"]
    if bridge == "mirror":  # it has the LLM's sizes
        for flag in ("--width", "--depth"):
            i = flags.index(flag)
            del flags[i : i + 2]
    else:
        flags += ["--width", 64, "--depth", 3]
    run = start(*flags)
    steps(run, 1)
    checkpoint.save_run(run)
    second = start("--from", tmp_path / "first", *OWN, "--steps", 3, "--out", tmp_path / "second")
    assert type(second.expert) is type(run.expert)
    assert second.args.bridge == bridge.partition(":")[0]
    for name, weight in run.ema.state_dict().items():
        assert torch.equal(weight, second.expert.state_dict()[name]), name
    steps(second, 1)
    checkpoint.save_run(second)
    resumed = start("--resume", "--out", tmp_path / "second")
    for name, weight in second.expert.state_dict().items():
        assert torch.equal(weight, resumed.expert.state_dict()[name]), name
    state = json.loads((tmp_path / "second" / "config.json").read_text("utf-8"))
    assert state["made_for"]["from"]["name"] == str(tmp_path / "first")


def test_the_reading_and_the_random_llm_come_along(tiny_run, tmp_path):
    reading = ["--template", "draw {} now: ", "--read", "after", "--random-llm", "--seed", 3]
    run = start(*tiny_run, *reading, "--steps", 2, "--out", tmp_path / "first")
    steps(run, 1)
    checkpoint.save_run(run)
    second = start("--from", tmp_path / "first", *OWN, "--steps", 2, "--out", tmp_path / "second")
    assert second.llm.reader is not None
    for key in ("template", "expose", "thinking", "random_llm", "llm_fingerprint"):
        assert second.expert.made_for[key] == run.expert.made_for[key]
    context = run.llm.context(["a red circle"])
    same = second.llm.context(["a red circle"])
    assert all(torch.equal(a, b) for a, b in zip(context.keys, same.keys))
    steps(second, 1)
    checkpoint.save_run(second)
    assert start("--resume", "--out", tmp_path / "second").llm.reader is not None
