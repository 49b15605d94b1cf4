"""Every number in a table of README.md and RESULTS.md is one of a JSON under assets/results/.

A function below writes the rows of each table from the JSON, mostly without their first cell, which
is a name; the document must say the same. A table with numbers and no such function fails.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from extras import charts, kinds, seeds
from extras.intervals import difference, mean_of_rows
from extras.race_table import runs_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "assets" / "results"
DOCUMENTS = ("README.md", "RESULTS.md")
KINDS = tuple(charts.KINDS)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------
# how numbers are written


def share(entry: dict) -> str:
    return f"{entry['score']:.2f}"


def sure(entry: dict) -> str:
    """A share and its 95 % interval."""
    low, high = entry["interval"]
    return f"{entry['score']:.2f} ({low:.2f} to {high:.2f})"


def apart(entry: dict) -> str:
    """A difference and its 95 % interval."""
    low, high = entry["interval"]
    return f"{entry['score']:+.2f} ({low:+.2f} to {high:+.2f})"


def rank(entry: dict, median: bool = True) -> str:
    """Of ranks: the share of the first places, of the first five, the median."""
    text = f"{share(entry['top 1'])} ({share(entry['top 5'])})"
    if median:
        text += f", {entry['median rank']['score']:.0f}"
    return text


@cache
def summary(suite: str, folder: str, kind: str) -> dict[str, dict]:
    """Of the runs of a kind; several tables say it."""
    return seeds.summarize(suite, charts.runs_of(folder, kind))


def languages_of(results: dict) -> dict[str, dict]:
    """The rows of `languages` that count: all but English."""
    rows = results["languages"]["rows"]
    return {row: rows[row] for row in rows if row != "English"}


# ------------------------------------------------------------------------------------------------
# README: is my run right, and what it shows


def planned() -> list[list[str]]:
    rows = []
    plans = read("plan")["planned"]
    for one, eight in zip(plans[::2], plans[1::2]):
        assert [plan["GPUs"] for plan in (one, eight)] == [1, 8]
        flags = []
        for plan in (one, eight):
            flags.append(f"`{plan['flags'].removesuffix(' --accumulate 4')}`")
        rows.append([*flags, f"{one['GB']:.0f}", f"{one['TFLOP']:.0f}"])
    return rows


def default_run() -> list[list[str]]:
    rows = []
    for moment in read("default")["moments"]:
        rows.append(
            [
                f"{moment['step']:,}",
                f"{moment['minutes']:.0f}",
                f"{moment['loss']:.3f}",
                share(moment["geneval"]["rows"]["colors"]),
                share(moment["geneval"]["rows"]["position"]),
                share(moment["geneval"]["mean"]),
            ]
        )
    return rows


MAIN = {  # suite -> what is said of it besides its mean
    "geneval": [],
    "unseen": [],
    "position": [],
    "languages": ["one object", "two objects"],
    "knowledge": [],
    "parrot": [],
}


def headline() -> list[list[str]]:
    rows = []
    for suite in MAIN:
        if suite == "unseen":
            continue
        row = []
        for kind in KINDS:
            row.append(sure(summary(suite, "main", kind)["mean"]))
        rows.append(row)
    rows.insert(3, [sure(emoji_found("emoji")), sure(emoji_found("emoji-random-llm")), ""])
    return rows


def emoji_found(run: str) -> dict:
    """How many pictures of emoji are nearest to the right one, over the languages but English."""
    rows = {}
    for language, measures in read(run)["emoji-languages"]["rows"].items():
        found = measures["features"]
        if language != "en":
            rows[language] = {"score": found["top 1"]["score"], "n": found["n"], "wrong": {}}
    return mean_of_rows({0: rows}, rows_are_drawn=True)


def costs() -> list[list[str]]:
    rows = []
    for run in read("training")["planned"]:
        rows.append([f"`{run['flags']}`", f"{run['GB']:.2f}", f"{run['measured GB']:.1f}"])
        assert run["measured GB"] * 0.85 <= run["GB"] <= run["measured GB"] * 1.15
    return rows


# ------------------------------------------------------------------------------------------------
# RESULTS: in short, the default run, its controls, and what the network predicts

IN_SHORT = {  # suite, row -> a column of the probe's table, and which of its layers
    ("geneval", "mean"): None,
    ("position", "mean"): None,
    ("languages", "one object"): ("21 languages", "layer 11"),
    ("languages", "two objects"): None,
    ("knowledge", "mean"): ("knowledge", "layer 15"),
    ("colors", "hex, random"): ("hex", None),
    ("colors", "new color words"): ("new color words", "layer 4"),
    ("emoji", "mean"): ("emoji", None),
    ("ascii", "mean"): None,
    ("parrot", "mean"): None,
}


def in_short() -> list[list[str]]:
    """What a probe reads of the LLM, colour / shape, and what the pictures have of it; then the
    pictures that are right, of each kind of run."""
    rows = []
    for (suite, name), found in IN_SHORT.items():
        row = ["", ""]
        if found:
            column, place = found
            row = [in_the_llm(column, place), probed()["picture"][column]]
        for kind in KINDS:
            row.append(sure(summary(suite, "main", kind)[name]))
        rows.append(row)
    return rows


def in_the_llm(column: str, place: str | None) -> str:
    """An entry in the table of the probe; no layer: what it read after others of the kind."""
    if column == "hex":
        return f"{read('probe-hex')['pretrained']['layer 4']['right']:.2f}"
    if place:
        return probed()[place][column]
    scores = read("probe-kinds")["pretrained"][column][kinds.WAYS[1]]
    return f"{share(scores['color'])} / {share(scores['shape'])}"


BEYOND_ENGLISH = {  # suite -> what is said of it besides its mean, of what the LLM may know
    "position": ["early", "late"],
    "languages": ["one object", "two objects"],
    "knowledge": ["culture", "space and time", "nature"],
    "colors": ["hex, random", "rgb(), random", "new color words"],
    "emoji": [],
    "ascii": [],
    "parrot": [],
}


def of_each_kind(suites: dict[str, list[str]], kinds: tuple[str, ...] = KINDS) -> list[list[str]]:
    """A mean and rows of each suite: the score of each kind of run over its seeds, what would be
    right by chance of the first kind, and how many pictures a run has drawn."""
    rows = []
    for suite, names in suites.items():
        groups = [charts.runs_of("main", kind) for kind in kinds]
        summaries = [summary(suite, "main", kind) for kind in kinds]
        for name in ("mean", *names):
            if (suite, name) == ("colors", "mean"):  # of what is judged in two ways
                rows.append([""] * (len(kinds) + 2))
                continue
            first = summaries[0][name]
            by_chance = first.get("chance")
            row = [sure(summary[name]) for summary in summaries]
            row.append("" if by_chance is None else f"{by_chance:.2f}")
            rows.append([*row, str(first["n"] // len(groups[0]))])
    return rows


def english() -> list[list[str]]:
    first = charts.runs_of("main", KINDS[0])[0]
    return of_each_kind({suite: list(first[suite]["rows"]) for suite in ("geneval", "unseen")})


def beyond_english() -> list[list[str]]:
    return of_each_kind(BEYOND_ENGLISH)


def second_llm() -> list[list[str]]:
    return of_each_kind(MAIN, ("smollm2", "smollm2-random"))


def long_run() -> list[list[str]]:
    """And the same with no LLM."""
    rows = beside_the_default("long")
    names = [(suite, name) for suite, names in MAIN.items() for name in ("mean", *names)]
    for row, (suite, name) in zip(rows, names, strict=True):
        row.append(sure(summary(suite, "main", "long-dense")[name]))
    return rows


def keys_and_values() -> list[list[str]]:
    suites = MAIN | {"geneval": ["counting"], "position": ["early", "late"]}
    return beside_the_default("kv", suites)


def framed() -> list[list[str]]:
    return on_both_halves("framed", charts.runs_of("main", "framed-choose"))


def rewritten() -> list[list[str]]:
    return on_both_halves("rewritten", charts.runs_of("thinking", "rewritten-choose"))


def on_both_halves(kind: str, choosing: list[dict]) -> list[list[str]]:
    """The half to report, and of two suites the other, by which something was chosen."""
    some = {suite: MAIN[suite] for suite in ("languages", "knowledge")}
    others = charts.runs_of("thinking", "default-choose")
    return beside_the_default(kind) + beside(choosing, others, some)


def beside_the_default(kind: str, suites: dict[str, list[str]] = MAIN) -> list[list[str]]:
    """Runs of a kind, and the same seeds of the default run."""
    runs = charts.runs_of("main", kind)
    return beside(runs, charts.runs_of("main", KINDS[0])[: len(runs)], suites)


def beside(runs: list[dict], others: list[dict], suites: dict[str, list[str]]) -> list[list[str]]:
    """What both have right, and what sets them apart."""
    rows = []
    for suite, names in suites.items():
        first = seeds.summarize(suite, runs)
        second = seeds.summarize(suite, others)
        paired = seeds.compare(suite, runs, others)
        for name in ("mean", *names):
            rows.append([sure(first[name]), sure(second[name]), apart(paired[name])])
    return rows


def differences() -> list[list[str]]:
    """Each seed, and what sets the pretrained runs apart from the same seeds of each control."""
    rows = []
    ours = charts.runs_of("main", KINDS[0])
    for suite, names in MAIN.items():
        each = seeds.summarize(suite, ours)
        controls = [charts.runs_of("main", kind) for kind in KINDS[1:]]
        paired = [seeds.compare(suite, ours[: len(runs)], runs) for runs in controls]
        for name in ("mean", *names):
            shares = ", ".join(f"{score:.2f}" for score in each[name]["of each run"])
            rows.append([shares, *(apart(difference[name]) for difference in paired)])
    return rows


def unets() -> list[list[str]]:
    rows = []
    for run in read("unet")["runs"].values():
        cells = []
        for step in ("200", "500", "700"):
            loss = run["loss"].get(step)
            cells.append("" if loss is None else f"{loss:.3f}")
        rows.append(cells)
    return rows


def each_seed(run: dict) -> list[str]:
    """The steps of a run, and its scores of each seed."""
    cells = [f"{run['steps']:,}"]
    for suite in ("geneval", "unseen"):
        cells.append(", ".join(f"{score:.2f}" for score in run[suite]))
    return cells


def equal_time() -> list[list[str]]:
    return [each_seed(run) for run in read("unet")["equal time"].values()]


def agreement() -> list[list[str]]:
    rows = []
    for errors in read("unet")["agreement"].values():
        rows.append([f"{error:.2f}" for error in errors])
    return rows


def samplers() -> list[list[str]]:
    columns = [("4", "5"), ("6", "7"), ("8",), ("11", "12"), ("15", "16"), ("23", "24")]
    columns += [("47", "48"), ("100",)]
    rows = []
    for name in ("euler", "heun", "ab2", "fresh"):
        scores = read("samplers")[name]
        cells = []
        for calls in columns:
            right = [scores[n] for n in calls if n in scores]
            cells.append(f"{right[0] / read('samplers')['pictures']:.2f}" if right else "")
        rows.append(cells)
    return rows


def prediction() -> list[list[str]]:
    rows = []
    for name in ("clean", "velocity"):
        run = read("prediction")[name]
        rows.append(
            [
                f"{run['loss']:.3f}",
                sure(run["geneval"]["rows"]["colors"]),
                sure(run["geneval"]["rows"]["position"]),
                sure(run["geneval"]["mean"]),
            ]
        )
    return rows


# ------------------------------------------------------------------------------------------------
# RESULTS: does the LLM's knowledge reach the picture?


def each_language() -> list[list[str]]:
    """Two languages a line: eleven on the left, eleven on the right."""
    pretrained, random = [
        seeds.summarize("languages", charts.runs_of("main", kind)) for kind in KINDS[:2]
    ]
    names = list(charts.runs_of("main", KINDS[0])[0]["languages"]["rows"])
    rows = []
    for left, right in zip(names[:11], names[11:]):
        row = [share(pretrained[left]), share(random[left]), ""]
        rows.append([*row, right, share(pretrained[right]), share(random[right])])
    return rows


def in_words() -> list[list[str]]:
    """What the LLM says, what a probe reads, and of the random LLM."""
    found = read("answers")
    pretrained = found["pretrained"]
    ways = [
        pretrained["words"]["as it is"],
        pretrained["words"]["calibrated"],
        pretrained["probe"]["English captions"],
        pretrained["probe"]["and other languages"],
        found["random"]["probe"]["English captions"],
    ]
    assert pretrained["probe"]["layer"] == 11
    return [[sure(way[what]) for what in ("color", "shape", "both")] for way in ways]


def of_the_kind() -> list[list[str]]:
    """Colour and shape that a probe reads, without prompts of the kind and with them, and what is
    gained; of the random LLM too."""
    found = read("probe-kinds")
    rows = []
    for kind, ways in found["pretrained"].items():
        gained = {what: apart(entry) for what, entry in kinds.gained(ways).items()}
        for way, scores in ways.items():
            random = found["random"][kind][way]
            row = [str(scores["layer"])]
            for what in ("color", "shape"):
                row += [share(scores[what]), gained[what] if way == kinds.WAYS[1] else ""]
            rows.append([*row, f"{share(random['color'])} / {share(random['shape'])}"])
    return rows


def language_trials() -> list[list[str]]:
    """What was tried for other languages, and what sets it apart from the first, without it; and
    what the other pictures have wrong."""
    trials = read("language-trials")["trials"]
    rows = []
    for trial in trials:
        one = trial["languages"]["one object"]
        difference = ""
        if trial is not trials[0]:
            difference = apart(seeds.compare("languages", [trial], trials[:1])["mean"])
        wrong = [str(one["wrong"][why]) for why in ("wrong shape", "wrong color")]
        rows.append([sure(one), difference, *wrong])
    return rows


def language_probes() -> list[list[str]]:
    """Colour and shape both right in layer 11, in 12, and in 10 to 12 side by side."""
    found = read("language-trials")["probes"]
    rows = []
    for table in (found["rows"], found["frames"]["rows"]):
        for layers in table.values():
            rows.append([f"{both:.2f}" for _, _, both in layers])
    return rows


def hex_codes() -> list[list[str]]:
    """How many codes never shown are right, how far off each seed's are, and what becomes of other
    languages."""
    rows = []
    for kind in KINDS:
        for codes, entry in charts.hex_scores(kind).items():
            runs = charts.runs_of("hex", f"{kind}-{codes}")
            off = ", ".join(f"{distance:.0f}" for distance in entry["off"])
            languages = seeds.summarize("languages", runs)["mean"]
            name = f"{codes:,}" if kind == KINDS[0] else f"{codes:,}, {charts.KINDS[kind]}"
            nearest = f"{charts.nearest_shown(codes):.0f}" if codes else ""
            rows.append([name, nearest, sure(entry), off, sure(languages)])
    return rows


PALETTES = ("", "-dense", "-alone")


def palettes() -> list[list[str]]:
    """Prompts with codes: how many are right, how far off, and of two codes how many pictures with
    both shapes have them not the wrong way round."""
    runs = {kind: charts.runs_of("hex", f"palettes{kind}")[0] for kind in PALETTES}
    found = [run["palettes"]["rows"] for run in runs.values()]
    rows = []
    for name in found[0]:
        tallies = [tally[name] for tally in found]
        rows.append([*map(sure, tallies), str(tallies[0]["n"])])
        offs = [tally["color_off"] for tally in tallies]
        rows.append([*("" if off is None else f"{off:.0f}" for off in offs), ""])
    straight = []
    for tally in found:
        wrong = tally["two codes"]["wrong"]
        swapped = wrong.get("swapped colors", 0)
        fit = round(tally["two codes"]["score"] * tally["two codes"]["n"])
        fit += wrong.get("wrong color", 0)
        straight.append(f"{fit} of {fit + swapped}" if fit + swapped else "")
    return [*rows, [*straight, ""]]


def probe() -> list[list[str]]:
    return [list(columns.values()) for columns in probed().values()]


def probed() -> dict[str, dict[str, str]]:
    """Layer, and the picture -> column -> colour / shape right: a mean over the rows of a column,
    each as often as it has prompts, and over the seeds."""
    runs = charts.runs_of("main", KINDS[0])
    of_row = {row: tally["n"] for row, tally in runs[0]["colors"]["rows"].items()}
    codes = []
    for name in ("hex, canonical", "hex, random"):
        codes += of_row[name] * [f"colors {name}"]
    columns = {
        "21 languages": [f"languages {name}" for name in languages_of(runs[0])],
        "emoji": ["emoji single"],
        "knowledge": ["knowledge"],
        "hex": codes,
        "new color words": ["colors new color words"],
    }
    found = {}
    for layer in ("layer 0", "layer 4", "layer 11", "layer 12", "layer 15", "picture"):
        tables = [run["probe"][layer] for run in runs]
        found[layer] = {}
        for column, names in columns.items():
            pairs = [table[name] for table in tables for name in names]
            color = sum(pair[0] for pair in pairs) / len(pairs)
            shape = sum(pair[1] for pair in pairs) / len(pairs)
            found[layer][column] = f"{color:.2f} / {shape:.2f}"
    return found


# ------------------------------------------------------------------------------------------------
# RESULTS: emoji

EMOJI_LANGUAGES = "zh,fr,es,ja,pt,it,ko,de,id,ru,tr,ar,fa".split(",")


def emoji() -> list[list[str]]:
    runs = [read("emoji"), read("emoji-random-llm")]
    rows = [[rank(run["recall"]["rows"]["en"]["features"]) for run in runs]]
    rows.append([rank(run["emoji-languages"]["mean"]["features"]) for run in runs])
    for language in EMOJI_LANGUAGES:
        rows.append([rank(run["emoji-languages"]["rows"][language]["features"]) for run in runs])
    rows.append([rank(run["unseen-names"]["rows"]["en"]["features"]) for run in runs])
    return rows


def emoji_layers() -> list[list[str]]:
    rows = []
    for run in read("emoji-layers")["runs"].values():
        first_five = f"{run['top 1']:.2f} ({run['top 5']:.2f}), {run['median rank']}"
        rows.append([first_five, f"{run['recall']:.2f}", str(run["never trained on"])])
    return rows


def emoji_probe() -> list[list[str]]:
    pretrained = read("emoji")
    random = read("emoji-random-llm")["probe"]
    rows = []
    for number in (11, 13, 15, 16, 17):
        cells = pretrained["probe"][f"layer {number}"]
        ways = [rank(cells[way]) for way in ("nearest name", "ridge", "in a caption")]
        rows.append([*ways, rank(random[f"layer {number}"]["in a caption"])])
    rows.append([rank(pretrained["emoji-languages"]["mean"]["features"]), "", "", ""])
    return rows


# ------------------------------------------------------------------------------------------------
# RESULTS: other towers


def mirror() -> list[list[str]]:
    rows = []
    for run in read("mirror")["runs"]:
        rows.append(
            [
                f"{run['parameters'] / 1e6:.0f} M",
                f"{run['steps']:,}",
                f"{run['seconds a step']} s",
                sure(run["geneval"]),
                sure(run["unseen"]),
                share(run["languages"]),
            ]
        )
    return rows


def describing() -> list[list[str]]:
    first = read("lmfusion")["describe"]["pretrained"]
    second = read("lmfusion")["describe"]["random"]
    lines = []
    for row in first["describe"]["rows"]:
        lines.append([suite["describe"]["rows"][row] for suite in (first, second)])
        lines[-1].append(first["describe"]["difference"][row])
    spoken = "describe-languages"
    lines.append([first[spoken]["mean"], second[spoken]["mean"]])
    lines[-1].append(first[spoken]["difference"]["mean"])
    return [[sure(a), sure(b), apart(c), str(a["n"])] for a, b, c in lines]


def editing() -> list[list[str]]:
    runs = read("edits")
    first, second, longer = runs["pretrained"], runs["random"], runs["longer"]
    rows = []
    for row in ("color", "shape", "move", "remove", "add"):
        scores = [run["rows"][row] for run in (first, second, longer)]
        rows.append([*scores, first["difference"][row]])
    other = "six other languages"
    rows.append([first[other], second[other], longer[other], first["difference"][other]])
    return [[sure(a), sure(b), apart(d), sure(c), str(a["n"])] for a, b, c, d in rows]


def objectives() -> list[list[str]]:
    runs = read("lmfusion")["ddpm"]
    names = ("flow", "ddpm", "flow, 700 steps", "ddpm, whole skips")
    return [each_seed(runs[name]) for name in names]


def separation() -> list[list[str]]:
    rows = []
    for run in read("lmfusion")["separation"].values():
        row = []
        for kind, digits in (("loss", 3), ("lm_loss", 2)):
            for step in ("200", "300"):
                loss = run[kind].get(step)
                row.append("" if loss is None else f"{loss:.{digits}f}")
        after = run.get("perplexity after", run["perplexity before"])
        said = ", ".join(f"{value:,.0f}" for value in after.values())
        if "perplexity after" in run:
            said += f" (step {run['perplexity at step']})"
        rows.append([*row, said])
    return rows


RATES = ("0.001", "0.002", "0.004", "0.008")  # of learning; the second is train.py's own
BRIDGES = ("mot", "last:state=6", "last", "hsi", "lap", "kv", "metaqueries:queries=16", "dense")
RACERS = (  # each with its own learning rate
    "kv:as-mot",
    "last:state=6:lr=0.004",
    "mot",
    "hsi:lr=0.004",
    "lap",
    "last",
    "dense",
)
PAIRS = (  # of which the first of each was asked whether it is better
    ("kv:as-mot", "mot"),
    ("kv:as-mot", "last:state=6:lr=0.004"),
    ("last:state=6:lr=0.004", "last"),
    ("last:state=6:lr=0.004", "mot"),
    ("last:state=6:lr=0.004", "hsi:lr=0.004"),
    ("mot", "hsi:lr=0.004"),
)


@cache
def raced(folder: str) -> list[dict]:
    """What every run of a race left, of which each picture's verdict is known."""
    paths = sorted((RESULTS / folder).glob("*/race.json"))  # intervals are drawn in their order
    return [json.loads(path.read_text("utf-8")) for path in paths]


