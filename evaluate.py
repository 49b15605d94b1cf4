"""Does the LLM's knowledge reach the picture? Exact scores on fixed prompts, none of which training has seen.

    python evaluate.py --ckpt runs/shapes                                  # every suite: a table, a JSON, a picture each
    python evaluate.py --ckpt runs/shapes --suite languages,colors --n 4
    python evaluate.py --ckpt runs/shapes --versus runs/shapes-random-llm  # side by side
    python evaluate.py --ckpt runs/shapes --probe                          # what the LLM knows, and how much of it is drawn
    python evaluate.py --probe-llm gemma-3-270m                            # the same of hex codes alone, and no run
    python evaluate.py --race mot,last,lap --minutes 12 --seeds 0,1        # train one of each bridge, and compare them

No network judges: judge.py reads every picture by geometry. Prompts: assets/prompts/SUITE.jsonl, one JSON object a line with
row (of the table), prompt, groups ([count, color or null, shape]), and where it applies relation, or rgb (the exact colour).

Each suite has two halves (--half): what is chosen by its score (layers, guidance, a template, a budget)
is chosen on one, and the other is what a report is about. The same scene is on the same side in every
row, language and suite.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

import train
from cli import (
    OneLineParser,
    between,
    make_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
    write_text,
    write_whole,
)
from data import BACKGROUND, COLORS, PROMPTS, SHAPES, Emoji, Group, Scene, Shapes
from extras.intervals import difference, draw_anew, mean_of_rows, weighted_median, wilson
from judge import BASIC_COLORS, Found, Verdict, basic_color, delta_e, judge, lab, learned_features, pixel_features, ranks
from model import FrozenLLM, ImageExpert, load_llm
from sample import (
    add_thinking,
    caption_font,
    draw,
    llm_of,
    load_expert,
    newest_run,
    picture_table,
    spread,
    thinking_of,
)

SUITES = ("geneval", "unseen", "languages", "colors", "emoji", "ascii", "knowledge", "parrot", "position")
AS_IN_ENGLISH = "as in English"  # names that training has taught all the same
LEFT_OUT = {  # rows to compare with, not in the mean
    "languages": {"English"},
    "emoji-languages": {"en", AS_IN_ENGLISH},
    "unseen-names": {AS_IN_ENGLISH},
}
NEAR = 15.0  # CIE76 delta E within which a colour counts as the one that was asked for by its numbers

# ---------------------------------------------------------------------------------------------------------------------
# prompts and verdicts


@dataclass(frozen=True)
class Prompt:
    row: str
    text: str
    scene: Scene
    rgb: tuple[int, int, int] | None = None  # where the colour asked for is exact, and no word of data.COLORS

    @property
    def scene_id(self) -> str:
        groups = [[group.count, group.color, group.shape] for group in self.scene.groups]
        return hashed(json.dumps([groups, self.scene.relation, self.rgb]))


HALVES = ("choose", "report", "both")
SALT = 375  # with it 40 to 60 % of every row are on each side


def hashed(what: str) -> str:
    return sha256(f"{SALT} {what}".encode()).hexdigest()[:8]


def is_in(half: str, scene_id: str) -> bool:
    """Whether what has this hash belongs to the half to choose on, or to the one to report."""
    return half == "both" or half == ("choose", "report")[int(scene_id, 16) % 2]


def read_suite(
    name: str,
    limit: int | None = None,
    only: list[str] | None = None,
    one: bool = False,
    half: str = "both",
) -> list[Prompt]:
    """The prompts of a suite or of a half of it: of some rows, for one object, the first of each row."""
    rows: dict[str, list[Prompt]] = {}
    for line in (PROMPTS / f"{name}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        scene = Scene(tuple(Group(*group) for group in record["groups"]), record.get("relation"))
        rgb = tuple(record["rgb"]) if "rgb" in record else None
        prompt = Prompt(record["row"], record["prompt"], scene, rgb)
        things = sum(group.count for group in scene.groups)
        if is_in(half, prompt.scene_id) and (things == 1 or not one):
            rows.setdefault(prompt.row, []).append(prompt)
    if unknown := [row for row in only or () if row not in rows]:
        raise ValueError(f"--rows {unknown[0]}: the rows of {name} are {', '.join(rows)}")
    return [prompt for row in only or rows for prompt in rows[row][:limit]]


@dataclass(frozen=True)
class Grade:
    """reason: why the picture is wrong, None if it is right (see judge.Verdict). off: how far its colour is from the one
    asked for, where it has the shapes: in delta E where the prompt gives numbers, else in RGB, 0 to 441."""

    reason: str | None
    off: float | None
    verdict: Verdict


def grade(prompt: Prompt, picture: np.ndarray) -> Grade:
    verdict = judge(picture, prompt.scene)
    if prompt.rgb is None:
        return Grade(verdict.reason, verdict.rgb_distance, verdict)
    if not verdict.ok:
        return Grade(verdict.reason, None, verdict)
    off = delta_e(verdict.found[0].rgb, prompt.rgb)
    return Grade(None if off < NEAR else "wrong color", off, verdict)


def chance(prompts: list[Prompt], pictures: np.ndarray) -> dict[str, float]:
    """row -> the share that would be right by chance: every picture against the next prompt of its
    row that asks for another scene. A row that asks for one scene alone has none."""
    right: dict[str, list[bool]] = {}
    for i, prompt in enumerate(prompts):
        others = [other for other in prompts[i + 1 :] + prompts[:i] if other.row == prompt.row]
        other = next((other for other in others if other.scene_id != prompt.scene_id), None)
        if other:
            right.setdefault(prompt.row, []).append(grade(other, pictures[i]).reason is None)
    return {row: float(np.mean(some)) for row, some in right.items()}


def tally(pairs: list[tuple[Prompt, Grade]]) -> dict:
    """One row of the table: its score with the interval, why the others are wrong, the median
    distance of the colours; each picture's verdict and scene, for other intervals later."""
    right = "".join("0" if g.reason else "1" for _, g in pairs)
    offs = [g.off for _, g in pairs if g.off is not None]
    entry = {
        "score": right.count("1") / len(pairs),
        "n": len(pairs),
        "wrong": dict(Counter(g.reason for _, g in pairs if g.reason).most_common()),
        "color_off": median(offs) if offs else None,
        "right": right,
        "scenes": " ".join(prompt.scene_id for prompt, _ in pairs),
    }
    return entry | {"interval": mean_of_rows({0: {"": entry}})["interval"]}


