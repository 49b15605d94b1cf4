"""Where (caption, picture) pairs come from.

    shapes     scenes of coloured shapes, drawn on the fly from a seed; captions in plain English
    emoji      the emoji of a colour font, under their English names
    a folder   pictures with captions: metadata.jsonl (file_name, text) or a .txt beside each picture

Every source answers `example(index, draws)` with one caption and `draws` pictures of it, uint8 (draws, size, size, 3).
The answer depends on the seed and the index alone, so a resumed run sees what it would have seen.
"""

import codecs
import hashlib
import io
import json
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageDraw, ImageFont, PngImagePlugin

# ---------------------------------------------------------------------------------------------------------------------
# the vocabulary of the shapes

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
CANONICAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of A from B; y down
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
BACKGROUND = (128, 128, 128)  # the grey at equal distance from all corners of the RGB cube, and 0 to the network

_FIRST_WORD = re.compile(  # CSS writes "lightgoldenrodyellow"; a caption says "light goldenrod yellow"
    "(alice|antique|blanched|cadet|cornflower|dark|deep|dodger|floral|forest|ghost|indian|lawn|lemon|light|medium|midnight"
    "|mint|misty|navajo|pale|papaya|peach|powder|rebecca|rosy|royal|saddle|sandy|slate|spring|steel|goldenrod(?=y)|sea(?=g)"
    "|sky|dim(?=g)|hot(?=p)|old(?=lace)|lavender(?=b)|lime(?=g)|olive(?=[dg])|orange(?=r)|violet(?=r)|white(?=s)|yellow(?=g)"
    "|green(?=y)|blue(?=v))"
)


def _css_colors(min_distance: float = 70) -> dict[str, tuple[int, int, int]]:
    """The CSS colour names of Pillow, in words, without those that would vanish on the background (RGB distance)."""
    colors = {_FIRST_WORD.sub(r"\1 ", name): ImageColor.getrgb(name) for name in sorted(ImageColor.colormap)}
    return {name: rgb for name, rgb in colors.items() if np.linalg.norm(np.subtract(rgb, BACKGROUND)) >= min_distance}


COLORS = _css_colors()
COLOR_NAMES = tuple(COLORS)


def canonical_triple(a: str, relation: str, b: str) -> tuple[str, str, str]:
    """ "b right of a" is the same picture as "a left of b": only "left of" and "above" are left over."""
    return {"right of": (b, "left of", a), "below": (b, "above", a)}.get(relation, (a, relation, b))