def race_chosen() -> list[list[str]]:
    runs = {log["racer"]: log["suites"] for log in raced("race-chosen")}
    rows = []
    for bridge in BRIDGES:
        row = []
        for rate in RATES:
            name = bridge if rate == RATES[1] else f"{bridge}:lr={rate}"
            cell = ""
            if name in runs:
                mean = mean_of_rows({0: languages_of(runs[name])}, rows_are_drawn=True)
                cell = f"{share(mean)} ({share(runs[name]['geneval']['rows']['colors'])})"
            row.append(cell)
        rows.append(row)
    return rows


def race() -> list[list[str]]:
    table = read("race/table")
    rows = []
    for name in RACERS:
        racer = table[name]
        languages = racer["suites"]["languages"]
        position = racer["suites"]["position"]["rows"]
        paired = languages["minus control"]
        rows.append(
            [
                sure(racer["suites"]["geneval"]["rows"]["colors"]),
                sure(languages),
                ", ".join(f"{seed:.2f}" for seed in languages["seeds"]),
                apart(paired) if paired else "",
                sure(racer["suites"]["knowledge"]),
                f"{share(position['early'])}, {share(position['late'])}",
                f"{racer['images/s']:.0f}",
            ]
        )
    return rows


def race_pairs() -> list[list[str]]:
    found = []
    for pair in PAIRS:
        languages = [runs_of(racer, "languages", raced("race")) for racer in pair]
        english = []
        for racer in pair:
            runs = runs_of(racer, "geneval", raced("race"))
            english.append({seed: {"colors": rows["colors"]} for seed, rows in runs.items()})
        found.append([apart(difference(*languages, True)), apart(difference(*english))])
    return found


