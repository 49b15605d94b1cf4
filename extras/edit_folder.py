"""Edits of one's own: a folder of pictures before and after, with what was said between them.

    python train.py --data FOLDER --image-size 64      # as any folder: its metadata.jsonl says so

A line of metadata.jsonl, all lines or none of them with "before":

    {"before": "house.png", "text": "make it winter", "file_name": "house-in-winter.png"}
"""

import hashlib
from pathlib import Path

import numpy as np

from extras.files import Folder, read_records
from extras.inside import metadata_in


def open_folder(root: str | Path, image_size: int, seed: int = 0) -> Folder:
    """A folder of captioned pictures, or of edits."""
    metadata = metadata_in(Path(root))
    if metadata and any("before" in record for _, record in read_records(metadata)):
        return EditFolder(root, image_size, seed)
    return Folder(root, image_size, seed)


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
        for pair in self.pairs:
            before = self.before[pair]
            digest.update(repr((before.name, before.stat().st_size)).encode())
        return digest.hexdigest()

    def shown(self) -> np.ndarray:
        """A picture for each of `prompts`, which it was said of: (prompts, size, size, 3) uint8."""
        said_of = {}
        for path, caption in self.pairs:
            said_of.setdefault(caption, self.before[path, caption])
        return np.stack([self.picture(said_of[prompt]) for prompt in self.prompts])
