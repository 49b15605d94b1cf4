"""Reads a drawn shapes scene back from its pixels, by geometry alone: is it what was asked for?

    verdict = judge(image, scene)        # image: uint8 (H, W, 3), scene: data.Scene
    verdict.ok, verdict.reason           # (True, None) or, say, (False, "wrong color")

No network and no randomness: the same pixels get the same verdict everywhere. The reading has three
steps. A thing is a connected region whose pixels lie on the line from the background to one colour;
its area and centroid say how large, and where, each of the shapes would have to be; the shape that
covers it best is its shape. Pictures drawn by a network (soft edges, noise, colours somewhat off)
are read by the same steps with the same constants.

Not judged: the size words ("small", "large"), and the place of things where the scene names no
relation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from statistics import fmean

import numpy as np
from PIL import Image, ImageFilter

from data import BACKGROUND, COLORS, RELATIONS, SHAPES, Group, Scene, Thing, draw_things
from extras.colors import basic_color, same_color

FOREGROUND = 50  # RGB distance from the background that shows; the faintest of data.COLORS has 71
SAME_HUE = 32  # RGB distance from a colour's line within which a pixel is it; red and brown: 39
FULLEST = 0.25  # the part of a region, its best covered pixels, that gives its colour
MIN_AREA = 0.006  # of the picture: less is a speck; the smallest thing of data.lay_out has 0.014
MAX_REGIONS = 32  # specks included: a picture in more is no scene, the rest a thing of no shape
MIN_OVERLAP = 0.6  # soft IoU with the best template, below which a thing is not a shape
MAX_RADIUS = 0.5  # of the picture's width: what is larger, a white picture say, is not a shape
MARGIN = 0.1  # of the picture's width: how far left of, or above, the other a thing must be

# --------------------------------------------------------------------------------------------------
# scene and picture -> verdict


@dataclass(frozen=True)
class Found:
    """One thing as read from the pixels. x, y (the centre) and radius in units of the width."""

    shape: str | None  # None where no shape covers it
    rgb: tuple[int, int, int]
    color: str  # the basic colour term of rgb
    x: float
    y: float
    radius: float
    overlap: float  # soft IoU with the shape that covers it best


# what a picture shows that shows nothing, or nothing that can be read
NOTHING = Found(None, BACKGROUND, "grey", 0.5, 0.5, 0.5, 0.0)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows a scene, and if not, the first of these reasons that applies:

    "extra"           something is not a shape
    "wrong color"     as many of each shape as asked for, but not in these colours
    "wrong relation"  the very things asked for, but not so placed
    "wrong count"     things of every kind asked for and of no other, but not so many of each
    "extra"           more things than asked for
    "missing"         fewer things than asked for
    "wrong shape"     as many things as asked for
    """

    ok: bool
    reason: str | None
    found: tuple[Found, ...]
    rgb_distance: float | None  # mean distance (0..441) from the colours named, if the shapes fit


Split = list[list[Found]]  # the things of each group


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Whether a picture, uint8 (H, W, 3), shows exactly what the scene asks for, and if not, why.

    ValueError if the scene asks for a shape or a colour that data.py does not have.
    """
    for group in scene.groups:
        if group.shape not in SHAPES or group.color not in (None, *COLORS):
            expected = "a shape of data.SHAPES, and a colour of data.COLORS or None"
            raise ValueError(f"{group}: expected {expected}")
    found = read_scene(image)
    splits = list(_splits(found, scene.groups))
    reason = _reason(found, scene, splits)
    return Verdict(reason is None, reason, tuple(found), _rgb_distance(splits, scene.groups))


def _reason(found: list[Found], scene: Scene, splits: list[Split]) -> str | None:
    for thing in found:
        if thing.shape is None:
            return "extra"

    # the shapes are right: their colours, then their places
    if splits:
        colored = [split for split in splits if all(map(_colored, split, scene.groups))]
        if not colored:
            return "wrong color"
        if not any(_holds(scene.relation, split) for split in colored):
            return "wrong relation"
        return None

    # they are not: is every thing of a kind that was asked for, and every kind there?
    kinds = np.zeros((len(found), len(scene.groups)), bool)
    for i, thing in enumerate(found):
        for k, group in enumerate(scene.groups):
            kinds[i, k] = group.shape == thing.shape and _colored([thing], group)
    if found and kinds.any(1).all() and kinds.any(0).all():
        return "wrong count"
    surplus = len(found) - sum(group.count for group in scene.groups)
    if surplus > 0:
        return "extra"
    return "missing" if surplus < 0 else "wrong shape"


def _splits(found: list[Found], groups: tuple[Group, ...]) -> Iterator[Split]:
    """Every way to hand all things to the one or two groups: to each its number, of its shape."""
    if len(found) != sum(group.count for group in groups):
        return
    for chosen in combinations(range(len(found)), groups[0].count):
        split = [[] for _ in groups]
        for i, thing in enumerate(found):
            split[0 if i in chosen else 1].append(thing)
        fits = True
        for group, things in zip(groups, split, strict=True):
            fits = fits and all(thing.shape == group.shape for thing in things)
        if fits:
            yield split


def _colored(things: list[Found], group: Group) -> bool:
    """Whether all have the group's colour; where it names none, that of the first of them."""
    wanted = COLORS[group.color] if group.color else things[0].rgb
    return all(same_color(thing.rgb, wanted) for thing in things)