# ------------------------------------------------------------------------------------------------
# RESULTS: thinking first, speed


# how a tower was trained, and how it draws if otherwise
THINKING = ("plain", "plain-reencode", "rewrite", "reencode", "think")
ONE_OBJECT = (  # what a tower that has learned single objects is asked
    ("geneval", "colors"),
    ("languages", "one object"),
    ("knowledge", "mean"),
    ("position", "mean"),
    ("emoji", "mean"),
    ("parrot", "mean"),
)


def thinking(kinds: tuple[str, ...] = THINKING) -> list[list[str]]:
    """Of towers that were trained on bare captions and on what the LLM writes about each."""
    rows = []
    for suite, name in ONE_OBJECT:
        if kinds != THINKING and suite == "emoji":
            continue
        found = [summary(suite, "thinking", kind) for kind in kinds]
        row = [sure(entries[name]) for entries in found]
        rows.append([*row, str(found[0][name]["n"])])
    return rows


def instructed() -> list[list[str]]:
    """The same of an instruct model, trained on bare captions and in its chat template."""
    return thinking(("smollm2-plain", "smollm2-chat", "smollm2-reencode", "smollm2-think"))


def speed() -> list[list[str]]:
    bench = read("bench")
    train = {entry["way"]: entry for entry in bench["train"]}
    one = {entry["way"]: entry for entry in bench["sample"] if entry["prompts"] == 1}

    def ms(entry: dict) -> str:
        return f"{entry['ms']:,.0f} ms"

    joint = "joint forward, fast attention"
    each_step = "LLM over the distinct captions of each step"
    cache = train["caption cache"]
    return [
        [ms(train["joint forward, float32 definition"]), ""],
        [ms(train[joint]), ms(one[joint])],
        [ms(train[each_step]), ms(one["cached, two passes"])],
        [f"{ms(cache)} ({cache['images/s']:.0f} pictures/s)", ms(one["cached, one batch"])],
    ]


