"""Reads a drawn shapes scene back from its pixels, by geometry alone, and says whether it is the scene asked for.

    verdict = judge(image, scene)        # image: uint8 (H, W, 3), scene: data.Scene
    verdict.ok, verdict.reason           # (True, None) or (False, "wrong color")

No network and no randomness: the same pixels get the same verdict everywhere. The reading has three steps: a thing is a
connected region whose pixels lie between the background and one colour; its area and centroid say how large, and where,
each of the shapes would have to be; the shape that then covers it best is its shape. Pictures drawn by a network (soft
edges, noise, colours somewhat off) are read by the same steps and the same constants.

Not judged: the size words ("small", "large"), and places where the scene names no relation.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from data import BACKGROUND, CANONICAL_COLORS, COLORS, RELATIONS, SHAPES, Scene, Thing, draw_things

FOREGROUND = 40  # RGB distance from the background where a thing may begin; the faintest colour of data.COLORS has 71
SAME_HUE = 32  # RGB distance from the line background-colour within which a pixel is that colour, more or less covering
MIN_AREA = 0.006  # of the picture; the smallest thing that data.lay_out draws has 0.014. What is smaller is a speck
MIN_OVERLAP = 0.6  # soft IoU with the best template, below which a thing is not a shape
MAX_REGIONS = 32  # a picture that falls into more regions, specks included, is no scene: the rest is left in one piece
SAME_COLOR = 12.0  # CIE76 delta E within which a colour is the one asked for, whatever the terms beside a boundary say
MARGIN = 0.1  # of the picture's side: how far apart two things must be for "left of" to be true

REASONS = ("extra", "missing", "wrong count", "wrong shape", "wrong color", "wrong relation")

# ---------------------------------------------------------------------------------------------------------------------
# colour

_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
_WHITE = _TO_XYZ.sum(1)  # D65, as sRGB has it


def lab(rgb) -> np.ndarray:
    """sRGB 0..255, (..., 3) -> CIE L*a*b* (D65), (..., 3): L* 0..100, a* and b* about -100..100 (IEC 61966-2-1, CIE 15)."""
    v = np.asarray(rgb, np.float64) / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    t = linear @ _TO_XYZ.T / _WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(rgb1, rgb2) -> float:
    """CIE76: the Euclidean distance of two sRGB colours in L*a*b*. About 2 is just noticeable."""
    return float(np.linalg.norm(lab(rgb1) - lab(rgb2)))


# Berlin and Kay's eleven basic colour terms, each at its CSS value: the ten canonical colours, and grey.
BASIC_COLORS = {name: COLORS[name] for name in CANONICAL_COLORS} | {"grey": BACKGROUND}
_BASIC_LAB = lab(list(BASIC_COLORS.values()))  # (11, 3)


def basic_color(rgb) -> str:
    """The basic colour term whose prototype is nearest in L*a*b*; rgb in 0..255."""
    return list(BASIC_COLORS)[int(np.square(_BASIC_LAB - lab(rgb)).sum(1).argmin())]


# ---------------------------------------------------------------------------------------------------------------------
# picture -> things


@dataclass(frozen=True)
class Found:
    """One thing as read from the pixels. x, y (the centre) and radius in units of the picture's side, as in data.Thing."""

    shape: str | None  # None: no shape covers it
    rgb: tuple[int, int, int]
    color: str  # basic colour term of rgb
    x: float
    y: float
    radius: float
    overlap: float  # soft IoU with the shape that covers it best


def _moments() -> tuple[np.ndarray, np.ndarray]:
    """(8,) areas and (8,) heights of the centroid below the centre, of each shape at radius 1: from what data.py draws."""
    side, radius = 128, 0.4
    areas, drops = [], []
    for shape in SHAPES:
        cover = draw_things([Thing(shape, (255, 128, 128), 0.5, 0.5, radius)], side)[..., 0] / 127 - 128 / 127
        areas.append(cover.sum() / (radius * side) ** 2)
        drops.append(((np.arange(side) + 0.5) @ cover.sum(1) / cover.sum() - side / 2) / (radius * side))
    return np.array(areas), np.array(drops)


_AREAS, _DROPS = _moments()
STEPS = 8  # a template's size and place are rounded to 1/STEPS pixel


