"""What LMFusion trains instead of a flow: denoising diffusion, with the same time.

    python train.py --objective ddpm --out runs/ddpm
    python sample.py --ckpt runs/ddpm --prompt "a red circle" --renoise 0    # DDIM, one curve
    python sample.py --ckpt runs/ddpm --prompt "a red circle"                # ancestral sampling

As everywhere here t = 0 is noise and t = 1 is data. The path is no straight line:

    x_t = sqrt(a(t)) data + sqrt(1 - a(t)) noise
    a(t) = cos^2(((1 - t) + s) / (1 + s) pi / 2) / cos^2(s / (1 + s) pi / 2), s = 0.008

(the cosine schedule, Nichol & Dhariwal 2021, eq. 17, with 1 - t for their t / T), and the network
says what the noise was: `predict(x_t, t, context) -> noise`. The loss is eq. 14 of Ho et al. 2020.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flow import guide

S = 0.008  # keeps the first steps from being too small (Nichol & Dhariwal, section 3.2)
LARGEST_T = 0.999  # 1 - t is at least a step of their 1,000


def signal(t: Tensor | float) -> Tensor:
    """a(t), the share of the data's variance at t, any shape, on the CPU: MPS has no float64; 0 at
    t = 0 (but for rounding), 1 at t = 1."""
    t = torch.as_tensor(t.cpu() if isinstance(t, Tensor) else t, dtype=torch.float64)
    angle = ((1 - t) + S) / (1 + S) * math.pi / 2
    return (angle.cos() / math.cos(S / (1 + S) * math.pi / 2)).square().clamp(1e-5, 1)


def ddpm_loss(predict: Callable, data: Tensor, noise: Tensor, t: Tensor, context) -> Tensor:
    """Mean squared error of the noise, one value per picture, (B,)."""
    a = signal(t).view(-1, 1, 1, 1).to(data.device, data.dtype)
    x_t = a.sqrt() * data + (1 - a).sqrt() * noise
    predicted = predict(x_t, t, context)
    return (predicted.float() - noise).square().mean(dim=(1, 2, 3))


def uniform_time(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """(n,) times, evenly from all of [0, LARGEST_T]: one in each n-th, in random order. mean and
    std are flow.sample_time's, and mean nothing here."""
    order = torch.randperm(n, generator=generator)
    within = torch.rand(n, generator=generator)
    return (order + within) / n * LARGEST_T


def guided(
    predict: Callable, context, empty, scale: float, interval: tuple[float, float], renorm: bool
) -> Callable:
    """predict(x_t, t, _) with guidance, as flow.euler_sample has it."""
    both = context.concat(empty)

    def with_guidance(x: Tensor, t: Tensor, _) -> Tensor:
        if scale == 1 or not interval[0] <= t[0] <= interval[1]:
            return predict(x, t, context)
        cond, uncond = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(cond, uncond, scale, renorm)

    return with_guidance


@torch.no_grad()
def ddim_sample(
    predict: Callable,
    noise: Tensor,
    context,
    steps: int,
    eta: float = 0.0,
    fresh_noise: Callable | None = None,
    clip: float | None = 1.0,
    watch: Callable | None = None,
) -> Tensor:
    """From noise at t = 0 to a picture at t = 1 in `steps` steps (DDIM, Song et al. 2021, eq. 12).

    eta: of their eq. 16; 0 follows one curve, 1 is DDPM's ancestral sampling, which needs
    fresh_noise() -> like x. clip: the predicted clean picture is held within [-clip, clip]; None:
    it is not. watch(t, x, v) is called at every step, v the straight way to the clean picture, as
    flow.euler_sample has it.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).clamp(max=LARGEST_T).tolist()
    times[-1] = 1.0
    x = noise
    for now, then in pairwise(times):
        t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
        predicted = predict(x, t, context).to(x.dtype)
        a = signal(now).item()
        a_then = signal(then).item()
        clean = (x - (1 - a) ** 0.5 * predicted) / a**0.5
        if clip is not None:
            clean = clean.clamp(-clip, clip)
            predicted = (x - a**0.5 * clean) / (1 - a) ** 0.5  # that agrees with it
        if watch is not None:
            watch(now, x, (clean - x) / (1 - now))
        sigma = eta * ((1 - a_then) / (1 - a)) ** 0.5 * (1 - a / a_then) ** 0.5
        x = a_then**0.5 * clean + max(0.0, 1 - a_then - sigma**2) ** 0.5 * predicted
        if sigma:
            x = x + sigma * fresh_noise()
    return x
