"""Sheets of pictures in rows and columns, each with a word above: what the windows into a run show.

trajectory.py and word_maps.py make the pictures; here they are enlarged, coloured and lettered.
"""

import numpy as np
from PIL import Image, ImageDraw

from cli import caption_font, unbroken

Tile = tuple[np.ndarray | None, str]  # picture (height, width, 3) uint8, and what stands above it

LETTERS = 12  # the height of labels in pixels, of the title one more
LINE = 17  # from one line of text to the next
GAP = 6
HEAT = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]  # dark to bright


def sheet(rows: list[list[Tile]], title: str, left: list[str] | None = None) -> Image.Image:
    """Rows of tiles, all of one size; None is an empty place. left: a label for each row."""
    height, width = rows[0][0][0].shape[:2]
    title_font = caption_font(title, LETTERS + 1)

    # how much room the labels take
    margin = GAP
    for label in left or []:
        length = caption_font(label, LETTERS).getlength(label)
        margin = max(margin, GAP + round(length) + GAP)
    columns = max(len(row) for row in rows)
    inner = columns * (width + GAP)
    title_lines = []
    if title:
        title_lines = wrap(title, title_font, max(200, margin + inner - 2 * GAP))
    tops = []
    top = GAP + LINE * len(title_lines)
    for row in rows:
        if any(label for _, label in row):
            top += LINE
        tops.append(top)
        top += height + GAP
    outer = margin + inner
    for line in title_lines:
        outer = max(outer, round(title_font.getlength(line)) + 2 * GAP)

    # the title, and each row
    image = Image.new("RGB", (outer, top), "white")
    ink = ImageDraw.Draw(image)
    for i, line in enumerate(title_lines):
        ink.text((GAP, GAP // 2 + i * LINE), line, fill="black", font=title_font)
    for r, row in enumerate(rows):
        if left:
            place = (GAP, tops[r] + height // 2 - LINE // 2)
            ink.text(place, left[r], fill="black", font=caption_font(left[r], LETTERS))
        for c, (picture, label) in enumerate(row):
            x = margin + c * (width + GAP)
            font = caption_font(label, LETTERS)
            ink.text((x, tops[r] - LINE), cut(label, font, width), fill="black", font=font)
            if picture is not None:
                image.paste(Image.fromarray(picture), (x, tops[r]))
    return image


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of a text that are no wider than so many pixels, broken between words."""
    lines = [""]
    for word in unbroken(text).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            longer = word
            lines.append("")
        lines[-1] = cut(longer, font, width)
    return lines


def cut(text: str, font, width: float) -> str:
    """The text, or as much of it as has room in so many pixels."""
    text = unbroken(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def enlarge(picture: np.ndarray, least: int) -> np.ndarray:
    """A picture (height, width, 3), each pixel as a square of whole pixels: so large that its width
    is at least so many; one of more than twice as many is reduced."""
    width = picture.shape[1]
    if width > 2 * least:
        return np.asarray(Image.fromarray(picture).reduce(width // least))
    factor = -(-least // width)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1, (height, width) -> colours from dark to bright, (height, width, 3)."""
    colors = np.array(HEAT, dtype=np.float64)
    places = np.linspace(0, 1, len(colors))
    values = values.clip(0, 1)
    channels = [np.interp(values, places, colors[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def stretch(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(rows, columns) -> size, (height, width): each patch as a square, none blurred into the
    next."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST))