def _hashed_tenth(items: set) -> set:
    """One in ten, fixed for ever: the first tenth in the order of a hash, so that no seed changes it."""
    return set(sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())[: len(items) // 10])


# Never a training caption, word for word: the prompts that evaluate.py asks for.
PROMPTS = Path(__file__).parent / "assets" / "prompts"
TEST_PROMPTS = frozenset(
    json.loads(line)["prompt"].lower()
    for path in sorted(PROMPTS.glob("*.jsonl"))
    for line in path.read_text("utf-8").strip().split("\n")
)

# Never in a training caption either: a tenth of the pairs (names of one and the same RGB fall together) and of the triples.
_PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
_TRIPLES = [(a, relation, b) for a in SHAPES for relation in RELATIONS for b in SHAPES]
_held_out_rgb = _hashed_tenth({(COLORS[color], shape) for color, shape in _PAIRS})
_held_out_triples = _hashed_tenth({canonical_triple(*triple) for triple in _TRIPLES})
HELD_OUT_PAIRS = frozenset(pair for pair in _PAIRS if (COLORS[pair[0]], pair[1]) in _held_out_rgb)
HELD_OUT_TRIPLES = frozenset(triple for triple in _TRIPLES if canonical_triple(*triple) in _held_out_triples)


@dataclass(frozen=True)
class Group:
    """`count` things alike: "three small teal stars". color and size are None where the caption leaves them open."""

    count: int
    color: str | None
    shape: str
    size: str | None = None  # "small" or "large"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: one or two groups, and where the first stands as seen from the second, if it says so
    (then each group is one thing)."""

    groups: tuple[Group, ...]
    relation: str | None = None  # a key of RELATIONS

    def is_held_out(self) -> bool:
        triple = (self.groups[0].shape, self.relation, self.groups[-1].shape)
        return triple in HELD_OUT_TRIPLES or any((g.color, g.shape) in HELD_OUT_PAIRS for g in self.groups)


@dataclass(frozen=True)
class Thing:
    """One drawn thing. x, y (the centre) and radius in units of the picture's side, y downward."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float


# ---------------------------------------------------------------------------------------------------------------------
# scene -> caption


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words  # no colour or shape here begins with a spoken "you"


def _phrase(group: Group, rng: np.random.Generator, article: str = "a") -> str:
    """ "a red circle", "the small red circle", "three red circles", "2 circles"."""
    noun = group.shape if group.count == 1 else _plural(group.shape)
    words = " ".join(filter(None, (group.size, group.color, noun)))
    if group.count > 1:
        return f"{COUNT_WORDS[group.count] if rng.random() < 0.8 else group.count} {words}"
    return {"a": _article(words), "the": f"the {words}", "one": f"one {words}", "": words}[article]


_PREFIXES = ("a photo of ", "a picture of ", "an image of ", "a drawing of ", "a painting of ", "draw ", "show me ",
             "this is ", "a simple picture with ", "i see ", "here is ", "please draw ")  # fmt: skip
_ONE_FORMS = ("{s} {n} that is {c}", "{s} {n} colored {c}", "{s} {n} in {c}", "{s} {n} of {c} color",
              "{s} {c} colored {n}", "{s} {c}-colored {n}", "the {n} is {c}", "the color of the {n} is {c}", "{n}, {c}",
              "{s} {n} painted {c}")  # fmt: skip
_AND_FORMS = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}", "{a}, {b}",
              "both {a} and {b}", "{a} together with {b}", "{a} near {b}")  # fmt: skip
_RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "above", "above", "over", "higher than"),
    "below": ("below", "below", "below", "under", "beneath", "underneath"),
}


