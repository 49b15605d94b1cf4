"""Where (caption, picture) pairs come from.

    shapes     scenes of coloured shapes, drawn on the fly from a seed; captions in plain English
    a folder   of pictures with captions: extras/folders.py
    x.tar      shards of such pictures, or hf:NAME, a Hub's data set: extras/streams.py
    latents    such pictures in a folder, encoded by a VAE: extras/latents.py
    edits      pairs of shapes with an instruction between them: extras/edits.py
    emoji      of a colour font, under their English names: extras/emoji.py
    several    with commas, shapes,emoji: one expert learns them all: extras/mixed.py

What every source offers, and all that training asks of it:

    example(index, draws)   one caption, and `draws` pictures of it, uint8 (draws, size, size, 3)
    image_size              the side of its pictures in pixels
    prompts                 a few captions, for the grids of samples
    about()                 what it holds and what it leaves out, in a line
    fingerprint()           a hash of what it holds; None if the code alone says it
    made_for                what a checkpoint keeps of its options

An example depends on the seed and the index alone, so that a resumed run sees what it would have
seen. With `draws` above one, one reading of the caption by the LLM serves several pictures.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

# --------------------------------------------------------------------------------------------------
# the vocabulary of the shapes

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
# Colours: GenEval's. Relations: (x, y) of A as seen from B, y downward.
CANONICAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
                    "white")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
BACKGROUND = (128, 128, 128)  # in the middle of the RGB cube, and 0 to the network

_FIRST_WORD = re.compile(  # CSS writes "lightgoldenrodyellow"; a caption "light goldenrod yellow"
    "(alice|antique|blanched|cadet|cornflower|dark|deep|dodger|floral|forest|ghost|indian|lawn"
    "|lemon|light|medium|midnight|mint|misty|navajo|pale|papaya|peach|powder|rebecca|rosy|royal"
    "|saddle|sandy|slate|spring|steel|goldenrod(?=y)|sea(?=g)|sky|dim(?=g)|hot(?=p)|old(?=lace)"
    "|lavender(?=b)|lime(?=g)|olive(?=[dg])|orange(?=r)|violet(?=r)|white(?=s)|yellow(?=g)"
    "|green(?=y)|blue(?=v))"
)


def _css_colors(min_distance: float = 70) -> dict[str, tuple[int, int, int]]:
    """Pillow's CSS colours, in words, without those that would vanish on the background.

    min_distance: from it, in RGB levels.
    """
    colors = {}
    for name in sorted(ImageColor.colormap):
        rgb = ImageColor.getrgb(name)
        if np.linalg.norm(np.subtract(rgb, BACKGROUND)) >= min_distance:
            colors[_FIRST_WORD.sub(r"\1 ", name)] = rgb
    return colors


COLORS = _css_colors()
COLOR_NAMES = tuple(COLORS)

# --------------------------------------------------------------------------------------------------
# what is never trained on


def canonical_triple(a: str, relation: str, b: str) -> tuple[str, str, str]:
    """One name for one picture: "b right of a" is "a left of b", "b below a" is "a above b"."""
    if relation == "right of":
        return b, "left of", a
    if relation == "below":
        return b, "above", a
    return a, relation, b


def hashed_tenth(items: set) -> set:
    """One in ten, the first in the order of a hash: fixed for ever, whatever the seed."""
    ordered = sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())
    return set(ordered[: len(items) // 10])


PROMPTS = Path(__file__).parent / "assets" / "prompts"  # that evaluate.py asks for


def _read_test_prompts() -> frozenset[str]:
    prompts = set()
    for path in sorted(PROMPTS.glob("*.jsonl")):
        for line in path.read_text("utf-8").strip().split("\n"):
            prompts.add(json.loads(line)["prompt"].lower())
    return frozenset(prompts)


# Never a training caption, word for word.
TEST_PROMPTS = _read_test_prompts()

# Never in a training caption either: a tenth of all (color, shape) pairs, where colours of equal
# RGB go together, and a tenth of all (shape, relation, shape) triples.
_PAIRS = list(product(COLORS, SHAPES))
_TRIPLES = list(product(SHAPES, RELATIONS, SHAPES))
_held_out_rgb = hashed_tenth({(COLORS[color], shape) for color, shape in _PAIRS})
_held_out_triples = hashed_tenth({canonical_triple(*triple) for triple in _TRIPLES})
HELD_OUT_PAIRS = frozenset(pair for pair in _PAIRS if (COLORS[pair[0]], pair[1]) in _held_out_rgb)
HELD_OUT_TRIPLES = frozenset(t for t in _TRIPLES if canonical_triple(*t) in _held_out_triples)


@dataclass(frozen=True)
class Group:
    """`count` things alike, as in "three small teal stars".

    color and size ("small" or "large") are None where the caption leaves them open.
    """

    count: int
    color: str | None
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: one group or two.

    relation, a key of RELATIONS: where the first stands as seen from the second, if the caption
    says so; then each group is one thing.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def is_held_out(self) -> bool:
        for group in self.groups:
            if (group.color, group.shape) in HELD_OUT_PAIRS:
                return True
        triple = (self.groups[0].shape, self.relation, self.groups[-1].shape)
        return triple in HELD_OUT_TRIPLES


# --------------------------------------------------------------------------------------------------
# scene -> caption


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many plain English captions of a scene; a third of the time the plainest one."""
    if rng.random() < 1 / 3:
        joiner = f" {scene.relation or 'and'} "
        return joiner.join([_phrase(group, rng) for group in scene.groups])
    prefix = ""
    if rng.random() < 0.4:
        prefix = str(rng.choice(_PREFIXES))
    if len(scene.groups) == 1:
        return _of_one_group(scene.groups[0], prefix, rng)

    # two groups: beside each other, or in a relation
    article = str(rng.choice(["a", "a", "a", "the", "one"]))
    a = _phrase(scene.groups[0], rng, article)
    b = _phrase(scene.groups[1], rng, article)
    if scene.relation is None:
        return prefix + str(rng.choice(_AND_FORMS)).format(a=a, b=b)
    words = str(rng.choice(_RELATION_WORDS[scene.relation]))
    turn = rng.random()
    if turn < 0.6:
        return f"{prefix}{a} {words} {b}"
    if turn < 0.85 or words == "higher than":
        return f"{a} {rng.choice(['is', 'stands', 'sits'])} {words} {b}"
    return f"{words} {b} {rng.choice(['is', 'there is', 'you see'])} {a}"


