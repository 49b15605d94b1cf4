"""What users bring: text of any editor, pictures of any camera.

Whatever is damaged is a ValueError that names the file and says what to do.
"""

import codecs
import io
import json
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What is opened, whatever its suffix. No other kinds that Pillow knows: PostScript is a program.
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# --------------------------------------------------------------------------------------------------
# text


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
    texts = [(str(path), read_text(path))] if is_list else read_lines(path)
    records = []
    for where, text in texts:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}; expected a JSON object") from None
        if not (is_list and isinstance(values, list)):
            values = [values]
        for record in values:
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {json.dumps(record)[:60]}; expected a JSON object")
            records.append((where, record))
    return records


def text_in(record: dict, key: str, where: str) -> str | None:
    """The string under a key; None for null, or without the key. ValueError for any other value."""
    value = record.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: {key} is {json.dumps(value)[:60]}; expected a string")
    if value is None:
        return None
    return clean_text(value)


# --------------------------------------------------------------------------------------------------
# pictures

# What Pillow has to say about metadata; once for all: threads that changed the filters for a while
# would undo each other's.
warnings.filterwarnings("ignore", module="PIL")
PngImagePlugin.MAX_TEXT_CHUNK = 2**25  # Pillow's 1 MB is less than some editors write about a PNG
DRAFT = 4  # a JPEG is decoded at no less than this many times the side that is asked for


def read_picture(file, size: tuple[int, int] | None = None, name: str | None = None) -> Image.Image:
    """A picture in RGB as viewers show it: upright by its EXIF data, on white, the first frame.

    file: a path, or an open file and its `name`. With `size`, (height, width), its centre in that
    shape, at that size. ValueError if it does not decode, or has more pixels than Pillow holds for
    safe.
    """
    try:
        with Image.open(file, formats=KINDS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow warns, and goes on
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return _as_seen(image, size)
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes Pillow raises anything, struct.error for one
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name or file} does not decode ({said})") from error


_TURNS = {  # EXIF's orientation -> what makes upright what a camera stored on its side
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LIES_ON_ITS_SIDE = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]


def _as_seen(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    # A JPEG can be decoded at a half, a quarter or an eighth of its size, whose last row and column
    # then stand for less than a pixel: draft says the size without that rounding.
    drafted = None
    if size:
        drafted = image.draft(None, (DRAFT * max(size), DRAFT * max(size)))
    image.load()
    width, height = image.size
    if drafted:
        width, height = drafted[1][2:]
    turn = _turn_of(image)

    # the colours as they are meant
    if image.mode[0] in "IF":
        image = _in_8_bits(image)
    image = _in_srgb(image)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")

    # the centre, in the shape that is asked for, on white, upright
    if size:
        rows, columns = size
        if turn in LIES_ON_ITS_SIDE:
            rows, columns = columns, rows
        scale = min(height / rows, width / columns)
        left = (width - scale * columns) / 2
        top = (height - scale * rows) / 2
        box = (left, top, left + scale * columns, top + scale * rows)
        image = image.resize((columns, rows), Image.Resampling.LANCZOS, box)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return image


def size_as_seen(file) -> tuple[int, int]:
    """(height, width) of a picture, by the beginning of its file alone; any error if that is
    damaged."""
    with Image.open(file, formats=KINDS) as image:
        width, height = image.size
        return (width, height) if _turn_of(image) in LIES_ON_ITS_SIDE else (height, width)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data: viewers show the picture as it lies
        return None


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
