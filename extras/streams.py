"""Captioned pictures by the million: tar shards, and data sets of the Hugging Face Hub.

    python train.py --data 'shards/{000..099}.tar'          # or shards/*.tar: WebDataset's form
    python train.py --data hf:NAME:split=train:image=jpg:text=caption

Shards are read where they lie, nothing is extracted. Python's own tarfile says at which byte each
picture stands, so that any example is there at once: a run goes on exactly where it was, and
several processes share the shards. (The package webdataset reads on and on, and knows neither.) A
data set of the Hub is streamed, one picture after the other, in its own order.
"""

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from extras.captioned import Captioned
from extras.files import PICTURE_SUFFIXES, clean_text, read_picture, text_in

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of shards' numbers, as WebDataset and bash have it
MOST_SHARDS = 100_000
MOST_FAILURES = 1000  # pictures in a row that do not decode
CAPTIONS = ("txt", "json")  # beside each picture, under its name; the second holds "text" or
TEXT_NAMES = ("text", "caption", "prompt")  # another of these


def is_of_shards(name: str) -> bool:
    return name.endswith(".tar")


class Member(NamedTuple):
    """A picture in a shard: `size` bytes from `offset` on."""

    shard: int
    name: str
    offset: int
    size: int


class Shards(Captioned):
    """The pictures of tar files that have a caption under the same name: 0001.jpg, 0001.txt.

    An epoch takes the shards in a random order, each from its beginning to its end. ValueError for
    a file that is no tar, for a name in it that leads out of it, and if no picture is left.
    """

    def __init__(self, pattern: str, image_size: int, seed: int = 0):
        self.files = shard_files(pattern)
        self.pattern = pattern
        self.uncaptioned = 0
        pairs = []
        for number in range(len(self.files)):
            pairs += self._read_shard(number)
        super().__init__(pairs, image_size, seed)
        if not self.pairs:
            raise ValueError(
                f"--data {pattern}: no picture with a caption ({self.about()}); expected names "
                "like 0001.jpg with 0001.txt, or 0001.json with a text in it"
            )

    def open(self, member: Member) -> io.BytesIO:
        with open(self.files[member.shard], "rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.size))

    def place_of(self, member: Member) -> str:
        return f"{member.name} in {self.files[member.shard]}"

    def name_of(self, member: Member) -> str:
        return f"{member.shard}/{member.name}"

    def bytes_of(self, member: Member) -> int:
        return member.size

    def about(self) -> str:
        said = f"{super().about()} in {len(self.files)} shards"
        if self.uncaptioned:
            said += f"; {self.uncaptioned} left out without a caption"
        return said

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        of_shard = np.array([member.shard for member, _ in self.pairs])
        places = [np.flatnonzero(of_shard == k) for k in rng.permutation(len(self.files))]
        return np.concatenate(places)

    def _read_shard(self, number: int) -> list[tuple[Member, str]]:
        pictures: dict[str, Member] = {}
        captions: dict[str, str] = {}
        path = self.files[number]
        try:
            with tarfile.open(path, "r:") as tar:
                for entry in tar:
                    if entry.isdir():
                        continue
                    check_entry(entry, path)
                    key, _, kind = split_name(entry.name)
                    if f".{kind}" in PICTURE_SUFFIXES:
                        pictures[key] = Member(number, entry.name, entry.offset_data, entry.size)
                    elif kind in CAPTIONS:
                        where = f"{entry.name} in {path}"
                        captions[key] = caption_of(kind, tar.extractfile(entry).read(), where)
                if Path(path).stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("its end is missing")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"{path} does not read as a tar file ({error}); expected one that is whole and not "
                "compressed"
            ) from None
        pairs = [(member, captions.get(key, "")) for key, member in pictures.items()]
        captioned = [pair for pair in pairs if pair[1]]
        self.uncaptioned += len(pairs) - len(captioned)
        return captioned


def shard_files(pattern: str) -> list[str]:
    """ "a/{000..099}.tar", "a/*.tar" or "a.tar" -> the files, in order. ValueError if one is not
    there."""
    numbers = RANGE.search(pattern)
    if not numbers:
        files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
    else:
        first, last = numbers.groups()
        count = int(last) - int(first) + 1
        if not 1 <= count <= MOST_SHARDS:
            raise ValueError(f"--data {pattern}: expected a range upward, of at most {MOST_SHARDS}")
        start, end = numbers.span()
        files = []
        for k in range(int(first), int(last) + 1):
            files.append(f"{pattern[:start]}{k:0{len(first)}}{pattern[end:]}")
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        gone = f"{missing[0]} is not there" if missing else "there is no such file"
        raise ValueError(f"--data {pattern}: {gone}; expected tar files")
    return files


