"""What lies in a folder, and what only seems to: names and links that lead out of it.

    for path in files_in(Path("my-pictures"), {".png"}): ...

A folder may come from a stranger. What its links and the names in its metadata.jsonl reach outside
of it would be trained on, drawn, and shown in grids: so that is refused, and nothing there is
opened.
"""

import os
from functools import cache
from pathlib import Path


class Inside:
    """Whether files and folders, by their paths below a root, really lie in it. The root may be a
    link, and so may all below it, as long as they stay there.

    Cheap for many files: each is asked whether it is a link, and where it really is only if so; its
    folder once for all that it holds.
    """

    def __init__(self, root: Path):
        self.root = root
        self.home = os.path.realpath(root)
        self.place = cache(self._place)

    def _place(self, path: str) -> str:
        """Where a path really is. ValueError if that is outside of the root."""
        place = os.path.realpath(path)
        if place != self.home and not place.startswith(os.path.join(self.home, "")):
            raise ValueError(
                f"{path} leads out of {self.root}, to {place}; expected what lies in that folder: "
                "copy it there, in the place of the link (cp -rL copies a whole folder so)"
            )
        return place

    def check(self, path: str) -> None:
        """ValueError for a file that is outside of the root."""
        self.place(path if os.path.islink(path) else os.path.dirname(path))


def metadata_in(root: Path) -> Path | None:
    """A folder's metadata.jsonl, if it has one."""
    path = root / "metadata.jsonl"
    if not path.is_file():
        return None
    Inside(root).check(str(path))
    return path


def files_in(root: Path, suffixes: set[str], below: bool = True) -> list[Path]:
    """The files with one of these suffixes in a folder and, if so wanted, in those below it.

    Suffixes count in capitals too. Hidden files do not: Mac's "._a.png" is no picture. Links to
    folders are followed, each folder once: they may lead in circles. ValueError for one that leads
    out of the folder. What is no file (a pipe, on which reading would wait) is left out.
    """
    paths = []
    seen = set()
    inside = Inside(root)
    for folder, inner, names in os.walk(root, followlinks=True):
        place = inside.place(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        inner[:] = sorted(name for name in inner if below and not name.startswith("."))
        for name in names:
            if os.path.splitext(name)[1].lower() not in suffixes or name.startswith("."):
                continue
            path = os.path.join(folder, name)
            inside.check(path)
            if os.path.isfile(path) or not os.path.exists(path):  # or a link to nothing
                paths.append(Path(path))
    return sorted(paths)
