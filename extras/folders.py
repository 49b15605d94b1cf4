"""Folders of captioned pictures, and of edits.

    python train.py --data FOLDER --image-size 64

Each picture has a line in metadata.jsonl (Hugging Face's imagefolder), or a .txt beside it. A line
of edits, all lines or none of them with "before":

    {"file_name": "cat.png", "text": "a cat"}
    {"before": "house.png", "text": "make it winter", "file_name": "house-in-winter.png"}
"""

import hashlib
import json
import os
from pathlib import Path, PurePath

import numpy as np

from extras.captioned import Captioned
from extras.files import PICTURE_SUFFIXES, read_records, read_text, text_in
from extras.inside import Inside, files_in, metadata_in


def open_folder(root: str | Path, image_size: int, seed: int = 0) -> Captioned:
    """A folder of captioned pictures, or of edits."""
    metadata = metadata_in(Path(root))
    if metadata and any("before" in record for _, record in read_records(metadata)):
        return EditFolder(root, image_size, seed)
    return Folder(root, image_size, seed)


class Folder(Captioned):
    """Pictures with captions: metadata.jsonl (Hugging Face's imagefolder), or a .txt beside each.

    Left out and counted: pictures without a caption or with an empty one, and pictures that
    metadata.jsonl names and that are not there. ValueError if none is left, or if a name or a link
    leads out of the folder.
    """

    def __init__(self, root: str | Path, image_size: int, seed: int = 0):
        self.root = Path(root)
        self.inside = Inside(self.root)
        self.metadata = metadata_in(self.root)
        self.listed = self.metadata is not None
        named = self._read_metadata() if self.listed else self._read_sidecars()

        # what is there, what has a caption, and what is left out
        there = [(path, caption) for path, caption in named if os.path.isfile(path)]
        pairs = [(path, caption) for path, caption in there if caption]
        captioned = {path for path, _ in pairs}
        pictures = set(files_in(self.root, PICTURE_SUFFIXES)).union(path for path, _ in there)
        self.uncaptioned = len(pictures - captioned)
        self.missing = len(named) - len(there)
        super().__init__(pairs, image_size, seed)
        if not pairs:
            self._refuse()

    def about(self) -> str:
        said = super().about()
        if self.uncaptioned:
            said += f"; {self.uncaptioned} left out without a caption"
        if self.missing:
            named = "that metadata.jsonl names" if self.listed else "links to pictures"
            said += f"; {self.missing} {named} are not there"
        return said

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

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


class EditFolder(Folder):
    """Pairs of pictures: example -> the instruction, and the pair `draws` times, as extras/edits.py
    has it. A pair whose first picture is not there is left out and counted. ValueError for a line
    that names no picture before, and if no pair is left."""

    before_and_after = True
    made_for = {"pairs": True}

    def _read_metadata(self) -> list[tuple[Path, str]]:
        self.before: dict[tuple[Path, str], Path] = {}
        self.alone = 0
        pairs = []
        lines = zip(read_records(self.metadata), super()._read_metadata())
        for (where, record), (path, caption) in lines:
            before = self.picture_of(record, "before", where)
            if before is None:
                raise ValueError(
                    f'{where}: no "before"; expected, as in other lines of it, the name of the '
                    "picture before the edit"
                )
            if before.is_file():
                self.before[path, caption] = before
                pairs.append((path, caption))
            else:
                self.alone += 1
        return pairs

    def pictures_of(self, pair: tuple[Path, str], draws: int) -> np.ndarray:
        before = self.picture(self.before[pair])
        return np.stack([np.stack([before, self.picture(pair[0])])] * draws)

    def about(self) -> str:
        said = super().about().replace("pictures with captions", "pairs of pictures")
        if self.alone:
            said += f"; {self.alone} left out whose picture before is not there"
        return said

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for pair in self.every:
            before = self.before[pair]
            digest.update(repr((before.name, before.stat().st_size)).encode())
        return digest.hexdigest()

    def shown(self) -> np.ndarray:
        """A picture for each of `prompts`, which it was said of: (prompts, size, size, 3) uint8."""
        said_of = {}
        for path, caption in self.pairs:
            said_of.setdefault(caption, self.before[path, caption])
        return np.stack([self.picture(said_of[prompt]) for prompt in self.prompts])
