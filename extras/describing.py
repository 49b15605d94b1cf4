"""What a run says of pictures: of one's own, and a score on scenes whose every thing is known.

    python sample.py --describe picture.png other.jpg
    python evaluate.py --ckpt runs/described --suite describe
    python evaluate.py --ckpt runs/described --suite describe-languages     # after "Una foto di"

A caption is read back by the grammar of captions (caption_grammar.py), and compared with the scene:
shapes, colours, counts, and where things stand, if it says so. No network judges.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from assemble import open_towers
from cli import write_whole
from data import (
    CANONICAL_COLORS,
    COLOR_NAMES,
    COLORS,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    Thing,
    draw_things,
    lay_out,
)
from evaluate import LoadedRun
from extras.caption_grammar import scene_of
from extras.files import read_picture
from extras.grades import Grade
from extras.lmfusion import LINE, Sequence, after_pictures, logits_of
from extras.suites import Prompt, is_in
from extras.tables import compare, print_suite, sheet, summarize
from llm import FrozenLLM
from model import ImageExpert
from sample import data_of

AT_ONCE = 32  # pictures that are described as one batch


def check_describes(expert: ImageExpert, name: str) -> None:
    """ValueError if an expert, out of the checkpoint of this name, never learned to describe."""
    if not expert.made_for.get("describe"):
        raise ValueError(
            f"{name} never learned to describe: expected a run that was trained with "
            "train.py --describe 0.2"
        )


@torch.no_grad()
def describe(
    llm: FrozenLLM,
    expert: ImageExpert,
    pictures: Tensor,
    beginnings: list[str] | None = None,
    temperature: float = 0.0,
    seeds: list[int] | None = None,
    tokens: int = 48,
) -> list[str]:
    """What the LLM says of each picture, (B, C, height, width) in [-1, 1], after its beginning:
    until its tokenizer's end, a line's end, or so many tokens.

    temperature 0: the most likely token each time; else drawn, from the chance of each row's seed.
    """
    sequence = after_pictures(llm, expert, pictures)
    beginnings = beginnings or [""] * len(pictures)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(pictures))]
    start = sequence.position
    line = sequence.tokens(LINE)
    states = sequence.read_tokens([line + sequence.tokens(text) for text in beginnings])
    last = sequence.position - start - 1
    hidden = states[torch.arange(len(states)), last]  # (B, d)
    said: list[list[int]] = [[] for _ in pictures]
    for _ in range(tokens):
        new = []
        for row, generator in zip(logits_of(llm, hidden).cpu(), generators):
            new.append(next_token(row, temperature, generator))
        for ids, token in zip(said, new):
            ids.append(token)
        if all(has_ended(sequence, ids) for ids in said):
            break
        states = sequence.read_tokens([[token] for token in new])
        if states is None:  # the LLM takes no more
            break
        hidden = states[:, -1]
    return [text + text_of(sequence, ids) for text, ids in zip(beginnings, said)]


def next_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """logits (vocabulary,) -> a token."""
    if not temperature:
        return int(logits.argmax())
    chances = (logits / temperature).softmax(dim=0)
    return int(torch.multinomial(chances, 1, generator=generator))


def has_ended(sequence: Sequence, ids: list[int]) -> bool:
    tokenizer = sequence.llm.tokenizer
    return tokenizer.eos_token_id in ids or "\n" in tokenizer.decode(ids)


def text_of(sequence: Sequence, ids: list[int]) -> str:
    """The text of the tokens, up to its end."""
    tokenizer = sequence.llm.tokenizer
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids).partition("\n")[0]


# -------------------------------------------------------------------------------------------------
# the suite


def why_wrong(said: str, things: list[Thing]) -> str | None:
    """Why a caption does not tell of these things, None if it does: shapes, counts and colours
    (all must be named; of the same RGB any name will do), and where things stand, if it says so."""
    scene = scene_of(said)
    if scene is None:
        return "no scene"
    told = []
    for group in scene.groups:
        told += [group.shape] * group.count
    there = [thing.shape for thing in things]
    if sorted(told) != sorted(there):
        return "wrong shape" if len(told) == len(there) else "wrong count"
    told = []
    for group in scene.groups:
        if group.color is None:
            return "no color"
        told += [(group.shape, COLORS[group.color])] * group.count
    if sorted(told) != sorted((thing.shape, thing.rgb) for thing in things):
        return "wrong color"
    if scene.relation and not stands(scene, things):
        return "wrong relation"
    return None


def stands(scene: Scene, things: list[Thing]) -> bool:
    """Whether a thing of the first group stands as the relation says, seen from another of the
    second: by what separates the two most."""
    for first, second in product(*[things_of(group, things) for group in scene.groups]):
        dx, dy = first.x - second.x, first.y - second.y
        way = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
        if first is not second and RELATIONS[scene.relation] == way:
            return True
    return False


def things_of(group: Group, things: list[Thing]) -> list[Thing]:
    return [t for t in things if t.shape == group.shape and t.rgb == COLORS[group.color]]


PER_ROW = 60  # scenes
SUITE = {  # row -> how many things of each kind, and which colours
    "one object": ([(1,)], CANONICAL_COLORS),
    "two objects": ([(1, 1)], CANONICAL_COLORS),
    "two to four of a kind": ([(2,), (3,), (4,)], CANONICAL_COLORS),
    "all 130 colors": ([(1,)], COLOR_NAMES),
}


@dataclass(frozen=True)
class Shown:
    """A scene of a suite, drawn: its things, the picture (side, side, 3) uint8, and how its
    description begins."""

    row: str
    scene: Scene
    things: list[Thing]
    picture: np.ndarray
    beginning: str = ""


def read_describe_suite(
    side: int, limit: int | None, only: list[str] | None, half: str
) -> list[Shown]:
    """The scenes of the suite or of a half of it; the same whatever the seed of a run."""
    shown = []
    for row in only or SUITE:
        if row not in SUITE:
            raise ValueError(f"--rows {row}: the rows of describe are {', '.join(SUITE)}")
        rng = np.random.default_rng([2024, list(SUITE).index(row)])
        counts, colors = SUITE[row]
        members = []
        while len(members) < PER_ROW:
            groups = []
            for count in counts[len(members) % len(counts)]:
                groups.append(Group(count, str(rng.choice(colors)), str(rng.choice(SHAPES))))
            if len(set((COLORS[group.color], group.shape) for group in groups)) < len(groups):
                continue
            scene = Scene(tuple(groups))
            things = lay_out(scene, rng)
            members.append(Shown(row, scene, things, draw_things(things, side)))
        prompts = [member for member in members if is_in(half, prompt_of(member, "").scene_id)]
        shown += prompts[:limit]
    return shown


def prompt_of(shown: Shown, said: str) -> Prompt:
    """What was said of a scene, in the place of a prompt."""
    return Prompt(shown.row, said, shown.scene)


def why_not_of(said: str, shown: Shown) -> str | None:
    """why_wrong, of a scene of the suite."""
    return why_wrong(said, shown.things)


def evaluate_describing(
    suite: str, args: argparse.Namespace, runs: list[LoadedRun]
) -> dict[str, dict]:
    """Score, print and picture a suite of one run, or of two side by side. -> run -> scores"""
    from extras.described_languages import read_languages_suite, why_not_in

    if suite == "describe-languages":
        read, judge = read_languages_suite, why_not_in
    else:
        read, judge = read_describe_suite, why_not_of
    results = {}
    graded = []
    for run, name in zip(runs, ("evaluate", "versus")):
        shown = read(run.expert.image_size, args.limit, args.rows, args.half)
        pictures = np.stack([one.picture for one in shown])
        beginnings = [one.beginning for one in shown]
        said = describe_all(run.expert, run.llm, pictures, beginnings=beginnings)
        prompts = list(map(prompt_of, shown, said))
        grades = [Grade(judge(text, one), None, None) for text, one in zip(said, shown)]
        results[run.name] = summarize(suite, prompts, grades)
        results[run.name]["said"] = said
        for row, share in chance_of(judge, shown, said).items():
            results[run.name]["rows"][row]["chance"] = share
        graded.append(grades)
        picture = sheet(prompts, [(run.name, pictures, grades)])
        write_whole(args.out / f"{name}-{suite}.png", picture.save)
    if len(runs) > 1:
        difference = compare(suite, prompts, *graded)
        results[runs[0].name]["difference"] = difference
    print_suite(suite, results)
    return results


def chance_of(judge: Callable, shown: list[Shown], said: list[str]) -> dict[str, float]:
    """row -> the share that would be right of the next picture of the row."""
    right: dict[str, list[bool]] = {}
    for i, one in enumerate(shown):
        for other in shown[i + 1 :] + shown[:i]:
            if other.row == one.row:
                right.setdefault(one.row, []).append(judge(said[i], other) is None)
                break
    return {row: float(np.mean(passed)) for row, passed in right.items()}


def describe_all(expert: ImageExpert, llm: FrozenLLM, pictures: np.ndarray, **options) -> list[str]:
    """What is said of each picture, (n, side, side, 3) uint8. options: see describe, each picture's
    own beginning and seed."""
    said = []
    for start in range(0, len(pictures), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        own = dict(options)
        for name in ("beginnings", "seeds"):
            if name in own:
                own[name] = own[name][some]
        said += describe(llm, expert, data_of(expert, pictures[some], llm.device), **own)
    return said


# -------------------------------------------------------------------------------------------------
# one's own pictures


def describe_files(args: argparse.Namespace) -> None:
    """sample.py --describe: a line for each picture."""
    check_flags(args)
    paths = args.describe
    sizes = [read_picture(path).size for path in paths]  # refused before anything is loaded
    expert, llm = open_towers(args, None)
    check_describes(expert, args.ckpt or "the checkpoint")
    side = expert.image_size
    squares = []
    for path, (width, height) in zip(paths, sizes):
        if (width, height) != (side, side):
            print(f"{path}: {width}x{height}, its centre read at {side}x{side}")
        squares.append(np.asarray(read_picture(path, (side, side))))
    beginning = args.prompt[0] if args.prompt else ""
    seeds = list(range(args.seed, args.seed + len(paths)))
    said = describe_all(
        expert,
        llm,
        np.stack(squares),
        beginnings=[beginning] * len(paths),
        temperature=args.temperature,
        seeds=seeds,
    )
    for path, text in zip(paths, said):
        print(f"{path}: {text}")


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for flags of drawing beside --describe."""
    used = "describe prompt temperature seed ckpt llm vae trust_remote_code device dtype".split()
    for name in sorted(args.given - set(used)):
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"--describe says what pictures show: leave out {flag}")
    if len(args.prompt) > 1:
        raise ValueError("--describe takes one --prompt, the beginning of every description")
