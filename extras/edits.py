"""Edits: a picture, an English instruction, and the picture after it.

    python train.py --from runs/shapes --data edits
    python sample.py --image in.png --prompt "make the circle red"
    python evaluate.py --ckpt runs/edits-from-shapes --suite edits

One to three things stand on a grid of 3 x 3 places, each of another shape, so that "the circle" is
one of them. Five kinds of instruction; nothing else changes, and all of it is judged exactly.
"""

from dataclasses import dataclass, replace

import numpy as np

from data import (
    CANONICAL_COLORS,
    COLOR_NAMES,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Thing,
    draw_things,
    with_article,
)
from extras.colors import same_color

KINDS = ("color", "shape", "move", "remove", "add")
CELLS = (0.2, 0.5, 0.8)  # of a place, in units of the side
JITTER = 0.02
RADII = (0.10, 0.13)
SMALL = 0.75  # of "a small blue heart"
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BESIDE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "up": ("above", "over"),
    "down": ("below", "under"),
}
COLOR_FORMS = (
    "make {the} {c}",
    "turn {the} {c}",
    "paint {the} {c}",
    "color {the} {c}",
    "{the} should be {c}",
    "change the color of {the} to {c}",
)
SHAPE_FORMS = (
    "turn {the} into {a}",
    "replace {the} with {a}",
    "make {the} {a}",
    "change {the} to {a}",
)
MOVE_FORMS = {
    "left": ("move {the} to the left", "move {the} left", "shift {the} to the left"),
    "right": ("move {the} to the right", "move {the} right", "shift {the} to the right"),
    "up": ("move {the} up", "move {the} upward", "shift {the} up"),
    "down": ("move {the} down", "move {the} downward", "shift {the} down"),
}
REMOVE_FORMS = ("remove {the}", "delete {the}", "take {the} away", "erase {the}")
ADD_FORMS = ("add {a} {where} {the}", "put {a} {where} {the}", "draw {a} {where} {the}")


@dataclass(frozen=True)
class Placed:
    """A thing in its place: column and row of the grid, and how it is drawn there."""

    shape: str
    color: str
    cell: tuple[int, int]
    shift: tuple[float, float]
    radius: float

    def thing(self) -> Thing:
        x = CELLS[self.cell[0]] + self.shift[0]
        y = CELLS[self.cell[1]] + self.shift[1]
        return Thing(self.shape, COLORS[self.color], x, y, self.radius)


@dataclass(frozen=True)
class Edit:
    """kind: of KINDS. Things before and after."""

    kind: str
    instruction: str
    before: tuple[Placed, ...]
    after: tuple[Placed, ...]


class Edits:
    """Pairs of pictures and what was said between them, drawn on the fly from the seed.

    An example's pictures are (draws, 2, size, size, 3): the same pair `draws` times, since what an
    instruction asks for is one picture.
    """

    before_and_after = True
    prompts = (
        "make the circle red",
        "turn the star into a heart",
        "move the square to the right",
        "remove the ring",
        "add a small blue heart above the cross",
        "paint the triangle pink",
        "move the diamond up",
        "delete the heart",
    )

    def __init__(self, image_size: int, seed: int = 0):
        self.image_size = image_size
        self.seed = seed
        self.made_for = {"pairs": True}

    def about(self) -> str:
        return "pairs of coloured shapes and an instruction, drawn on the fly from the seed"

    def fingerprint(self) -> None:
        """Drawn from the seed alone: nothing outside the code can change it."""

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        edit = random_edit(rng)
        while is_held_out(edit):
            edit = random_edit(rng)
        pair = np.stack([self.picture(edit.before), self.picture(edit.after)])
        return edit.instruction, np.broadcast_to(pair, (draws, *pair.shape))

    def picture(self, things: tuple[Placed, ...]) -> np.ndarray:
        return draw_things([placed.thing() for placed in things], self.image_size)

    def shown(self) -> np.ndarray:
        """A picture for each of `prompts`, of the thing that it speaks of and another:
        (prompts, size, size, 3) uint8."""
        pictures = []
        for i, prompt in enumerate(self.prompts):
            rng = np.random.default_rng([self.seed, i])
            first = next(shape for shape in SHAPES if f"the {shape}" in prompt)
            second = SHAPES[(SHAPES.index(first) + 3) % len(SHAPES)]
            things = (placed(first, "green", (1, 1), rng), placed(second, "white", (2, 2), rng))
            pictures.append(self.picture(things))
        return np.stack(pictures)