TABLES = {  # document, heading -> what writes the cells of the tables below it, in order
    ("README.md", "Is my run right?"): [default_run],
    ("README.md", "What it shows"): [headline],
    ("README.md", "Your LLM, your pictures, your GPU"): [planned],
    ("RESULTS.md", "In short"): [in_short],
    ("RESULTS.md", "What does a run cost?"): [costs],
    ("RESULTS.md", "What does the default run learn?"): [english, long_run, second_llm],
    ("RESULTS.md", "Which U-Net?"): [equal_time, unets, agreement],
    ("RESULTS.md", "What does the sampler decide?"): [samplers],
    ("RESULTS.md", "Should the network predict the clean picture or the velocity?"): [prediction],
    ("RESULTS.md", "What does LMFusion add, and does its advice hold?"): [
        describing,
        separation,
        editing,
        objectives,
    ],
    ("RESULTS.md", "Does the LLM's knowledge reach the picture?"): [
        beyond_english,
        differences,
        each_language,
    ],
    ("RESULTS.md", "Does the LLM not know it, or does the expert not hear it?"): [
        probe,
        of_the_kind,
        in_words,
        language_trials,
        language_probes,
        framed,
    ],
    ("RESULTS.md", "How many hex codes must training show?"): [hex_codes, palettes],
    ("RESULTS.md", "Does it hold for real pictures?"): [emoji],
    ("RESULTS.md", "Which layers know a name?"): [emoji_layers, emoji_probe],
    ("RESULTS.md", "Is a copy of the LLM a better expert?"): [mirror],
    ("RESULTS.md", "Which bridge carries other languages?"): [race_chosen, race],
    ("RESULTS.md", "Is it the bridge or the layer?"): [race_pairs, keys_and_values],
    ("RESULTS.md", "Does it help to think first?"): [rewritten, thinking, instructed],
    ("RESULTS.md", "What does the cache save?"): [speed],
}


