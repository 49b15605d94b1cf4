"""Rectified flow, in pure functions: the path, the loss, guidance, the Euler sampler.

Convention, used everywhere: **t = 0 is noise, t = 1 is data**.

    x_t = (1 - t) noise + t data     a straight path     (Liu et al. 2022, Rectified Flow, eq. 1)
    v   = data - noise               its velocity
    x  += (t' - t) v(x, t)           the Euler step, t from 0 up to 1

(BAGEL writes it the other way round: its t = 1 is noise and its velocity is noise - data.)

`predict(x_t, t, context) -> v` is any network: x_t (B, C, height, width), t (B,), v like x_t. This
file knows none.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path from noise (t = 0) to data (t = 1). t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * noise + t * data


def flow_loss(predict: Callable, data: Tensor, noise: Tensor, t: Tensor, context) -> Tensor:
    """The whole objective: mean squared error of the velocity, one value per picture, (B,)."""
    v = predict(interpolate(data, noise, t), t, context)
    return (v.float() - (data - noise)).square().mean(dim=(1, 2, 3))


def to_velocity(clean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at x_t of a network that says what the clean picture is (Li & He 2025, JiT).

    x_t      = (1 - t) noise + t data
    noise    = (x_t - t data) / (1 - t)
    velocity = data - noise = (data - x_t) / (1 - t)

    The last Euler step, from t to 1, goes (1 - t) times this: it lands on `clean`. At t = 1 itself,
    where nothing remains and nobody asks, it is finite all the same.
    """
    remaining = (1 - t).clamp_min(1e-6).view(-1, 1, 1, 1)
    return (clean - x_t) / remaining


def sample_time(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """(n,) times from a logit-normal, sigmoid(mean + std z): most of them in the middle, where the
    work is (Esser et al. 2024, Stable Diffusion 3, section 3.1).

    A negative mean leans to the noisy side, where the layout of a picture is decided. [0, 1] is cut
    into n equal parts and one quantile drawn in each, in random order: each t has the same
    distribution, and every batch covers it evenly.
    """
    order = torch.randperm(n, generator=generator)
    within = torch.rand(n, generator=generator)
    quantiles = ((order + within) / n).clamp(1e-4, 1 - 1e-4)
    z = torch.special.ndtri(quantiles)  # the inverse of the normal's distribution function
    return torch.sigmoid(mean + std * z)


def guide(v_cond: Tensor, v_uncond: Tensor, scale: float, renorm: bool) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): away from what the network would draw
    for no caption. scale 1 is no guidance.

    renorm shrinks the result to the length of v_cond where it is longer, picture by picture, which
    keeps strong guidance from over-saturating (as in BAGEL, whose global norm would let the
    pictures of a batch disturb each other).
    """
    v = v_uncond + scale * (v_cond - v_uncond)
    if not renorm:
        return v
    length = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    wanted = torch.linalg.vector_norm(v_cond, dim=(1, 2, 3), keepdim=True)
    return v * (wanted / length.clamp_min(1e-8)).clamp(max=1)


@torch.no_grad()
def euler_sample(
    predict: Callable,
    noise: Tensor,
    context,
    steps: int,
    uncond_context=None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    renorm: bool = False,
    shift: float = 1.0,
    renoise: float = 0.0,
    fresh_noise: Callable | None = None,
    watch: Callable | None = None,
) -> Tensor:
    """Integrate dx/dt = v from noise at t = 0 to a picture at t = 1 with `steps` Euler steps.

    noise (B, C, height, width). Guidance needs uncond_context (of the empty prompt) and is applied
    for t in interval; both branches go through the network as one batch:
    `context.concat(uncond_context)`. shift > 1 spends more of the steps near the noise: with
    s = 1 - t, s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23).

    Steps that end at t <= renoise draw their noise anew, by fresh_noise() -> like x. Each Euler
    step heads for the same clean picture; what noise stays in x is only where the network's errors
    pile up, and fresh noise lets it decide again (Karras et al. 2022, section 4, on stochastic
    samplers; the step itself is algorithm 1 of Song et al. 2023, Consistency Models).
    watch(t, x, v) is called at every step, before x moves along v.
    """
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (1 - shift * s / (1 + (shift - 1) * s)).tolist()
    both = context.concat(uncond_context) if guidance != 1 else None
    x = noise
    for now, then in pairwise(times):
        guided = both is not None and interval[0] <= now <= interval[1]
        if guided:
            t = torch.full((2 * len(x),), now, dtype=x.dtype, device=x.device)
            v_cond, v_uncond = predict(torch.cat([x, x]), t, both).chunk(2)
            v = guide(v_cond, v_uncond, guidance, renorm)
        else:
            t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
            v = predict(x, t, context)
        if watch is not None:
            watch(now, x, v)
        if then <= renoise:
            clean = x + (1 - now) * v  # where v leads
            x = (1 - then) * fresh_noise() + then * clean
        else:
            x = x + (then - now) * v  # Euler
    return x