def _holds(relation: str | None, split: Split) -> bool:
    """Whether the offset between the groups' centres points the right way.

    More so than any other way, and by a margin.
    """
    if relation is None:
        return True
    centers = []
    for things in split:
        centers.append(np.mean([(thing.x, thing.y) for thing in things], axis=0))
    dx, dy = centers[0] - centers[1]
    right, down = RELATIONS[relation]
    along = dx * right + dy * down
    across = abs(dx * down) + abs(dy * right)
    return along > max(across, MARGIN)


def _rgb_distance(splits: list[Split], groups: tuple[Group, ...]) -> float | None:
    """Mean distance from the colours named, in the split where it is least; None without any."""
    means = []
    for split in splits:
        distances = []
        for group, things in zip(groups, split, strict=True):
            if group.color:
                distances += [math.dist(thing.rgb, COLORS[group.color]) for thing in things]
        if distances:
            means.append(fmean(distances))
    return min(means, default=None)


# --------------------------------------------------------------------------------------------------
# picture -> things


def read_scene(image: np.ndarray) -> list[Found]:
    """The things in a picture, uint8 (H, W, 3), the most contrasting first.

    ValueError if it is not such an array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"a picture of {image.dtype} {image.shape}; expected uint8 (height, width, 3)"
        )
    rim = ((1, 1), (1, 1), (0, 0))  # no region meets the border
    delta = np.pad(image.astype(np.float32) - BACKGROUND, rim)  # (H + 2, W + 2, 3)
    contrast = np.linalg.norm(delta, axis=-1)  # of what is not yet read
    taken = np.zeros_like(contrast, bool)
    found = []
    for _ in range(MAX_REGIONS):
        seed = int(contrast.argmax())
        if contrast.flat[seed] < FOREGROUND:
            return found

        # first with the seed's colour, noise and all, then with that of its fullest pixels
        color = delta.reshape(-1, 3)[seed]
        for _ in range(2):
            cover = delta @ color / (color @ color)  # 0 on the background, 1 on the colour
            beside = delta - cover[..., None] * color
            hued = np.square(beside).sum(-1) < SAME_HUE**2
            core = _connected(hued & (cover > 0.5) & ~taken, seed)
            full = cover >= np.quantile(cover[core], 1 - FULLEST)
            color = delta[core & full].mean(0)
        cover = delta @ color / (color @ color)

        # a speck is passed over
        if np.linalg.norm(color) < FOREGROUND or core.sum() < MIN_AREA * image[..., 0].size:
            contrast[core] = 0
            continue

        # around it lie its soft edge, a halo, the seam with a neighbour: nothing else begins there
        widened = Image.fromarray(core.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))
        around = np.asarray(widened) > 0
        contrast[around] = 0
        edge = around & hued & (np.abs(cover) < 0.5) & ~taken
        found.append(_name(core | edge, cover, color))
        taken |= core
    return [*found, NOTHING]


def _connected(mask: np.ndarray, seed: int) -> np.ndarray:
    """The pixel of flat index `seed`, and all of mask (False on its border) that hangs with it.

    The picture becomes one long integer, a bit for each pixel: a step of growth to all eight
    neighbours is four shifts.
    """
    width = mask.shape[1]
    bits = np.packbits(mask, bitorder="little").tobytes()
    allowed = int.from_bytes(bits, "little") | 1 << seed
    part = 0
    grown = 1 << seed
    while part != grown:
        part = grown
        row = part | part << 1 | part >> 1
        grown = (row | row << width | row >> width) & allowed
    bits = np.frombuffer(part.to_bytes(mask.size // 8 + 1, "little"), np.uint8)
    flat = np.unpackbits(bits, count=mask.size, bitorder="little")
    return flat.astype(bool).reshape(mask.shape)


def _name(region: np.ndarray, cover: np.ndarray, color: np.ndarray) -> Found:
    """The shape that covers a region best, put where the region's area and centroid say.

    region: bool (H + 2, W + 2), cover: how much of each pixel is the thing's, color: its RGB less
    the background.
    """
    # its size and centroid
    ys, xs = np.nonzero(region)
    cover = cover[ys, xs]
    size = math.sqrt(max(cover.sum(), 1))
    x = float(cover @ xs) / size**2
    y = float(cover @ ys) / size**2
    column = round(x)
    row = round(y)

    # every shape of that size, there: which overlaps most?
    down = round((y - row) * PLACE_STEPS)
    right = round((x - column) * PLACE_STEPS)
    templates = _templates(round(size * SIZE_STEPS), down, right)
    half = templates.shape[-1] // 2
    inside_y = np.clip(ys - row + half, 0, 2 * half)
    inside_x = np.clip(xs - column + half, 0, 2 * half)
    here = templates[:, inside_y, inside_x] / np.float32(_SOLID)  # (16, pixels)
    # clipped only now: clipped noise has a mean, and would have weighed on the area
    cover = np.clip(cover, 0, 1)
    both = np.minimum(here, cover).sum(1)
    either = templates.sum((1, 2)) / _SOLID + cover.sum() - both
    overlaps = both / either
    best = int(overlaps.argmax()) % len(SHAPES)
    overlap = float(overlaps.max())

    width = region.shape[1] - 2
    radius = size / math.sqrt(_AREAS[best])
    is_shape = overlap >= MIN_OVERLAP and radius <= MAX_RADIUS * width
    levels = np.clip(np.round(BACKGROUND + color), 0, 255)
    rgb = tuple(int(level) for level in levels)
    return Found(
        shape=SHAPES[best] if is_shape else None,
        rgb=rgb,
        color=basic_color(rgb),
        x=(x - 0.5) / width,
        y=(y - 0.5 - float(_DROPS[best]) * radius) / width,
        radius=radius / width,
        overlap=overlap,
    )


# --------------------------------------------------------------------------------------------------
# templates: every shape at every size and place, as data.py draws it

SIZE_STEPS = 8  # sizes of templates are multiples of an eighth of a pixel
PLACE_STEPS = 4  # and places of a quarter
SOFT = 0.6  # pixels: the Gaussian blur of the second set of templates, for pictures with soft edges
_SOLID = 255 - BACKGROUND[0]


def _coverage(shape: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """How far the shape covers each pixel, uint8 (side, side), 0 to _SOLID. All in pixels."""
    thing = Thing(shape, (255, *BACKGROUND[1:]), x / side, y / side, radius / side)
    return draw_things([thing], side, oversample=8)[..., 0] - np.uint8(BACKGROUND[0])


def _moments() -> Iterator[tuple[float, float]]:
    """Each shape's area, and how far its centroid lies below its centre, at radius 1."""
    for shape in SHAPES:
        rows = _coverage(shape, 64, 64, 50, side=128).sum(1) / _SOLID
        centroid = (np.arange(128) + 0.5) @ rows / rows.sum()
        yield rows.sum() / 50**2, (centroid - 64) / 50


_AREAS, _DROPS = np.array(list(_moments())).T  # (8,), (8,)


@lru_cache(maxsize=4096)
def _templates(size: int, down: int, right: int) -> np.ndarray:
    """Every shape, its area a square of `size` steps, its centroid some steps off the middle pixel.

    Coverages, uint8 (16, side, side), 0 to _SOLID, with an empty rim: the 8 shapes sharp, then the
    8 soft.
    """
    half = math.ceil(size / SIZE_STEPS) + 2  # no shape reaches as far from its centroid
    radii = size / SIZE_STEPS / np.sqrt(_AREAS)
    x = half + 0.5 + right / PLACE_STEPS
    y = half + 0.5 + down / PLACE_STEPS - _DROPS * radii
    sharp = []
    soft = []
    for i, shape in enumerate(SHAPES):
        template = _coverage(shape, x, y[i], radii[i], 2 * half + 1)
        sharp.append(template)
        blurred = Image.fromarray(template).filter(ImageFilter.GaussianBlur(SOFT))
        soft.append(np.asarray(blurred))
    return np.stack(sharp + soft)
