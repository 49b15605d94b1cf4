"""train.py --keep K: the last K checkpoints before the newest, each in a folder of the run's.

    python train.py --keep 3
    python sample.py --ckpt runs/shapes/step-000250 --prompt "a red circle"

A folder has what a drawing needs, no state to resume from: hard links to the files of before, where
the file system has such, so that none is copied. It is removed once it is none of the last K, but
only if nothing else has been put into it; what this file has not made is left alone.
"""

import json
import os
import re
import shutil
from pathlib import Path

from checkpoint import KEPT, WEIGHTS, step_of_run
from cli import flat, remove


def keep_present(out: Path) -> None:
    """Give the checkpoint that a run's folder holds, if any, a folder of its own, which is there
    whole or not at all. OSError if it cannot be written."""
    step = step_of_run(str(out))
    if step is None:
        return
    folder = out / f"step-{step:06d}"
    if os.path.lexists(folder):
        if not is_own(folder):
            print(f"{folder} is not of --keep: it stays, and this checkpoint is not kept")
        return
    beside = out / f"tmp-{folder.name}"
    remove(beside)
    try:
        beside.mkdir()
        for name in WEIGHTS:
            link(out / name, beside / name)
        about = {"step": step, "made_by": "train.py --keep, which removes this folder again"}
        (beside / KEPT).write_text(json.dumps(about) + "\n", "utf-8")
        beside.rename(folder)
    except OSError as error:
        what = f"{folder} could not be written, and the checkpoint of step {step} stays the newest"
        raise OSError(f"{what}: {flat(str(error))}") from error
    finally:
        remove(beside)


def link(source: Path, target: Path) -> None:
    """A second name for a file; where there is no such thing, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def remove_older(out: Path, keep: int) -> None:
    """Remove all of a run's kept checkpoints before its newest one, but for the last `keep`."""
    newest = step_of_run(str(out)) or 0
    kept = {}
    for folder in out.glob("step-*"):
        number = re.fullmatch(r"step-(\d{6,})", folder.name)
        if number and int(number[1]) < newest and is_own(folder):
            kept[int(number[1])] = folder
    for step in sorted(kept)[:-keep]:
        away = out / f"tmp-{kept[step].name}"  # a kill meanwhile leaves no folder half empty
        kept[step].rename(away)
        remove(away)


def is_own(folder: Path) -> bool:
    """Whether keep_present has made it, and nobody has put anything else into it."""
    if folder.is_symlink() or not (folder / KEPT).is_file():
        return False
    return {path.name for path in folder.iterdir()} <= {*WEIGHTS, KEPT}
