"""Tables of small pictures: lines with titles, in blocks side by side, each picture with a text.

cli.py's captioned_grid shows what a run has drawn; here is what compares: right and wrong, one run
beside another, one bridge below another.
"""

import unicodedata

import numpy as np
from PIL import Image, ImageDraw

from cli import caption_font

Cell = tuple[np.ndarray, str, bool | None]  # picture (height, width, 3), text, whether it is right

SIDE = 128  # at most, of a picture, in pixels
COLUMN = 140  # a picture and the gap to the next
TEXT_HEIGHT = 36
TITLE_HEIGHT = 20
GAP = 6
GREEN = (40, 150, 60)
RED = (200, 50, 50)
GREY = (90, 90, 90)


def picture_table(blocks: list[tuple[str, dict[str, list[Cell]]]]) -> Image.Image:
    """Lines of small pictures with a title each, in blocks side by side.

    blocks: name, title -> cells. A frame is green where the picture is right, red where it is not,
    and there is none for None.
    """
    # as wide as the longest line, as high as the block with the most lines
    columns = 0
    rows = 0
    height = 0  # of the highest picture
    for _, lines in blocks:
        for line in lines.values():
            columns = max(columns, len(line))
            height = max([height, *(fitted(picture).height for picture, _, _ in line)])
        rows = max(rows, len(lines))
    block_width = columns * COLUMN + 16
    row_height = TITLE_HEIGHT + 2 * GAP + height + TEXT_HEIGHT
    size = (GAP + block_width * len(blocks), TITLE_HEIGHT + rows * row_height)
    image = Image.new("RGB", size, "white")
    ink = ImageDraw.Draw(image)

    for k, (name, lines) in enumerate(blocks):
        left = GAP + k * block_width
        ink.text((left, 2), name, fill="black", font=caption_font(name, 13))
        for r, (title, line) in enumerate(lines.items()):
            top = TITLE_HEIGHT + r * row_height
            ink.text((left, top), title, fill=GREY, font=caption_font(title, 12))
            for c, cell in enumerate(line):
                _paste_cell(image, left + c * COLUMN, top + TITLE_HEIGHT, height, cell)
    return image


def _paste_cell(image: Image.Image, x: int, y: int, height: int, cell: Cell) -> None:
    picture, text, right = cell
    ink = ImageDraw.Draw(image)
    enlarged = fitted(picture)
    if right is not None:
        frame = (x, y, x + enlarged.width + 5, y + enlarged.height + 5)
        ink.rectangle(frame, fill=GREEN if right else RED)
    image.paste(enlarged, (x + 3, y + 3))
    write_small(ink, (x, y + height + 8), text, COLUMN - 6, lines=3)


def fitted(picture: np.ndarray) -> Image.Image:
    """(height, width, 3) uint8, each pixel as a square of whole pixels; larger ones reduced."""
    image = Image.fromarray(picture)
    longest = max(image.size)
    if longest > SIDE:
        share = SIDE / longest
        size = (max(1, round(share * image.width)), max(1, round(share * image.height)))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = SIDE // longest
    size = (factor * image.width, factor * image.height)
    return image.resize(size, Image.Resampling.NEAREST)


def spread(n: int, k: int) -> list[int]:
    """k of n places, evenly spread, the first among them."""
    k = min(n, k)
    return [i * n // k for i in range(k)]


def write_small(
    ink: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, lines: int
) -> None:
    """A prompt, broken into lines between words, or inside a word that is too long."""
    text = _spell_emoji("\n".join(text.splitlines()))
    font = caption_font(text, 10)
    done = []
    now = ""
    for character in text:
        if character == "\n":
            done.append(now)
            now = ""
            continue
        if ink.textlength(now + character, font) > width:
            head, space, tail = now.rpartition(" ")
            if space:
                done.append(head)
                now = tail
            else:
                done.append(now)
                now = ""
        now += character
    shown = [*done, now][:lines]
    ink.multiline_text(place, "\n".join(shown), fill="black", font=font, spacing=1)


def _spell_emoji(text: str) -> str:
    """Few fonts have emoji beside letters: their names in brackets."""
    for character in dict.fromkeys(text):
        if ord(character) >= 0x1F000 or 0x2B00 <= ord(character) < 0x2C00:
            name = unicodedata.name(character, f"U+{ord(character):X}").lower()
            text = text.replace(character, f"[{name}]")
    return text