_PREFIXES = ("a photo of ", "a picture of ", "an image of ", "a drawing of ", "a painting of ",
             "draw ", "show me ", "this is ", "a simple picture with ", "i see ", "here is ",
             "please draw ")
_ONE_FORMS = (  # {s}: an article and a size, {n}: the shape, {c}: its colour
    "{s} {n} that is {c}", "{s} {n} colored {c}", "{s} {n} in {c}", "{s} {n} of {c} color",
    "{s} {c} colored {n}", "{s} {c}-colored {n}", "the {n} is {c}",
    "the color of the {n} is {c}", "{n}, {c}", "{s} {n} painted {c}",
)
_AND_FORMS = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}",
              "{a}, {b}", "both {a} and {b}", "{a} together with {b}", "{a} near {b}")
_RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "right of", "to the right of", "on the right of",
                 "on the right side of"),
    "above": ("above", "above", "above", "over", "higher than"),
    "below": ("below", "below", "below", "under", "beneath", "underneath"),
}


def _of_one_group(group: Group, prefix: str, rng: np.random.Generator) -> str:
    if group.count > 1:
        prefix = prefix or str(rng.choice(["", "", "there are "]))
        return prefix + _phrase(group, rng)
    prefix = prefix or str(rng.choice(["", "", "", "there is "]))
    return prefix + _of_one_thing(group, rng, bare=not prefix)