def tables_of(suite: str, prompts: list[Prompt], grades: list[Grade]) -> dict[str, dict[str, dict]]:
    """What has a score -> row -> tally: each row, their mean; of languages, one and two objects."""
    rows: dict[str, list[tuple[Prompt, Grade]]] = {}
    for prompt, g in zip(prompts, grades):
        rows.setdefault(prompt.row, []).append((prompt, g))
    tables = {row: {row: tally(pairs)} for row, pairs in rows.items()}
    counted = [row for row in rows if row not in LEFT_OUT.get(suite, ())] or list(rows)
    for name, groups in (("one object", 1), ("two objects", 2)) if suite in LEFT_OUT else ():
        part = {}
        for row in counted:
            part[row] = [pair for pair in rows[row] if len(pair[0].scene.groups) == groups]
        if all(part.values()):
            tables[name] = {row: tally(pairs) for row, pairs in part.items()}
    return tables | {"mean": {row: tables[row][row] for row in counted}}


def summarize(suite: str, prompts: list[Prompt], grades: list[Grade]) -> dict:
    """Every row of a suite and their means. -> JSON."""
    tables = tables_of(suite, prompts, grades)
    result = {"rows": {}}
    for name, table in tables.items():
        if name in table:
            result["rows"][name] = table[name]
        else:
            result[name] = mean_of_rows({0: table}, suite in LEFT_OUT)
    return result


def compare(suite: str, prompts: list[Prompt], ours: list[Grade], theirs: list[Grade]) -> dict:
    """The paired difference of two runs in every row and mean of a suite. -> JSON."""
    first = tables_of(suite, prompts, ours)
    second = tables_of(suite, prompts, theirs)
    return {
        name: difference({0: first[name]}, {0: second[name]}, suite in LEFT_OUT) for name in first
    }


# ---------------------------------------------------------------------------------------------------------------------
# what the reader sees


def signed(difference: dict) -> str:
    low, high = difference["interval"]
    return f"{difference['score']:+5.2f} {low:+.2f} to {high:+.2f}"


def print_suite(suite: str, results: dict[str, dict]) -> None:
    """run -> its results: one run, or two side by side."""

    def cells(result: dict) -> str:
        low, high = result["interval"]
        return f"{result['score']:5.2f}  {low:.2f} to {high:.2f}"

    first = next(iter(results.values()))

    def line(name: str, entries: list[dict], difference: dict | None) -> None:
        shown = [cells(entry) for entry in entries]
        if difference:
            shown.append(signed(difference))
        off = entries[0].get("color_off")
        by_chance = entries[0].get("chance")
        text = f"  {name:30}{'   '.join(shown)}  {entries[0]['n']:5}"
        text += " " * 9 if off is None else f"{off:9.0f}"
        if len(entries) == 1:
            text += " " * 8 if by_chance is None else f"{by_chance:8.2f}"
            text += "  " + ", ".join(f"{n} {why}" for why, n in entries[0]["wrong"].items())
        print(text)

    heads = ["right  95 %        "]
    if len(results) > 1:
        heads = [f"{Path(name).name[:19]:>19}" for name in results] + [f"{'difference':>20}"]
    off = "off, dE" if suite == "colors" else "off, RGB"
    more = "  chance  wrong because" if len(results) == 1 else ""
    print(f"{suite:32}{'   '.join(heads)}      n{off:>9}{more}")
    differences = first.get("difference", {})
    for row in first["rows"]:
        line(row, [result["rows"][row] for result in results.values()], differences.get(row))
    for name in ("one object", "two objects", "mean"):
        if name in first:
            shown = f"{name}, but English" if suite in LEFT_OUT else name
            line(shown, [result[name] for result in results.values()], differences.get(name))
    print(flush=True)


def sheet(prompts: list[Prompt], runs: list[tuple[str, np.ndarray, list[Grade]]]) -> Image.Image:
    """A suite at a glance: a line of pictures for each row, two runs side by side, green frames right and red ones wrong.
    runs: name, pictures (prompts, height, width, 3), grades."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt.row, []).append(i)
    blocks = []
    for name, pictures, grades in runs:
        lines = {}
        for row, members in rows.items():
            score = sum(grades[i].reason is None for i in members) / len(members)
            shown = [members[k] for k in spread(len(members), 8 // len(runs))]
            lines[f"{row}: {score:.2f}"] = [(pictures[i], prompts[i].text, grades[i].reason is None) for i in shown]
        blocks.append((name, lines))
    return picture_table(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# does the LLM know it, or does the expert not hear it?


def ridge(X: torch.Tensor, Y: torch.Tensor, strength: float = 10.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ridge regression on standardized features, in its dual form: there are more features than captions.

    The penalty is strong, ten times a caption's squared norm. A weak one finds directions that tell English captions apart
    and mean nothing in another language.
    """
    middle, scale = X.mean(0), (X.std(0) + 1e-3) * X.shape[1] ** 0.5
    Z = (X - middle) / scale
    weights = Z.T @ torch.linalg.solve(Z @ Z.T + strength * torch.eye(len(Z)), Y - Y.mean(0))
    return lambda new: (new - middle) / scale @ weights + Y.mean(0)


def hear(llm: FrozenLLM, captions: list[str]) -> list[torch.Tensor]:
    """What the LLM hands over of each caption, layer by layer: its values, their mean over the text tokens beside those of the
    last token, which has read all of it. (B, 2 G Dv)"""
    parts = []
    for start in range(0, len(captions), 256):
        context = llm.context(captions[start : start + 256])
        lengths, rows = context.lengths.clamp_min(1), torch.arange(len(context.lengths))
        means = [v.float().sum(2) / lengths[:, None, None] for v in context.values]  # padding is zero
        lasts = [v[rows, :, lengths - 1].float() for v in context.values]
        parts.append([torch.cat(pair, -1).flatten(1).cpu() for pair in zip(means, lasts)])
    return [torch.cat(layer) for layer in zip(*parts)]


