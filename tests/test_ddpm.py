"""Diffusion against what is known in closed form: the schedule, and a Gaussian's own denoiser."""

import math

import pytest
import torch
from safetensors.torch import load_file

import assemble
import sample
import train
from checkpoint import load_expert
from conftest import CPU
from extras.ddpm import ddim_sample, ddpm_loss, signal, uniform_time

MEAN, STD = 0.3, 0.5


def gaussian_denoiser(x: torch.Tensor, t: torch.Tensor, context) -> torch.Tensor:
    """The expected noise in x_t, of data from N(MEAN, STD^2): what a perfect network would say."""
    a = signal(t).view(-1, 1, 1, 1)
    variance = a * STD**2 + (1 - a)
    return (1 - a).sqrt() / variance * (x - a.sqrt() * MEAN)


def test_the_schedule_is_nichols():
    assert signal(1.0).item() == 1
    assert signal(0.0).item() < 1.1e-5
    for t in (0.1, 0.5, 0.9):
        wanted = math.cos(((1 - t) + 0.008) / 1.008 * math.pi / 2) ** 2
        wanted /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert signal(t).item() == pytest.approx(wanted, abs=1e-9)
    t = torch.linspace(0, 1, 50)
    assert (signal(t).diff() >= 0).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_gaussian_comes_out(eta):
    """In float64, many steps: its mean and its standard deviation."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    out = ddim_sample(gaussian_denoiser, draw(), None, 400, eta=eta, fresh_noise=draw, clip=None)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert out.std().item() == pytest.approx(STD, abs=0.015)


def test_ddim_is_the_closed_form_map():
    """eta 0: for a Gaussian the curve from noise z ends at MEAN + STD z, for every z."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = []
    for steps in (100, 400, 1600):
        out = ddim_sample(gaussian_denoiser, z, None, steps, clip=None)
        errors.append((out - (MEAN + STD * z)).abs().max().item())
    assert errors[-1] < 0.01 and errors[0] > 2 * errors[1] > 4 * errors[2] / 1.2, errors


def test_the_loss_of_the_perfect_network():
    """Is the noise's variance that x_t does not tell."""
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    shape = (n, 1, 1, 1)
    data = MEAN + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    for t in (0.2, 0.5, 0.8):
        losses = ddpm_loss(gaussian_denoiser, data, noise, torch.full((n,), t), None)
        a = signal(t).item()
        wanted = a * STD**2 / (a * STD**2 + (1 - a))
        assert losses.shape == (n,)
        assert losses.mean().item() == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("steps", [1, 4, 24, 250])
def test_a_network_that_knows_the_picture_lands_on_it(steps):
    goal = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1

    def oracle(x, t, context):
        a = signal(t).view(-1, 1, 1, 1)
        return (x - a.sqrt() * goal) / (1 - a).sqrt()

    end = ddim_sample(oracle, torch.randn(goal.shape, dtype=torch.float64), None, steps)
    assert (end - goal).abs().max() < 1e-6


def test_times_cover_all_evenly():
    t = uniform_time(1000, 0.0, 1.0, torch.Generator().manual_seed(3))
    assert t.min() >= 0 and t.max() < 1
    assert (t.sort().values.diff() < 0.003).all()
    assert not torch.equal(t, t.sort().values)


def test_a_run_of_it(tiny_run, tmp_path):
    """Trains, resumes to the same end, and draws both ways; each prompt as if alone."""
    flags = [*tiny_run, "--objective", "ddpm", "--steps", "6"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    cut = [*flags, "--out", str(tmp_path / "cut")]
    train.train(train.prepare(*train.settings(cut)), until=3)
    train.main(["--resume", "--out", str(tmp_path / "cut")])
    ours = load_file(tmp_path / "cut" / "train_state.safetensors")
    theirs = load_file(tmp_path / "whole" / "train_state.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    expert = load_expert(str(tmp_path / "cut"), CPU)
    assert expert.prediction == "noise"
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    prompts = ["a red circle", "", "two stars"]
    drawn = []
    for renoise in (0.0, 0.6):
        together = sample.draw(expert, llm, prompts, [3, 4, 5], 4, renoise=renoise).astype(int)
        for i in range(3):
            row = slice(i, i + 1)
            alone = sample.draw(expert, llm, prompts[row], [3 + i], 4, renoise=renoise)
            assert abs(alone.astype(int) - together[row]).max() <= 1
        drawn.append(together)
    assert abs(drawn[0] - drawn[1]).max() > 1
    clean = sample.draw(expert, llm, ["a red circle"], [3], 4, guidance=1.0, renoise=0.0)
    assert clean.shape == (1, 16, 16, 3)
