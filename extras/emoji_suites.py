"""Which emoji is a run's picture of a name nearest to? Scores of a run that was trained on emoji.

    python -m extras.emoji --ckpt runs/emoji --versus runs/emoji-random-llm --half both
    python -m extras.emoji --ckpt runs/emoji --probe          # also what the LLM's layers know

recall: English names that were trained on. emoji-languages: the same emoji's names in the package's
languages. unseen-names: emoji never trained on, among themselves. Flags and files are those of
evaluate.py.
"""

import argparse
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import evaluate
from cli import OneLineParser, make_folder, write_whole
from evaluate import LoadedRun
from extras.emoji import Emoji
from extras.grids import Cell, picture_table
from extras.likeness import learned_features, pixel_features, rank_scores, ranks
from extras.probe import hear, ridge, without_thinking
from extras.suites import hashed, is_in
from llm import FrozenLLM
from sample import draw

SUITES = ["recall", "emoji-languages", "unseen-names"]
AS_IN_ENGLISH = "as in English"  # names that training has taught all the same
LEFT_OUT = {  # rows to compare with, not in the mean
    "emoji-languages": ("en", AS_IN_ENGLISH),
    "unseen-names": (AS_IN_ENGLISH,),
}
ASKED = 128  # emoji asked for in each language, by the order of a hash: no seed changes them
COLUMNS = 12  # of the picture

Asked = tuple[str, str, str]  # row, prompt, emoji


def evaluate_emoji(
    args: argparse.Namespace, runs: list[LoadedRun], source: Emoji
) -> dict[str, dict]:
    """Score, print and picture the emoji suites of one run or two. -> run -> suite -> scores"""
    # before anything is learned or drawn: --rows may be refused
    asked = {}
    for suite in args.suite:
        prompts = read_emoji_suite(suite, source, args.limit, args.rows, args.half)
        asked[suite] = [prompt for prompt in prompts for _ in range(args.n)]
    glyphs = np.stack(list(source.glyphs.values()))
    measures = {"pixels": pixel_features, "features": learned_features(glyphs)}

    results = {}
    for run in runs:
        results[run.name] = {}
    for suite, prompts in asked.items():
        among = sorted(source.held_out) if suite == "unseen-names" else source.trained
        candidates = np.stack([source.glyphs[text] for text in among])
        middle = (len(among) + 1) / 2
        by_chance = f"top 1 {1 / len(among):.4f}, median rank {middle:.0f} of {len(among)}"
        print(f"{suite} (chance: {by_chance})")
        names = [prompt for _, prompt, _ in prompts]
        truth = [among.index(text) for _, _, text in prompts]
        seeds = list(range(args.seed, args.seed + len(prompts)))
        blocks = []
        for run in runs:
            way = {"renoise": args.renoise}
            pictures = draw(run.expert, run.llm, names, seeds, args.steps, *args.guidance, **way)
            places = {}
            for measure, features in measures.items():
                places[measure] = ranks(features(pictures), features(candidates), truth)
            scores = summarize_ranks(suite, prompts, places, len(among))
            results[run.name][suite] = scores
            print_ranks(Path(run.name).name, scores)
            first = places["features"] == 1
            columns = COLUMNS // len(runs)
            lines = emoji_lines(source, prompts, pictures, first, args.seed, columns)
            blocks.append((run.name, lines))
        write_whole(args.out / f"evaluate-{suite}.png", picture_table(blocks).save)
    return results


def read_emoji_suite(
    name: str,
    source: Emoji,
    limit: int | None,
    only: list[str] | None = None,
    half: str = "both",
) -> list[Asked]:
    """Row, prompt and emoji: the English names of the emoji trained on, of some of them in the
    package's languages (English first, to compare with), or of those never trained on.

    A name that training has taught all the same, for another emoji ("rabbit") or in English
    ("pizza"), is in a row apart. ValueError if a row is not there.
    """
    taught = set()
    for text in source.trained:
        taught.update(name.lower() for name in source.names[text])

    prompts = []
    if name == "recall":
        for text in _half(half, source.trained)[:limit]:
            prompts.append(("en", source.names[text][0], text))
    elif name == "unseen-names":
        for text in _half(half, sorted(source.held_out))[:limit]:
            prompt = source.names[text][0]
            row = AS_IN_ENGLISH if prompt.lower() in taught else "en"
            prompts.append((row, prompt, text))
    else:
        prompts = _in_languages(name, source, limit, only, half, taught)
    return prompts