def _one_object(group: Group, rng: np.random.Generator, bare: bool) -> str:
    if group.color is None or rng.random() < 0.6:
        return _phrase(group, rng, str(rng.choice(["a", "a", "a", "the", "one", "" if bare else "a"])))
    form = str(rng.choice(_ONE_FORMS))
    article = str(rng.choice(["a", "the", "one"]))
    subject = "{size}" + form.removeprefix("{s} ") if form.startswith("{s}") else form.replace("the {n}", "the {size}{n}")
    words = subject.format(size=f"{group.size} " if group.size else "", n=group.shape, c=group.color)
    if not form.startswith("{s}"):
        return words
    return _article(words) if article == "a" else f"{article} {words}"


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many plain English captions of a scene; a third of the time the plainest one."""
    if rng.random() < 1 / 3:
        joiner = f" {scene.relation or 'and'} "
        return joiner.join(_phrase(group, rng) for group in scene.groups)
    prefix = str(rng.choice(_PREFIXES)) if rng.random() < 0.4 else ""
    if len(scene.groups) == 1:
        group = scene.groups[0]
        if group.count > 1:
            return (prefix or str(rng.choice(["", "", "there are "]))) + _phrase(group, rng)
        prefix = prefix or str(rng.choice(["", "", "", "there is "]))
        return prefix + _one_object(group, rng, bare=not prefix)
    article = str(rng.choice(["a", "a", "a", "the", "one"]))
    a, b = (_phrase(group, rng, article) for group in scene.groups)
    if scene.relation is None:
        return prefix + str(rng.choice(_AND_FORMS)).format(a=a, b=b)
    words = str(rng.choice(_RELATION_WORDS[scene.relation]))
    turn = rng.random()
    if turn < 0.6:
        return f"{prefix}{a} {words} {b}"
    if turn < 0.85 or words == "higher than":
        return f"{a} {rng.choice(['is', 'stands', 'sits'])} {words} {b}"
    return f"{words} {b} {rng.choice(['is', 'there is', 'you see'])} {a}"


# ---------------------------------------------------------------------------------------------------------------------
# scene -> picture

_OUTLINES = {  # corners in units of the radius, y downward
    "square": np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": np.array([(0, -0.95), (1, 0.8), (-1, 0.8)]),
    "diamond": np.array([(0, -1.08), (0.76, 0), (0, 1.08), (-0.76, 0)]),
    "cross": np.array([(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
                       (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)]),
    "star": np.array([(r * np.sin(i * np.pi / 5), 0.06 - r * np.cos(i * np.pi / 5))
                      for i, r in enumerate([1.12, 0.46] * 5)]),
    "heart": np.array([(np.sin(u) ** 3, -(13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)) / 15 - 0.1)
                       for u in np.linspace(0, 2 * np.pi, 40, endpoint=False)]),
}  # fmt: skip
RING_HOLE = 0.52  # inner over outer radius


def draw_things(things: list[Thing], image_size: int, oversample: int = 4) -> np.ndarray:
    """Render on the background, antialiased: (image_size, image_size, 3) uint8."""
    side = image_size * oversample
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for thing in things:
        x, y, r = thing.x * side, thing.y * side, thing.radius * side
        box = (x - r, y - r, x + r, y + r)
        if thing.shape == "circle":
            draw.ellipse(box, fill=thing.rgb)
        elif thing.shape == "ring":
            draw.ellipse(box, outline=thing.rgb, width=round(r * (1 - RING_HOLE)))
        else:
            draw.polygon([(x + r * u, y + r * v) for u, v in _OUTLINES[thing.shape]], fill=thing.rgb)
    return np.asarray(image.reduce(oversample))


_RADII = {1: (0.20, 0.28), 2: (0.14, 0.17), 3: (0.13, 0.16), 4: (0.13, 0.16)}  # by the number of things in the picture
_SIZES = {"small": 0.75, "large": 1.30}
_SLOTS = {  # where things go before they are jittered, in reading order: what is said first stands left, or above
    1: [[(0.5, 0.5)]],
    2: [[(0.26, 0.5), (0.74, 0.5)], [(0.5, 0.26), (0.5, 0.74)]],
    3: [[(0.25, 0.3), (0.75, 0.3), (0.5, 0.73)], [(0.5, 0.27), (0.25, 0.7), (0.75, 0.7)]],
    4: [[(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]],
}


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """Place the things of a scene without overlap; what the caption leaves open (colour, size, arrangement) is random."""
    n = sum(group.count for group in scene.groups)
    slots = [np.array(slot) for slot in _SLOTS[n][rng.integers(len(_SLOTS[n]))]]
    if scene.relation:
        step = 0.24 * np.array(RELATIONS[scene.relation])
        slots = [0.5 + step, 0.5 - step]
    jitter = {1: 0.06, 2: 0.04, 3: 0.03, 4: 0.03}[n]
    things = []
    for group in scene.groups:
        color = group.color
        while color is None or (group.color is None and (color, group.shape) in HELD_OUT_PAIRS):
            color = str(rng.choice(CANONICAL_COLORS))
        for _ in range(group.count):
            radius = rng.uniform(*_RADII[n]) * _SIZES.get(group.size, 1.0)
            if n > 1:
                radius = min(radius, 0.18)  # two large neighbours must not touch
            x, y = (np.clip(c + rng.uniform(-jitter, jitter), 1.08 * radius, 1 - 1.08 * radius) for c in slots.pop(0))
            things.append(Thing(group.shape, COLORS[color], float(x), float(y), float(radius)))
    return things


# ---------------------------------------------------------------------------------------------------------------------
# the sources


class Shapes:
    """Scenes of one to four coloured shapes with English captions, drawn on the fly. one_object: a single one in each."""

    prompts = ("a red circle", "a green star", "a photo of three small teal stars", "a red circle left of a blue square",
               "a yellow heart above a green cross", "the heart is to the left of the gold ring",
               "two white diamonds and a black triangle", "a ring that is purple")  # fmt: skip

    def __init__(self, image_size: int, seed: int = 0, one_object: bool = False):
        self.image_size, self.seed, self.one_object = image_size, seed, one_object

    def about(self) -> str:
        return f"scenes of {'one coloured shape' if self.one_object else 'coloured shapes'}, drawn on the fly from the seed"

    def fingerprint(self) -> None:
        """Drawn from the seed alone: nothing outside the code can change it."""

    def _group(self, count: int, colorless: float, rng: np.random.Generator) -> Group:
        canonical = rng.random() < 2 / 3
        color = None if rng.random() < colorless else str(rng.choice(CANONICAL_COLORS if canonical else COLOR_NAMES))
        shape = str(rng.choice(SHAPES))
        return Group(count, color, shape, str(rng.choice(["small", "large"])) if rng.random() < 0.15 else None)

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random scene, never one of the held-out pairs or triples."""
        while True:
            kind = rng.random()
            relation = None
            if kind < 0.38 or self.one_object:
                counts = (1,)
            elif kind < 0.54:  # two to four of a kind
                counts = (int(rng.integers(2, 5)),)
            elif kind < 0.74:  # two kinds, without a word on where they stand
                counts = [(1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)][rng.integers(10)]
            else:  # one left of, right of, above or below another
                counts, relation = (1, 1), str(rng.choice(list(RELATIONS)))
            colorless = 1.0 if rng.random() < 0.12 else 0.04  # a scene without any colour word, or a group here and there
            groups = tuple(self._group(count, colorless, rng) for count in counts)
            shapes, colors = [g.shape for g in groups], [COLORS.get(g.color) for g in groups]
            alike = len(groups) == 2 and shapes[0] == shapes[1] and (None in colors or colors[0] == colors[1])
            scene = Scene(groups, relation)
            if not alike and not scene.is_held_out():
                return scene

    def caption(self, index: int) -> tuple[str, Scene, np.random.Generator]:
        """The caption of an example, what it asks for, and the generator that goes on to draw it."""
        rng = np.random.default_rng([self.seed, index])
        while True:
            scene = self.scene(rng)
            caption = write_caption(scene, rng)
            if caption.lower() not in TEST_PROMPTS:
                return caption, scene, rng

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        caption, scene, rng = self.caption(index)
        return caption, np.stack([draw_things(lay_out(scene, rng), self.image_size) for _ in range(draws)])


