"""Rectified flow: the target, the sampler on fields with a known solution, guidance."""

import pytest
import torch

from flow import euler_sample, flow_loss, guide, interpolate, sample_time, to_velocity


class NoContext:
    def concat(self, other):
        return self


def test_the_target_is_data_minus_noise():
    """A network that answers the true velocity has no loss; t = 0 is noise and t = 1 is data."""
    torch.manual_seed(0)
    data, noise = torch.randn(2, 5, 3, 4, 4).unbind(0)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    x_t = interpolate(data, noise, t)
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[4], data[4])
    assert flow_loss(lambda x, t, c: data - noise, data, noise, t, None).max() == 0
    off_by_two = flow_loss(lambda x, t, c: data - noise + 2, data, noise, t, None)
    assert torch.allclose(off_by_two, torch.full((5,), 4.0), atol=1e-5)
    moved = (
        interpolate(data, noise, t + 1e-3) - x_t
    ) / 1e-3  # the velocity is the path's derivative
    assert torch.allclose(moved, data - noise, atol=1e-2)


def test_euler_on_a_straight_field_is_exact():
    """v = (goal - x) / (1 - t) is the rectified flow to one point: any number of steps ends on
    it."""
    torch.manual_seed(0)
    noise, goal = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64).unbind(0)
    for steps in (1, 3, 24):
        for shift in (1.0, 3.0):
            end = euler_sample(
                lambda x, t, c: (goal - x) / (1 - t).view(-1, 1, 1, 1),
                noise,
                None,
                steps,
                shift=shift,
            )
            assert (end - goal).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 4, 24, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_network_that_knows_the_picture_lands_on_it(steps, shift):
    """A clean-picture head through to_velocity, in float32: no bias at any number of steps."""
    torch.manual_seed(0)
    noise, goal = torch.randn(2, 2, 3, 8, 8).unbind(0)
    oracle = lambda x, t, context: to_velocity(goal, x, t)
    end = euler_sample(oracle, noise, None, steps, shift=shift)
    assert (end - goal).abs().max() <= 1e-4


def test_fresh_noise_up_to_a_time():
    """Steps that end there land on the predicted clean picture with a noise of its own; the others
    are Euler's."""
    torch.manual_seed(0)
    noise, goal, *fresh = torch.randn(6, 2, 3, 8, 8, dtype=torch.float64).unbind(0)
    handed = []
    seen = []

    def next_noise():
        handed.append(fresh[len(handed)])
        return handed[-1]

    end = euler_sample(
        lambda x, t, context: to_velocity(goal, x, t),
        noise,
        None,
        4,
        renoise=0.5,
        fresh_noise=next_noise,
        watch=lambda t, x, v: seen.append((t, x)),
    )
    assert len(handed) == 2, "the steps to 0.25 and to 0.5"
    assert [t for t, _ in seen] == [0, 0.25, 0.5, 0.75]
    for t, x in seen:
        its_noise = {0: noise, 0.25: fresh[0]}.get(t, fresh[1])
        assert torch.allclose(x, (1 - t) * its_noise + t * goal)
    assert (end - goal).abs().max() < 1e-9


@pytest.mark.parametrize("renoise", [0.0, 0.6])
def test_two_pictures_come_out_half_and_half(renoise):
    """Data that is +1 or -1 everywhere, and the network that is right about it: both come out, as
    often, and nothing between them."""
    torch.manual_seed(0)

    def predict(x, t, context):
        t = t.view(-1, 1, 1, 1)
        evidence = (t * x / (1 - t) ** 2).sum(dim=(1, 2, 3), keepdim=True)
        return to_velocity(torch.tanh(evidence).expand_as(x), x, t.flatten())

    shape = (2000, 1, 2, 2)
    end = euler_sample(
        predict,
        torch.randn(shape),
        None,
        48,
        shift=2.0,
        renoise=renoise,
        fresh_noise=lambda: torch.randn(shape),
    )
    which = end.mean(dim=(1, 2, 3))
    assert ((which.abs() - 1).abs() < 0.05).float().mean() > 0.97
    assert 0.45 < (which > 0).float().mean() < 0.55


def test_at_the_end_of_time_the_velocity_is_finite():
    x = torch.randn(1, 3, 4, 4)
    assert to_velocity(x + 0.1, x, torch.ones(1)).isfinite().all()


def test_euler_converges_at_first_order():
    """dx/dt = x from 1: e at t = 1. Twice the steps, half the error."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [
        abs(euler_sample(lambda x, t, c: x, one, None, steps).item() - torch.e)
        for steps in (50, 100, 200)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1, errors


def test_guidance_in_one_batch_and_only_in_its_interval():
    calls = []

    def predict(x, t, context):
        calls.append((len(x), t[0].item()))
        return torch.ones_like(x) * torch.arange(len(x)).view(
            -1, 1, 1, 1
        )  # the first half is 0, the second 1

    x = torch.zeros(1, 1, 2, 2)
    end = euler_sample(predict, x, NoContext(), 4, NoContext(), guidance=3.0, interval=(0.4, 1.0))
    assert calls == [(1, 0.0), (1, 0.25), (2, 0.5), (2, 0.75)]
    assert torch.allclose(end, torch.full_like(end, 2 * 0.25 * (1 + 3 * (0 - 1))))


def test_renorm_is_per_picture():
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 4, 3, 8, 8).unbind(0)
    v = guide(cond, uncond, 4.0, renorm=True)
    length = v.flatten(1).norm(dim=1)
    assert torch.allclose(length, cond.flatten(1).norm(dim=1), rtol=1e-5)
    alone = guide(cond[:1], uncond[:1], 4.0, renorm=True)
    assert torch.equal(alone, v[:1]), "a picture's guidance must not depend on its neighbours"
    assert torch.equal(guide(cond, cond, 4.0, renorm=True), guide(cond, cond, 1.0, renorm=False))


@pytest.mark.parametrize("mean", [-0.4, 0.0])
def test_time_is_logit_normal(mean):
    t = sample_time(100_000, mean, 1.0, torch.Generator().manual_seed(0))
    z = torch.logit(t)
    assert abs(z.mean() - mean) < 0.01 and abs(z.std() - 1) < 0.01 and 0 < t.min() and t.max() < 1