def is_held_out(edit: Edit) -> bool:
    """Pairs of colour and shape that shapes never show, no edit shows either."""
    for things in (edit.before, edit.after):
        if any((one.color, one.shape) in HELD_OUT_PAIRS for one in things):
            return True
    return False


def placed(
    shape: str, color: str, cell: tuple[int, int], rng: np.random.Generator, scale: float = 1.0
) -> Placed:
    shift = rng.uniform(-JITTER, JITTER, 2)
    radius = scale * rng.uniform(*RADII)
    return Placed(shape, color, cell, (float(shift[0]), float(shift[1])), float(radius))


def random_edit(rng: np.random.Generator) -> Edit:
    """A scene and an instruction that can be carried out in it."""
    while True:
        kind = KINDS[rng.integers(len(KINDS))]
        edit = edit_of(kind, random_scene(rng), rng)
        if edit:
            return edit


def random_scene(rng: np.random.Generator) -> list[Placed]:
    """One to three things of different shapes, in different places."""
    count = int(rng.integers(1, 4))
    shapes = rng.choice(SHAPES, count, replace=False)
    cells = rng.choice(9, count, replace=False)
    scene = []
    for shape, cell in zip(shapes, cells):
        where = (int(cell % 3), int(cell // 3))
        scene.append(placed(str(shape), random_color(rng), where, rng))
    return scene


def random_color(rng: np.random.Generator) -> str:
    colors = CANONICAL_COLORS if rng.random() < 2 / 3 else COLOR_NAMES
    return str(rng.choice(colors))


def edit_of(kind: str, scene: list[Placed], rng: np.random.Generator) -> Edit | None:
    """An instruction of this kind for the first thing of a scene; None if it cannot be."""
    old, *others = scene
    the = f"the {old.shape}"
    if rng.random() < 0.3:
        the = f"the {old.color} {old.shape}"
    after = list(others)
    if kind == "color":
        new = replace(old, color=random_color(rng))
        if same_color(COLORS[new.color], COLORS[old.color]):
            return None  # nobody would see the change
        said = pick(COLOR_FORMS, rng).format(the=the, c=new.color)
        after.append(new)
    elif kind == "shape":
        new = replace(old, shape=str(rng.choice(SHAPES)))
        if any(new.shape == one.shape for one in scene):
            return None
        said = pick(SHAPE_FORMS, rng).format(the=the, a=with_article(new.shape))
        after.append(new)
    elif kind == "remove":
        if not others:
            return None
        said = pick(REMOVE_FORMS, rng).format(the=the)
    else:
        way = str(rng.choice(list(STEPS)))
        cell = (old.cell[0] + STEPS[way][0], old.cell[1] + STEPS[way][1])
        free = all(one.cell != cell for one in scene)
        if not free or min(cell) < 0 or max(cell) > 2:
            return None
        if kind == "move":
            said = pick(MOVE_FORMS[way], rng).format(the=the)
            after.append(replace(old, cell=cell))
        else:
            said, new = addition(the, way, cell, scene, rng)
            after += [old, new]
    return Edit(kind, said, tuple(scene), tuple(after))


def addition(
    the: str, way: str, cell: tuple[int, int], scene: list[Placed], rng: np.random.Generator
) -> tuple[str, Placed]:
    """A thing of another shape than those in the scene, at this place beside `the`."""
    shapes = [shape for shape in SHAPES if all(shape != one.shape for one in scene)]
    small = rng.random() < 0.2
    new = placed(str(rng.choice(shapes)), random_color(rng), cell, rng, SMALL if small else 1.0)
    words = f"small {new.color} {new.shape}" if small else f"{new.color} {new.shape}"
    where = pick(BESIDE[way], rng)
    return pick(ADD_FORMS, rng).format(a=with_article(words), where=where, the=the), new


def pick(forms: tuple[str, ...], rng: np.random.Generator) -> str:
    return forms[rng.integers(len(forms))]