EMOJI_FONTS = (("NotoColorEmoji.ttf", 109), ("Apple Color Emoji.ttc", 160), ("seguiemj.ttf", 128))  # with a size it has


def emoji_font(path: str | None = None) -> ImageFont.FreeTypeFont:
    """A colour-emoji font: this file, or the system's own. ValueError if there is none, or it has no colour."""
    for name, size in [(path, size) for _, size in EMOJI_FONTS] if path else EMOJI_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        face = np.asarray(draw_emoji("\U0001f600", font, 32)).astype(int)
        if (np.ptp(face, axis=-1) > 60).any():
            return font
        raise ValueError(f"{name} has no colours; expected a colour-emoji font such as {EMOJI_FONTS[0][0]}")
    raise ValueError(f"{path or 'a colour-emoji font'} cannot be read; install one (Debian, Ubuntu: apt install "
                     "fonts-noto-color-emoji) or name a file with --emoji-font")  # fmt: skip


def draw_emoji(text: str, font: ImageFont.FreeTypeFont, image_size: int) -> np.ndarray | None:
    """One emoji on the background, (image_size, image_size, 3) uint8; None if the font does not have it."""
    left, top, right, bottom = font.getbbox("\U0001f600")  # the frame of a full-sized face serves for all
    side = round(1.04 * max(right - left, bottom - top))
    image = Image.new("RGBA", (side, side), (*BACKGROUND, 0))
    corner = ((side - left - right) // 2, (side - top - bottom) // 2)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    if image.getbbox() is None:
        return None
    whole = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return np.asarray(whole.resize((image_size, image_size), Image.Resampling.LANCZOS))


class Emoji:
    """Unicode's emoji as a colour font draws them, under their English names and aliases (CLDR's, from the package emoji).

    Those of a single code point; variants: also sequences, which are skin tones, flags, families. `glyphs`: emoji ->
    picture, of all that the font has; `missing` it has not; `held_out`, a hashed tenth, is never trained on.
    """

    prompts = ("cat face", "a red apple", "an emoji of a rocket", "pizza", "sunflower", "the snowman", "a guitar", "octopus")
    forms = ("{n}", "{n}", "{a}", "{a}", "the {n}", "{n} emoji", "an emoji of {a}", "a picture of {a}", "an image of {a}")

    def __init__(self, image_size: int, seed: int = 0, font: str | None = None, variants: bool = False):
        try:
            from emoji import EMOJI_DATA, STATUS
        except ImportError:
            raise ValueError("--data emoji needs the package of the emoji's names: pip install emoji") from None
        self.image_size, self.seed = image_size, seed
        face, self.glyphs, self.names, self.missing = emoji_font(font), {}, {}, []
        tofu = draw_emoji("\U0010fffe", face, image_size)
        for text, entry in EMOJI_DATA.items():
            if entry["status"] != STATUS["fully_qualified"] or (len(text.rstrip("\ufe0f")) > 1 and not variants):
                continue
            glyph = draw_emoji(text, face, image_size)
            if glyph is None or (tofu is not None and np.array_equal(glyph, tofu)):
                self.missing.append(text)
                continue
            words = [name.strip(":").replace("_", " ").replace("’", "'") for name in (entry["en"], *entry.get("alias", ()))]
            self.glyphs[text] = glyph
            self.names[text] = [words[0]] + [word for word in words[1:] if len(word) > 2 and word.replace(" ", "").isalpha()]
        self.held_out = _hashed_tenth(set(self.glyphs))
        self.trained = [text for text in self.glyphs if text not in self.held_out]

    def about(self) -> str:
        return f"{len(self.trained)} emoji to train on, {len(self.held_out)} held out; the font lacks {len(self.missing)}"

    def fingerprint(self) -> str:
        """Another font draws other glyphs, another version of the package emoji gives other names."""
        digest = hashlib.sha256(repr(self.names).encode())
        for glyph in self.glyphs.values():
            digest.update(glyph)
        return digest.hexdigest()

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        text = self.trained[rng.integers(len(self.trained))]
        name = str(rng.choice(self.names[text]))
        one = name if name.endswith("s") else ("an " if name[0].lower() in "aeio" else "a ") + name
        return str(rng.choice(self.forms)).format(n=name, a=one), np.stack([self.glyphs[text]] * draws)


# ---------------------------------------------------------------------------------------------------------------------
# what users bring: text files, pictures, folders of both


def clean_text(text: str) -> str:
    """Text that every tokenizer takes: half a surrogate pair becomes U+FFFD.

    JSON may hold such halves ("\\ud83d", an emoji cut in two), and so may a word from a terminal
    that is not UTF-8.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path: Path) -> str:
    """A user's text file: UTF-8, or UTF-16 as Windows writes it, without its byte-order mark.

    Lines end in "\\n". ValueError, which names the file and the line, if it is in another encoding.
    """
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"byte {error.object[error.start]:#04x} is not {error.encoding}"
        raise ValueError(f"{path}, line {line}: {what}; save the file as UTF-8") from None
    if not is_utf16 and 4 * raw.count(b"\0") > len(raw):  # a NUL beside each letter
        raise ValueError(f"{path} is UTF-16 without a byte-order mark; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(where, line): the stripped lines of a user's text file. Blank ones are left out."""
    lines = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines cuts at U+2028 too
        if line.strip():
            lines.append((f"{path}, line {number}", line.strip()))
    return lines


def read_records(path: Path) -> list[tuple[str, dict]]:
    """(where, object): a user's JSON lines, or a .json file with a list of objects."""
    is_list = path.suffix.lower() == ".json"
    records = []
    for where, text in [(str(path), read_text(path))] if is_list else read_lines(path):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}; expected a JSON object") from None
        for record in value if is_list and isinstance(value, list) else [value]:
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {json.dumps(record)[:60]}; expected a JSON object")
            records.append((where, record))
    return records