def probe(llm: FrozenLLM, graded: list[tuple[str, Prompt, Grade]], seed: int, captions: int = 2000) -> dict:
    """Linear probes from each layer of the LLM to colour and shape, fitted on training captions of one thing, tested on the
    prompts of one thing; and the same measure of the pictures. graded: suite, prompt, and the grade of its picture.

    -> {"layer 3" or "picture": {column: (share of colours right, share of shapes right)}}. A colour is right if its basic
    term is; where the prompt gives numbers, if it is less than NEAR away.
    """
    source, examples = Shapes(8, seed), []
    for i in range(20 * captions):
        caption, scene, _ = source.caption(i)
        if len(scene.groups) == 1 and scene.groups[0].count == 1 and scene.groups[0].color and len(examples) < captions:
            examples.append((caption, COLORS[scene.groups[0].color], scene.groups[0].shape))
    terms = list(BASIC_COLORS)
    targets = torch.zeros(captions, len(terms) + len(SHAPES) + 3)
    for target, (_, rgb, shape) in zip(targets, examples):
        target[terms.index(basic_color(rgb))] = target[len(terms) + SHAPES.index(shape)] = 1
        target[-3:] = torch.tensor(lab(rgb))

    columns: dict[str, list[tuple[Prompt, Grade]]] = {}
    for suite, prompt, g in graded:
        if len(prompt.scene.groups) == 1 and prompt.scene.groups[0].count == 1:
            row = "" if suite == "knowledge" else f" {prompt.row}"
            columns.setdefault(suite + row, []).append((prompt, g))

    def shares(column: str, answers: list[tuple[str, np.ndarray, str | None]]) -> tuple[float | None, float]:
        """answers: basic term, Lab and shape, one for each prompt of the column."""
        colors, shapes = [], []
        for (prompt, _), (term, color, shape) in zip(columns[column], answers):
            group = prompt.scene.groups[0]
            shapes.append(shape == group.shape)
            if prompt.rgb:
                colors.append(np.linalg.norm(color - lab(prompt.rgb)) < NEAR)
            elif group.color:
                colors.append(term == basic_color(COLORS[group.color]))
        return float(np.mean(colors)) if colors else None, float(np.mean(shapes))

    heard = hear(llm, [caption for caption, *_ in examples])
    tests = {column: hear(llm, [prompt.text for prompt, _ in pairs]) for column, pairs in columns.items()}
    table = {}
    for number, layer in enumerate(llm.kept):
        predict = ridge(heard[number], targets)
        answers = {column: [(terms[out[: len(terms)].argmax()], out[-3:].numpy(), SHAPES[out[len(terms) : -3].argmax()])
                            for out in predict(test[number])] for column, test in tests.items()}  # fmt: skip
        table[f"layer {layer.index}"] = {column: shares(column, some) for column, some in answers.items()}
    drawn = {column: [largest(g) for _, g in pairs] for column, pairs in columns.items()}
    drawn = {column: [(thing.color, lab(thing.rgb), thing.shape) for thing in things] for column, things in drawn.items()}
    return table | {"picture": {column: shares(column, some) for column, some in drawn.items()}}


