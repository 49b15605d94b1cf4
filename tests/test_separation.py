"""LMFusion's ablation: a tower that shares modules with the LLM, and an LLM that is trained."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import refusal

import assemble
import evaluate
import train
from checkpoint import load_expert
from conftest import CPU
from extras.lmfusion import caption_loss
from extras.mirror import MirrorTower
from extras.perplexity import main as perplexity_main
from extras.separation import SeparatedTower, TrainedLLM
from flow import flow_loss
from inspection import fingerprint
from loading import load_llm
from sample import draw

SIZES = {"patch": 8, "image_size": 16}
FAMILIES = ["qwen2", "llama", "gemma3"]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def flags_of(tiny_run: list[str], bridge: str) -> list[str]:
    cut = tiny_run.index("--width")  # and its depth: a mirror has the LLM's
    rest = [str(flag) for flag in (*tiny_run[:cut], *tiny_run[cut + 4 :])]
    return [*rest, "--bridge", bridge, "--describe", "0.25", "--dtype", "float32"]


def start(*flags) -> train.Run:
    return train.prepare(*train.settings([str(flag) for flag in flags]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_begins_as_the_copy_does(kind, tiny_llm):
    """With the LLM's own weights everywhere it makes no difference whose they are: deep, shallow
    and none read the caption and the picture alike."""
    llm = tiny_llm(kind)
    deep = MirrorTower.beside(llm, "llm", **SIZES)
    deep.attach(llm)
    img = torch.randn(2, 4, deep.width, generator=torch.Generator().manual_seed(0))
    context = llm.context(["a red circle", "two"])
    sizes = [sum(p.numel() for p in deep.parameters())]
    errors = []
    wanted = deep.decode(img, context)
    for separation in ("shallow", "none"):
        for ratio in (0.0, 1.0):
            tower = SeparatedTower.beside(llm, "llm", separation, ratio, **SIZES)
            tower.attach(llm)
            context = llm.context(["a red circle", "two"])
            errors.append(largest(tower.decode(img, context), wanted))
            if not ratio:
                sizes.append(sum(p.numel() for p in tower.parameters()))
    assert all(error < 1e-5 for error in errors), errors
    assert sizes[0] > sizes[1] > sizes[2]  # ever less of its own


@pytest.mark.parametrize("separation", ["deep", "shallow", "none"])
@pytest.mark.parametrize("ratio", [0, 0.1])
def test_who_learns(separation, ratio, tiny_run, llm_folder, tmp_path):
    """At ratio 0 the LLM's bytes stay; above, it moves by its share of the learning rate, from what
    is drawn as from what is described."""
    bridge = f"mirror:separation={separation}:lr-ratio={ratio}"
    run = start(*flags_of(tiny_run, bridge), "--steps", 2, "--warmup", 1)
    before = [p.detach().clone() for p in run.llm.model.parameters()]
    own = [p.detach().clone() for p in run.expert.parameters()]
    optimized = {id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in run.expert.parameters()}
    assert all(p.requires_grad == bool(ratio) for p in run.llm.model.parameters())

    captions, pictures = next(train.Batches(run.source, run.llm, 8, 2, 0))
    train.train_step(run, run.expert, captions, pictures)
    steps = [largest(a, b) for a, b in zip(before, run.llm.model.parameters())]
    if not ratio:
        assert all(step == 0 for step in steps), steps
        assert fingerprint(run.llm.model) == fingerprint(
            load_llm(str(llm_folder("qwen2")), CPU, torch.float32).model
        )
    else:  # Adam's first step has the size of the learning rate
        assert isinstance(run.llm, TrainedLLM)
        assert np.max(steps) == pytest.approx(0.1 * run.args.lr, rel=0.05)  # a NaN stays one
    moved = [largest(a, b) for a, b in zip(own, run.expert.parameters())]
    assert np.max(moved) == pytest.approx(run.args.lr, rel=0.05)


def test_both_losses_reach_a_trained_llm(tiny_run):
    """And the drawing's through the caption's keys and values."""
    run = start(*flags_of(tiny_run, "mirror:lr-ratio=1"), "--steps", 2)
    data = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in run.expert.patcher.parameters():
            p += 0.1
    captions = ["a red circle", "two"]
    t = torch.tensor([0.3, 0.6])
    losses = {
        "drawing": lambda: flow_loss(
            run.expert, data, torch.zeros_like(data), t, run.llm.context(captions)
        ),
        "describing": lambda: caption_loss(run.llm, run.expert, data, captions),
    }
    for name, loss in losses.items():
        run.llm.model.zero_grad()
        loss().sum().backward()
        for layer in run.llm.model.get_decoder().layers:
            assert layer.self_attn.k_proj.weight.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "bridge",
    ["mirror:separation=shallow", "mirror:separation=none:lr-ratio=1", "mirror:lr-ratio=0.1"],
)
def test_a_run_goes_on_and_draws(bridge, tiny_run, llm_folder, tmp_path, capsys):
    flags = flags_of(tiny_run, bridge)
    flags[flags.index("--out") + 1] = str(tmp_path / "whole")
    whole = start(*flags, "--steps", 4)
    train.train(whole)
    cut = [*flags, "--steps", "4"]
    cut[cut.index("--out") + 1] = str(tmp_path / "cut")
    train.train(start(*cut), until=2)
    train.main(["--resume", "--out", str(tmp_path / "cut")])
    names = ("train_state.safetensors", "model.safetensors")
    for name in names:
        first, second = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    # out of its file it draws as it did in the run
    expert = load_expert(str(tmp_path / "whole"), CPU)
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    prompts = ["a red circle", "two"]
    ours = draw(expert, llm, prompts, [0, 1], 3)
    theirs = draw(whole.ema, whole.ema_llm, prompts, [0, 1], 3)
    assert (ours == theirs).all()

    # in bfloat16 too, in which the LLM that was trained stays as it is
    asked = "--suite geneval,describe --limit 1 --steps 2 --device cpu --dtype bfloat16"
    evaluate.main(["--ckpt", str(tmp_path / "whole"), *asked.split()])
    assert (tmp_path / "whole" / "partial" / "evaluate-describe.png").exists()

    # and what it has cost is said
    capsys.readouterr()
    perplexity_main(["--ckpt", str(tmp_path / "whole"), "--device", "cpu", "--dtype", "float32"])
    said = capsys.readouterr().out
    assert ("is frozen" in said) == ("lr-ratio" not in bridge)
    assert ("have moved" in said and "NOT as it was" in said) == ("lr-ratio" in bridge)


def test_what_cannot_be_separated_is_refused(tiny_run, capsys):
    for bridge in (
        "mirror:separation=half",
        "mirror:lr-ratio=2",
        "mirror:lr-ratio=x",
    ):
        said = refusal(capsys, train.main, *flags_of(tiny_run, bridge))
        assert bridge.split(":", 1)[1].split(":")[-1].split("=")[0] in said
    flags = flags_of(tiny_run, "mirror:separation=none")
    said = refusal(capsys, train.main, *flags, "--checkpointing")
    assert "--checkpointing: with --bridge mirror:separation=none" in said