def text_in(record: dict, key: str, where: str) -> str | None:
    """The string under a key; None for null, or without the key. ValueError for any other value."""
    value = record.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: {key} is {json.dumps(value)[:60]}; expected a string")
    return value and clean_text(value)


def files_in(root: Path, suffixes: set[str], below: bool = True) -> list[Path]:
    """The files with one of these suffixes in a folder and, if so wanted, in those below it.

    Suffixes count in capitals too. Hidden files do not: Mac's "._a.png" is no picture. Links to
    folders are followed, each folder once: they may lead in circles.
    """
    paths, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        inner[:] = sorted(name for name in inner if below and not name.startswith("."))
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):
                paths.append(Path(folder, name))
    return sorted(paths)


PngImagePlugin.MAX_TEXT_CHUNK = 2**25  # Pillow's 1 MB is less than some editors write about a PNG
DRAFT = 4  # a JPEG is decoded at no less than this many times the side that is asked for


def read_picture(path: str | Path, side: int | None = None) -> Image.Image:
    """A picture in RGB as viewers show it: upright by its EXIF data, on white, the first frame.

    With `side`, its centre square at that size. ValueError if it does not decode, or has more
    pixels than Pillow holds for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow has to say about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _as_seen(image, side)
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes Pillow raises anything, struct.error for one
        raise ValueError(f"{path} does not decode ({type(error).__name__}: {error})") from error


_TURNS = {  # EXIF's orientation -> what makes upright what the camera stored on its side
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _as_seen(image: Image.Image, side: int | None) -> Image.Image:
    # A JPEG can be decoded at a half, a quarter or an eighth of its size, whose last row and column
    # then stand for less than a pixel: draft says the size without that rounding.
    drafted = image.draft(None, (DRAFT * side, DRAFT * side)) if side else None
    image.load()
    width, height = drafted[1][2:] if drafted else image.size
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data: viewers show the picture as it lies
        turn = None
    if image.mode[0] in "IF":
        image = _in_8_bits(image)
    image = _in_srgb(image)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if side:
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.LANCZOS, box)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.transpose(turn) if turn is not None else image


def _in_srgb(image: Image.Image) -> Image.Image:
    """By its colour profile, if it has one: a phone's Display P3, a printer's CMYK."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    srgb = ImageCms.createProfile("sRGB")
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
    except ImageCms.PyCMSError:  # damaged, or for another kind of picture: viewers leave it out
        return image


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey in 16 bits, whole numbers or fractions -> 8 bits; Pillow would cut off all above 255."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    white = 65535
    if image.mode == "F":  # no white is agreed on: 1 or 255, whichever holds all values
        white = 1 if values.max() <= 1 else 255
    white = max(white, values.max())
    return Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))


PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CACHE_BYTES = 256e6  # of decoded pictures: what fits is decoded once, not every epoch


class Folder:
    """Pictures with captions: metadata.jsonl (Hugging Face's imagefolder), or a .txt beside each.

    Left out and counted: pictures without a caption or with an empty one, and pictures that
    metadata.jsonl names and that are not there. One that does not decode is skipped and counted in
    `skipped`. ValueError if none is left.
    """

    def __init__(self, root: str | Path, image_size: int, seed: int = 0):
        self.root, self.image_size, self.seed = Path(root), image_size, seed
        self.metadata = self.root / "metadata.jsonl"
        listed = self.metadata.is_file()
        named = self._read_metadata(self.metadata) if listed else self._read_sidecars()
        there = [(path, caption) for path, caption in named if os.path.isfile(path)]
        self.pairs = [(path, caption) for path, caption in there if caption]
        self.captioned = {path for path, _ in self.pairs}
        pictures = {path for path, _ in there}.union(files_in(self.root, PICTURE_SUFFIXES))
        self.uncaptioned = len(pictures - self.captioned)
        self.missing = len(named) - len(there)
        self.skipped: set[Path] = set()
        self.prompts = tuple(dict.fromkeys(caption for _, caption in self.pairs))[:8]
        self.order = lru_cache(maxsize=2)(self._order)
        self.picture = lru_cache(maxsize=int(CACHE_BYTES / (3 * image_size**2)))(self._picture)
        if not self.pairs:
            kinds = ", ".join(sorted(PICTURE_SUFFIXES))
            deeper = ""
            for path in self.root.glob("*/metadata.jsonl"):
                deeper = f"; did you mean {path.parent}?"
            raise ValueError(
                f"{root} holds no captioned picture ({self.about()}); expected metadata.jsonl with "
                f"file_name and text, or a .txt beside each picture ({kinds}){deeper}"
            )

    def about(self) -> str:
        said = f"{len(self.captioned)} pictures with captions"
        if self.uncaptioned:
            said += f"; {self.uncaptioned} left out without a caption"
        if self.missing:
            named = "that metadata.jsonl names" if self.metadata.is_file() else "links to pictures"
            said += f"; {self.missing} {named} are not there"
        return said

    def fingerprint(self) -> str:
        """Changes with the pictures' names, captions and sizes of files; not with their times."""
        digest = hashlib.sha256()
        for path, caption in self.pairs:
            inside = path.is_relative_to(self.root)  # metadata.jsonl may name others
            name = (path.relative_to(self.root) if inside else path).as_posix()
            digest.update(repr((name, path.stat().st_size, caption)).encode())
        return digest.hexdigest()

    def _read_metadata(self, metadata: Path) -> list[tuple[Path, str]]:
        named = []
        for where, record in read_records(metadata):
            name = text_in(record, "file_name", where)
            caption = text_in(record, "text", where) or ""
            if not name:
                raise ValueError(f"{where}: no file_name; expected a picture's name, and its text")
            name = name.replace("\\", "/")  # as Windows writes it
            named.append((self.root / name, caption.strip()))
        return named

    def _read_sidecars(self) -> list[tuple[Path, str]]:
        texts = {path.with_suffix(""): path for path in files_in(self.root, {".txt"})}
        named = []
        for path in files_in(self.root, PICTURE_SUFFIXES):
            text = texts.get(path.with_suffix(""))
            named.append((path, read_text(text).strip() if text else ""))
        return named

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def _picture(self, path: Path) -> np.ndarray:
        return np.asarray(read_picture(path, self.image_size))

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        epoch, place = divmod(index, len(self.pairs))
        order = self.order(epoch)
        for k in range(len(order)):
            path, caption = self.pairs[order[(place + k) % len(order)]]
            try:
                return caption, np.stack([self.picture(path)] * draws)
            except ValueError as error:
                if not self.skipped:
                    said = f"{error} and is skipped; later ones are counted silently"
                    warnings.warn(said, stacklevel=2)
                self.skipped.add(path)
        raise ValueError(f"none of the {len(self.pairs)} pictures in {self.root} decodes")


def open_source(
    name: str, image_size: int, seed: int = 0, one_object: bool = False, font: str | None = None, variants: bool = False
) -> Shapes | Emoji | Folder:
    """ "shapes", "emoji" (with its font, and whether variants are taken) or a folder's path -> a source of examples."""
    if name == "shapes":
        return Shapes(image_size, seed, one_object)
    if name == "emoji":
        return Emoji(image_size, seed, font, variants)
    if Path(name).is_dir():
        return Folder(name, image_size, seed)
    raise ValueError(f"--data {name}: expected shapes, emoji, or an existing folder of captioned pictures")