def probe_hex(llm: FrozenLLM, seed: int, captions: int = 800) -> dict:
    """Does the LLM know a hex code? The probe fitted on the kind itself, captions with other codes.

    -> {"layer 3": {"right": share within NEAR of the colour, its "interval", "basic term": share,
    "R2": of L*, a*, b*}}. The penalty is weaker: there is no other language to carry over to.
    """
    rng = np.random.default_rng(seed)
    asked = read_suite("colors", captions // 8, ["hex, random"])
    taken = {prompt.rgb for prompt in asked}
    texts, colors = [], []
    while len(texts) < captions:
        rgb = tuple(rng.integers(0, 256, 3).tolist())
        if rgb not in taken:
            texts.append(f"a {rng.choice(SHAPES)} in the color #{bytes(rgb).hex()}")
            colors.append(rgb)
    heard, tests = hear(llm, texts), hear(llm, [prompt.text for prompt in asked])
    targets = torch.tensor(lab(colors), dtype=torch.float32)
    truth = lab([prompt.rgb for prompt in asked])
    terms = lab(list(BASIC_COLORS.values()))

    def term(colors: np.ndarray) -> np.ndarray:
        return np.square(colors[:, None] - terms).sum(-1).argmin(1)

    table = {}
    for layer, X, new in zip(llm.kept, heard, tests):
        guess = ridge(X, targets, 1.0)(new).numpy()
        right = np.linalg.norm(guess - truth, axis=1) < NEAR
        missed = np.square(guess - truth).sum(0) / np.square(truth - truth.mean(0)).sum(0)
        table[f"layer {layer.index}"] = {
            "right": float(right.mean()),
            "interval": wilson(right.sum(), len(right)),
            "basic term": float((term(guess) == term(truth)).mean()),
            "R2": (1 - missed).tolist(),
        }
    return table


def print_probe_hex(name: str, table: dict) -> None:
    print(
        f"{name}, fitted on other hex codes: within dE {NEAR:.0f}, 95 %, basic term, R2 of L, a, b"
    )
    for layer, cells in table.items():
        low, high = cells["interval"]
        R2 = " ".join(f"{value:5.2f}" for value in cells["R2"])
        print(
            f"  {layer:10} {cells['right']:.2f}  {low:.2f} to {high:.2f}  {cells['basic term']:.2f}  {R2}"
        )


def probe_llm(args: argparse.Namespace) -> None:
    """The probe for hex codes of an LLM, and of its control, without any run."""
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    make_folder(args.out)
    tables = {}
    for name, random_seed in (("pretrained", None), ("random", 0)):
        llm = load_llm(args.probe_llm, device, dtype, random_seed=random_seed)
        llm.keep(range(len(llm.layers)))
        tables[name] = probe_hex(llm, args.seed, min(800, 80 * (args.limit or 10)))
        print_probe_hex(f"{args.probe_llm}, {name}", tables[name])
    write_json(args.out / "probe-hex.json", {"llm": args.probe_llm, "seed": args.seed} | tables)
    print(args.out / "probe-hex.json")


def largest(g: Grade) -> Found:
    """The largest thing of a picture; the background where there is none."""
    return max(g.verdict.found, key=lambda thing: thing.radius, default=Found(None, BACKGROUND, "grey", 0.5, 0.5, 0.5, 0.0))


def print_probe(table: dict) -> None:
    names = list(table["picture"])
    for i, name in enumerate(names):
        print(f"  {i + 1:2} {name}")
    print(f"{'color/shape right':18}" + "".join(f"{i + 1:^11}" for i in range(len(names))))
    for row, cells in table.items():
        shown = ("   -" if color is None else f"{color:4.2f}" for color, _ in cells.values())
        print(f"{row:18}" + "".join(f"{color}/{shape:4.2f}  " for color, (_, shape) in zip(shown, cells.values())))


# ---------------------------------------------------------------------------------------------------------------------
# emoji: which of them is the picture nearest to?

EMOJI_SUITES = ("recall", "emoji-languages", "unseen-names")
ASKED = 128  # emoji asked for in every language: the first in the order of a hash, so that no seed changes them


def read_emoji_suite(
    name: str,
    source: Emoji,
    limit: int | None,
    only: list[str] | None = None,
    half: str = "both",
) -> list[tuple[str, str, str]]:
    """(row, prompt, emoji) for each prompt: the English names of the emoji trained on, of some of them in the package's
    languages (English first, to compare with), or of those never trained on. A name that training
    has taught all the same, for another emoji ("rabbit") or in English ("pizza"), is in a row apart."""
    from emoji import EMOJI_DATA, LANGUAGES, config

    taught = {name.lower() for text in source.trained for name in source.names[text]}

    def row(usual: str, prompt: str) -> str:
        return AS_IN_ENGLISH if prompt.lower() in taught else usual

    def some(emoji: list[str]) -> list[str]:
        return [text for text in emoji if is_in(half, hashed(text))]

    if name == "unseen-names":
        names = [(source.names[text][0], text) for text in some(sorted(source.held_out))[:limit]]
        return [(row("en", prompt), prompt, text) for prompt, text in names]
    if name == "recall":
        return [("en", source.names[text][0], text) for text in some(source.trained)[:limit]]
    config.load_language()
    asked = some(sorted(source.trained, key=lambda text: sha256(text.encode()).digest()))[
        : limit or ASKED
    ]
    if unknown := [row for row in only or () if row not in LANGUAGES]:
        raise ValueError(f"--rows {unknown[0]}: the rows of {name} are {', '.join(LANGUAGES)}")
    languages = only or sorted(LANGUAGES, key="en".__ne__)
    prompts = []
    for language in languages:
        for text in asked:
            if language in EMOJI_DATA[text]:
                prompt = EMOJI_DATA[text][language].strip(":").replace("_", " ")
                prompts.append(
                    (language if language == "en" else row(language, prompt), prompt, text)
                )
    return prompts


def rank_scores(places: np.ndarray, candidates: int, *shared: list[str]) -> dict:
    """Shares of the first and the first five places and the median, each with a 95 % interval: a
    bootstrap over the prompts, or over what they share (emoji, languages; see extras/intervals.py)."""
    rng = np.random.default_rng(0)
    weights = 1.0
    for labels in shared or [range(len(places))]:
        weights = weights * draw_anew(np.array(labels), rng)
    weights = weights[weights.sum(1) > 0]
    total = weights.sum(1)
    measures = {
        "top 1": (np.mean(places == 1), weights @ (places == 1) / total),
        "top 5": (np.mean(places <= 5), weights @ (places <= 5) / total),
        "median rank": (np.median(places), weighted_median(places, weights)),
    }
    result = {"n": len(places), "candidates": candidates}
    for name, (score, resampled) in measures.items():
        low, high = np.quantile(resampled, (0.025, 0.975))
        result[name] = {"score": float(score), "interval": (float(low), float(high))}
    return result


def evaluate_emoji(args: argparse.Namespace, runs: list[tuple[str, ImageExpert, FrozenLLM]]) -> dict[str, dict]:
    """Score, print and picture the emoji suites of one run or two, and probe the first. -> run -> suite -> scores."""
    options = runs[0][1].made_for.get("emoji", {})
    source = Emoji(runs[0][1].image_size, 0, options.get("font"), options.get("variants", False))
    asked = {}  # before anything is learned or drawn: it may be refused
    for suite in args.suite:
        prompts = read_emoji_suite(suite, source, args.limit, args.rows, args.half)
        asked[suite] = [prompt for prompt in prompts for _ in range(args.n)]
    measures = {"pixels": pixel_features, "features": learned_features(np.stack(list(source.glyphs.values())))}
    results = {name: {} for name, _, _ in runs}
    for suite, prompts in asked.items():
        among = sorted(source.held_out) if suite == "unseen-names" else source.trained
        candidates, place = np.stack([source.glyphs[text] for text in among]), {text: i for i, text in enumerate(among)}
        seeds, blocks = [args.seed + i for i in range(len(prompts))], []
        print(f"{suite} (chance: top 1 {1 / len(among):.4f}, median rank {(len(among) + 1) / 2:.0f} of {len(among)})")
        for name, expert, llm in runs:
            pictures = draw(expert, llm, [prompt for _, prompt, _ in prompts], seeds, args.steps, args.guidance)
            places = {measure: ranks(features(pictures), features(candidates), [place[text] for *_, text in prompts])
                      for measure, features in measures.items()}  # fmt: skip
            rows, _, emoji = zip(*prompts)
            results[name][suite] = summarize_ranks(suite, rows, emoji, places, len(among))
            print_ranks(Path(name).name, results[name][suite])
            blocks.append((name, emoji_lines(source, prompts, pictures, places["features"], args.seed, 12 // len(runs))))
        write_whole(args.out / f"evaluate-{suite}.png", picture_table(blocks).save)
    if args.probe:
        name, _, llm = runs[0]
        llm.think(None)
        llm.keep(range(len(llm.layers)))
        results[name]["probe"] = probe_emoji(llm, source, args.limit, args.half)
    return results


def emoji_lines(source: Emoji, prompts: list, pictures: np.ndarray, places: np.ndarray, seed: int, columns: int) -> dict:
    """Some emoji, chosen by the seed: a line of their glyphs, then one of the pictures of each row's prompts."""
    asked = list(dict.fromkeys(text for *_, text in prompts))
    chosen = [asked[i] for i in np.random.default_rng(seed).permutation(len(asked))[:columns]]
    lines = {"the glyph": [(source.glyphs[text], source.names[text][0], None) for text in chosen]}
    first = {(row, text): i for i, (row, _, text) in reversed(list(enumerate(prompts)))}
    for row in dict.fromkeys(row for row, *_ in prompts):
        here = [first[row, text] for text in chosen if (row, text) in first]
        lines[row] = [(pictures[i], prompts[i][1], bool(places[i] == 1)) for i in here]
    return lines


def summarize_ranks(
    suite: str, rows: list[str], emoji: list[str], places: dict[str, np.ndarray], candidates: int
) -> dict:
    """rows, emoji: of each prompt; places: measure -> rank of each prompt's emoji. -> every row's
    scores and those of all, and the ranks, for other intervals later. -> JSON."""
    rows, emoji = np.array(rows), np.array(emoji)
    result = {"rows": {}}
    for row in dict.fromkeys(rows.tolist()):
        here = rows == row
        result["rows"][row] = {
            measure: rank_scores(some[here], candidates, emoji[here])
            | {"ranks": " ".join(map(str, some[here])), "emoji": " ".join(emoji[here])}
            for measure, some in places.items()
        }
    counted = ~np.isin(rows, list(LEFT_OUT.get(suite, ())))
    if len(set(rows[counted])) > 1:
        shared = emoji[counted], rows[counted]
        result["mean"] = {
            measure: rank_scores(some[counted], candidates, *shared)
            for measure, some in places.items()
        }
    return result


def probe_emoji(llm: FrozenLLM, source: Emoji, limit: int | None, half: str = "both") -> dict:
    """What the LLM's layers know of the names, without any picture. -> {"layer 3": {way: scores}} of the right emoji's rank:
    for the names in other languages, by ridge regression from the values of the English names ("ridge") and by the cosine to
    the nearest of these ("nearest name"); and nearest too for the English names inside a longer caption ("in a caption").
    With a limit, among a hundred times as many emoji."""
    asked = read_emoji_suite("emoji-languages", source, limit, half=half)
    among = list(dict.fromkeys([text for *_, text in asked] + source.trained))[: 100 * limit if limit else None]
    foreign = [(prompt, text) for row, prompt, text in asked if row not in LEFT_OUT["emoji-languages"]]
    framed = [(f"a picture of {prompt}", text) for row, prompt, text in asked if row == "en"]
    names = [(name, i) for i, text in enumerate(among) for name in source.names[text]]
    owner, n = torch.tensor([i for _, i in names]), len(among)
    heard = [hear(llm, [text for text, _ in pairs]) for pairs in (names, foreign, framed)]

    def places(scores: torch.Tensor, pairs: list[tuple[str, str]]) -> dict:
        true = scores.gather(1, torch.tensor([among.index(text) for _, text in pairs])[:, None])
        ties = (scores == true).sum(1) - 1  # where a layer cannot tell them apart: the middle of their places
        return rank_scores((1 + (scores > true).sum(1) + ties / 2).numpy(), n, [text for _, text in pairs])

    def nearest(X: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Cosine of each new caption to each emoji's nearest name, on standardized features: (P, n)."""
        middle, scale = X.mean(0), X.std(0) + 1e-3
        cosine = F.normalize((new - middle) / scale, dim=-1) @ F.normalize((X - middle) / scale, dim=-1).T
        return torch.full((len(new), n), -1.0).scatter_reduce(1, owner.expand(len(new), -1), cosine, "amax")

    table = {}
    for layer, X, other, longer in zip(llm.kept, *heard):
        table[f"layer {layer.index}"] = row = {
            "ridge": places(ridge(X, torch.eye(n)[owner])(other), foreign),
            "nearest name": places(nearest(X, other), foreign),
            "in a caption": places(nearest(X, longer), framed),
        }
        print_ranks(f"layer {layer.index}", {"rows": {"": row}})
    return table


def print_ranks(name: str, result: dict) -> None:
    for row, scores in [*result["rows"].items(), *([("mean", result["mean"])] if "mean" in result else [])]:
        for measure, some in scores.items():
            cells = (f"{key} {some[key]['score']:.4g} ({some[key]['interval'][0]:.3g} to {some[key]['interval'][1]:.3g})"
                     for key in ("top 1", "top 5", "median rank"))  # fmt: skip
            print(f"  {name:14} {row:13} {measure:8}  " + "   ".join(cells), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the race: every bridge with the same data, pictures and seeds

LEGS = 4  # a run is scored so many times on its way
WARM_UP = 8  # steps before a racer's speed is taken
ON_THE_WAY = (("geneval", 8), ("languages", 4))  # suites, and prompts of each row
CONTROL = "dense"  # hears nothing of the LLM: the others are compared with it


def flags_of(racer: str) -> list[str]:
    """A bridge with flags of its own, "lap:stride=1", as train.py takes them."""
    bridge, *options = racer.split(":")
    return ["--bridge", bridge, *(part for option in options for part in f"--{option}".split("=", 1))]


def train_racer(args: argparse.Namespace, racer: str, seed: int, steps: int, folder: Path, flags: list[str]) -> dict:
    """One run of the race, gone on with where it stopped. -> what it took, and its scores on the way. JSON."""
    legs = ["--steps", str(steps), "--save-every", str(steps // LEGS), "--sample-every", str(steps)]
    given = [*flags_of(racer), "--seed", str(seed), "--out", str(folder), *legs, *flags]
    path, log = folder / "race.json", {"curve": []}
    if (folder / "train_state.safetensors").exists():
        given = ["--resume", "--out", str(folder)]
        log = json.loads(path.read_text("utf-8")) if path.exists() else log
    if len(log["curve"]) == LEGS:
        return log
    run = train.prepare(*train.settings(given))
    log["parameters"] = sum(p.numel() for p in run.expert.parameters())
    while len(log["curve"]) < LEGS:
        target, scores = steps // LEGS * (len(log["curve"]) + 1), {}
        if run.step < target:  # it may have been stopped after its training, before its scores
            train.train(run, target)
        for suite, limit in ON_THE_WAY:
            most = min(limit, args.limit or limit)
            half = "both" if args.half == "both" else "choose"  # a curve may decide on a budget
            prompts = read_suite(suite, most, one=run.args.one_object, half=half)
            pictures = draw(run.ema, run.llm, [prompt.text for prompt in prompts], list(range(len(prompts))), args.steps)
            grades = [grade(prompt, picture) for prompt, picture in zip(prompts, pictures)]
            scores[suite] = summarize(suite, prompts, grades)["mean"]["score"]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
        measured = next(line for line in lines if line["step"] == target)
        speed = {key: measured[key] for key in ("images_per_second", "llm_share")}
        log["curve"].append({"images": target * run.args.batch_size} | speed | scores)
        write_json(path, log)
    return log


def race(args: argparse.Namespace, flags: list[str]) -> None:
    """Train every racer with every seed, for as many steps as the first of them does in --minutes, and score all suites; then
    one table and one picture of all that lies in the folder. What is finished is not done again: of a run, race.json and
    drawn.png are all that is needed then. flags: for train.py."""
    out = Path(args.out or "runs/race")
    plan = out / "race.json"
    if not plan.exists():
        steps = max(1, round(60 * args.minutes * measure_speed(args.race[0], flags)[0] / LEGS)) * LEGS
        make_folder(out)
        planned = {"steps": steps, "minutes": args.minutes, "of": args.race[0], "half": args.half}
        write_json(plan, planned)
    planned = json.loads(plan.read_text("utf-8"))
    steps, args.half = planned["steps"], planned.get("half", "both")
    print(f"{out}: {steps} steps each; suites: half {args.half}")
    suites = args.suite
    for seed in args.seeds:
        for racer in args.race:
            folder = out / f"{racer.replace(':', '-').replace('=', '-').replace('/', '-')}-seed{seed}"
            if not (folder / "drawn.png").exists():
                log = train_racer(args, racer, seed, steps, folder, flags)
                args.ckpt, args.versus, args.suite, args.out = str(folder), None, suites, folder
                runs = open_runs(args)
                log["suites"] = evaluate_shapes(args, runs)[args.ckpt]
                write_json(folder / "race.json", log | {"racer": racer, "seed": seed})
                write_whole(folder / "drawn.png", draw_shown(*runs[0][1:], args.steps).save)
    folders = [path.parent for path in sorted(out.glob("*/drawn.png"))]
    logs = [json.loads((folder / "race.json").read_text("utf-8")) for folder in folders]
    table = race_table(logs, race_speeds(plan, list(dict.fromkeys(log["racer"] for log in logs)), flags))
    write_json(out / "table.json", table)
    print_race(table)
    shown = {log["racer"]: folder for log, folder in reversed(list(zip(logs, folders)))}
    write_whole(out / "race.png", race_picture(table, shown, "--one-object" in flags).save)
    print(f"{out / 'table.json'}, and race.png beside it: the same prompts for all, and how the scores grew")


def race_speeds(plan: Path, racers: list[str], flags: list[str]) -> dict[str, tuple[float, int, float]]:
    """The racers' speeds, measured one after another in one go, so that what a busy hour slows is no bridge's fault."""
    known = json.loads(plan.read_text("utf-8"))
    if not set(racers) <= known.get("speeds", {}).keys():
        write_json(plan, known := known | {"speeds": {racer: measure_speed(racer, flags) for racer in racers}})
    return known["speeds"]


@contextmanager
def stopwatch(module: torch.nn.Module) -> Iterator[list[float]]:
    """The clock before and after every forward pass of a module, in turn."""
    clock: list[float] = []

    def note(*_) -> None:
        clock.append(time.perf_counter())

    hooks = [
        module.register_forward_pre_hook(note),
        module.register_forward_hook(note, always_call=True),
    ]
    yield clock
    for hook in hooks:
        hook.remove()


def measure_speed(racer: str, flags: list[str]) -> tuple[float, int, float]:
    """Steps per second of a racer here and now, over one look-ahead of captions; pictures a step; and
    the share of that time in forward passes of the LLM, a tower's own too, not in gradients."""
    run = train.prepare(
        train.parse_args([*flags_of(racer), "--out", tempfile.mkdtemp(), *flags]), {}, {}
    )
    with stopwatch(run.llm.model.base_model) as clock:
        for captions, pictures in train.batches(
            run.source, run.llm, run.args.batch_size, run.args.draws, 0
        ):
            if run.step == WARM_UP:
                started = time.perf_counter()
                clock.clear()
            elif run.step == WARM_UP + train.LOOK_AHEAD:
                seconds = time.perf_counter() - started
                inside = sum(clock[1::2]) - sum(clock[::2])
                return train.LOOK_AHEAD / seconds, run.args.batch_size, inside / seconds
            train.train_step(run, run.expert, captions, pictures)


def race_table(logs: list[dict], speeds: dict[str, list[float]]) -> dict:
    """racer -> parameters, images per second, the LLM's share; of each suite the rows and their mean
    over all seeds, with an interval, the mean of each seed, and the difference to the CONTROL; and the
    curves, against images, and minutes at that speed. A speed of old has no share of the LLM: then it
    is the median of the run's legs, which leaves out what a tower runs through the LLM itself."""
    table = {}
    for racer in dict.fromkeys(log["racer"] for log in logs):
        mine = [log for log in logs if log["racer"] == racer]
        suites = {}
        for suite in mine[0]["suites"]:
            drawn = suite in LEFT_OUT
            runs = runs_of(racer, suite, logs)
            control = {} if racer == CONTROL else runs_of(CONTROL, suite, logs)
            rows = {}
            for row in mine[0]["suites"][suite]["rows"]:
                rows[row] = mean_of_rows(
                    {log["seed"]: {row: log["suites"][suite]["rows"][row]} for log in mine}
                )
            suites[suite] = mean_of_rows(runs, drawn) | {
                "seeds": [log["suites"][suite]["mean"]["score"] for log in mine],
                "minus control": difference(runs, control, drawn),
                "rows": rows,
            }
        legs = [point for log in mine for point in log["curve"]]
        speed, pictures, *share = speeds[racer]
        rate = speed * pictures
        table[racer] = {
            "parameters": mine[0]["parameters"],
            "images": legs[-1]["images"],
            "images/s": rate,
            "llm_share": share[0] if share else median(point["llm_share"] for point in legs),
            "seeds": [log["seed"] for log in mine],
            "suites": suites,
            "curves": [
                [point | {"minutes": point["images"] / rate / 60} for point in log["curve"]]
                for log in mine
            ],
        }
    return table


def runs_of(racer: str, suite: str, logs: list[dict]) -> dict[int, dict[str, dict]]:
    """seed -> row -> tally, of a racer's runs and the rows that count."""
    runs = {}
    for log in logs:
        if log["racer"] == racer:
            rows = log["suites"][suite]["rows"]
            runs[log["seed"]] = {
                row: rows[row] for row in rows if row not in LEFT_OUT.get(suite, ())
            }
    return runs


def print_race(table: dict) -> None:
    suites = list(next(iter(table.values()))["suites"])
    print(
        f"{'':22}{'parameters':>11}{'images/s':>10}{'LLM':>6}  "
        + "".join(f"{suite:>20}" for suite in suites)
    )
    for racer, line in table.items():
        cells = (
            f"{s['score']:5.2f} {s['interval'][0]:.2f} to {s['interval'][1]:.2f}"
            for s in line["suites"].values()
        )
        print(f"{racer:22}{line['parameters']:>11,}{line['images/s']:10.0f}{line['llm_share']:6.0%}  "
              + "".join(f"{cell:>20}" for cell in cells))  # fmt: skip
        paired = [s["minus control"] for s in line["suites"].values()]
        if any(paired):
            cells = [signed(d) if d else "" for d in paired]
            print(f"{f'  minus {CONTROL}':51}" + "".join(f"{cell:>20}" for cell in cells))


INKS = ("#c23b22", "#1f6fb4", "#2a8c3c", "#8a4fbf", "#d98c00", "#444444", "#00938f", "#b3487f", "#7a6a2f", "#6b8cff")


def shown_prompts(one: bool) -> list[Prompt]:
    """What every racer draws for the picture of the race. one: prompts for one object alone."""
    rows = [("geneval", None), ("languages", ["Italian", "Spanish", "Chinese", "Japanese", "Hindi"]), ("knowledge", None),
            ("position", None)]  # fmt: skip
    return [prompt for suite, only in rows for prompt in read_suite(suite, 1, only, one)]


def draw_shown(expert: ImageExpert, llm: FrozenLLM, steps: int) -> Image.Image:
    """Side by side, without frames."""
    texts = [prompt.text for prompt in shown_prompts("one_object" in expert.made_for)]
    return Image.fromarray(np.hstack(draw(expert, llm, texts, list(range(len(texts))), steps)))


def race_picture(table: dict, folders: dict[str, Path], one: bool) -> Image.Image:
    """The same prompts and noise, a line for each racer, and below it the scores on the way. folders: racer -> a run of it."""
    prompts, lines = shown_prompts(one), {}
    for racer in table:
        pictures = np.hsplit(np.asarray(Image.open(folders[racer] / "drawn.png")), len(prompts))
        lines[racer] = [(x, p.text, grade(p, x).reason is None) for p, x in zip(prompts, pictures)]
    top = picture_table([("", lines)])
    legend, width = caption_font("", 12), (top.width - 150) // 4
    longest = ceil(max(map(legend.getlength, table)))
    sheet = Image.new("RGB", (max(top.width, 4 * width + 40 + longest), top.height + 300), "white")
    sheet.paste(top, (0, 0))
    ink = ImageDraw.Draw(sheet)
    for panel, (suite, unit) in enumerate((suite, unit) for suite, _ in ON_THE_WAY for unit in ("images", "minutes")):
        left, bottom = 20 + panel * width, top.height + 260
        points = [point for line in table.values() for curve in line["curves"] for point in curve]
        most, best = (max(point[key] for point in points) for key in (unit, suite))
        best = ceil(10 * best + 0.1) / 10  # the top of the panel: the next tenth
        ink.rectangle((left, bottom - 200, left + width - 40, bottom), outline="#bbbbbb")
        title = f"{suite}, to {best:.1f}, against {unit}, to {most:,.0f}"
        ink.text((left, bottom - 218), title, fill="black", font=caption_font("", 11))
        for color, line in zip(INKS, table.values()):
            for curve in line["curves"]:
                places = [(left + (width - 40) * point[unit] / most, bottom - 200 * point[suite] / best) for point in curve]
                ink.line([(left, bottom), *places], fill=color, width=2)
    for i, (color, racer) in enumerate(zip(INKS, table)):
        ink.text((20 + 4 * width, top.height + 50 + 20 * i), racer, fill=color, font=legend)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# the command


def seed_list(text: str) -> list[int]:
    """argparse type: seeds with commas, each once."""
    return list(dict.fromkeys(seed_number(part) for part in text.split(",")))


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and with --race what of it is meant for train.py."""
    parser = OneLineParser(description="Score a run's pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="a run's folder or a Hub id (default: the newest run under runs/)")
    add("--versus", help="another run, to stand beside it")
    add("--suite", help="which suites, with commas (default: all that there are for the run's data)")
    halves = "part of each suite, split by a hash of the scene: choose on one, report the other"
    add("--half", choices=HALVES, default="report", help=f"{halves}; README's tables are of both")
    add("--probe", action="store_true", help="also probe what the LLM's layers know")
    add("--probe-llm", metavar="LLM", help="only probe this LLM, and its control, for hex codes")
    add("--rows", help="only these rows of the suite, with commas")
    add("--n", type=positive(int), default=1, help="pictures of each prompt")
    add("--limit", type=positive(int), help="only the first so many prompts of each row, for a quick look")
    add("--steps", type=positive(int), default=24, help="Euler steps")
    add("--guidance", type=between(-1000, 1000), default=3.0, help="guidance scale; 1 is none")
    add("--seed", type=seed_number, default=0, help="of the noise: picture k of all starts from seed + k")
    own = "the run's own; its partial/ for --rows, --limit or --half choose"
    add("--out", help=f"folder for the JSON and the pictures (default: {own})")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and the expert")
    add("--race", help="train and compare these bridges, with commas, each with its own flags for train.py: mot,lap:stride=1; "
        "all other flags are train.py's")  # fmt: skip
    add(
        "--minutes",
        type=positive(float),
        default=12,
        help="--race: how long the first of them trains; all see as many pictures",
    )
    add("--seeds", type=seed_list, default=[0], help="--race: with commas")
    add_thinking(parser)
    args, more = parser.parse_known_args(argv)
    if args.race:
        args.race = list(dict.fromkeys(args.race.split(",")))  # named twice, a run is still one run
        args.rows = None
        return args, ["--device", args.device, "--dtype", args.dtype, *more]
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if args.probe_llm:
        args.out = Path(args.out or "evaluation")
        return args, []
    args.ckpt = args.ckpt or str(newest_run())
    args.rows = args.rows.split(",") if args.rows else None
    home = Path(args.ckpt if Path(args.ckpt).is_dir() else "evaluation")
    thinking = f"rewrite-{args.rewrite}" if args.rewrite else "think" if args.think else ""
    partial = args.rows or args.limit or args.half == "choose"
    args.out = Path(args.out or (home / "partial" if partial else home) / thinking)
    return args, []


SUITES_OF = {"shapes": SUITES, "emoji": EMOJI_SUITES}


def open_runs(args: argparse.Namespace) -> list[tuple[str, ImageExpert, FrozenLLM]]:
    """The run, and the other one beside it; fills in args.suite. ValueError if no suite, or not this one, is for their data."""
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    names = [args.ckpt] + ([args.versus] if args.versus else [])
    experts = {name: load_expert(name, device) for name in names}
    data = {name: expert.made_for.get("data") for name, expert in experts.items()}
    if wrong := [name for name in names if data[name] not in SUITES_OF or data[name] != data[args.ckpt]]:
        ours = "; ".join(f"{','.join(suites)} for {kind}" for kind, suites in SUITES_OF.items())
        raise ValueError(f"{wrong[0]} was trained on {data[wrong[0]]}; the suites are {ours}, and two runs must be of one kind")
    known = SUITES_OF[data[args.ckpt]]
    args.suite = args.suite.split(",") if args.suite else list(known)
    if unknown := [name for name in args.suite if name not in known]:
        raise ValueError(f"--suite {unknown[0]}: for a run on {data[args.ckpt]} expected some of {','.join(known)}")
    runs = [(name, expert, llm_of(expert, None, device, dtype)) for name, expert in experts.items()]
    for _, _, llm in runs:
        if thinking := thinking_of(llm, args):
            llm.think(*thinking)
    return runs


def read_results(path: Path) -> dict:
    """Those of other suites that are there, or none. ValueError if it is something else."""
    try:
        return {} | json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (TypeError, ValueError):
        raise ValueError(f"{path} is cut, or no evaluation; move it away, or give another --out") from None


def save_results(path: Path, results: dict) -> None:
    """Put them beside those of other suites that are there, all at once."""
    write_json(path, read_results(path) | results)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def evaluate_shapes(args: argparse.Namespace, runs: list[tuple[str, ImageExpert, FrozenLLM]]) -> dict[str, dict]:
    """Score, print and picture the suites of one run or two, and probe the first. -> run -> suite -> scores."""
    results, graded = {name: {} for name, _, _ in runs}, []
    one = all("one_object" in expert.made_for for _, expert, _ in runs)
    asked = {}  # before anything is drawn: it may be refused
    for suite in args.suite:
        prompts = read_suite(suite, args.limit, args.rows, one, args.half)
        asked[suite] = [prompt for prompt in prompts for _ in range(args.n)]
    for suite, prompts in asked.items():
        seeds = [args.seed + i for i in range(len(prompts))]  # a noise of its own for each picture
        drawn = []
        for name, expert, llm in runs:
            pictures = draw(expert, llm, [prompt.text for prompt in prompts], seeds, args.steps, args.guidance)
            grades = [grade(prompt, picture) for prompt, picture in zip(prompts, pictures)]
            drawn.append((name, pictures, grades))
            results[name][suite] = summarize(suite, prompts, grades)
            for row, share in chance(prompts, pictures).items():
                results[name][suite]["rows"][row]["chance"] = share
        if len(runs) > 1:
            both = [grades for _, _, grades in drawn]
            results[args.ckpt][suite]["difference"] = compare(suite, prompts, *both)
        graded += [(suite, prompt, g) for prompt, g in zip(prompts, drawn[0][2])]
        print_suite(suite, {name: result[suite] for name, result in results.items()})
        write_whole(args.out / f"evaluate-{suite}.png", sheet(prompts, drawn).save)
    if args.probe:
        name, _, llm = runs[0]
        llm.think(None)
        llm.keep(range(len(llm.layers)))
        results[name]["probe"] = probe(llm, graded, args.seed, min(2000, 200 * (args.limit or 10)))
        print_probe(results[name]["probe"])
        if "colors" in args.suite:
            captions = min(800, 80 * (args.limit or 10))
            results[name]["probe-hex"] = probe_hex(llm, args.seed, captions)
            print_probe_hex(name, results[name]["probe-hex"])
    return results


def main(argv: list[str] | None = None) -> None:
    args, for_training = parse_args(argv)
    if args.race:
        return race(args, for_training)
    if args.probe_llm:
        return probe_llm(args)
    runs = open_runs(args)
    make_folder(args.out)
    for file in ("evaluate.json", "versus.json"):
        read_results(args.out / file)  # refused before the work
    data = runs[0][1].made_for["data"]
    results = (evaluate_shapes if data == "shapes" else evaluate_emoji)(args, runs)
    names = ("half", "n", "limit", "steps", "guidance", "seed", "think", "rewrite")
    settings = {key: vars(args)[key] for key in names}
    for (name, expert, _), file in zip(runs, ("evaluate.json", "versus.json")):
        scores = {key: value | {"settings": settings} if key in args.suite else value for key, value in results[name].items()}
        save_results(args.out / file, {"run": name, "made_for": expert.made_for} | scores)
    where = args.out / "evaluate.json"
    print(f"half {args.half}: {where}, and a picture of each suite beside it: green is right, red wrong")


if __name__ == "__main__":
    one_line_errors(main)
