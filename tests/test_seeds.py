"""A seed reaches every part of a run; every bridge resumes bit for bit; all that counts as trained
is trained."""

from functools import partial

import numpy as np
import pytest
import torch

import assemble
import checkpoint
import sample
import train
from conftest import CPU
from data import Shapes
from extras.bridges import BRIDGES
from flow import flow_loss, sample_time
from loading import load_llm

FLAGS = "--device cpu --batch-size 12 --draws 3 --image-size 16 --patch 8".split()
SIZE = "--width 64 --depth 6".split()
SPECS = {"metaqueries": "metaqueries:queries=4", "lap": "lap:stride=2:no-refiner"}
OURS = [SPECS.get(name, name) for name in BRIDGES if name != "mirror"]  # of any width


def start(*flags) -> train.Run:
    return train.prepare(*train.settings([str(flag) for flag in flags]))


def steps(run: train.Run, n: int) -> None:
    batches = train.Batches(run.source, run.llm, run.args.batch_size, run.args.draws, run.step)
    for _, (captions, pictures) in zip(range(n), batches):
        train.train_step(run, run.expert, captions, pictures)


def chance(seed: int, step: int) -> dict[str, torch.Tensor]:
    """What train_step draws by chance, in its order."""
    generator = train.step_generator(seed, step)
    return {
        "noise": torch.randn(8, 3, 4, 4, generator=generator),
        "time": sample_time(8, -0.4, 1.0, generator),
        "dropout": torch.rand(8, generator=generator),
    }


@pytest.mark.parametrize(
    "one, other",
    [((0, 5), (1, 5)), ((7, 5), (8, 5)), ((0, 5), (0, 6)), ((2**31 - 1, 0), (0, 0))],
)
def test_another_seed_or_step_is_another_chance(one, other):
    """On a CPU torch keeps the low 32 bits of a seed: (seed << 32) + step would be the step
    alone."""
    first, again, second = chance(*one), chance(*one), chance(*other)
    for name in first:
        assert torch.equal(first[name], again[name]), name
        assert not torch.isclose(first[name], second[name]).any(), name


def test_two_seeds_differ_in_everything(llm_folder, tmp_path):
    """Weights, data, noise, times, dropped captions, as they reach the loss and the LLM of a real
    step."""
    seen = {}
    loss = flow_loss

    def watch(predict, data, noise, t, context):
        seen[seed] |= {"data": data, "noise": noise, "time": t, "dropout": context.lengths}
        return loss(predict, data, noise, t, context)

    flags = ["--llm", llm_folder("deep"), *FLAGS, *SIZE, "--dtype", "float32"]
    flags += ["--caption-dropout", "0.5", "--steps", 2]
    for seed in (0, 1):
        run = start(*flags, "--seed", seed, "--out", tmp_path / str(seed), "--batch-size", 30)
        run.loss = watch
        seen[seed] = {"weights": run.expert.patcher.first.weight.detach().clone()}
        steps(run, 1)
    for name in ("weights", "data", "noise", "time", "dropout"):
        assert not torch.equal(seen[0][name], seen[1][name]), f"--seed does not reach the {name}"
    captions = [[Shapes(16, seed).example(i, 1)[0] for i in range(20)] for seed in (0, 1)]
    assert captions[0] != captions[1]
    controls = []
    for seed in (0, 1):
        control = load_llm(str(llm_folder("deep")), CPU, torch.float32, random_seed=seed)
        controls.append(control.fingerprint)
    assert controls[0] != controls[1], "nor the control's weights"
    noises = [sample.draw(run.ema, run.llm, ["a ring"], [seed], steps=1) for seed in (0, 1)]
    assert not np.array_equal(*noises)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bridge", OURS)
