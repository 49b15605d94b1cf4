"""Does a picture that was learned to be described in English come out in other languages?

    python evaluate.py --ckpt runs/described --suite describe-languages
    python sample.py --ckpt runs/described --describe picture.png --prompt "Una foto di"

A description is begun in a language ("Una foto di"), and the LLM goes on. Right is one with the
word of that language for the colour of the single thing in the picture, and of no other colour.
Beginnings and words stand in assets/describe/languages.json: the parts of the words that do not
change, by hand; none where the English word is the same.
"""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from data import CANONICAL_COLORS, draw_things, lay_out
from extras.caption_grammar import scene_of
from extras.describing import Shown
from extras.suites import read_suite

LANGUAGES = Path(__file__).parent.parent / "assets" / "describe" / "languages.json"
ENGLISH = re.compile(rf"\b({'|'.join(CANONICAL_COLORS)})\b")


@cache
def read_languages() -> dict[str, dict]:
    """Language -> its beginning, and its colours' words."""
    return json.loads(LANGUAGES.read_text("utf-8"))


def read_languages_suite(
    side: int, limit: int | None, only: list[str] | None, half: str
) -> list[Shown]:
    """The single things of the suite `languages`, drawn: each language a row, whose descriptions
    begin in it."""
    languages = read_languages()
    shown = []
    for prompt in read_suite("languages", limit, only, one=True, half=half):
        rng = np.random.default_rng([2026, int(prompt.scene_id, 16)])
        things = lay_out(prompt.scene, rng)
        beginning = languages[prompt.row]["beginning"]
        picture = draw_things(things, side)
        shown.append(Shown(prompt.row, prompt.scene, things, picture, beginning))
    return shown


def colors_in(said: str, row: str) -> set[str]:
    """The colours that a text names in the language of a row, longer words first: of Indonesian's
    "merah muda", pink, the half would be red."""
    words = []
    for color, forms in read_languages()[row]["colors"].items():
        words += [(form.casefold(), color) for form in forms]
    named = set()
    for word, color in sorted(words, key=lambda pair: -len(pair[0])):
        if word in said:
            named.add(color)
            said = said.replace(word, "*")
    return named


def why_not_in(said: str, shown: Shown) -> str | None:
    """Why a description does not say the thing's colour in the row's language; None if it does."""
    said = said.removeprefix(shown.beginning).casefold()
    in_english = scene_of(said) is not None
    if shown.row != "English":
        said = ENGLISH.sub("", said)  # "blu" is no part of "blue"
    named = colors_in(said, shown.row)
    if named == {shown.scene.groups[0].color}:
        return None
    if named:
        return "another color"
    return "in English" if in_english else "no color"
