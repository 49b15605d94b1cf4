"""Does the LLM's knowledge reach the picture? Exact scores on fixed prompts, none of which training has seen.

    python evaluate.py --ckpt runs/shapes                                  # every suite: a table, a JSON, a picture each
    python evaluate.py --ckpt runs/shapes --suite languages,colors --n 4
    python evaluate.py --ckpt runs/shapes --versus runs/shapes-random-llm  # side by side
    python evaluate.py --ckpt runs/shapes --probe                          # what the LLM knows, and how much of it is drawn
    python evaluate.py --race mot,last,lap --minutes 12 --seeds 0,1        # train one of each bridge, and compare them

No network judges: judge.py reads every picture by geometry. Prompts: assets/prompts/SUITE.jsonl, one JSON object a line with
row (of the table), prompt, groups ([count, color or null, shape]), and where it applies relation, or rgb (the exact colour).
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, sqrt
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
from judge import BASIC_COLORS, Found, Verdict, basic_color, delta_e, judge, lab, learned_features, pixel_features, ranks
from model import FrozenLLM, ImageExpert
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
LEFT_OUT = {"languages": {"English"}, "emoji-languages": {"en"}}  # rows to compare with, not in the mean
NEAR = 15.0  # CIE76 delta E within which a colour counts as the one that was asked for by its numbers

# ---------------------------------------------------------------------------------------------------------------------
# prompts and verdicts


@dataclass(frozen=True)
class Prompt:
    row: str
    text: str
    scene: Scene
    rgb: tuple[int, int, int] | None = None  # where the colour asked for is exact, and no word of data.COLORS


def read_suite(name: str, limit: int | None = None, only: list[str] | None = None, one: bool = False) -> list[Prompt]:
    """The prompts of a suite; with a limit, the first so many of each row; of some rows only; or those for one object."""
    rows: dict[str, list[Prompt]] = {}
    for line in (PROMPTS / f"{name}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        scene = Scene(tuple(Group(*group) for group in record["groups"]), record.get("relation"))
        rgb = tuple(record["rgb"]) if "rgb" in record else None
        if not one or sum(group.count for group in scene.groups) == 1:
            rows.setdefault(record["row"], []).append(Prompt(record["row"], record["prompt"], scene, rgb))
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


def wilson(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    middle, half = right + z * z / 2, z * sqrt(max(0.0, right * (n - right) / n) + z * z / 4)
    return max(0.0, (middle - half) / (n + z * z)), min(1.0, (middle + half) / (n + z * z))


def tally(grades: list[Grade]) -> dict:
    """One row of the table: its score with the interval, why the others are wrong, the median distance of the colours."""
    right, n = sum(g.reason is None for g in grades), len(grades)
    offs = [g.off for g in grades if g.off is not None]
    wrong = dict(Counter(g.reason for g in grades if g.reason).most_common())
    return {
        "score": right / n,
        "interval": wilson(right, n),
        "n": n,
        "wrong": wrong,
        "color_off": median(offs) if offs else None,
    }


def mean_of_rows(rows: list[dict]) -> dict:
    """The mean of the rows' scores, as GenEval takes it. Its interval is Wilson's for as many pictures as would give an equal
    share the same variance: n_eff = R^2 / sum of 1/n, which is all of them where the rows are of one size."""
    score = sum(row["score"] for row in rows) / len(rows)
    n_eff = len(rows) ** 2 / sum(1 / row["n"] for row in rows)
    wrong = sum((Counter(row["wrong"]) for row in rows), Counter())
    return {"score": score, "interval": wilson(score * n_eff, n_eff), "n": sum(row["n"] for row in rows), "wrong": dict(wrong)}


def summarize(suite: str, prompts: list[Prompt], grades: list[Grade]) -> dict:
    """Every row of a suite, their mean, and for languages, one object and two apart. -> JSON."""
    rows: dict[str, list[tuple[Prompt, Grade]]] = {}
    for prompt, g in zip(prompts, grades):
        rows.setdefault(prompt.row, []).append((prompt, g))
    result = {"rows": {row: tally([g for _, g in pairs]) for row, pairs in rows.items()}}
    counted = [pairs for row, pairs in rows.items() if row not in LEFT_OUT.get(suite, ())] or list(rows.values())
    if suite in LEFT_OUT:
        for name, groups in (("one object", 1), ("two objects", 2)):
            part = [[g for prompt, g in pairs if len(prompt.scene.groups) == groups] for pairs in counted]
            if all(part):
                result[name] = mean_of_rows([tally(some) for some in part])
    return result | {"mean": mean_of_rows([tally([g for _, g in pairs]) for pairs in counted])}


# ---------------------------------------------------------------------------------------------------------------------
# what the reader sees


def print_suite(suite: str, results: dict[str, dict]) -> None:
    """run -> its results: one run, or two side by side."""

    def cells(result: dict) -> str:
        low, high = result["interval"]
        return f"{result['score']:5.2f}  {low:.2f} to {high:.2f}"

    def line(name: str, entries: list[dict]) -> None:
        text = f"  {name:30}" + "   ".join(map(cells, entries)) + f"  {entries[0]['n']:5}"
        off = entries[0].get("color_off")
        text += " " * 9 if off is None else f"{off:9.0f}"
        print(text + ("  " + ", ".join(f"{n} {why}" for why, n in entries[0]["wrong"].items()) if len(entries) == 1 else ""))

    heads = (f"{Path(name).name[:19]:>19}" for name in results) if len(results) > 1 else ["right  95 %        "]
    off = "off, dE" if suite == "colors" else "off, RGB"
    print(f"{suite:32}{'   '.join(heads)}      n{off:>9}" + ("  wrong because" if len(results) == 1 else ""))
    first = next(iter(results.values()))
    for row in first["rows"]:
        line(row, [result["rows"][row] for result in results.values()])
    for name in ("one object", "two objects", "mean"):
        if name in first:
            line(f"{name}, but English" if suite in LEFT_OUT else name, [result[name] for result in results.values()])
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


def read_emoji_suite(name: str, source: Emoji, limit: int | None, only: list[str] | None = None) -> list[tuple[str, str, str]]:
    """(row, prompt, emoji) for each prompt: the English names of the emoji trained on, of some of them in the package's
    languages (English first, to compare with), or of those never trained on."""
    from emoji import EMOJI_DATA, LANGUAGES, config

    if name == "unseen-names":
        return [("en", source.names[text][0], text) for text in sorted(source.held_out)[:limit]]
    if name == "recall":
        return [("en", source.names[text][0], text) for text in source.trained[:limit]]
    config.load_language()
    asked = sorted(source.trained, key=lambda text: sha256(text.encode()).digest())[: limit or ASKED]
    if unknown := [row for row in only or () if row not in LANGUAGES]:
        raise ValueError(f"--rows {unknown[0]}: the rows of {name} are {', '.join(LANGUAGES)}")
    languages = only or sorted(LANGUAGES, key="en".__ne__)
    return [(language, EMOJI_DATA[text][language].strip(":").replace("_", " "), text)
            for language in languages for text in asked if language in EMOJI_DATA[text]]  # fmt: skip


def rank_scores(places: np.ndarray, candidates: int, seed: int = 0) -> dict:
    """Shares of the first and the first five places and the median, each with a 95 % bootstrap interval over the prompts."""
    drawn = np.random.default_rng(seed).choice(places, (1000, len(places)))
    result = {"n": len(places), "candidates": candidates}
    for name, measure in (("top 1", lambda p: (p == 1).mean(-1)), ("top 5", lambda p: (p <= 5).mean(-1)),
                          ("median rank", lambda p: np.median(p, axis=-1))):  # fmt: skip
        low, high = np.quantile(measure(drawn), (0.025, 0.975))
        result[name] = {"score": float(measure(places)), "interval": (float(low), float(high))}
    return result


def evaluate_emoji(args: argparse.Namespace, runs: list[tuple[str, ImageExpert, FrozenLLM]]) -> dict[str, dict]:
    """Score, print and picture the emoji suites of one run or two, and probe the first. -> run -> suite -> scores."""
    options = runs[0][1].made_for.get("emoji", {})
    source = Emoji(runs[0][1].image_size, 0, options.get("font"), options.get("variants", False))
    measures = {"pixels": pixel_features, "features": learned_features(np.stack(list(source.glyphs.values())))}
    results = {name: {} for name, _, _ in runs}
    for suite in args.suite:
        prompts = [p for p in read_emoji_suite(suite, source, args.limit, args.rows) for _ in range(args.n)]
        among = sorted(source.held_out) if suite == "unseen-names" else source.trained
        candidates, place = np.stack([source.glyphs[text] for text in among]), {text: i for i, text in enumerate(among)}
        seeds, blocks = [args.seed + i for i in range(len(prompts))], []
        print(f"{suite} (chance: top 1 {1 / len(among):.4f}, median rank {(len(among) + 1) / 2:.0f} of {len(among)})")
        for name, expert, llm in runs:
            pictures = draw(expert, llm, [prompt for _, prompt, _ in prompts], seeds, args.steps, args.guidance)
            places = {measure: ranks(features(pictures), features(candidates), [place[text] for *_, text in prompts])
                      for measure, features in measures.items()}  # fmt: skip
            results[name][suite] = summarize_ranks(suite, [row for row, *_ in prompts], places, len(among))
            print_ranks(Path(name).name, results[name][suite])
            blocks.append((name, emoji_lines(source, prompts, pictures, places["features"], args.seed, 12 // len(runs))))
        write_whole(args.out / f"evaluate-{suite}.png", picture_table(blocks).save)
    if args.probe:
        name, _, llm = runs[0]
        llm.think(None)
        llm.keep(range(len(llm.layers)))
        results[name]["probe"] = probe_emoji(llm, source, args.limit)
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


def summarize_ranks(suite: str, rows: list[str], places: dict[str, np.ndarray], candidates: int) -> dict:
    """rows: of each prompt; places: measure -> rank of each prompt's emoji. -> every row's scores and those of all. -> JSON."""
    rows_ = np.array(rows)
    result = {"rows": {row: {measure: rank_scores(some[rows_ == row], candidates) for measure, some in places.items()}
                       for row in dict.fromkeys(rows)}}  # fmt: skip
    counted = ~np.isin(rows_, list(LEFT_OUT.get(suite, ())))
    if len(set(rows_[counted])) > 1:
        result["mean"] = {measure: rank_scores(some[counted], candidates) for measure, some in places.items()}
    return result


def probe_emoji(llm: FrozenLLM, source: Emoji, limit: int | None) -> dict:
    """What the LLM's layers know of the names, without any picture. -> {"layer 3": {way: scores}} of the right emoji's rank:
    for the names in other languages, by ridge regression from the values of the English names ("ridge") and by the cosine to
    the nearest of these ("nearest name"); and nearest too for the English names inside a longer caption ("in a caption").
    With a limit, among a hundred times as many emoji."""
    asked = read_emoji_suite("emoji-languages", source, limit)
    among = list(dict.fromkeys([text for *_, text in asked] + source.trained))[: 100 * limit if limit else None]
    foreign = [(prompt, text) for row, prompt, text in asked if row != "en"]
    framed = [(f"a picture of {prompt}", text) for row, prompt, text in asked if row == "en"]
    names = [(name, i) for i, text in enumerate(among) for name in source.names[text]]
    owner, n = torch.tensor([i for _, i in names]), len(among)
    heard = [hear(llm, [text for text, _ in pairs]) for pairs in (names, foreign, framed)]

    def places(scores: torch.Tensor, pairs: list[tuple[str, str]]) -> dict:
        true = scores.gather(1, torch.tensor([among.index(text) for _, text in pairs])[:, None])
        ties = (scores == true).sum(1) - 1  # where a layer cannot tell them apart: the middle of their places
        return rank_scores((1 + (scores > true).sum(1) + ties / 2).numpy(), n)

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
            print(f"  {name:14} {row:5} {measure:12}  " + "   ".join(cells), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the race: every bridge with the same data, pictures and seeds

LEGS = 4  # a run is scored so many times on its way
WARM_UP = 8  # steps before a racer's speed is taken
ON_THE_WAY = (("geneval", 8), ("languages", 4))  # suites, and prompts of each row


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
            prompts = read_suite(suite, min(limit, args.limit or limit), one=run.args.one_object)
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
        write_json(plan, {"steps": steps, "minutes": args.minutes, "of": args.race[0]})
    steps = json.loads(plan.read_text("utf-8"))["steps"]
    print(f"{out}: {steps} steps each")
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


def race_speeds(plan: Path, racers: list[str], flags: list[str]) -> dict[str, tuple[float, int]]:
    """The racers' speeds, measured one after another in one go, so that what a busy hour slows is no bridge's fault."""
    known = json.loads(plan.read_text("utf-8"))
    if not set(racers) <= known.get("speeds", {}).keys():
        write_json(plan, known := known | {"speeds": {racer: measure_speed(racer, flags) for racer in racers}})
    return known["speeds"]


def measure_speed(racer: str, flags: list[str]) -> tuple[float, int]:
    """Steps per second of a racer here and now, over one look-ahead of captions; and pictures a step."""
    run = train.prepare(train.parse_args([*flags_of(racer), "--out", tempfile.mkdtemp(), *flags]), {}, {})
    for captions, pictures in train.batches(run.source, run.llm, run.args.batch_size, run.args.draws, 0):
        if run.step == WARM_UP:
            started = time.perf_counter()
        elif run.step == WARM_UP + train.LOOK_AHEAD:
            return train.LOOK_AHEAD / (time.perf_counter() - started), run.args.batch_size
        train.train_step(run, run.expert, captions, pictures)


def race_table(logs: list[dict], speeds: dict[str, tuple[float, int]]) -> dict:
    """racer -> parameters, images per second, the LLM's share; of each suite the rows and their mean over all seeds, with
    Wilson's interval, and the mean of each seed; and the curves, against images, and minutes at that speed (measure_speed).
    """
    table = {}
    for racer in dict.fromkeys(log["racer"] for log in logs):
        mine = [log for log in logs if log["racer"] == racer]
        suites = {}
        for suite in mine[0]["suites"]:
            scores = [log["suites"][suite] for log in mine]
            rows = {row: mean_of_rows([s["rows"][row] for s in scores]) for row in scores[0]["rows"]}
            mean = mean_of_rows([row for name, row in rows.items() if name not in LEFT_OUT.get(suite, ())])
            suites[suite] = mean | {"seeds": [s["mean"]["score"] for s in scores], "rows": rows}
        legs = [point for log in mine for point in log["curve"]]
        rate = speeds[racer][0] * speeds[racer][1]
        curves = [[point | {"minutes": point["images"] / rate / 60} for point in log["curve"]] for log in mine]
        table[racer] = {"parameters": mine[0]["parameters"], "images": legs[-1]["images"], "images/s": rate,
                        "llm_share": min(point["llm_share"] for point in legs), "seeds": [log["seed"] for log in mine],
                        "suites": suites, "curves": curves}  # fmt: skip
    return table


def print_race(table: dict) -> None:
    suites = list(next(iter(table.values()))["suites"])
    print(f"{'':22}{'parameters':>11}{'images/s':>10}{'LLM':>6}  " + "".join(f"{suite:>17}" for suite in suites))
    for racer, line in table.items():
        cells = (f"{s['score']:5.2f} {s['interval'][0]:.2f} to {s['interval'][1]:.2f}" for s in line["suites"].values())
        print(f"{racer:22}{line['parameters']:>11,}{line['images/s']:10.0f}{line['llm_share']:6.0%}  "
              + "".join(f"{cell:>17}" for cell in cells))  # fmt: skip


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


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and with --race what of it is meant for train.py."""
    parser = OneLineParser(description="Score a run's pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="a run's folder or a Hub id (default: the newest run under runs/)")
    add("--versus", help="another run, to stand beside it")
    add("--suite", help="which suites, with commas (default: all that there are for the run's data)")
    add("--probe", action="store_true", help="also probe what the LLM's layers know")
    add("--rows", help="only these rows of the suite, with commas")
    add("--n", type=positive(int), default=1, help="pictures of each prompt")
    add("--limit", type=positive(int), help="only the first so many prompts of each row, for a quick look")
    add("--steps", type=positive(int), default=24, help="Euler steps")
    add("--guidance", type=between(-1000, 1000), default=3.0, help="guidance scale; 1 is none")
    add("--seed", type=seed_number, default=0, help="of the noise: picture k of all starts from seed + k")
    add("--out", help="folder for the JSON and the pictures (default: the run's own; its partial/ for --rows or --limit)")
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
    add("--seeds", default="0", help="--race: with commas")
    add_thinking(parser)
    args, more = parser.parse_known_args(argv)
    if args.race:
        args.race, args.seeds, args.rows = args.race.split(","), [seed_number(text) for text in args.seeds.split(",")], None
        return args, ["--device", args.device, "--dtype", args.dtype, *more]
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.ckpt = args.ckpt or str(newest_run())
    args.rows = args.rows.split(",") if args.rows else None
    home = Path(args.ckpt if Path(args.ckpt).is_dir() else "evaluation")
    thinking = f"rewrite-{args.rewrite}" if args.rewrite else "think" if args.think else ""
    args.out = Path(args.out or (home / "partial" if args.rows or args.limit else home) / thinking)
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


def save_results(path: Path, results: dict) -> None:
    """Put them beside those of other suites that are there, all at once."""
    write_json(path, (json.loads(path.read_text("utf-8")) if path.exists() else {}) | results)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def evaluate_shapes(args: argparse.Namespace, runs: list[tuple[str, ImageExpert, FrozenLLM]]) -> dict[str, dict]:
    """Score, print and picture the suites of one run or two, and probe the first. -> run -> suite -> scores."""
    results, graded = {name: {} for name, _, _ in runs}, []
    one = all("one_object" in expert.made_for for _, expert, _ in runs)
    for suite in args.suite:
        prompts = [prompt for prompt in read_suite(suite, args.limit, args.rows, one) for _ in range(args.n)]
        seeds = [args.seed + i for i in range(len(prompts))]  # a noise of its own for each picture
        drawn = []
        for name, expert, llm in runs:
            pictures = draw(expert, llm, [prompt.text for prompt in prompts], seeds, args.steps, args.guidance)
            grades = [grade(prompt, picture) for prompt, picture in zip(prompts, pictures)]
            drawn.append((name, pictures, grades))
            results[name][suite] = summarize(suite, prompts, grades)
        graded += [(suite, prompt, g) for prompt, g in zip(prompts, drawn[0][2])]
        print_suite(suite, {name: result[suite] for name, result in results.items()})
        write_whole(args.out / f"evaluate-{suite}.png", sheet(prompts, drawn).save)
    if args.probe:
        name, _, llm = runs[0]
        llm.think(None)
        llm.keep(range(len(llm.layers)))
        results[name]["probe"] = probe(llm, graded, args.seed, min(2000, 200 * (args.limit or 10)))
        print_probe(results[name]["probe"])
    return results


def main(argv: list[str] | None = None) -> None:
    args, for_training = parse_args(argv)
    if args.race:
        return race(args, for_training)
    runs = open_runs(args)
    make_folder(args.out)
    data = runs[0][1].made_for["data"]
    results = (evaluate_shapes if data == "shapes" else evaluate_emoji)(args, runs)
    settings = {key: vars(args)[key] for key in ("n", "limit", "steps", "guidance", "seed", "think", "rewrite")}
    for (name, expert, _), file in zip(runs, ("evaluate.json", "versus.json")):
        scores = {key: value | {"settings": settings} if key in args.suite else value for key, value in results[name].items()}
        save_results(args.out / file, {"run": name, "made_for": expert.made_for} | scores)
    print(f"{args.out / 'evaluate.json'}, and a picture of each suite beside it: green frames are right, red are wrong")


if __name__ == "__main__":
    one_line_errors(main)