def _half(half: str, emoji: list[str]) -> list[str]:
    return [text for text in emoji if is_in(half, hashed(text))]


def _in_languages(
    name: str,
    source: Emoji,
    limit: int | None,
    only: list[str] | None,
    half: str,
    taught: set[str],
) -> list[Asked]:
    from emoji import EMOJI_DATA, LANGUAGES, config  # the package

    config.load_language()
    for language in only or ():
        if language not in LANGUAGES:
            expected = f"the rows of {name} are {', '.join(LANGUAGES)}"
            raise ValueError(f"--rows {language}: {expected}")
    in_order = sorted(source.trained, key=lambda text: sha256(text.encode()).digest())
    asked = _half(half, in_order)[: limit or ASKED]
    prompts = []
    for language in only or sorted(LANGUAGES, key="en".__ne__):  # English first
        for text in asked:
            if language in EMOJI_DATA[text]:
                prompt = EMOJI_DATA[text][language].strip(":").replace("_", " ")
                is_taught = language != "en" and prompt.lower() in taught
                row = AS_IN_ENGLISH if is_taught else language
                prompts.append((row, prompt, text))
    return prompts


# --------------------------------------------------------------------------------------------------
# scores


def summarize_ranks(
    suite: str, prompts: list[Asked], places: dict[str, np.ndarray], candidates: int
) -> dict:
    """places: measure -> rank of each prompt's emoji. -> every row's scores and those of all, and
    the ranks, for other intervals later. -> JSON"""
    rows = np.array([row for row, _, _ in prompts])
    emoji = np.array([text for _, _, text in prompts])
    result = {"rows": {}}
    for row in dict.fromkeys(rows.tolist()):
        here = rows == row
        result["rows"][row] = {}
        for measure, all_places in places.items():
            scores = rank_scores(all_places[here], candidates, emoji[here])
            scores["ranks"] = " ".join(map(str, all_places[here]))
            scores["emoji"] = " ".join(emoji[here])
            result["rows"][row][measure] = scores

    counted = ~np.isin(rows, LEFT_OUT.get(suite, ()))
    if len(set(rows[counted])) > 1:
        result["mean"] = {}
        for measure, all_places in places.items():
            shared = (emoji[counted], rows[counted])
            result["mean"][measure] = rank_scores(all_places[counted], candidates, *shared)
    return result


def print_ranks(name: str, result: dict) -> None:
    lines = list(result["rows"].items())
    if "mean" in result:
        lines.append(("mean", result["mean"]))
    for row, measures in lines:
        for measure, scores in measures.items():
            cells = []
            for key in ("top 1", "top 5", "median rank"):
                low, high = scores[key]["interval"]
                cells.append(f"{key} {scores[key]['score']:.4g} ({low:.3g} to {high:.3g})")
            print(f"  {name:14} {row:13} {measure:8}  " + "   ".join(cells), flush=True)


def emoji_lines(
    source: Emoji,
    prompts: list[Asked],
    pictures: np.ndarray,
    right: np.ndarray,
    seed: int,
    columns: int,
) -> dict[str, list[Cell]]:
    """Some emoji, chosen by the seed: a line of their glyphs, then one of each row's pictures."""
    asked = list(dict.fromkeys(text for _, _, text in prompts))
    order = np.random.default_rng(seed).permutation(len(asked))
    chosen = [asked[i] for i in order[:columns]]
    lines = {"the glyph": [(source.glyphs[text], source.names[text][0], None) for text in chosen]}
    first = {}  # row -> emoji -> its first picture
    for i, (row, _, text) in enumerate(prompts):
        first.setdefault(row, {}).setdefault(text, i)
    for row, place in first.items():
        lines[row] = []
        for text in chosen:
            if text in place:
                i = place[text]
                lines[row].append((pictures[i], prompts[i][1], bool(right[i])))
    return lines