def _of_one_thing(group: Group, rng: np.random.Generator, bare: bool) -> str:
    """bare: nothing stands before it, so that it may do without an article."""
    if group.color is None or rng.random() < 0.6:
        no_article = "" if bare else "a"
        article = str(rng.choice(["a", "a", "a", "the", "one", no_article]))
        return _phrase(group, rng, article)
    form = str(rng.choice(_ONE_FORMS))
    article = str(rng.choice(["a", "the", "one"]))
    size = f"{group.size} " if group.size else ""
    if not form.startswith("{s}"):  # "the heart is red" has its own article
        form = form.replace("the {n}", "the {size}{n}")
        return form.format(size=size, n=group.shape, c=group.color)
    form = "{size}" + form.removeprefix("{s} ")
    words = form.format(size=size, n=group.shape, c=group.color)
    if article == "a":
        return with_article(words)
    return f"{article} {words}"


def _phrase(group: Group, rng: np.random.Generator, article: str = "a") -> str:
    """As "a red circle", "the small red circle", "three red circles", "2 circles"."""
    noun = group.shape
    if group.count > 1:
        noun += "es" if noun.endswith("s") else "s"
    words = " ".join(filter(None, (group.size, group.color, noun)))
    if group.count > 1:
        count = COUNT_WORDS[group.count]
        if rng.random() >= 0.8:
            count = group.count
        return f"{count} {words}"
    if article == "a":
        return with_article(words)
    return f"{article} {words}".strip()


def with_article(words: str) -> str:
    """No colour or shape here begins with a spoken "you"."""
    return ("an " if words[0] in "aeio" else "a ") + words


# --------------------------------------------------------------------------------------------------
# scene -> picture