@lru_cache(maxsize=None)
def _templates(size: int, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """Every shape with the area of a square of side size/STEPS pixels, its centroid dy, dx /STEPS off the middle pixel's centre.

    Coverages (8, S, S) in 0..1 with an empty rim, and their sums (8,).
    """
    half = math.ceil(size / STEPS) + 2
    side = 2 * half + 1
    covers = []
    for shape, area, drop in zip(SHAPES, _AREAS, _DROPS, strict=True):
        radius = size / STEPS / math.sqrt(area)
        x, y = half + 0.5 + dx / STEPS, half + 0.5 + dy / STEPS - drop * radius
        thing = Thing(shape, (255, 128, 128), x / side, y / side, radius / side)
        covers.append(draw_things([thing], side, STEPS)[..., 0])
    covers = np.stack(covers).astype(np.float32) / 127 - 128 / 127
    return covers, covers.sum((1, 2))


def _connected(mask: np.ndarray, seed: int) -> np.ndarray:
    """The part of mask (False all along its border) that hangs together, corners included, with flat index seed.

    The picture is one long integer with a bit per pixel, and a step of growth a few shifts: much faster than arrays here.
    """
    width, length = mask.shape[1], (mask.size + 7) // 8
    allowed = int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")
    part, grown = 0, 1 << seed
    while part != grown:
        part = grown
        row = part | part << 1 | part >> 1
        grown = (row | row << width | row >> width) & allowed
    bits = np.frombuffer(part.to_bytes(length, "little"), np.uint8)
    return np.unpackbits(bits, count=mask.size, bitorder="little").astype(bool).reshape(mask.shape)


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours, corners included."""
    row = mask.copy()
    row[:, 1:] |= mask[:, :-1]
    row[:, :-1] |= mask[:, 1:]
    out = row.copy()
    out[1:] |= row[:-1]
    out[:-1] |= row[1:]
    return out


def _read_thing(delta: np.ndarray, cover: np.ndarray, near: np.ndarray, side: int) -> Found:
    """The shape whose template, put where the region's area and centroid say, covers the region best.

    delta (H, W, 3) the picture less the background, cover (H, W) how far each pixel is on the way to the thing's colour,
    near (H, W) the pixels that may belong to it.
    """
    ys, xs = np.nonzero(near)
    cover, delta = cover[ys, xs], delta[ys, xs]
    mass = cover.sum()
    y, x, size = cover @ ys / mass, cover @ xs / mass, math.sqrt(mass)
    row, column = round(y), round(x)
    templates, sums = _templates(round(size * STEPS), round((y - row) * STEPS), round((x - column) * STEPS))
    half = templates.shape[-1] // 2
    templates = templates[:, np.clip(ys - row + half, 0, 2 * half), np.clip(xs - column + half, 0, 2 * half)]  # (8, pixels)
    soft = np.clip(cover, 0, 1)
    both = np.minimum(templates, soft).sum(1)
    overlaps = both / (sums + soft.sum() - both)
    best = int(overlaps.argmax())
    template = templates[best]
    rgb = np.clip(np.round(BACKGROUND + template @ delta / (template @ template)), 0, 255).astype(int)
    radius = size / math.sqrt(_AREAS[best])
    return Found(SHAPES[best] if overlaps[best] >= MIN_OVERLAP else None, tuple(rgb.tolist()), basic_color(rgb),
                 (x - 0.5) / side, (y - 0.5 - _DROPS[best] * radius) / side, radius / side, float(overlaps[best]))  # fmt: skip


def read_scene(image: np.ndarray) -> list[Found]:
    """The things in a uint8 picture (H, W, 3), the most contrasting first."""
    height, width, _ = image.shape
    delta = np.zeros((height + 2, width + 2, 3), np.float32)  # the background goes on for a pixel on all sides
    delta[1:-1, 1:-1] = image.astype(np.float32) - BACKGROUND
    contrast = np.sqrt(np.square(delta).sum(-1))
    taken = np.zeros_like(contrast, bool)
    found = []
    for _ in range(MAX_REGIONS):
        seed = int(contrast.argmax())
        if contrast.flat[seed] < FOREGROUND:
            return found
        color = delta.reshape(-1, 3)[seed]
        for strong in (0.7, 0.5):
            cover = delta @ color / (color @ color)  # 0 on the background, 1 on the colour
            hued = np.square(delta - cover[..., None] * color).sum(-1) < SAME_HUE**2
            core = _connected(hued & (cover > strong) & ~taken, seed)
            if strong == 0.7:
                color = np.median(delta[core], axis=0)
        near = _grow(_grow(core)) & hued & ~taken & (core | (cover < 0.5))
        contrast[near] = 0
        if core.sum() >= MIN_AREA * height * width and (core & ~_grow(taken)).any():
            found.append(_read_thing(delta, cover, near, width))
        taken |= core
    return found + [Found(None, BACKGROUND, "grey", 0.5, 0.5, 0.5, 0.0)]
