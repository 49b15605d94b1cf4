"""What evaluate.py asks for: suites of prompts, each with the scene that it means, in two halves.

A suite is a file in assets/prompts/, a prompt a line; its rows are scored each on its own.
"""

import argparse
import json
from dataclasses import dataclass
from hashlib import sha256

from data import PROMPTS, Group, Scene
from flags import split_at_commas

HALVES = ("choose", "report", "both")
SETTINGS = "half n limit steps renoise guidance seed read"  # that a score depends on
OTHER_SUITES = {  # that evaluate.py alone scores; which of the settings each has
    "describe": "half limit read",
    "describe-languages": "half limit read",
    "edits": "half limit steps renoise guidance seed read",
    "held-out": "limit seed read",
}
SALT = 375  # with it 40 to 60 % of every row are on each side


Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Prompt:
    """palette: the exact colour of each group that has one, else None; empty where none has."""

    row: str
    text: str
    scene: Scene
    palette: tuple[Rgb | None, ...] = ()

    @property
    def rgb(self) -> Rgb | None:
        """The exact colour of the first group, if it has one."""
        return self.palette[0] if self.palette else None

    @property
    def scene_id(self) -> str:
        """The same for the same scene, whatever the language, the row or the suite."""
        groups = [[group.count, group.color, group.shape] for group in self.scene.groups]
        exact = self.rgb if len(self.palette) < 2 else self.palette
        return hashed(json.dumps([groups, self.scene.relation, exact]))

    @property
    def is_of_one_thing(self) -> bool:
        return len(self.scene.groups) == 1 and self.scene.groups[0].count == 1


def hashed(what: str) -> str:
    return sha256(f"{SALT} {what}".encode()).hexdigest()[:8]


def is_in(half: str, scene_id: str) -> bool:
    """Whether a scene belongs to this half: "choose" is for choosing settings, "report" for the
    numbers that are given."""
    side = ("choose", "report")[int(scene_id, 16) % 2]
    return half in ("both", side)


def read_suite(
    name: str,
    limit: int | None = None,
    only: list[str] | None = None,
    one: bool = False,
    half: str = "both",
) -> list[Prompt]:
    """The prompts of a suite or of a half of it.

    limit: the first so many of each row. only: of these rows. one: for one object alone.
    ValueError if a row is not there.
    """
    rows: dict[str, list[Prompt]] = {}
    for line in (PROMPTS / f"{name}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        groups = tuple(Group(*group) for group in record["groups"])
        palette = tuple(tuple(rgb) if rgb else None for rgb in record.get("palette", ()))
        scene = Scene(groups, record.get("relation"))
        prompt = Prompt(record["row"], record["prompt"], scene, palette)
        if is_in(half, prompt.scene_id) and (prompt.is_of_one_thing or not one):
            rows.setdefault(prompt.row, []).append(prompt)

    prompts = []
    for row in only or rows:
        if row not in rows:
            raise ValueError(f"--rows {row}: the rows of {name} are {', '.join(rows)}")
        prompts += rows[row][:limit]
    return prompts


def check_suites(asked: str | None, scored: list[str]) -> None:
    """ValueError for a suite of --suite that is not scored here: some are evaluate.py's alone."""
    for suite in asked.split(",") if asked else ():
        if suite not in scored:
            expected = f"expected some of {','.join(scored)} (for others: python evaluate.py)"
            raise ValueError(f"--suite {suite}: {expected}")


def split_rows(text: str) -> list[str]:
    """--rows -> the rows, at the commas but for those in a row's own name: "hex, random"."""
    known = set()
    for path in PROMPTS.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            known.add(json.loads(line)["row"])
    rows = split_at_commas(text, lambda part: part.strip() in known)
    return [row.strip() for row in rows]


def settings_of(args: argparse.Namespace, suite: str = "") -> dict:
    """What a suite's score depends on, of the command line."""
    return {name: getattr(args, name) for name in OTHER_SUITES.get(suite, SETTINGS).split()}
