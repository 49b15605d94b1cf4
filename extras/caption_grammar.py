"""A caption of coloured shapes -> the scene that it tells of: what data.py writes, read back."""

import re

from data import COLORS, COUNT_WORDS, SHAPES, Group, Scene

_COUNTS = {"a": 1, "an": 1, "the": 1} | {word: n for n, word in COUNT_WORDS.items()}
_COUNTS |= {str(n): n for n in COUNT_WORDS}
_COUNT = "|".join(_COUNTS)
_COLOR = "|".join(sorted(COLORS, key=len, reverse=True))
_SHAPE = "|".join(SHAPES)
_AFTER = "that is|colored|in|of|is|painted"
_THINGS = re.compile(  # "three small teal stars", "a star that is red", "star, red"
    rf"(?:\b(?P<count>{_COUNT}) )?(?:\b(?P<size>small|large) )?"
    rf"(?:\b(?P<color>{_COLOR})(?:[ -]colored)? )?\b(?P<shape>{_SHAPE})(?P<many>e?s)?\b"
    rf"(?:(?: (?:{_AFTER})|,) (?P<after>{_COLOR})\b(?! (?:{_SHAPE})))?"
)
_COLOR_OF = re.compile(rf"\bthe color of the (?:\w+ )?(?:{_SHAPE}) is (?P<color>{_COLOR})$")
_WORDS = {
    "left of": r"(?:to |on )?(?:the )?left (?:side )?of",
    "right of": r"(?:to |on )?(?:the )?right (?:side )?of",
    "above": "above|over|higher than",
    "below": "below|under|beneath|underneath",
}


def scene_of(caption: str) -> Scene | None:
    """The scene that a caption tells of; None if it is none of one or two groups."""
    caption = caption.lower().strip(" .")
    groups = []
    places = []
    for found in _THINGS.finditer(caption):
        color = found["color"] or found["after"]
        count = _COUNTS.get(found["count"], 1)
        if bool(found["many"]) != (count > 1):
            return None
        groups.append(Group(count, color, found["shape"], found["size"]))
        places.append(found.span())
    if not 1 <= len(groups) <= 2:
        return None
    if len(groups) == 1:
        told = _COLOR_OF.search(caption)
        if told:
            groups = [Group(1, told["color"], groups[0].shape, groups[0].size)]
        return Scene(tuple(groups))

    # between the two, or before both: "left of the star is a ring"
    for relation, words in _WORDS.items():
        if re.search(rf"\b(?:{words})\b", caption[places[0][1] : places[1][0]]):
            return Scene(tuple(groups), relation)
        if re.match(rf"(?:{words})\b", caption[: places[0][0]]):
            return Scene((groups[1], groups[0]), relation)
    return Scene(tuple(groups))


def names_colors(caption: str) -> bool:
    """Whether a caption says the colour of all that it tells of: of "three stars" any will do."""
    scene = scene_of(caption)
    return scene is not None and all(group.color for group in scene.groups)