@dataclass(frozen=True)
class Thing:
    """One drawn thing. x, y (the centre) and radius in units of the picture's side, y downward."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float


_RADII = {1: (0.20, 0.28), 2: (0.14, 0.17), 3: (0.13, 0.16), 4: (0.13, 0.16)}  # by how many things
_JITTER = {1: 0.06, 2: 0.04, 3: 0.03, 4: 0.03}
_SIZES = {"small": 0.75, "large": 1.30, None: 1.0}
_SLOTS = {  # where they go before the jitter: what is said first stands left, or above
    1: [[(0.5, 0.5)]],
    2: [[(0.26, 0.5), (0.74, 0.5)], [(0.5, 0.26), (0.5, 0.74)]],
    3: [[(0.25, 0.3), (0.75, 0.3), (0.5, 0.73)], [(0.5, 0.27), (0.25, 0.7), (0.75, 0.7)]],
    4: [[(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]],
}


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """Place the things of a scene without overlap.

    What the caption leaves open (colour, size, arrangement) is random.
    """
    n = sum(group.count for group in scene.groups)
    slots = list(_SLOTS[n][rng.integers(len(_SLOTS[n]))])
    if scene.relation:
        step = 0.24 * np.array(RELATIONS[scene.relation])
        slots = [0.5 + step, 0.5 - step]
    jitter = _JITTER[n]
    things = []
    for group in scene.groups:
        color = group.color
        # one that is open is drawn again while it would make a held-out pair
        while color is None or (group.color is None and (color, group.shape) in HELD_OUT_PAIRS):
            color = str(rng.choice(CANONICAL_COLORS))
        for _ in range(group.count):
            radius = rng.uniform(*_RADII[n]) * _SIZES[group.size]
            if n > 1:
                radius = min(radius, 0.18)  # two large neighbours must not touch
            edge = 1.08 * radius
            slot_x, slot_y = slots.pop(0)
            x = np.clip(slot_x + rng.uniform(-jitter, jitter), edge, 1 - edge)
            y = np.clip(slot_y + rng.uniform(-jitter, jitter), edge, 1 - edge)
            things.append(Thing(group.shape, COLORS[color], float(x), float(y), float(radius)))
    return things


def draw_things(things: list[Thing], image_size: int, oversample: int = 4) -> np.ndarray:
    """Render on the background, antialiased: (image_size, image_size, 3) uint8."""
    side = image_size * oversample
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for thing in things:
        x = thing.x * side
        y = thing.y * side
        r = thing.radius * side
        box = (x - r, y - r, x + r, y + r)
        if thing.shape == "circle":
            draw.ellipse(box, fill=thing.rgb)
        elif thing.shape == "ring":
            draw.ellipse(box, outline=thing.rgb, width=round(r * (1 - RING_HOLE)))
        else:
            corners = [(x + r * u, y + r * v) for u, v in _OUTLINES[thing.shape]]
            draw.polygon(corners, fill=thing.rgb)
    return np.asarray(image.reduce(oversample))


def _star() -> list[tuple[float, float]]:
    corners = []
    for i, radius in enumerate([1.12, 0.46] * 5):
        angle = i * np.pi / 5
        corners.append((radius * np.sin(angle), 0.06 - radius * np.cos(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    """The well-known heart curve of sines and cosines."""
    corners = []
    for u in np.linspace(0, 2 * np.pi, 40, endpoint=False):
        height = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
        corners.append((np.sin(u) ** 3, -height / 15 - 0.1))
    return corners


RING_HOLE = 0.52  # inner over outer radius
_OUTLINES = {  # corners in units of the radius, y downward
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1.08), (0.76, 0), (0, 1.08), (-0.76, 0)],
    "cross": [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
              (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
    "star": _star(),
    "heart": _heart(),
}

# --------------------------------------------------------------------------------------------------
# the sources


class Shapes:
    """Scenes of one to four coloured shapes with English captions, drawn on the fly.

    one_object: a single shape in each. colored: two to four of a kind have their colour named as
    often as anything else; else half of such captions leave it open ("three stars").
    """

    prompts = (
        "a red circle", "a green star", "a photo of three small teal stars",
        "a red circle left of a blue square", "a yellow heart above a green cross",
        "the heart is to the left of the gold ring", "two white diamonds and a black triangle",
        "a ring that is purple",
    )

    def __init__(
        self, image_size: int, seed: int = 0, one_object: bool = False, colored: bool = False
    ):
        self.image_size = image_size
        self.seed = seed
        self.one_object = one_object
        self.colored = colored
        self.made_for = {}
        if one_object:
            self.made_for["one_object"] = True
        if colored:
            self.made_for["colored"] = True

    def about(self) -> str:
        what = "one coloured shape" if self.one_object else "coloured shapes"
        return f"scenes of {what}, drawn on the fly from the seed"

    def fingerprint(self) -> None:
        """Drawn from the seed alone: nothing outside the code can change it."""

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        caption, scene, rng = self.caption(index)
        pictures = []
        for _ in range(draws):
            pictures.append(draw_things(lay_out(scene, rng), self.image_size))
        return caption, np.stack(pictures)

    def caption(self, index: int) -> tuple[str, Scene, np.random.Generator]:
        """An example's caption, what it asks for, and the generator that goes on to draw it."""
        rng = np.random.default_rng([self.seed, index])
        while True:
            scene = self.scene(rng)
            caption = write_caption(scene, rng)
            if caption.lower() not in TEST_PROMPTS:
                return caption, scene, rng

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random scene, never one of the held-out pairs or triples."""
        while True:
            relation = None
            kind = rng.random()
            if kind < 0.38 or self.one_object:
                counts = (1,)
            elif kind < 0.54:  # 16 %: two to four of a kind
                counts = (int(rng.integers(2, 5)),)
            elif kind < 0.74:  # 20 %: two kinds, without a word on where they stand
                counts = _TWO_COUNTS[rng.integers(len(_TWO_COUNTS))]
            else:  # 26 %: one left of, right of, above or below another
                counts = (1, 1)
                relation = str(rng.choice(list(RELATIONS)))
            # a scene without any colour word, or a group here and there
            colorless = 1.0 if rng.random() < 0.12 else 0.04
            of_a_kind = len(counts) == 1 and counts[0] > 1
            if of_a_kind and not self.colored and rng.random() < 0.5:
                colorless = 1.0  # they must agree on one
            groups = tuple([self._group(count, colorless, rng) for count in counts])
            scene = Scene(groups, relation)
            if not _look_alike(groups) and not scene.is_held_out():
                return scene

    def _group(self, count: int, colorless: float, rng: np.random.Generator) -> Group:
        colors = CANONICAL_COLORS if rng.random() < 2 / 3 else COLOR_NAMES
        color = None
        if rng.random() >= colorless:
            color = str(rng.choice(colors))
        shape = str(rng.choice(SHAPES))
        size = None
        if rng.random() < 0.15:
            size = str(rng.choice(["small", "large"]))
        return Group(count, color, shape, size)


_TWO_COUNTS = [(1, 1)] * 5 + [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]


def _look_alike(groups: tuple[Group, ...]) -> bool:
    """Two groups of one shape whose colours are one RGB, or may be: which is which?"""
    if len(groups) < 2 or groups[0].shape != groups[1].shape:
        return False
    first = COLORS.get(groups[0].color)
    second = COLORS.get(groups[1].color)
    return first is None or second is None or first == second


def open_source(name: str, image_size: int, seed: int = 0, **options):
    """A source of examples: "shapes", "emoji" or "edits", a folder's path, tar shards or "hf:" and
    the name of a data set (extras/streams.py).

    options: see SOURCES; or `parts`, of several sources their names and options (flags.data_form).
    ValueError for a source that is not there, or an option that it has not.
    """
    if "parts" in options:
        from extras.mixed import Mixed

        return Mixed(options["parts"], image_size, seed)
    kind = kind_of_source(name)
    check_options(name, options, SOURCES[kind])
    if kind == "shapes":
        return Shapes(image_size, seed, **options)
    if kind == "edits":
        from extras.edits import Edits

        return Edits(image_size, seed)
    if kind == "emoji":
        from extras.emoji import Emoji

        return Emoji(image_size, seed, **options)
    if kind == "shards":
        from extras.streams import Shards

        return Shards(name, image_size, seed)
    if kind == "hub":
        from extras.streams import HubSet

        return HubSet(name.removeprefix("hf:"), image_size, seed, **options)
    if kind == "latents":
        from extras.latents import Encoded

        return Encoded(name, image_size, seed)
    from extras.folders import open_folder

    return open_folder(name, image_size, seed)


SOURCES = {  # kind -> its options: those that are switched on, and those with a value
    "shapes": {"one_object": bool, "colored": bool},
    "emoji": {"font": str, "variants": bool, "no_shapes": bool},
    "edits": {},
    "folder": {},
    "latents": {},
    "shards": {},
    "hub": {"split": str, "image": str, "text": str},
}


def kind_of_source(name: str) -> str:
    """ValueError if there is none of this name."""
    if name in ("shapes", "emoji", "edits"):
        return name
    if Path(name).is_dir():
        return "latents" if (Path(name) / "latents.json").is_file() else "folder"
    if name.startswith("hf:"):
        return "hub"
    if name.endswith(".tar"):
        return "shards"
    expected = "shapes, emoji, edits, hf:NAME, .tar files, or an existing folder of pictures"
    raise ValueError(f"--data {name}: expected {expected}")


def check_options(name: str, options: dict, known: dict) -> None:
    for option, value in options.items():
        said = option.replace("_", "-")
        if option not in known:
            owns = ", ".join(known).replace("_", "-") or "none"
            raise ValueError(f"--data {name} has no option {said!r}; it has {owns}")
        if not isinstance(value, known[option]):
            expected = "no value" if known[option] is bool else f"a value: {said}=VALUE"
            raise ValueError(f"--data {name}:{said}: expected {expected}")
