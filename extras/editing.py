"""Edit one's own pictures with a run that has learned to, and score it on scenes that are known.

    python sample.py --image in.png --prompt "make the circle red"
    python evaluate.py --ckpt runs/edits-from-shapes --suite edits

An edit is right if the change is made and everything else is kept: every thing in its place, its
shape and its colour, and nothing more. extras/judge.py reads the pictures; no network judges.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from assemble import open_towers
from cli import captioned_grid, write_whole
from data import CANONICAL_COLORS, Group, Scene
from evaluate import LoadedRun
from extras.colors import same_color
from extras.edits import KINDS, STEPS, Edit, Edits, Placed, edit_of, random_scene
from extras.files import read_picture
from extras.grades import Grade
from extras.judge import Found, read_scene
from extras.lmfusion import EDIT_GUIDANCE, draw_edits
from extras.suites import Prompt, is_in
from extras.tables import compare, print_suite, sheet, summarize
from model import ImageExpert
from sample import file_words, save_picture

PER_ROW = 40  # edits
NEAR = 0.12  # of the side: how far from its place a thing may stand; places are 0.3 apart
LANGUAGES = Path(__file__).parent.parent / "assets" / "edits" / "languages.json"


def check_edits(expert: ImageExpert, name: str) -> None:
    """ValueError if an expert, out of the checkpoint of this name, never learned to edit."""
    if not expert.made_for.get("pairs"):
        raise ValueError(
            f"{name} never learned to edit: expected a run that was trained with train.py --data "
            "edits (a vision-language model reads a picture first with --read image:FILE)"
        )


# -------------------------------------------------------------------------------------------------
# what is right


def why_wrong(picture: np.ndarray, edit: Edit) -> str | None:
    """Why a picture (side, side, 3) uint8 is not what an edit asks for; None if it is.

    "not done": what should have changed is not as it should be; "not kept": what should not have;
    "extra": something else is there.
    """
    found = read_scene(picture)
    missing = []
    for wanted in edit.after:
        match = next((one for one in found if is_it(one, wanted)), None)
        if match is None:
            missing.append(wanted)
        else:
            found.remove(match)
    if any(one not in edit.before for one in missing):
        return "not done"
    if missing:
        return "not kept"
    changed = [one for one in edit.before if one not in edit.after]
    if any(is_it(one, old) for one in found for old in changed):
        return "not done"
    return "extra" if found else None


def is_it(found: Found, wanted: Placed) -> bool:
    thing = wanted.thing()
    off = np.hypot(found.x - thing.x, found.y - thing.y)
    same = found.shape == thing.shape and same_color(found.rgb, thing.rgb)
    return bool(same and off < NEAR)


# -------------------------------------------------------------------------------------------------
# the suite


@dataclass(frozen=True)
class Asked:
    """An edit of the suite, and its prompt: the row, the instruction and the scene after it."""

    prompt: Prompt
    edit: Edit


def read_edit_suite(limit: int | None, only: list[str] | None, half: str) -> list[Asked]:
    """The edits of the suite or of a half of it, each kind in English a row and each other language
    a row, of the same edits; the same whatever the seed of a run."""
    rows: dict[str, list[Asked]] = {}
    languages = json.loads(LANGUAGES.read_text("utf-8"))
    for kind in KINDS:
        rng = np.random.default_rng([2025, KINDS.index(kind)])
        for _ in range(PER_ROW):
            edit = canonical_edit(kind, rng)
            add_to(rows, f"{kind}", edit, edit.instruction)
            for language, words in languages.items():
                if kind in words:
                    add_to(rows, language, edit, translated(edit, words))
    asked = []
    for row in only or rows:
        if row not in rows:
            raise ValueError(f"--rows {row}: the rows of edits are {', '.join(rows)}")
        members = [one for one in rows[row] if is_in(half, one.prompt.scene_id)]
        asked += members[:limit]
    return asked


def canonical_edit(kind: str, rng: np.random.Generator) -> Edit:
    """An edit of this kind among things of canonical colours."""
    while True:
        scene = []
        for one in random_scene(rng):
            scene.append(replace(one, color=str(rng.choice(CANONICAL_COLORS))))
        edit = edit_of(kind, scene, rng)
        if edit and all(one.color in CANONICAL_COLORS for one in edit.after):
            return edit


def add_to(rows: dict, row: str, edit: Edit, instruction: str) -> None:
    groups = tuple([Group(1, one.color, one.shape) for one in (*edit.before, *edit.after)])
    rows.setdefault(row, []).append(Asked(Prompt(row, instruction, Scene(groups)), edit))


def translated(edit: Edit, words: dict) -> str:
    """The instruction of a color, remove or move edit in the words of another language."""
    old = edit.before[0]
    the = words["the"][old.shape]
    if edit.kind == "remove":
        return words["remove"].format(the=the)
    new = edit.after[-1]
    if edit.kind == "move":
        step = (new.cell[0] - old.cell[0], new.cell[1] - old.cell[1])
        way = next(way for way in STEPS if STEPS[way] == step)
        return words["move"][way].format(the=the)
    color = words["colors"][new.color]
    if old.shape in words.get("feminine", ()):
        color = words["feminine colors"].get(new.color, color)
    return words["color"].format(the=the, c=color)


def evaluate_edits(args: argparse.Namespace, runs: list[LoadedRun]) -> dict[str, dict]:
    """Score, print and picture the suite of one run, or of two side by side. -> run -> scores"""
    asked = read_edit_suite(args.limit, args.rows, args.half)
    prompts = [one.prompt for one in asked]
    texts = [prompt.text for prompt in prompts]
    seeds = list(range(args.seed, args.seed + len(asked)))
    results = {}
    drawn = []
    for run in runs:
        source = Edits(run.expert.image_size)
        before = np.stack([source.picture(one.edit.before) for one in asked])
        guidance = (args.guidance[0], EDIT_GUIDANCE[1])
        pictures = draw_edits(
            run.expert, run.llm, before, texts, seeds, args.steps, guidance, args.renoise
        )
        grades = []
        for picture, one in zip(pictures, asked):
            grades.append(Grade(why_wrong(picture, one.edit), None, None))
        scores = summarize("edits", prompts, grades)
        unchanged = [why_wrong(picture, one.edit) is None for picture, one in zip(before, asked)]
        scores["unchanged"] = float(np.mean(unchanged))  # the input held against the edit: chance
        results[run.name] = scores
        drawn.append((run.name, np.concatenate([before, pictures], axis=2), grades))
    if len(runs) > 1:
        results[runs[0].name]["difference"] = compare("edits", prompts, drawn[0][2], drawn[1][2])
    print_suite("edits", results)
    write_whole(args.out / "evaluate-edits.png", sheet(prompts, drawn).save)
    return results


# -------------------------------------------------------------------------------------------------
# one's own pictures


def edit_files(args: argparse.Namespace, out: Path, into_file: bool) -> None:
    """sample.py --image: the picture after each prompt, beside the picture itself in the grid."""
    unused = "prompts maps read interactive trajectory size temperature".split()
    for name in unused:
        if name in args.given:
            raise ValueError(f"--image edits a picture: leave out --{name}")
    if args.guidance[1:] != ((0, 1), False):
        raise ValueError("--image: expected --guidance to be a scale alone, as in 1.5")
    picture = read_picture(args.image)
    expert, llm = open_towers(args, out.parent if into_file else out)
    check_edits(expert, args.ckpt or "the checkpoint")
    side = expert.image_size
    if picture.size != (side, side):
        print(f"{args.image}: {picture.width}x{picture.height}, its centre read at {side}x{side}")
    square = np.asarray(read_picture(args.image, (side, side)))

    seeds = [args.seed + k for k in range(args.n)]
    texts = [prompt for prompt in args.prompt for _ in seeds]
    before = np.stack([square] * len(texts))
    guidance = (args.guidance[0], args.image_guidance)
    seeds = seeds * len(args.prompt)
    after = draw_edits(expert, llm, before, texts, seeds, args.steps, guidance, args.renoise)
    for i, edited in enumerate(after):
        path = out
        if not into_file:
            number, k = divmod(i, args.n)
            path = out / f"{number:03d}-{file_words(texts[i])}-seed{seeds[k]}.png"
        save_picture(edited, path)
        print(path)
    if not into_file:
        cells = after.reshape(len(args.prompt), args.n, *after.shape[1:])
        cells = np.concatenate([before[: len(args.prompt), None], cells], axis=1)
        write_whole(out / "grid.png", captioned_grid(cells, args.prompt).save)
        print(out / "grid.png")