# ------------------------------------------------------------------------------------------------
# what the documents say


@dataclass
class Table:
    document: str
    heading: str
    rows: list[list[str]] = field(default_factory=list)  # without the header


def tables_in(document: str) -> list[Table]:
    tables = []
    heading = ""
    inside = False
    in_code = False
    for line in (ROOT / document).read_text("utf-8").splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code:
            heading = line.lstrip("# ")
        is_row = line.startswith("|") and not in_code
        if is_row and not inside:
            tables.append(Table(document, heading))
        elif is_row and not line.startswith("|---"):
            cells = line.strip("|").split("|")
            tables[-1].rows.append([cell.replace("**", "").strip() for cell in cells])
        inside = is_row
    return tables


def heading_tables() -> dict[tuple[str, str], list[Table]]:
    found = {}
    for document in DOCUMENTS:
        for table in tables_in(document):
            found.setdefault((document, table.heading), []).append(table)
    return found


@pytest.mark.parametrize("place", TABLES, ids=lambda place: f"{place[0]}, {place[1]}")
def test_every_number_of_a_table_is_in_a_json(place):
    found = heading_tables().get(place, [])
    assert len(found) == len(TABLES[place]), f"{place}: {len(found)} tables"
    for table, write in zip(found, TABLES[place]):
        expected = write()
        assert len(table.rows) == len(expected), f"{place}: {write.__name__}"
        for row, cells in zip(table.rows, expected):
            words, shown = row[1 : -len(cells)], row[-len(cells) :]
            assert not re.search(r"\d", " ".join(words)), f"{place}, {row[0]}: from no JSON"
            assert shown == cells, f"{place}, {row[0]}: the JSON says {' | '.join(cells)}"


