"""Training: frozen LLM, exact resuming, bad input in one line. What a kill or a stop leaves:
test_nothing_lost.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import assemble
import checkpoint
import sample
import train
from checkpoint import load_expert
from conftest import CPU
from flow import flow_loss
from inspection import fingerprint
from loading import load_llm

ROOT = Path(__file__).parent.parent


def start(*flags) -> train.Run:
    return train.prepare(*train.settings([str(flag) for flag in flags]))


def steps(run: train.Run, n: int) -> None:
    for _, (captions, pictures) in zip(
        range(n), train.Batches(run.source, run.llm, run.args.batch_size, run.args.draws, run.step)
    ):
        train.train_step(run, run.expert, captions, pictures)


def test_the_llm_is_frozen(tiny_run):
    """No gradient, not in the optimizer, the same bytes and the same logits after training as
    before."""
    run = start(*tiny_run, "--steps", 4)
    ids = torch.arange(1, 9)[None]
    weights_before = {name: p.clone() for name, p in run.llm.model.named_parameters()}
    hash_before, logits_before = fingerprint(run.llm.model), run.llm.model(input_ids=ids).logits
    expert_before = {name: p.detach().clone() for name, p in run.expert.named_parameters()}
    steps(run, 4)
    assert not any(p.requires_grad or p.grad is not None for p in run.llm.model.parameters())
    optimized = [
        id(p)
        for optimizer in run.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(optimized) == sorted(id(p) for p in run.expert.parameters() if p.requires_grad), (
        "the trainable set, each once"
    )
    assert not set(optimized) & {id(p) for p in run.llm.model.parameters()}
    assert all(torch.equal(p, weights_before[name]) for name, p in run.llm.model.named_parameters())
    assert fingerprint(run.llm.model) == hash_before
    assert torch.equal(run.llm.model(input_ids=ids).logits, logits_before)
    assert any(
        not torch.equal(p, expert_before[name]) for name, p in run.expert.named_parameters()
    ), "the expert did train"


def test_nothing_of_the_llm_is_saved(tiny_run, tmp_path):
    train.main([*tiny_run, "--steps", "2"])
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "model.safetensors",
        "train_state.safetensors",
        "metrics.jsonl",
        "samples-000002.png",
    } <= files
    expert = load_expert(str(tmp_path / "run"), CPU)
    names = set(expert.state_dict())
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == names
    stored = set(load_file(tmp_path / "run" / "train_state.safetensors"))
    assert {key.split(".", 1)[1] for key in stored} == names, (
        "weights, averages and moments of the expert alone"
    )
    assert (
        expert.made_for["llm_fingerprint"]
        == load_llm(expert.made_for["llm"], CPU, torch.float32).fingerprint
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_equals_uninterrupted(tiny_run, tmp_path, dtype):
    """Killed with -9 after a checkpoint and resumed by a new process' state (cold caption cache):
    the same bits."""
    flags = [*tiny_run, "--dtype", dtype, "--steps", "10", "--save-every", "3"]
    whole = start(*flags)
    steps(whole, 10)
    part = start(*flags, "--out", tmp_path / "part")
    steps(part, 6)
    checkpoint.save_run(part)
    steps(part, 2)  # done after the checkpoint, and lost by the kill
    resumed = start("--resume", "--out", tmp_path / "part")
    assert resumed.step == 6 and len(resumed.llm._cached) == 0
    steps(resumed, 4)
    for (name, a), b in zip(whole.expert.named_parameters(), resumed.expert.parameters()):
        assert torch.equal(a, b), f"{name}: {(a - b).abs().max():.2e}"
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.parameters(), resumed.ema.parameters()))
    for ours, theirs in zip(whole.optimizers, resumed.optimizers):
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_step(*flags) -> tuple[train.Run, dict[str, torch.Tensor]]:
    """A run after its first step: losses, norm, and what the optimizers keep, the gradients."""
    run = start(*flags)
    batch = next(train.Batches(run.source, run.llm, run.args.batch_size, run.args.draws, 0))
    losses, t, norm = train.train_step(run, run.expert, *batch)
    seen = {"losses": losses, "t": t, "norm": norm}
    if run.lm_losses:
        seen["lm losses"] = torch.cat(run.lm_losses)
    for optimizer in run.optimizers:
        for p, state in optimizer.state.items():
            for kind in ("exp_avg", "momentum_buffer"):
                if kind in state:
                    seen[f"gradient {len(seen)}"] = state[kind]
    return run, seen


@pytest.mark.parametrize(
    "task",
    [[], ["--describe", 0.3], ["--data", "edits"], ["--objective", "ddpm"]],
    ids=lambda task: " ".join(map(str, task)) or "plain",
)
def test_parts_of_a_batch_have_the_gradients_of_the_whole(task, tiny_run, tmp_path):
    """--accumulate, in float32. Of what is described and of what is drawn then, parts are uneven;
    edits are cut between pairs."""
    draws = 2 if "edits" in task else 1
    flags = [*tiny_run, *task, "--draws", draws, "--caption-dropout", 0.3]
    _, whole = one_step(*flags)
    run, parts = one_step(*flags, "--accumulate", 4)
    assert run.args.accumulate == 4 and whole.keys() == parts.keys() and len(whole) > 10
    size = max(1, *(x.abs().max() for name, x in whole.items() if "gradient" in name))
    for name, x in whole.items():
        assert x.shape == parts[name].shape
        error = (x - parts[name]).abs().max()
        assert error < 1e-6 * size, f"{name}: {error:.1e}"


@pytest.mark.parametrize("tower", ["mot", "mirror"])
def test_checkpointing_changes_memory_alone(tower, tiny_run, tmp_path):
    """The same bits from less that is saved for the way back; it is no part of the expert, and a
    run that goes on may switch it off."""
    flags = [*tiny_run, "--describe", 0.3]
    if tower == "mirror":
        cut = tiny_run.index("--width")  # and its depth: a mirror has the LLM's
        flags = [*tiny_run[:cut], *tiny_run[cut + 4 :], "--bridge", "mirror"]
    saved: dict[str, dict[int, int]] = {}
    ends = {}
    for name in ("plain", "checkpointing"):
        run = start(*flags, "--out", tmp_path / name, *["--checkpointing"] * (name != "plain"))
        weights = {p.data_ptr() for p in run.expert.parameters()}
        storages = saved.setdefault(name, {})

        def keep(x, weights=weights, storages=storages):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[id(storage)] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            steps(run, 1)
        steps(run, 1)
        checkpoint.save_run(run)
        ends[name] = run
    sizes = {name: sum(x.nbytes() for x in found.values()) for name, found in saved.items()}
    assert 0 < sizes["checkpointing"] < 0.6 * sizes["plain"], sizes
    assert ends["plain"].expert.config == ends["checkpointing"].expert.config

    resumed = start("--resume", "--no-checkpointing", "--out", tmp_path / "checkpointing")
    assert not resumed.args.checkpointing
    assert resumed.expert.blocks[0].__dict__.keys() == ends["plain"].expert.blocks[0].__dict__.keys()
    steps(resumed, 1)
    steps(ends["plain"], 1)
    for (name, a), b in zip(resumed.expert.named_parameters(), ends["plain"].expert.parameters()):
        assert torch.equal(a, b), f"{name}: {(a - b).abs().max():.2e}"


def command(*words, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_one_batch_is_overfitted(tiny_run):
    """The whole chain learns: four captions, four pictures, and the loss falls to a small part of
    where it began."""
    run = start(
        *tiny_run,
        "--steps",
        300,
        "--draws",
        1,
        "--batch-size",
        4,
        "--caption-dropout",
        0,
        "--lr",
        3e-3,
        "--patch",
        8,
    )
    captions, pictures = next(train.Batches(run.source, run.llm, 4, 1, 0))
    losses = [
        train.train_step(run, run.expert, captions, pictures)[0].mean().item() for _ in range(300)
    ]
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    assert last < 0.1 * first, f"from {first:.3f} to {last:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "read, shown",
    [
        ("rewrite:tokens=4", "written"),
        ("rewrite:reencode:tokens=4", "reencode"),
        ("think:4", "all"),
    ],
)
def test_training_on_what_the_llm_writes(read, shown, tiny_run, tmp_path):
    """It is part of the checkpoint: resumed and drawn from, the LLM writes as in training."""
    frame = tmp_path / "frame.txt"
    frame.write_text("red => blue\n{} =>\n")
    run = start(*tiny_run, "--steps", 2, "--read", f"{read}:frame={frame}")
    steps(run, 1)
    captions, _ = next(train.Batches(run.source, run.llm, 8, run.args.draws, 0))
    assert set(captions) <= set(run.llm.reader.written), "every caption was written about"
    checkpoint.save_run(run)
    frame.unlink()  # it stands in the checkpoint
    train.main(["--resume", "--out", run.args.out])
    expert = load_expert(run.args.out, CPU)
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    assert expert.made_for["thinking"] == ["red => blue\n{} =>", 4, shown]
    row, trained_on = (x.lookup(captions)[captions[0]] for x in (llm, run.llm))
    assert torch.equal(row, trained_on)


def test_training_on_a_folder(tiny_run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (30, 20), color).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {color} field")
    (folder / "c.png").write_bytes(b"broken")
    (folder / "c.txt").write_text("broken")
    with pytest.warns(UserWarning, match="does not decode"):
        train.main([*tiny_run, "--steps", "2", "--data", str(folder)])
    assert "did not decode and were skipped: 1" in capsys.readouterr().out
    assert Image.open(tmp_path / "run" / "samples-000002.png").width > 100


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, tmp_path):
    run = start(*tiny_run, "--steps", 9)
    steps(run, 2)
    checkpoint.save_run(run)
    before = (tmp_path / "run" / "train_state.safetensors").read_bytes()
    with torch.no_grad():
        run.expert.patcher.last.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        steps(run, 1)
    assert (tmp_path / "run" / "train_state.safetensors").read_bytes() == before
    assert start("--resume", "--out", tmp_path / "run").step == 2


def test_bad_input_is_refused_before_anything_is_written(tiny_run, llm_folder, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--patch", "5"], "--image-size 16 does not divide by --patch 5"),
        (["--batch-size", "6"], "--batch-size 6 does not divide by --draws 4"),
        (["--accumulate", "4"], "--batch-size 8: .* --draws 4 times --accumulate 4"),
        (["--compile", "--checkpointing"], "--checkpointing does not go with --compile"),
        (["--width", "30"], "--width 30 does not divide by 4"),
        (["--heads", "3"], "--heads 3: expected a multiple of the LLM's 2"),
        (["--depth", "9"], "--depth 9: .* has 3 attention layers"),
        (["--resume"], "--resume: there is no run in"),
        (["--data", tmp_path / "empty"], "holds no captioned picture"),
        (["--data", "emoji:one-object"], "--data emoji has no option 'one-object'"),
        (["--data", "shapes:variants"], "--data shapes has no option 'variants'"),
        (
            ["--data", "shapez"],
            "--data shapez: expected shapes, emoji, edits, hf:NAME, .tar files, or an existing folder",
        ),
        (["--template", "a picture"], "--template 'a picture': expected a text with one {}"),
        (["--read", "after"], "--read after: the template '{}' has no text after the caption"),
        (["--llm", "nobody/no-such-llm"], "--llm nobody/no-such-llm: "),
        (["--llm", llm_folder("bert")], "keeps no key-value cache|is not causal"),
        (["--device", "warp"], "--device warp cannot be used here"),
        (["--out", tmp_path / "file" / "run"], "Not a directory"),
    ]
    for flags, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            start(*tiny_run, *flags)
        assert not out.exists(), f"{flags} left {list(out.iterdir())}"
    for flags in (
        ["--steps", "0"],
        ["--batch-size", "-4"],
        ["--lr", "0"],
        ["--steps", "many"],
        ["--seed", "-1"],
    ):
        with pytest.raises(SystemExit) as stop:
            start(*tiny_run, *flags)
        assert stop.value.code == 2


def test_an_existing_run_is_not_overwritten(tiny_run, llm_folder, tmp_path):
    train.main([*tiny_run, "--steps", "2"])
    with pytest.raises(ValueError, match="already holds a run: --resume"):
        start(*tiny_run, "--steps", 2)
    with pytest.raises(ValueError, match="this run has --width 32"):
        start("--resume", "--out", tmp_path / "run", "--width", 64)
    with pytest.raises(ValueError, match="stands at step 2 of 2"):
        train.main(["--resume", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])  # a longer run goes on
    state = tmp_path / "run" / "train_state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not read as safetensors"):
        start("--resume", "--out", tmp_path / "run")


def test_the_command_line_fails_in_one_line_with_status_2(tmp_path):
    """Through the real process, as a user sees it; tests/test_cli.py has the other ways to fail."""
    done = command("sample.py", "--prompt", "x", "--ckpt", tmp_path / "no")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (
        done.stderr.startswith("sample.py: --ckpt ")
        and "expected the folder of a run" in done.stderr
    )


@pytest.mark.slow
def test_a_hub_id_without_a_hub_fails_at_once(tmp_path):
    """A real look for the Hub, with nothing at the other end: one clear line, without a long
    wait."""
    began = time.perf_counter()
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = command(
        "train.py", "--llm", "Qwen/Qwen2.5-0.5B", "--out", tmp_path / "run", env=os.environ | nobody
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (
        "--llm Qwen/Qwen2.5-0.5B: it is not in the local cache, and the Hub cannot be reached"
        in done.stderr
    )
    assert time.perf_counter() - began < 60, "an upper bound on waiting, not a benchmark"


def test_sample_command(tiny_run, tmp_path, monkeypatch, capsys):
    train.main([*tiny_run, "--steps", "2"])
    (tmp_path / "prompts.txt").write_text("a blue star\nun cerchio rosso\n")
    words = [
        "sample.py",
        "--ckpt",
        tmp_path / "run",
        "--prompt",
        "a red circle",
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    words += [
        "--n",
        2,
        "--steps",
        2,
        "--seed",
        7,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    sample.main()
    printed = capsys.readouterr().out
    written = sorted((tmp_path / "out").iterdir())
    assert (
        len(written) == 7 and "seed 7" in printed and all(str(path) in printed for path in written)
    )
    assert Image.open(tmp_path / "out" / "000-a-red-circle-seed7.png").size == (16, 16)
    assert Image.open(tmp_path / "out" / "grid.png").width > 256


@pytest.mark.slow
def test_loss_is_lower_where_the_caption_is_right(tiny_run):
    """After some training the caption matters: the loss with the right one is below that with
    another's."""
    run = start(*tiny_run, "--steps", 250, "--batch-size", 16, "--lr", 3e-3, "--patch", 8)
    steps(run, 250)
    captions, pictures = next(train.Batches(run.source, run.llm, 64, 1, 0))
    data = sample.to_tensor(pictures, CPU)
    noise, t = (
        torch.randn(data.shape, generator=torch.Generator().manual_seed(0)),
        torch.full((64,), 0.3),
    )
    with torch.no_grad():
        right = flow_loss(run.expert, data, noise, t, run.llm.context(captions)).mean()
        wrong = flow_loss(run.expert, data, noise, t, run.llm.context(captions[::-1])).mean()
    assert right < wrong, f"right {right:.4f}, wrong {wrong:.4f}"