def check_entry(entry: tarfile.TarInfo, path: str) -> None:
    """ValueError for what is no plain file within the shard."""
    name = PurePosixPath(entry.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in entry.name[1:2]:
        raise ValueError(f"{path}: {entry.name} leads out of it; expected names below its root")
    if not entry.isfile():
        raise ValueError(f"{path}: {entry.name} is a link or a device; expected files alone")


def split_name(name: str) -> tuple[str, str, str]:
    """ "a/0001.jpg" -> "a/0001", ".", "jpg", in small letters."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    return folder + slash + stem, dot, kind.lower()


def caption_of(kind: str, content: bytes, where: str) -> str:
    """The caption in a file of this kind. ValueError if that is no text."""
    try:
        text = content.decode("utf-8-sig")
        if kind == "txt":
            return clean_text(text).strip()
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: {error}; expected UTF-8{' text' if kind == 'txt' else ''}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object")
    for key in TEXT_NAMES:
        if text_in(record, key, where):
            return text_in(record, key, where).strip()
    return ""


class HubSet:
    """A data set of the Hub, or of a local folder that the library reads, streamed: example i is
    its i-th picture with a caption, beginning again at its end; where that does not decode, the
    next one.

    split, image, text: its part and its columns (default: train; a column of pictures; one called
    text, caption or prompt). ValueError if these are not there.
    """

    in_order = True

    def __init__(self, name: str, image_size: int, seed: int = 0, **columns: str):
        self.name = name
        self.image_size = image_size
        self.columns = columns
        self.made_for = {}
        self.skipped: set = set()
        self.stream = self._load(columns.get("split", "train"))
        self.image, self.text = self._columns()
        self.prompts = tuple(dict.fromkeys(self._first_captions(8)))
        self._begin()

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        if index < self.asked:
            self._begin()
        self.asked = index
        failures = 0
        while self.number < index:
            number, caption, content = next(self.records)
            if number < index:
                continue
            try:
                picture = read_picture(io.BytesIO(content), (self.image_size,) * 2, f"no. {number}")
            except ValueError as error:
                self.skipped.add(number)
                failures += 1
                if failures == MOST_FAILURES:
                    said = f"{failures} pictures in a row do not decode, the last one: {error}"
                    raise ValueError(f"--data hf:{self.name}: {said}") from None
                continue
            self.number = number
            self.last = (caption, np.asarray(picture))
        caption, picture = self.last
        return caption, np.stack([picture] * draws)

    def _begin(self) -> None:
        """Anew, from the first record."""
        self.records = self._numbered()
        self.asked = -1  # the last index that was asked for,
        self.number = -1  # and the record that was its example

    def about(self) -> str:
        return f"the data set {self.name}, streamed: {self.text} of {self.image}"

    def fingerprint(self) -> str:
        return f"{self.name} {sorted(self.columns.items())}"

    def _load(self, split: str):
        import datasets

        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(self.name, split=split, streaming=True)
        except Exception as error:  # of files, of the Hub, of the split: each becomes one line
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"--data hf:{self.name}: split {split!r} cannot be read ({why})"
            ) from None

    def _columns(self) -> tuple[str, str]:
        """Names of the columns of pictures and of captions. ValueError if they are not there."""
        import datasets

        features = self.stream.features or {}
        images = [name for name in features if isinstance(features[name], datasets.Image)]
        texts = [name for name in TEXT_NAMES if name in features]
        chosen = []
        for option, found in (("image", images), ("text", texts)):
            name = self.columns.get(option) or next(iter(found), None)
            if name not in features:
                raise ValueError(
                    f"--data hf:{self.name}: no column for {option}; expected {option}=COLUMN, one "
                    f"of {', '.join(features)}"
                )
            chosen.append(name)
        self.stream = self.stream.select_columns(chosen)
        if chosen[0] in images:
            self.stream = self.stream.cast_column(chosen[0], datasets.Image(decode=False))
        return chosen[0], chosen[1]

    def _records(self) -> Iterator[tuple[str, bytes]]:
        """Captions and the bytes of pictures, once through."""
        for record in self.stream:
            caption, image = record[self.text], record[self.image]
            content = image.get("bytes") if isinstance(image, dict) else image
            if isinstance(image, dict) and content is None:
                content = Path(image["path"]).read_bytes()
            if isinstance(caption, str) and caption.strip() and isinstance(content, bytes):
                yield clean_text(caption).strip(), content

    def _numbered(self) -> Iterator[tuple[int, str, bytes]]:
        """The records, numbered, again and again. ValueError if there are none."""
        number = 0
        while True:
            before = number
            for caption, content in self._records():
                yield number, caption, content
                number += 1
            if number == before:
                raise ValueError(f"--data hf:{self.name}: no picture with a caption")

    def _first_captions(self, count: int) -> list[str]:
        captions = []
        for caption, _ in self._records():
            captions.append(caption)
            if len(captions) == count:
                break
        return captions
