"""Reads a drawn shapes scene back from its pixels, by geometry alone, and says whether it is the scene asked for.

    verdict = judge(image, scene)        # image: uint8 (H, W, 3), scene: data.Scene
    verdict.ok, verdict.reason           # (True, None) or, say, (False, "wrong color")

No network and no randomness: the same pixels get the same verdict everywhere. The reading has three steps. A thing is a
connected region whose pixels lie on the line from the background to one colour; its area and centroid say how large,
and where, each of the shapes would have to be; the shape that covers it best is its shape. Pictures drawn by a network
(soft edges, noise, colours somewhat off) are read by the same steps with the same constants.

Pictures of other things have no such reading; of those, `ranks` says which of many candidates a picture is nearest to.

Not judged: the size words ("small", "large"), and the place of things where the scene names no relation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from data import BACKGROUND, CANONICAL_COLORS, COLORS, RELATIONS, SHAPES, Group, Scene, Thing, draw_things

FOREGROUND = 50  # RGB distance from the background at which there is something; the faintest of data.COLORS has 71
SAME_HUE = 32  # RGB distance from the line background-colour within which a pixel is that colour; red and brown: 39
FULLEST = 0.25  # the part of a region, its best covered pixels, that gives its colour
MIN_AREA = 0.006  # of the picture: what is smaller is a speck; the smallest thing of data.lay_out covers 0.014
MAX_REGIONS = 32  # a picture in more pieces, specks included, is no scene: the rest is read as one thing of no shape
MIN_OVERLAP = 0.6  # soft IoU with the best template, below which a thing is not a shape
MAX_RADIUS = 0.5  # of the picture's width: what is larger, a white picture say, is not a shape in the picture
SAME_COLOR = 12.0  # delta E within which two colours count as one, even across the border between two colour terms
MARGIN = 0.1  # of the picture's width: how far apart things must be for one to be left of, or above, the other

# ---------------------------------------------------------------------------------------------------------------------
# colour

_RGB_TO_XYZ = np.array([(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
                        (0.0193339, 0.1191920, 0.9503041)])  # fmt: skip


def lab(rgb) -> np.ndarray:
    """sRGB 0..255 (..., 3) -> CIE L*a*b* for D65 (..., 3), L* in 0..100 (IEC 61966-2-1; CIE 15)."""
    rgb = np.asarray(rgb, np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _RGB_TO_XYZ.sum(1)  # relative to D65, which is what sRGB's white is
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(rgb1, rgb2) -> float:
    """CIE76: the Euclidean distance of two sRGB colours (0..255) in L*a*b*. Two is just noticeable."""
    return float(np.linalg.norm(lab(rgb1) - lab(rgb2)))


# Berlin and Kay's eleven basic colour terms. Prototypes: the CSS values of the ten canonical colours, and of grey.
BASIC_COLORS = {name: COLORS[name] for name in CANONICAL_COLORS} | {"grey": (128, 128, 128)}
_BASIC_LAB = lab(list(BASIC_COLORS.values()))  # (11, 3)


def basic_color(rgb) -> str:
    """The basic colour term whose prototype is nearest in L*a*b*; rgb in 0..255."""
    return list(BASIC_COLORS)[int(np.square(_BASIC_LAB - lab(rgb)).sum(1).argmin())]


def same_color(rgb1, rgb2) -> bool:
    """Whether two colours (0..255) go by one basic term, or are hardly apart."""
    return basic_color(rgb1) == basic_color(rgb2) or delta_e(rgb1, rgb2) <= SAME_COLOR


# ---------------------------------------------------------------------------------------------------------------------
# templates: every shape at every size and place, as data.py draws it

SIZE_STEPS, PLACE_STEPS = 8, 4  # sizes and places of templates are multiples of 1/8 and of 1/4 pixel
SOFT = 0.6  # pixels: the Gaussian blur of the second set of templates, for pictures with soft edges
_SOLID = 255 - BACKGROUND[0]


def _coverage(shape: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """How far the shape covers each pixel, uint8 (side, side), 0 to _SOLID. x, y and radius in pixels."""
    thing = Thing(shape, (255, *BACKGROUND[1:]), x / side, y / side, radius / side)
    return draw_things([thing], side, oversample=8)[..., 0] - np.uint8(BACKGROUND[0])


def _moments() -> Iterator[tuple[float, float]]:
    """Each shape's area, and how far its centroid lies below its centre, at radius 1."""
    for shape in SHAPES:
        rows = _coverage(shape, 64, 64, 50, side=128).sum(1) / _SOLID
        yield rows.sum() / 50**2, ((np.arange(128) + 0.5) @ rows / rows.sum() - 64) / 50