def test_every_bridge_resumes_bit_for_bit(bridge, dtype, llm_folder, tmp_path):
    """Killed after a checkpoint and gone on with by a process whose LLM has read no caption, the
    empty one neither."""
    flags = ["--llm", llm_folder("llama"), *FLAGS, "--depth", 3, "--width", 128, "--dtype", dtype]
    flags += ["--bridge", bridge, "--steps", 5]
    flags += ["--caption-dropout", 0.4]  # this LLM's empty prompt has a token: BOS
    whole = start(*flags, "--out", tmp_path / "whole")
    steps(whole, 3)
    checkpoint.save_run(whole)
    steps(whole, 2)
    resumed = start("--resume", "--out", tmp_path / "whole")
    steps(resumed, 2)
    pairs = [
        *zip(whole.expert.parameters(), resumed.expert.parameters()),
        *zip(whole.ema.parameters(), resumed.ema.parameters()),
    ]
    differences = [(a - b).abs().max().item() for a, b in pairs]
    assert all(d == 0 for d in differences), f"largest difference {max(differences):.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("bridge", [*OURS, "lap:per-layer"])
def test_no_weight_is_dead(bridge, llm_folder, tmp_path):
    """Every parameter that is counted gets a gradient: asked of the gradient, since weight decay
    moves dead weights too."""
    flags = ["--llm", llm_folder("deep"), *FLAGS, *SIZE, "--dtype", "float32", "--bridge", bridge]
    flags += ["--steps", 9, "--caption-dropout", 0]
    run = start(*flags, "--out", tmp_path / "run")
    steps(run, 3)  # gates and head start at zero
    reached = set()

    def watch(grad: torch.Tensor, key: str) -> None:
        if grad.abs().max() > 0:
            reached.add(key)

    for key, weight in run.expert.named_parameters():
        weight.register_hook(partial(watch, key=key))
    steps(run, 1)
    dead = [key for key, _ in run.expert.named_parameters() if key not in reached]
    assert not dead, f"no gradient reaches {dead}"


@pytest.mark.parametrize("bridge", ["mot", SPECS["lap"]])
def test_the_average_and_a_drawing_keep_no_graph(bridge, llm_folder, tmp_path, monkeypatch):
    flags = ["--llm", llm_folder("deep"), *FLAGS, *SIZE, "--dtype", "float32", "--bridge", bridge]
    run = start(*flags, "--steps", 9, "--out", tmp_path / "run")
    steps(run, 2)
    assert not any(average.requires_grad for average in run.ema.parameters())
    graphs = [average for average in run.ema.parameters() if average.grad_fn is not None]
    assert not graphs, "a graph that grows with every step"

    # what a drawing's contexts keep: keys, or the text that a bridge has made
    seen = []
    euler_sample = sample.euler_sample

    def watch(predict, noise, context, *args, **options):
        both = context.concat(context)
        predict(torch.cat([noise, noise]), torch.zeros(2 * len(noise)), both)
        seen.append(both)
        return euler_sample(predict, noise, context, *args, **options)

    monkeypatch.setattr(sample, "euler_sample", watch)
    sample.draw(run.expert, run.llm, ["a red circle"], [0], steps=1)
    kept = seen[0].keys if bridge == "mot" else [seen[0].text]
    assert kept and not any(tensor.requires_grad for tensor in kept)


def test_pictures_drawn_alone_and_in_company(llm_folder, tmp_path):
    """What sample.draw says: one level of 255 in float32, a few in bfloat16, whose matrix
    kernels round otherwise."""
    flags = ["--llm", llm_folder("deep"), *FLAGS, *SIZE, "--dtype", "float32", "--steps", 60]
    flags += ["--lr", 0.01]
    run = start(*flags, "--out", tmp_path / "run")
    steps(run, 40)
    prompts = []
    for word in ("a red", "two", "the blue"):
        prompts += [f"{word} {shape}" for shape in ("circle", "ring", "star", "heart")]
    for dtype, levels in ((torch.float32, 1), (torch.bfloat16, 12)):
        llm = assemble.llm_of(run.ema, None, CPU, dtype)
        together = sample.draw(run.ema, llm, prompts, list(range(12)), steps=8).astype(int)
        differences = []
        for i in range(12):
            alone = sample.draw(run.ema, llm, [prompts[i]], [i], steps=8)[0].astype(int)
            differences.append(np.abs(alone - together[i]).max())
        assert all(d <= levels for d in differences), f"{dtype}: {max(differences)} levels of 255"