# --------------------------------------------------------------------------------------------------
# what the LLM's layers know of the names, without any picture


def probe_emoji(llm: FrozenLLM, source: Emoji, limit: int | None, half: str = "both") -> dict:
    """-> {"layer 3": {way: scores}} of the right emoji's rank: for the names in other languages, by
    ridge regression from the values of the English names ("ridge") and by the cosine to the nearest
    of these ("nearest name"); and nearest too for the English names inside a longer caption ("in a
    caption"). With a limit, among a hundred times as many emoji."""
    # the names that are known, and the two kinds of captions to be recognized
    asked = read_emoji_suite("emoji-languages", source, limit, half=half)
    among = [text for _, _, text in asked] + source.trained
    among = list(dict.fromkeys(among))[: 100 * limit if limit else None]
    known = []
    owner = []
    for i, text in enumerate(among):
        for name in source.names[text]:
            known.append(name)
            owner.append(i)
    foreign = []
    framed = []
    for row, prompt, text in asked:
        if row not in LEFT_OUT["emoji-languages"]:
            foreign.append((prompt, text))
        if row == "en":
            framed.append((f"a picture of {prompt}", text))

    # layer by layer
    owner = torch.tensor(owner)
    names_heard = hear(llm, known)
    foreign_heard = hear(llm, [caption for caption, _ in foreign])
    framed_heard = hear(llm, [caption for caption, _ in framed])
    table = {}
    for k, layer in enumerate(llm.kept):
        X = names_heard[k]
        predict = ridge(X, torch.eye(len(among))[owner])
        nearest = nearest_name(X, owner, len(among))
        row = {
            "ridge": place_scores(predict(foreign_heard[k]), foreign, among),
            "nearest name": place_scores(nearest(foreign_heard[k]), foreign, among),
            "in a caption": place_scores(nearest(framed_heard[k]), framed, among),
        }
        table[f"layer {layer.index}"] = row
        print_ranks(f"layer {layer.index}", {"rows": {"": row}})
    return table


def nearest_name(X: Tensor, owner: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """X (names, D), owner (names,): each name's emoji, of n.

    -> a function: the cosine of each new caption (P, D) to each emoji's nearest name (P, n), on
    standardized features.
    """
    middle = X.mean(0)
    scale = X.std(0) + 1e-3
    names = F.normalize((X - middle) / scale, dim=-1)

    def cosines(new: Tensor) -> Tensor:
        each = F.normalize((new - middle) / scale, dim=-1) @ names.T  # (P, names)
        none = torch.full((len(new), n), -1.0)
        return none.scatter_reduce(1, owner.expand(len(new), -1), each, "amax")

    return cosines


def place_scores(scores: Tensor, captions: list[tuple[str, str]], among: list[str]) -> dict:
    """scores (P, n) of each caption and emoji; captions with the right one.

    -> the scores of its rank.
    """
    emoji = [text for _, text in captions]
    truth = torch.tensor([among.index(text) for text in emoji])
    true = scores.gather(1, truth[:, None])
    # where a layer cannot tell some apart, they share the middle of their places
    ties = (scores == true).sum(1) - 1
    places = 1 + (scores > true).sum(1) + ties / 2
    return rank_scores(places.numpy(), len(among), emoji)


# --------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description="Score the pictures of a run on emoji.",
    )
    parser.add_argument("--probe", action="store_true", help="also probe what the layers know")
    evaluate.add_run_flags(parser)
    evaluate.add_score_flags(parser)
    args = evaluate.fill_in(parser.parse_args(argv))
    runs = evaluate.open_runs(args, "emoji", SUITES)
    make_folder(args.out)
    for file in evaluate.FILES:
        evaluate.read_results(args.out / file)  # refused before the work
    first = runs[0]
    options = first.expert.made_for.get("emoji", {})
    source = Emoji(first.expert.image_size, 0, **options)
    results = evaluate_emoji(args, runs, source)
    if args.probe:
        without_thinking(first)
        first.llm.keep(range(len(first.llm.layers)))
        results[first.name]["probe"] = probe_emoji(first.llm, source, args.limit, args.half)
    evaluate.save_results(args, runs, results)