_AREAS, _DROPS = np.array(list(_moments())).T  # (8,), (8,)


@lru_cache(maxsize=4096)
def _templates(size: int, down: int, right: int) -> np.ndarray:
    """Every shape with the area of a square of `size` steps, its centroid some steps off the middle pixel's centre.

    Coverages, uint8 (16, side, side), 0 to _SOLID, with an empty rim: the 8 shapes sharp, then the 8 soft.
    """
    half = math.ceil(size / SIZE_STEPS) + 2  # no shape reaches as far from its centroid
    radii = size / SIZE_STEPS / np.sqrt(_AREAS)
    x, y = half + 0.5 + right / PLACE_STEPS, half + 0.5 + down / PLACE_STEPS - _DROPS * radii
    sharp = [_coverage(shape, x, y[i], radii[i], 2 * half + 1) for i, shape in enumerate(SHAPES)]
    return np.stack(sharp + [np.asarray(Image.fromarray(t).filter(ImageFilter.GaussianBlur(SOFT))) for t in sharp])


# ---------------------------------------------------------------------------------------------------------------------
# picture -> things


@dataclass(frozen=True)
class Found:
    """One thing as read from the pixels. x, y (the centre) and radius as in data.Thing, in units of the width."""

    shape: str | None  # None where no shape covers it
    rgb: tuple[int, int, int]
    color: str  # the basic colour term of rgb
    x: float
    y: float
    radius: float
    overlap: float  # soft IoU with the shape that covers it best


