"""Emoji as a source of examples: 1,300 pictures under their English names.

    python train.py --data emoji                                       # the system's font
    python train.py --data emoji:font=NotoColorEmoji.ttf:variants      # skin tones, flags, ...
    python -m extras.emoji --ckpt runs/emoji                           # scores: emoji_suites.py

Names come from the package emoji (CLDR's), pictures from a colour font.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.emoji")
    import cli

    cli.start()

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import one_line_errors
from data import BACKGROUND, COLORS, COUNT_WORDS, SHAPES, hashed_tenth

FONTS = (  # with a size that each has
    ("NotoColorEmoji.ttf", 109),
    ("Apple Color Emoji.ttc", 160),
    ("seguiemj.ttf", 128),
)
FACE = "\U0001f600"  # a full-sized one
UNKNOWN = "\U0010fffe"  # no character: a font that draws it draws a box
NOUNS_OF_SHAPES = {*SHAPES, *[f"{shape}s" for shape in SHAPES]}
WORDS_OF_SHAPES = {*NOUNS_OF_SHAPES, *COUNT_WORDS.values(), "small", "medium", "large"}
WORDS_OF_SHAPES.update(word for color in COLORS for word in color.split())


class Emoji:
    """Unicode's emoji as a colour font draws them, under their English names and aliases.

    Those of a single code point; variants: also sequences, which are skin tones, flags, families.
    no_shapes: without the names that a caption of the shapes could be, "red heart", "star": beside
    shapes, such words would mean two pictures, and some are prompts of the suites.

    `glyphs`: emoji -> picture, of all that the font has; `missing` it has not; `held_out`, a hashed
    tenth, is never trained on. ValueError without the package emoji, or without a font.
    """

    prompts = (
        "cat face",
        "a red apple",
        "an emoji of a rocket",
        "pizza",
        "sunflower",
        "the snowman",
        "a guitar",
        "octopus",
    )
    forms = (  # n: the name; a: with its article
        "{n}",
        "{n}",
        "{a}",
        "{a}",
        "the {n}",
        "{n} emoji",
        "an emoji of {a}",
        "a picture of {a}",
        "an image of {a}",
    )

    def __init__(
        self,
        image_size: int,
        seed: int = 0,
        font: str | None = None,
        variants: bool = False,
        no_shapes: bool = False,
    ):
        try:
            from emoji import EMOJI_DATA, STATUS  # the package, not this file
        except ImportError:
            raise ValueError(
                "--data emoji needs the package of the emoji's names: pip install emoji"
            ) from None
        self.image_size = image_size
        self.seed = seed
        self.made_for = {"emoji": {"font": font, "variants": variants}}
        if no_shapes:
            self.made_for["emoji"]["no_shapes"] = True
        self.glyphs: dict[str, np.ndarray] = {}
        self.names: dict[str, list[str]] = {}
        self.missing: list[str] = []
        face = emoji_font(font)
        tofu = draw_emoji(UNKNOWN, face, image_size)
        for text, entry in EMOJI_DATA.items():
            is_sequence = len(text.rstrip("\ufe0f")) > 1
            if entry["status"] != STATUS["fully_qualified"] or (is_sequence and not variants):
                continue
            glyph = draw_emoji(text, face, image_size)
            if glyph is None or (tofu is not None and np.array_equal(glyph, tofu)):
                self.missing.append(text)
                continue
            self.glyphs[text] = glyph
            self.names[text] = _names(entry)
            if no_shapes:
                self.names[text] = [name for name in self.names[text] if not _is_of_shapes(name)]
        named = {text for text in self.names if self.names[text]}
        self.nameless = len(self.glyphs) - len(named)
        self.held_out = hashed_tenth(set(self.glyphs)) & named
        self.trained = [text for text in self.glyphs if text in named - self.held_out]

    def about(self) -> str:
        said = f"{len(self.trained)} emoji to train on, {len(self.held_out)} held out; "
        if self.nameless:
            said += f"{self.nameless} left out, called as shapes are; "
        return said + f"the font lacks {len(self.missing)}"

    def fingerprint(self) -> str:
        """Another font draws other glyphs, another version of the package gives other names."""
        digest = hashlib.sha256(repr(self.names).encode())
        for glyph in self.glyphs.values():
            digest.update(glyph)
        return digest.hexdigest()

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        text = self.trained[rng.integers(len(self.trained))]
        name = str(rng.choice(self.names[text]))
        form = str(rng.choice(self.forms))
        caption = form.format(n=name, a=_with_article(name))
        return caption, np.stack([self.glyphs[text]] * draws)

    def unseen(self) -> Iterator[tuple[str, np.ndarray]]:
        """The names and pictures that are held out."""
        for text in self.glyphs:
            if text in self.held_out:
                yield self.names[text][0], self.glyphs[text]


def _names(entry: dict) -> list[str]:
    """The name, then those of the aliases that are words: no ":+1:", no "uk"."""
    names = []
    for name in (entry["en"], *entry.get("alias", ())):
        words = name.strip(":").replace("_", " ").replace("’", "'")
        are_words = len(words) > 2 and words.replace(" ", "").isalpha()
        if not names or are_words:
            names.append(words)
    return names


def _is_of_shapes(name: str) -> bool:
    """Whether a name is a shape, and no word of it is more than a colour, a count or a size."""
    words = set(re.split(r"\W+", name.lower()))
    return bool(words & NOUNS_OF_SHAPES) and words <= WORDS_OF_SHAPES


def _with_article(name: str) -> str:
    if name.endswith("s"):
        return name
    return ("an " if name[0].lower() in "aeio" else "a ") + name


def draw_emoji(text: str, font: ImageFont.FreeTypeFont, image_size: int) -> np.ndarray | None:
    """One emoji on the background, (image_size, image_size, 3) uint8.

    None if the font does not have it.
    """
    left, top, right, bottom = font.getbbox(FACE)  # its frame serves for all
    side = round(1.04 * max(right - left, bottom - top))
    image = Image.new("RGBA", (side, side), (*BACKGROUND, 0))
    corner = ((side - left - right) // 2, (side - top - bottom) // 2)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    if image.getbbox() is None:
        return None
    behind = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    whole = Image.alpha_composite(behind, image).convert("RGB")
    return np.asarray(whole.resize((image_size, image_size), Image.Resampling.LANCZOS))


def emoji_font(path: str | None = None) -> ImageFont.FreeTypeFont:
    """A colour-emoji font: this file, or the system's own.

    ValueError if there is none, or it has no colour.
    """
    for system_name, size in FONTS:  # a file, too, may have one of these sizes alone
        name = path or system_name
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        face = draw_emoji(FACE, font, 32)
        if face is not None and (np.ptp(face, axis=-1) > 60).any():
            return font
        raise ValueError(
            f"{name} has no colours; expected a colour-emoji font such as {FONTS[0][0]}"
        )
    raise ValueError(
        f"{path or 'a colour-emoji font'} cannot be read; install one (Debian, Ubuntu: apt install "
        "fonts-noto-color-emoji) or name a file with --data emoji:font=FILE"
    )


def main(argv: list[str] | None = None) -> None:
    from extras import emoji_suites

    emoji_suites.main(argv)


if __name__ == "__main__":
    one_line_errors(main)