def test_every_table_with_a_number_is_compared():
    for place, tables in heading_tables().items():
        for table in tables:
            numbers = re.findall(r"\d", str([row[1:] for row in table.rows]))
            assert place in TABLES or not numbers, f"{place}: a table that no JSON gives"


def test_the_figures_show_the_scores():
    pytest.importorskip("matplotlib", reason="pip install -r requirements-maps.txt")
    bars = charts.draw_controls().axes[0].patches
    scores = [entry["score"] for entries in charts.control_scores().values() for entry in entries]
    assert [bar.get_height() for bar in bars] == scores
    lines = charts.draw_steps().axes[0].containers
    assert len(lines) == len(charts.TWINS)
    for drawn, kind in zip(lines, charts.TWINS):
        scores = charts.step_scores(kind).values()
        assert list(drawn[0].get_ydata()) == [entry["score"] for entry in scores]
    right, off = charts.draw_hex().axes
    lines = [scores for scores in map(charts.hex_scores, KINDS) if scores]
    assert len(right.containers) == len(lines) > 0
    for drawn, scores in zip(right.containers, lines):
        assert list(drawn[0].get_ydata()) == [entry["score"] for entry in scores.values()]
        assert [charts.CODES[int(x)] for x in drawn[0].get_xdata()] == list(scores)
    shown = [distance for line in off.lines for distance in line.get_ydata()]
    assert shown == [x for scores in lines for entry in scores.values() for x in entry["off"]]


def test_readme_stays_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1500, f"README.md has {len(text.split())} words"
    assert len(tables_in("README.md")) <= 4


def test_the_shipped_experts_scores_are_in_its_json():
    text = (ROOT / "assets" / "expert" / "README.md").read_text("utf-8")
    scores = read("shipped")
    for suite in ("geneval", "unseen", "languages"):
        assert f"| {sure(scores[suite]['mean'])} | {scores[suite]['mean']['n']} |" in text
    assert f"| {sure(scores['languages']['one object'])} |" in text


def test_every_link_leads_somewhere():
    """Links into the repository: the file is there, and of RESULTS.md the heading too."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            path = path or document
            assert (ROOT / path).exists(), f"{document}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in anchors, f"{document}: {target}"