def _connected(mask: np.ndarray, seed: int) -> np.ndarray:
    """The pixel of flat index `seed`, and all of mask (False along its border) that hangs together with it.

    The picture becomes one long integer, a bit for each pixel: a step of growth to all eight neighbours is four shifts.
    """
    width = mask.shape[1]
    allowed = int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little") | 1 << seed
    part, grown = 0, 1 << seed
    while part != grown:
        part = grown
        row = part | part << 1 | part >> 1
        grown = (row | row << width | row >> width) & allowed
    bits = np.frombuffer(part.to_bytes(mask.size // 8 + 1, "little"), np.uint8)
    return np.unpackbits(bits, count=mask.size, bitorder="little").astype(bool).reshape(mask.shape)


def _name(region: np.ndarray, cover: np.ndarray, color: np.ndarray) -> Found:
    """The shape that covers a region best, put where the region's area and centroid say.

    region: bool (H + 2, W + 2), cover: how much of each pixel is the thing's, color: its RGB less the background.
    """
    ys, xs = np.nonzero(region)
    cover = cover[ys, xs]
    size = math.sqrt(max(cover.sum(), 1))
    x, y = float(cover @ xs) / size**2, float(cover @ ys) / size**2
    column, row = round(x), round(y)
    steps = round(size * SIZE_STEPS), round((y - row) * PLACE_STEPS), round((x - column) * PLACE_STEPS)
    templates = _templates(*steps)
    half = templates.shape[-1] // 2
    here = templates[:, np.clip(ys - row + half, 0, 2 * half), np.clip(xs - column + half, 0, 2 * half)]  # (16, pixels)
    cover = np.clip(cover, 0, 1)  # only now: clipped noise has a mean, and would have weighed on the area
    both = np.minimum(here / np.float32(_SOLID), cover).sum(1)
    overlaps = both / (templates.sum((1, 2)) / _SOLID + cover.sum() - both)
    best, overlap = int(overlaps.argmax()) % len(SHAPES), float(overlaps.max())
    width, radius = region.shape[1] - 2, size / math.sqrt(_AREAS[best])
    is_shape = overlap >= MIN_OVERLAP and radius <= MAX_RADIUS * width
    rgb = tuple(int(v) for v in np.clip(np.round(BACKGROUND + color), 0, 255))
    return Found(SHAPES[best] if is_shape else None, rgb, basic_color(rgb), (x - 0.5) / width,
                 (y - 0.5 - float(_DROPS[best]) * radius) / width, radius / width, overlap)  # fmt: skip


def read_scene(image: np.ndarray) -> list[Found]:
    """The things in a picture, uint8 (H, W, 3), the most contrasting first. ValueError if it is not such an array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture of {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
    delta = np.pad(image.astype(np.float32) - BACKGROUND, ((1, 1), (1, 1), (0, 0)))  # no region meets the border
    contrast = np.linalg.norm(delta, axis=-1)  # of what is not yet read
    taken = np.zeros_like(contrast, bool)
    found = []
    for _ in range(MAX_REGIONS):
        seed = int(contrast.argmax())
        if contrast.flat[seed] < FOREGROUND:
            return found
        color = delta.reshape(-1, 3)[seed]
        for _ in range(2):  # first with the seed's colour, noise and all, then with that of the region's fullest pixels
            cover = delta @ color / (color @ color)  # 0 on the background, 1 on the colour
            hued = np.square(delta - cover[..., None] * color).sum(-1) < SAME_HUE**2
            core = _connected(hued & (cover > 0.5) & ~taken, seed)
            color = delta[core & (cover >= np.quantile(cover[core], 1 - FULLEST))].mean(0)
        cover = delta @ color / (color @ color)
        if np.linalg.norm(color) < FOREGROUND or core.sum() < MIN_AREA * image[..., 0].size:
            contrast[core] = 0
            continue
        around = np.asarray(Image.fromarray(core.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))) > 0
        contrast[around] = 0  # its soft edge, a halo, the seam with a neighbour: nothing else begins here
        found.append(_name(core | around & hued & (np.abs(cover) < 0.5) & ~taken, cover, color))
        taken |= core
    return [*found, Found(None, BACKGROUND, "grey", 0.5, 0.5, 0.5, 0.0)]


# ---------------------------------------------------------------------------------------------------------------------
# things -> verdict


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
    rgb_distance: float | None  # mean distance (0..441) from the colours named, where the shapes are right


def _colored(things: list[Found], group: Group) -> bool:
    """Whether all have the group's colour; where it names none, that of the first of them."""
    return all(same_color(thing.rgb, COLORS[group.color] if group.color else things[0].rgb) for thing in things)


def _holds(relation: str | None, split: list[list[Found]]) -> bool:
    """Whether the offset between the groups' centres points the right way: more so than any other, and by a margin."""
    if relation is None:
        return True
    dx, dy = np.subtract(*(np.mean([(thing.x, thing.y) for thing in things], axis=0) for things in split))
    right, down = RELATIONS[relation]
    return dx * right + dy * down > max(abs(dx * down) + abs(dy * right), MARGIN)


def _splits(found: list[Found], groups: tuple[Group, ...]) -> Iterator[list[list[Found]]]:
    """Every way to hand all the things to the one or two groups, to each as many as it asks for, of its shape."""
    if len(found) != sum(group.count for group in groups):
        return
    for first in combinations(range(len(found)), groups[0].count):
        rest = [i for i in range(len(found)) if i not in first]
        split = [[found[i] for i in part] for part in (first, rest)[: len(groups)]]
        if all(thing.shape == group.shape for group, things in zip(groups, split, strict=True) for thing in things):
            yield split


def _reason(found: list[Found], scene: Scene, splits: list[list[list[Found]]]) -> str | None:
    if any(thing.shape is None for thing in found):
        return "extra"
    if splits:
        colored = [split for split in splits if all(map(_colored, split, scene.groups))]
        if not colored:
            return "wrong color"
        return None if any(_holds(scene.relation, split) for split in colored) else "wrong relation"
    kinds = [[g.shape == thing.shape and _colored([thing], g) for g in scene.groups] for thing in found]
    if found and all(map(any, kinds)) and all(map(any, zip(*kinds, strict=True))):
        return "wrong count"
    surplus = len(found) - sum(group.count for group in scene.groups)
    return "extra" if surplus > 0 else "missing" if surplus < 0 else "wrong shape"


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Whether a picture, uint8 (H, W, 3), shows exactly what the scene asks for, and if not, why.

    ValueError if the scene asks for a shape or a colour that data.py does not have.
    """
    for group in scene.groups:
        if group.shape not in SHAPES or group.color not in (None, *COLORS):
            raise ValueError(f"{group}: expected a shape of data.SHAPES, and a colour of data.COLORS or None")
    found = read_scene(image)
    splits = list(_splits(found, scene.groups))
    reason = _reason(found, scene, splits)
    distances = [[math.dist(thing.rgb, COLORS[group.color]) for group, things in zip(scene.groups, split, strict=True)
                  if group.color for thing in things] for split in splits]  # fmt: skip
    return Verdict(reason is None, reason, tuple(found), min(map(fmean, distances)) if any(distances) else None)


# ---------------------------------------------------------------------------------------------------------------------
# pictures that are no scenes of shapes: which of these candidates is it nearest to?


def pixel_features(pictures: np.ndarray) -> Tensor:
    """uint8 (B, height, width, 3) -> (B, height width 3), so that distances are those of the pixels."""
    return torch.from_numpy(pictures).float().flatten(1) / 255


def _augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, tilt, soften and recolour a little, each picture of (B, 3, S, S) in its own way."""

    def some(*shape: int) -> Tensor:
        return 2 * torch.rand(len(pictures), *shape, generator=generator) - 1

    scale, tilt, shift = 1 + 0.15 * some(1), 0.15 * some(1), 0.12 * some(2)
    rows = [torch.cat([scale, -tilt, shift[:, :1]], 1), torch.cat([tilt, scale, shift[:, 1:]], 1)]
    matrix = torch.stack(rows, 1)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(moved, 3, 1, 1)
    moved = torch.lerp(moved, soft, (some(1, 1, 1) + 1) / 2) * (1 + 0.15 * some(3, 1, 1)) + 0.1 * some(3, 1, 1)
    return moved + 0.03 * torch.randn(moved.shape, generator=generator)


def learned_features(candidates: np.ndarray, seed: int = 0, steps: int = 300) -> Callable[[np.ndarray], Tensor]:
    """A small network that has learned to tell these pictures, uint8 (M, S, S, 3), apart when they are shifted, tilted, soft
    or recoloured; it never sees a generated one. -> pictures (B, S, S, 3) to unit vectors (B, 128)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = (3, 32, 64, 128)
        layers = [layer for i, o in pairwise(widths) for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.GELU())]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(widths[-1] * 16, 128))
        names = nn.Parameter(torch.randn(len(candidates), 128))

    def embed(x: Tensor) -> Tensor:
        return F.normalize(net(x), dim=-1)

    glyphs = torch.from_numpy(candidates).movedim(-1, 1).float() / 127.5 - 1
    optimizer = torch.optim.AdamW([*net.parameters(), names], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(glyphs), (128,), generator=generator)
        scores = 16 * embed(_augment(glyphs[chosen], generator)) @ F.normalize(names, dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(scores, chosen).backward()
        optimizer.step()
        schedule.step()
    return torch.no_grad()(lambda pictures: embed(torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1))


def ranks(pictures: Tensor, candidates: Tensor, truth: list[int]) -> np.ndarray:
    """The place of each picture's true candidate among all by distance, 1 the nearest: features (P, D) and (M, D) -> (P,)."""
    distances = torch.cdist(pictures.double(), candidates.double())
    true = distances.gather(1, torch.tensor(truth)[:, None])
    return 1 + (distances < true).sum(1).numpy()
