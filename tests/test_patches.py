"""From pixels to tokens and back."""

import pytest
import torch

from model import ImageExpert
from patches import PATCHERS, patchify, split_patch, unpatchify

T = torch.tensor([0.5], dtype=torch.float64)  # of all pictures of a batch


def patcher_of(kind: str, patch: int, width: int = 32, loud: bool = True, fading: bool = True):
    """A patcher in float64, in which nothing is zero if it is loud."""
    torch.manual_seed(0)
    patcher = PATCHERS[kind](width, patch, 3, fading).double()
    if loud:
        for parameter in patcher.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return patcher


def there_and_back(patcher, x_t, time):
    img, skips = patcher.encode(x_t, T, time)
    return patcher.decode(img, skips, time, x_t.shape[2:])


def inputs(patch: int, rows: int = 2, columns: int = 3, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, rows * patch, columns * patch)
    x_t = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x_t, torch.randn(batch, 32, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "shape, patch", [((2, 3, 16, 16), 4), ((1, 4, 8, 24), 8), ((2, 1, 6, 4), 1)]
)
def test_patchify_round_trip(shape, patch):
    x = torch.randn(shape)
    tokens = patchify(x, patch)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // patch**2, shape[1] * patch**2)
    assert torch.equal(unpatchify(tokens, patch, *shape[2:]), x)
    assert torch.equal(tokens[0, 0], x[0, :, :patch, :patch].flatten()), (
        "the first token is the upper left patch"
    )


@pytest.mark.parametrize("kind", PATCHERS)
@pytest.mark.parametrize("patch", [1, 2, 3, 4, 6, 7, 8, 12, 16, 32])
def test_any_patch_and_any_picture_that_divides(kind, patch):
    """Also one that is no square: a token for each patch, row by row, and pixels like x_t."""
    patcher = patcher_of(kind, patch)
    x_t, time = inputs(patch)
    img, skips = patcher.encode(x_t, T, time)
    assert img.shape == (2, 6, 32)
    out = patcher.decode(img, skips, time, x_t.shape[2:])
    assert out.shape == x_t.shape and out.isfinite().all() and out.std() > 0

    pixels, strides, last = split_patch(patch)
    assert pixels * strides[-1] * last == patch and len(strides) <= 3


@pytest.mark.parametrize("kind", PATCHERS)
def test_it_starts_at_zero(kind):
    patcher = patcher_of(kind, 8, loud=False)
    assert torch.equal(there_and_back(patcher, *inputs(8)), torch.zeros(2, 3, 16, 24).double())


@pytest.mark.parametrize("kind", PATCHERS)
def test_a_batch_is_as_one_by_one(kind):
    patcher = patcher_of(kind, 16)
    x_t, time = inputs(16, batch=3)
    together = there_and_back(patcher, x_t, time)
    for i in range(3):
        alone = there_and_back(patcher, x_t[i : i + 1], time[i : i + 1])
        assert torch.allclose(together[i], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", PATCHERS)
def test_every_weight_learns(kind):
    patcher = patcher_of(kind, 16)
    there_and_back(patcher, *inputs(16)).square().sum().backward()
    for name, parameter in patcher.named_parameters():
        assert parameter.grad.abs().amax() > 0, name


def reach(kind: str) -> torch.Tensor:
    """How much each pixel out of 3 x 3 patches of 8 x 8 changes with the token in the middle."""
    patcher = patcher_of(kind, 8)
    x_t, time = inputs(8, rows=3, columns=3, batch=1)
    img, skips = patcher.encode(x_t, T, time)
    other = img.clone()
    other[:, 4] += 1
    before = patcher.decode(img, skips, time, x_t.shape[2:])
    after = patcher.decode(other, skips, time, x_t.shape[2:])
    return (after - before)[0].abs().amax(0)  # (24, 24)


def test_a_seam_is_where_no_token_reaches_over():
    """Out of a linear patcher nothing crosses the border of a patch; out of a U-Net it does."""
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[8:16, 8:16] = True
    linear = reach("linear")
    assert (linear[inside] > 0).all() and (linear[~inside] == 0).all()
    unet = reach("unet")
    assert (unet[inside] > 0).all() and (unet[7, 8:16] > 0).all() and (unet[16, 8:16] > 0).all()


def test_the_skips_carry_what_the_way_in_has_seen():
    """With the same tokens, another picture in: the U-Net's answer changes, not the linear one's."""
    for kind, expected in (("linear", False), ("unet", True)):
        patcher = patcher_of(kind, 16)
        x_t, time = inputs(16)
        img, skips = patcher.encode(x_t, T, time)
        _, other_skips = patcher.encode(x_t.flip(3), T, time)
        one = patcher.decode(img, skips, time, x_t.shape[2:])
        other = patcher.decode(img, other_skips, time, x_t.shape[2:])
        assert bool((one - other).abs().amax() > 1e-3) is expected


def test_the_time_reaches_the_convolutions():
    patcher = patcher_of("unet", 16)
    x_t, time = inputs(16)
    one = there_and_back(patcher, x_t, time)
    assert (one - there_and_back(patcher, x_t, time + 1)).abs().amax() > 1e-3


def test_only_who_says_the_clean_picture_fades_its_skips():
    """Near the noise: there a velocity, or the noise itself, needs the noise of each place."""
    x_t, time = inputs(8)
    near_the_noise = torch.tensor([0.03], dtype=torch.float64)
    for fading, share in ((True, 0.01), (False, 1)):
        patcher = patcher_of("unet", 8, fading=fading)
        _, skips = patcher.encode(x_t, near_the_noise, time)
        _, whole = patcher.encode(x_t, T, time)
        for ours, theirs in zip(skips, whole, strict=True):
            assert (ours - share * theirs).abs().max() < 1e-12
    fades = {}
    for prediction in ("clean", "velocity", "noise"):
        layers = [{"index": 0, "kv_heads": 1, "key_width": 8, "value_width": 8}]
        fades[prediction] = ImageExpert(layers, 32, 4, prediction=prediction).patcher.fading
    assert fades == {"clean": True, "velocity": False, "noise": False}
