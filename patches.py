"""From pixels to image tokens and back: the two ends of the image expert.

Each patcher has two halves. `encode` makes one token of each patch of P x P pixels; `decode` makes
pixels of the tokens that the transformer has been through.

    linear   one matrix each way (ViT, DiT). Neighbouring patches do not see each other on the way
             out: their seams show.
    unet     a small U-Net around the transformer: convolutions on the way in, and on the way out
             with what the way in has seen at each size (Transfusion, Zhou et al. 2024, section 3;
             LMFusion, Shi et al. 2024, sections 2.2 and 3.1). The edges are clean.

Shapes: B images of C channels and height x width pixels, N tokens, D expert width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SIDE = 16384  # of a picture, in pixels


class LinearPatcher(nn.Module):
    """A patch's pixels times a matrix. (fading: of skips, and it has none.)"""

    def __init__(self, width: int, patch: int, channels: int, fading: bool = True):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.head = nn.Linear(width, channels * patch**2)
        start_at_zero(self.head)

    def encode(self, x_t: Tensor, t: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x_t (B, C, height, width), t (B,), time (B, D) -> tokens (B, N, D), and no skips."""
        return self.embed(patchify(x_t, self.patch)), []

    def decode(self, img: Tensor, skips: list[Tensor], time: Tensor, size: tuple) -> Tensor:
        """Tokens (B, N, D) -> (B, C, height, width), of this size."""
        return unpatchify(self.head(img), self.patch, *size)


# From this t on the skips are whole; below, they fade away. Near the noise, where it is decided
# what is drawn, they would let each place decide from its own noise alone: four hearts of no named
# colour got four colours. Without them what the tokens agree on decides.
FULL_SKIPS = 0.3


class UNetPatcher(nn.Module):
    """Convolutions at two or three sizes, each half of the one before; then the last few places are
    one token. The way back adds what the way in had at each size (the skips).

    The largest size has half of the picture's side: 2 x 2 pixels are one place of 4 C channels,
    which takes less than half of the time of convolutions over single pixels. Channels double from
    size to size, up to 3/8 of the expert's width. Deviations from LMFusion: convolutions alone, one
    a size and way; skips are added, not appended, and with `fading` faded out near the noise (not
    where the network says what the noise is, or a velocity: that needs the noise of each place).
    """

    def __init__(self, width: int, patch: int, channels: int, fading: bool = True):
        super().__init__()
        self.patch = patch
        self.fading = fading
        self.pixels, strides, self.places = split_patch(patch)
        pixel_channels = channels * self.pixels**2
        shares = [1 / 8, 1 / 4, 3 / 8][-len(strides) :]
        sizes = [8 * max(1, round(share * width / 8)) for share in shares]  # channels at each size

        # the way in
        self.first = nn.Conv2d(pixel_channels, sizes[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        # the way out, in the same order
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for size in sizes:
            self.down.append(ConvBlock(size, width))
            self.up.append(ConvBlock(size, width))
        for fine, coarse in zip(sizes, sizes[1:]):
            self.shrink.append(Conv(4 * fine, coarse, 1))
            self.grow.append(Conv(coarse, 4 * fine, 1))
        # between them, the tokens
        self.embed = Conv(sizes[-1] * self.places**2, width, 1)
        self.unembed = Conv(width, sizes[-1] * self.places**2, 1)
        self.last = nn.Conv2d(sizes[0], pixel_channels, 3, padding=1)
        start_at_zero(self.last)

    def encode(self, x_t: Tensor, t: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x_t (B, C, height, width), t (B,), time (B, D): the embedding of t -> tokens (B, N, D),
        and the skips: what each size has seen, the largest first."""
        x = self.first(F.pixel_unshuffle(x_t, self.pixels))
        faded = 1
        if self.fading:
            faded = (t / FULL_SKIPS).clamp(max=1).square().view(-1, 1, 1, 1).to(x.dtype)
        x = self.down[0](x, time)
        skips = [x * faded]
        for shrink, block in zip(self.shrink, self.down[1:]):
            x = block(shrink(F.pixel_unshuffle(x, 2)), time)
            skips.append(x * faded)
        x = self.embed(F.pixel_unshuffle(x, self.places))  # (B, D, rows, columns) of tokens
        return x.flatten(2).transpose(1, 2), skips

    def decode(self, img: Tensor, skips: list[Tensor], time: Tensor, size: tuple) -> Tensor:
        """Tokens (B, N, D), skips and time of the way in -> (B, C, height, width), of this size."""
        grid = (size[0] // self.patch, size[1] // self.patch)
        x = img.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
        x = F.pixel_shuffle(self.unembed(x), self.places)
        x = self.up[-1](x + skips[-1], time)
        for i in reversed(range(len(self.grow))):
            x = F.pixel_shuffle(self.grow[i](x), 2)
            x = self.up[i](x + skips[i], time)
        return F.pixel_shuffle(self.last(x), self.pixels)


class ConvBlock(nn.Module):
    """x + convolution(silu(norm(x), scaled and shifted by what the time says)), same shape."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.modulation = nn.Linear(width, 2 * channels)
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, channels, rows, columns), time (B, D)."""
        shift, scale = self.modulation(time)[:, :, None, None].chunk(2, dim=1)
        return x + self.conv(F.silu(self.norm(x) * (1 + scale) + shift))


class Conv(nn.Linear):
    """A convolution over side x side places. Its weight is a matrix, (out, in side side), so that
    Muon trains it like those of the transformer: two thirds of the steps to the same loss."""

    def __init__(self, channels: int, out: int, side: int):
        super().__init__(channels * side**2, out)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, rows, columns) -> (B, out, rows, columns)."""
        weight = self.weight.unflatten(1, (-1, self.side, self.side))
        return F.conv2d(x, weight, self.bias, padding=self.side // 2)


PATCHERS = {"unet": UNetPatcher, "linear": LinearPatcher}


def split_patch(patch: int) -> tuple[int, list[int], int]:
    """How the U-Net comes from single pixels to a token of patch x patch pixels: how many pixels a
    side are one place, the halvings at which it convolves, and how many places a side of the last
    are one token; e.g. 16 -> 2, [1, 2, 4], 2: 2 pixels, 4, 8, and two of these a token. Any patch
    divides: 7 -> 1, [1], 7."""
    pixels = 2 if patch % 2 == 0 and patch > 2 else 1
    rest = patch // pixels
    strides = [1]
    while rest % 2 == 0 and rest > 2 and len(strides) < 3:
        strides.append(2 * strides[-1])
        rest //= 2
    return pixels, strides, rest


def start_at_zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Whatever it is asked, an untrained expert then says "grey everywhere" (or, with --prediction
    velocity, "stay")."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, height, width) -> (B, N, C P P), row by row."""
    B, C, height, width = x.shape
    x = x.reshape(B, C, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)  # (B, N, C P P)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse: (B, N, C P P) -> (B, C, height, width)."""
    B = len(tokens)
    x = tokens.reshape(B, height // patch, width // patch, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, height, width)
