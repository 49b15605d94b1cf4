"""An evaluation's tables: scores of rows, their means and differences; printed, and in pictures."""

from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from extras.grades import Grade
from extras.grids import picture_table, spread
from extras.intervals import difference, mean_of_rows
from extras.suites import Prompt

# rows to compare with, not in the mean
LEFT_OUT = {"languages": {"English"}, "describe-languages": {"English"}}


def tally(pairs: list[tuple[Prompt, Grade]]) -> dict:
    """One row of the table: its score with the interval, why the others are wrong, the median
    distance of the colours; each picture's verdict and scene, for other intervals later. -> JSON"""
    right = ""
    wrong = Counter()
    offs = []
    for _, its_grade in pairs:
        right += "0" if its_grade.reason else "1"
        if its_grade.reason:
            wrong[its_grade.reason] += 1
        if its_grade.off is not None:
            offs.append(its_grade.off)
    entry = {
        "score": right.count("1") / len(pairs),
        "n": len(pairs),
        "wrong": dict(wrong.most_common()),
        "color_off": median(offs) if offs else None,
        "right": right,
        "scenes": " ".join(prompt.scene_id for prompt, _ in pairs),
    }
    entry["interval"] = mean_of_rows({0: {"": entry}})["interval"]
    return entry


def tables_of(suite: str, prompts: list[Prompt], grades: list[Grade]) -> dict[str, dict[str, dict]]:
    """What has a score -> row -> tally: each row, their mean; of languages, one and two objects."""
    rows: dict[str, list[tuple[Prompt, Grade]]] = {}
    for prompt, its_grade in zip(prompts, grades):
        rows.setdefault(prompt.row, []).append((prompt, its_grade))
    tables = {}
    for row, pairs in rows.items():
        tables[row] = {row: tally(pairs)}
    counted = [row for row in rows if row not in LEFT_OUT.get(suite, ())] or list(rows)

    # of languages also by the number of objects, where every language has such prompts
    if suite in LEFT_OUT:
        for name, groups in (("one object", 1), ("two objects", 2)):
            table = {}
            for row in counted:
                pairs = [pair for pair in rows[row] if len(pair[0].scene.groups) == groups]
                if pairs:
                    table[row] = tally(pairs)
            if len(table) == len(counted):
                tables[name] = table

    tables["mean"] = {row: tables[row][row] for row in counted}
    return tables


def summarize(suite: str, prompts: list[Prompt], grades: list[Grade]) -> dict:
    """Every row of a suite and their means. -> JSON"""
    result = {"rows": {}}
    for name, table in tables_of(suite, prompts, grades).items():
        if name in table:
            result["rows"][name] = table[name]
        else:
            result[name] = mean_of_rows({0: table}, suite in LEFT_OUT)
    return result


def compare(suite: str, prompts: list[Prompt], ours: list[Grade], theirs: list[Grade]) -> dict:
    """The paired difference of two runs in every row and mean of a suite. -> JSON"""
    first = tables_of(suite, prompts, ours)
    second = tables_of(suite, prompts, theirs)
    differences = {}
    for name in first:
        drawn = suite in LEFT_OUT
        differences[name] = difference({0: first[name]}, {0: second[name]}, drawn)
    return differences


# --------------------------------------------------------------------------------------------------
# what the reader sees


def signed(paired: dict) -> str:
    low, high = paired["interval"]
    return f"{paired['score']:+5.2f} {low:+.2f} to {high:+.2f}"


def print_suite(suite: str, results: dict[str, dict]) -> None:
    """run -> its results: one run, or two side by side."""
    runs = list(results.values())
    differences = runs[0].get("difference", {})
    if len(runs) == 1:
        heads = ["right  95 %        "]
        more = "  chance  wrong because"
    else:
        heads = [f"{Path(name).name[:19]:>19}" for name in results] + [f"{'difference':>20}"]
        more = ""
    off = "off, dE" if suite in ("colors", "palettes") else "off, RGB"
    print(f"{suite:32}{'   '.join(heads)}      n{off:>9}{more}")
    for row in runs[0]["rows"]:
        print_line(row, [result["rows"][row] for result in runs], differences.get(row))
    for name in ("one object", "two objects", "mean"):
        if name in runs[0]:
            shown = f"{name}, but English" if suite in LEFT_OUT else name
            print_line(shown, [result[name] for result in runs], differences.get(name))
    print(flush=True)


def print_line(name: str, entries: list[dict], paired: dict | None) -> None:
    """A row or a mean: an entry of each run, and their difference."""
    cells = []
    for entry in entries:
        low, high = entry["interval"]
        cells.append(f"{entry['score']:5.2f}  {low:.2f} to {high:.2f}")
    if paired:
        cells.append(signed(paired))
    first = entries[0]
    off = first.get("color_off")
    text = f"  {name:30}{'   '.join(cells)}  {first['n']:5}"
    text += " " * 9 if off is None else f"{off:9.0f}"
    if len(entries) == 1:
        by_chance = first.get("chance")
        text += " " * 8 if by_chance is None else f"{by_chance:8.2f}"
        text += "  " + ", ".join(f"{n} {why}" for why, n in first["wrong"].items())
    print(text)


def sheet(prompts: list[Prompt], drawn: list[tuple[str, np.ndarray, list[Grade]]]) -> Image.Image:
    """A suite at a glance: a line of pictures for each row, two runs side by side, right ones in
    green frames, wrong ones in red. drawn: of each run name, pictures (prompts, height, width, 3),
    grades."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt.row, []).append(i)
    blocks = []
    for name, pictures, grades in drawn:
        lines = {}
        for row, members in rows.items():
            right = [grades[i].reason is None for i in members]
            cells = []
            for k in spread(len(members), 8 // len(drawn)):
                i = members[k]
                cells.append((pictures[i], prompts[i].text, right[k]))
            lines[f"{row}: {sum(right) / len(right):.2f}"] = cells
        blocks.append((name, lines))
    return picture_table(blocks)
