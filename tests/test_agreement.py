"""The two readers of extras/agreement.py are right about what is possible."""

import numpy as np
import torch
from test_cli import refusal

import train
from data import CANONICAL_COLORS, COLORS
from extras import agreement
from extras.agreement import four_alike, mean_inside, readers
from flow import interpolate
from sample import to_tensor


def pictures_at(t: float, n: int = 24):
    captions, pictures, colors, places = four_alike(n, 32, seed=1)
    data = to_tensor(pictures, torch.device("cpu"))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    x_t = interpolate(data, noise, torch.full((n,), t))
    return data, x_t, torch.from_numpy(colors).float(), torch.from_numpy(places).float()


def test_four_things_of_one_colour():
    captions, pictures, colors, places = four_alike(12, 32, seed=0)
    data = to_tensor(pictures, torch.device("cpu"))
    assert all(caption.startswith("four ") for caption in captions)
    inside = torch.from_numpy(places).float()
    assert (inside.sum((2, 3)) > 20).all() and inside.sum(1).max() == 1, "apart from each other"
    seen = mean_inside(data, inside)
    assert (seen - torch.from_numpy(colors).float()[:, None]).abs().max() < 0.02


def test_a_reader_is_the_mean_over_the_posterior():
    """Against the likelihood of every single pixel, in float64."""
    t = 0.1
    _, x_t, _, inside = pictures_at(t, n=3)
    possible = np.array([COLORS[name] for name in CANONICAL_COLORS]) / 127.5 - 1
    alone, together = readers(x_t, t, inside)
    x = x_t.double().numpy()
    for b in range(3):
        log_likelihood = np.zeros((4, len(possible)))
        for k in range(4):
            pixels = x[b][:, inside[b, k].bool().numpy()]  # (3, pixels)
            for j, color in enumerate(possible):
                off = (pixels - t * color[:, None]) ** 2
                log_likelihood[k, j] = -off.sum() / (2 * (1 - t) ** 2)
        for k in range(4):
            assert np.allclose(alone[b, k], mean_of(log_likelihood[k], possible), atol=1e-3)
            everything = mean_of(log_likelihood.sum(0), possible)
            assert np.allclose(together[b, k], everything, atol=1e-3)


def mean_of(log_likelihood: np.ndarray, possible: np.ndarray) -> np.ndarray:
    weights = np.exp(log_likelihood - log_likelihood.max())
    return weights @ possible / weights.sum()


def test_four_say_more_than_one():
    errors = {}
    for t in (0.05, 0.15, 0.6):
        _, x_t, colors, inside = pictures_at(t)
        alone, together = readers(x_t, t, inside)
        errors[t] = [(c - colors[:, None]).square().mean().item() for c in (alone, together)]
    assert errors[0.15][1] < 0.6 * errors[0.15][0]
    assert errors[0.05][0] > errors[0.15][0] > errors[0.6][0]
    assert errors[0.6][0] < 1e-3 and errors[0.6][1] < 1e-3


def test_an_expert_that_predicts_the_noise_is_refused(tiny_run, tmp_path, capsys):
    """What it says is no velocity; one that learned a flow is asked."""
    train.main([*tiny_run, "--steps", "1", "--objective", "ddpm"])
    told = refusal(capsys, agreement.main, "--ckpt", tmp_path / "run")
    assert "run predicts the noise (ddpm); expected a run of --objective flow" in told
    train.main([*tiny_run, "--steps", "1", "--out", str(tmp_path / "flow")])
    agreement.main(["--ckpt", str(tmp_path / "flow"), "--n", "2"])
    lines = capsys.readouterr().out.splitlines()[-len(agreement.TIMES) :]
    errors = [float(number) for line in lines for number in line.split()[1:]]
    assert len(errors) == 9 and all(0 <= error < 10 for error in errors), lines
