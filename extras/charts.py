"""The figures of RESULTS.md, drawn from the JSONs it is made of: bars and curves with intervals.

    python -m extras.charts --out assets          # controls.png, hex.png, steps.png

matplotlib draws: pip install -r requirements-maps.txt
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.charts")
    import cli

    cli.start()

from pathlib import Path

import numpy as np

from cli import OneLineParser, make_folder, one_line_errors, write_whole
from evaluate import read_results
from extras.colors import lab
from extras.intervals import mean_of_rows
from extras.maps import COLORS, add_legend, as_picture, new_figure, new_panel
from extras.seeds import summarize
from extras.shapes_folder import codes as shown_codes
from extras.suites import read_suite

ASSETS = Path(__file__).parent.parent / "assets"
KINDS = {"pretrained": "pretrained LLM", "random": "random LLM", "dense": "no LLM"}
BARS = {  # what a group of bars is called -> the suite, and which of its scores
    "English": ("geneval", "mean"),
    "unseen pairs": ("unseen", "mean"),
    "other sentences": ("position", "mean"),
    "21 languages,\none object": ("languages", "one object"),
    "21 languages,\ntwo objects": ("languages", "two objects"),
    "facts": ("knowledge", "mean"),
    "nonsense": ("parrot", "mean"),
}
TWINS = {  # a line each over the steps of training
    "pretrained": "gemma-3-270m",
    "random": "random gemma-3-270m",
    "dense": "no LLM",
    "smollm2": "SmolLM2-135M-Instruct",
    "smollm2-random": "random SmolLM2-135M-Instruct",
}
STEPS = ASSETS / "results" / "steps.json"  # kind -> step -> what evaluate.py said then, a run each
LAST_STEP = 2400
CODES = (0, 1, 10, 100, 1000)
HEX = "hex, random"  # the row of the suite `colors` whose codes no training picture shows


# -------------------------------------------------------------------------------------------------
# what is drawn


def runs_of(folder: str, kind: str) -> list[dict]:
    """What evaluate.py has said of the runs of one kind, seed by seed."""
    paths = sorted((ASSETS / "results" / folder).glob(f"{kind}-[0-9].json"))
    return [read_results(path) for path in paths]


def control_scores() -> dict[str, list[dict]]:
    """kind -> the score of each group of bars, with its interval."""
    scores = {}
    for kind in KINDS:
        runs = runs_of("main", kind)
        scores[kind] = [summarize(suite, runs)[name] for suite, name in BARS.values()]
    return scores


def step_scores(kind: str) -> dict[int, dict]:
    """Step -> GenEval's mean over the seeds (on the way there are fewer), with its interval."""
    runs_at = {int(step): runs for step, runs in read_results(STEPS)[kind].items()}
    runs_at[LAST_STEP] = runs_of("main", kind)
    return {step: summarize("geneval", runs)["mean"] for step, runs in runs_at.items()}


def nearest_shown(codes: int) -> float:
    """How far a code that is asked for is from the nearest of those shown: the median, in CIE76."""
    asked = read_suite("colors", only=[HEX], half="report")
    distances = []
    shown = lab(shown_codes(codes, seed=0))
    for prompt in asked:
        distances.append(np.linalg.norm(shown - lab(prompt.rgb), axis=1).min())
    return float(np.median(distances))


def hex_scores(kind: str) -> dict[int, dict]:
    """Hex codes shown in training -> how many codes that were not shown are right, with interval,
    and `off` of each seed, the median distance of the drawn colour in CIE76."""
    scores = {}
    for codes in CODES:
        runs = [run["colors"]["rows"][HEX] for run in runs_of("hex", f"{kind}-{codes}")]
        if runs:
            entry = mean_of_rows({seed: {HEX: tally} for seed, tally in enumerate(runs)})
            entry["off"] = [tally["color_off"] for tally in runs]
            scores[codes] = entry
    return scores


# -------------------------------------------------------------------------------------------------
# figures


def error_bars(scores: list[dict]) -> list[list[float]]:
    """How far each interval goes below its score and above it, as matplotlib takes them."""
    below = [score["score"] - score["interval"][0] for score in scores]
    above = [score["interval"][1] - score["score"] for score in scores]
    return [below, above]


def draw_controls():
    """A group of bars for each thing that is asked for, a bar for each kind of run."""
    figure = new_figure(10, 3.8)
    axes = new_panel(figure, figure.add_gridspec(1, 1)[0], "share of pictures that are right", "")
    scores = control_scores()
    width = 0.8 / len(scores)
    for i, entries in enumerate(scores.values()):
        aside = (i - (len(scores) - 1) / 2) * width
        places = [group + aside for group in range(len(BARS))]
        heights = [entry["score"] for entry in entries]
        bars = {"color": COLORS[i], "ecolor": "#444444", "capsize": 2}
        axes.bar(places, heights, 0.9 * width, yerr=error_bars(entries), **bars)
    axes.set_xticks(range(len(BARS)), BARS)
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    add_legend(figure, [KINDS[kind] for kind in scores])
    return figure


def draw_steps():
    """GenEval over the steps of training, a line for each LLM, its random twin and none."""
    figure = new_figure(10, 3.8)
    place = figure.add_gridspec(1, 1)[0]
    axes = new_panel(figure, place, "GenEval's six tasks, share right", "steps")
    for i, kind in enumerate(TWINS):
        scores = step_scores(kind)
        heights = [entry["score"] for entry in scores.values()]
        aside = 12 * (i - len(TWINS) // 2)  # so that intervals do not hide each other
        steps = [step + aside for step in scores]
        line = {"color": COLORS[i], "marker": "o", "capsize": 3}
        axes.errorbar(steps, heights, yerr=error_bars(list(scores.values())), **line)
    axes.set_ylim(0, 1)
    add_legend(figure, list(TWINS.values()))
    return figure


def draw_hex():
    """How many codes are right, and how far off the colours are, over the codes shown."""
    figure = new_figure(10, 3.6)
    places = figure.add_gridspec(1, 2)
    shown = "hex codes in training, none of those asked for"
    right = new_panel(figure, places[0], "codes never shown that are right (ΔE < 15)", shown)
    off = new_panel(figure, places[1], "colour off by, median ΔE of each seed", shown)
    lines = {name: scores for kind, name in KINDS.items() if (scores := hex_scores(kind))}
    for i, scores in enumerate(lines.values()):
        at = [CODES.index(codes) for codes in scores]
        entries = list(scores.values())
        heights = [entry["score"] for entry in entries]
        line = {"color": COLORS[i], "marker": "o", "capsize": 3}
        right.errorbar(at, heights, yerr=error_bars(entries), **line)
        for place, entry in zip(at, entries):
            off.plot([place] * len(entry["off"]), entry["off"], "o", color=COLORS[i], alpha=0.7)
    for axes in (right, off):
        axes.set_xticks(range(len(CODES)), [f"{codes:,}" for codes in CODES])
        axes.set_ylim(bottom=0)
    add_legend(figure, list(lines))
    return figure


FIGURES = {"controls": draw_controls, "hex": draw_hex, "steps": draw_steps}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="The figures of RESULTS.md, from its JSONs.")
    parser.add_argument("--out", default="evaluation", help="a folder for the figures")
    args = parser.parse_args(argv)
    out = make_folder(args.out)
    for name, draw in FIGURES.items():
        path = out / f"{name}.png"
        write_whole(path, as_picture(draw()).save)
        print(path)


if __name__ == "__main__":
    one_line_errors(main)
