"""Prompts from files, and pictures as the official evaluators of three benchmarks read them.

    python sample.py --prompts FILE --out samples
    python sample.py --prompts evaluation_metadata.jsonl:geneval --out for-geneval
"""

import json
import re
from pathlib import Path

import numpy as np

from cli import save_picture, write_text
from extras.files import read_lines, read_records, read_text, text_in
from extras.inside import files_in

EXPECTED = "expected a prompt a line, JSON objects, or a folder of .txt"


def read_prompts(path: Path) -> list[tuple[str, str, dict]]:
    """Name, text and record of each prompt of a file or a folder:

    a file with a prompt a line (blank lines are none); .jsonl or .json with objects that have
    "prompt" (GenEval, WISE); a folder of .txt files with a prompt each (DPG-Bench).
    ValueError if it is none of these, or holds no prompt.
    """
    if not path.exists():
        raise ValueError(f"--prompts {path} is not there; {EXPECTED}")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        raise ValueError(f"--prompts {path} is a table; {EXPECTED}")
    if path.is_dir():
        prompts = _from_folder(path)
    elif suffix in (".json", ".jsonl"):
        prompts = _from_records(path)
    else:
        prompts = []
        for _, line in read_lines(path):
            prompts.append((f"{len(prompts):05d}", line, {}))
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt; {EXPECTED}")
    return prompts


def _from_folder(folder: Path) -> list[tuple[str, str, dict]]:
    prompts = []
    for file in files_in(folder, {".txt"}, below=False):
        text = read_text(file).strip()
        if not text:
            raise ValueError(f"--prompts {file} is empty; expected a prompt")
        prompts.append((file.stem, text, {}))
    return prompts


def _from_records(path: Path) -> list[tuple[str, str, dict]]:
    prompts = []
    for where, record in read_records(path):
        lower = {key.lower(): value for key, value in record.items()}
        prompt = text_in(lower, "prompt", where)
        name = lower.get("prompt_id", f"{len(prompts):05d}")
        if prompt is None:
            said = json.dumps(record)[:60]
            raise ValueError(f'{where}: {said}; expected JSON objects that have a "prompt"')
        if not names_a_file(name):
            said = json.dumps(name)[:60]
            expected = "expected what a file can be named after"
            raise ValueError(f"{where}: prompt_id is {said}; {expected}")
        prompts.append((str(name), prompt, record))
    return prompts


def names_a_file(name) -> bool:
    """Whether every system can have a file of that name, with a suffix."""
    if isinstance(name, bool) or not isinstance(name, int | str):
        return False
    letters = re.fullmatch(r'[^\0-\x1f/\\:*?"<>|\ud800-\udfff]+', str(name))
    return letters is not None and len(str(name).encode()) <= 240


# --------------------------------------------------------------------------------------------------
# the benchmarks' own evaluators

LAYOUTS = {"geneval": 4, "dpg": 4, "wise": 1}  # pictures of each prompt that the evaluator expects


def split_layout(text: str) -> tuple[Path, str | None]:
    """--prompts FILE:geneval -> the file, and the layout that is asked for, if one is.

    ValueError if what stands there is neither a file nor one with a layout.
    """
    path = Path(text)
    head, colon, layout = text.rpartition(":")
    if path.exists() or not colon:  # a file's name may have a colon
        return path, None
    if head and layout in LAYOUTS:
        return Path(head), layout
    if Path(head).exists():
        raise ValueError(f"--prompts {text}: expected one of {', '.join(LAYOUTS)} after the colon")
    return path, None


def check_layout(layout: str, prompts: list[tuple[str, str, dict]], n: int) -> None:
    """ValueError if a benchmark's evaluator could not read what would be written.

    Before the work, not after it. prompts: of read_prompts; n: pictures of each.
    """
    if not prompts:
        raise ValueError(f"{layout} needs the benchmark's own prompts: give --prompts, no --prompt")
    if layout in ("dpg", "wise") and n != LAYOUTS[layout]:
        expected = f"the evaluator of {layout} expects {LAYOUTS[layout]} of each prompt"
        raise ValueError(f"--n {n}: {expected}")
    seen = set()
    for name, _, record in prompts:
        if layout == "geneval" and "prompt" not in record:
            raise ValueError("geneval needs GenEval's evaluation_metadata.jsonl as --prompts")
        if name.lower() in seen:  # on Windows and on Macs A.png is a.png
            what = "stands there twice: one picture would overwrite the other"
            raise ValueError(f"prompt_id {name!r} {what}")
        seen.add(name.lower())


def save_layout(layout: str, out: Path, prompts: list, pictures: np.ndarray) -> None:
    """pictures (prompts, n, height, width, 3) uint8, as a benchmark's own evaluator reads them."""
    for i, (name, _, record) in enumerate(prompts):
        row = pictures[i]
        if layout == "geneval":  # 00000/metadata.jsonl, 00000/samples/00000.png
            samples = out / f"{i:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            write_text(samples.parent / "metadata.jsonl", json.dumps(record) + "\n")
            for k, picture in enumerate(row):
                save_picture(picture, samples / f"{k:05d}.png")
        elif layout == "dpg":  # NAME.png: two by two
            upper = np.hstack(row[:2])
            lower = np.hstack(row[2:])
            save_picture(np.vstack([upper, lower]), out / f"{name}.png")
        else:  # ID.png
            save_picture(row[0], out / f"{name}.png")
