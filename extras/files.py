"""What users bring: folders of pictures with captions, text of any editor, pictures of any camera.

    python train.py --data FOLDER --image-size 64

Whatever is damaged is a ValueError that names the file and says what to do.
"""

import codecs
import hashlib
import io
import json
import os
import warnings
from functools import lru_cache
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from extras.inside import Inside, files_in, metadata_in

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What is opened, whatever its suffix. No other kinds that Pillow knows: PostScript is a program.
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CACHE_BYTES = 256e6  # of decoded pictures: what fits is decoded once, not every epoch


class Folder:
    """Pictures with captions: metadata.jsonl (Hugging Face's imagefolder), or a .txt beside each.

    Left out and counted: pictures without a caption or with an empty one, and pictures that
    metadata.jsonl names and that are not there. One that does not decode is skipped and counted in
    `skipped`. ValueError if none is left, or if a name or a link leads out of the folder.
    """

    made_for = {}  # it has no options

    def __init__(self, root: str | Path, image_size: int, seed: int = 0):
        self.root = Path(root)
        self.image_size = image_size
        self.seed = seed
        self.inside = Inside(self.root)
        self.metadata = metadata_in(self.root)
        self.listed = self.metadata is not None
        named = self._read_metadata() if self.listed else self._read_sidecars()

        # what is there, what has a caption, and what is left out
        there = [(path, caption) for path, caption in named if os.path.isfile(path)]
        self.pairs = [(path, caption) for path, caption in there if caption]
        self.captioned = {path for path, _ in self.pairs}
        pictures = set(files_in(self.root, PICTURE_SUFFIXES)).union(path for path, _ in there)
        self.uncaptioned = len(pictures - self.captioned)
        self.missing = len(named) - len(there)
        self.skipped: set[Path] = set()
        if not self.pairs:
            self._refuse()

        captions = dict.fromkeys(caption for _, caption in self.pairs)  # each once, in order
        self.prompts = tuple(captions)[:8]
        self.order = lru_cache(maxsize=2)(self._order)
        in_cache = int(CACHE_BYTES / (3 * image_size**2))
        self.picture = lru_cache(maxsize=in_cache)(self._picture)

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        epoch, place = divmod(index, len(self.pairs))
        order = self.order(epoch)
        for k in range(len(order)):  # the next one in place of one that does not decode
            pair = self.pairs[order[(place + k) % len(order)]]
            path, caption = pair
            try:
                return caption, self.pictures_of(pair, draws)
            except ValueError as error:
                if not self.skipped:
                    said = f"{error} and is skipped; later ones are counted silently"
                    warnings.warn(said, stacklevel=2)
                self.skipped.add(path)
        raise ValueError(f"none of the {len(self.pairs)} pictures in {self.root} decodes")

    def pictures_of(self, pair: tuple[Path, str], draws: int) -> np.ndarray:
        """(draws, size, size, 3): a picture needs no variety beside the noise's."""
        return np.stack([self.picture(pair[0])] * draws)

    def about(self) -> str:
        said = f"{len(self.captioned)} pictures with captions"
        if self.uncaptioned:
            said += f"; {self.uncaptioned} left out without a caption"
        if self.missing:
            named = "that metadata.jsonl names" if self.listed else "links to pictures"
            said += f"; {self.missing} {named} are not there"
        return said

    def fingerprint(self) -> str:
        """Changes with the pictures' names, captions and sizes of files; not with their times."""
        digest = hashlib.sha256()
        for path, caption in self.pairs:
            name = path.relative_to(self.root)
            digest.update(repr((name.as_posix(), path.stat().st_size, caption)).encode())
        return digest.hexdigest()

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def _picture(self, path: Path) -> np.ndarray:
        return np.asarray(read_picture(path, self.image_size))

    def _read_metadata(self) -> list[tuple[Path, str]]:
        named = []
        for where, record in read_records(self.metadata):
            path = self.picture_of(record, "file_name", where)
            caption = text_in(record, "text", where) or ""
            if path is None:
                raise ValueError(f"{where}: no file_name; expected a picture's name, and its text")
            named.append((path, caption.strip()))
        return named

    def picture_of(self, record: dict, key: str, where: str) -> Path | None:
        """The picture that a line of metadata.jsonl names under `key`; None if it names none.
        ValueError if it is outside of the folder."""
        name = text_in(record, key, where)
        if not name:
            return None
        name = name.replace("\\", "/")  # as Windows writes it
        if PurePath(name).anchor or os.path.normpath(name).split(os.sep)[0] == "..":
            raise ValueError(
                f"{where}: {key} {json.dumps(name)[:200]} leads out of {self.root}; expected the "
                "name of a picture in that folder: put the picture there"
            )
        path = self.root / name
        if os.path.isfile(path):
            self.inside.check(str(path))
        return path

    def _read_sidecars(self) -> list[tuple[Path, str]]:
        texts = {path.with_suffix(""): path for path in files_in(self.root, {".txt"})}
        named = []
        for path in files_in(self.root, PICTURE_SUFFIXES):
            text = texts.get(path.with_suffix(""))
            named.append((path, read_text(text).strip() if text else ""))
        return named

    def _refuse(self) -> None:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        deeper = ""
        for path in self.root.glob("*/metadata.jsonl"):
            deeper = f"; did you mean {path.parent}?"
        expected = "metadata.jsonl with file_name and text, or a .txt beside each picture"
        raise ValueError(
            f"{self.root} holds no captioned picture ({self.about()}); expected {expected} "
            f"({kinds}){deeper}"
        )


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
            with Image.open(path, formats=KINDS) as image:
                return _as_seen(image, side)
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes Pillow raises anything, struct.error for one
        raise ValueError(f"{path} does not decode ({type(error).__name__}: {error})") from error


_TURNS = {  # EXIF's orientation -> what makes upright what a camera stored on its side
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
    drafted = None
    if side:
        drafted = image.draft(None, (DRAFT * side, DRAFT * side))
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

    # the centre square, on white, upright
    if side:
        short = min(width, height)
        left = (width - short) / 2
        top = (height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.LANCZOS, box)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return image


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
