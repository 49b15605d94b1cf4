"""Curves of runs: loss, loss by t, scores over pictures seen, speed; several runs on one sheet.

    python -m extras.maps runs/shapes                     # writes runs/shapes/curves.png
    python -m extras.maps runs/shapes runs/emoji          # writes curves.png

Reads metrics.jsonl, of a run that still goes on, too; and the scores that evaluate.py and
extras/race.py have left in the run's folder. matplotlib draws: pip install -r requirements-maps.txt
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.maps")
    import cli

    cli.start()

import argparse
import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cli import OneLineParser, make_folder, one_line_errors, write_whole
from extras.run_logs import RunLog, read_run, short_names

COLORS = (  # Okabe and Ito's, which colour-blind readers tell apart, without the yellow
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)
DASHES = ("-", "--", ":", "-.")  # once all colours are used
COLUMNS = 5  # of small panels
SMOOTHED_OVER = 1 / 20  # of a run, by a running median
DOTS_PER_INCH = 100


class NoMatplotlib(ValueError):
    """It is no requirement of anything else."""


def draw_curves(logs: list[RunLog]):
    """The sheet: loss and speed above, the loss of each bin of t below them, then the scores.

    -> a matplotlib figure
    """
    # as many rows as the scores take
    suites = list(dict.fromkeys(suite for log in logs for suite in log.scores))
    heights = [3.8, 2.7] + [2.7] * math.ceil(len(suites) / COLUMNS)  # inches
    if not suites:
        heights.append(0.5)
    figure = new_figure(14, sum(heights))
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)

    # loss and speed
    top = rows[0].subgridspec(1, 2, width_ratios=[3, 2])
    axes = new_panel(figure, top[0], "loss", "pictures seen")
    for i, log in enumerate(logs):
        draw_smoothed(axes, log.images, log.loss, i)
    log_scale(axes)
    draw_speed(figure, top[1], logs)

    # loss by t: one scale for all bins, so that they can be compared
    bins = max(log.loss_by_t.shape[1] for log in logs)
    places = rows[1].subgridspec(1, max(1, bins))
    first = None
    for k in range(bins):
        title = f"loss at t = {k / bins:.1f} to {(k + 1) / bins:.1f}"
        axes = new_panel(figure, places[k], title, "pictures seen", sharey=first)
        first = first or axes
        for i, log in enumerate(logs):
            if k < log.loss_by_t.shape[1]:
                draw_smoothed(axes, log.images, log.loss_by_t[:, k], i)
        log_scale(axes)

    # scores
    if not suites:
        draw_no_scores(figure, rows[2])
    for r in range(math.ceil(len(suites) / COLUMNS)):
        in_row = suites[r * COLUMNS : (r + 1) * COLUMNS]
        places = rows[2 + r].subgridspec(1, max(3, len(in_row)))
        for place, suite in zip(places, in_row):
            axes = new_panel(figure, place, f"{suite}, share right", "pictures seen")
            for i, log in enumerate(logs):
                draw_line(axes, log.scores.get(suite, []), i)
            axes.set_ylim(-0.03, 1.03)
    for axes in figure.axes:
        axes.set_xlim(left=0)
    add_legend(figure, [log.name for log in logs])
    return figure


def draw_smoothed(axes, x: np.ndarray, y: np.ndarray, i: int) -> None:
    """Faint points as they were logged, and their running median as a line."""
    color, _ = style(i)
    axes.plot(x, y, ".", color=color, alpha=0.4, markersize=5, markeredgewidth=0)
    draw_line(axes, zip(x, running_median(y)), i, marker="")
    if len(x) == 1:
        axes.plot(x, y, "o", color=color, markersize=5)


def draw_speed(figure, place, logs: list[RunLog]) -> None:
    title = "pictures a second"
    if any(log.resumed for log in logs):
        title += " (▲ resumed)"
    axes = new_panel(figure, place, title, "pictures seen")
    for i, log in enumerate(logs):
        draw_smoothed(axes, log.images, log.speed, i)
        marks = np.interp(log.resumed, log.images, log.speed)
        axes.plot(log.resumed, marks, "^", color=style(i)[0], markersize=8, markeredgecolor="white")
    axes.set_ylim(bottom=0)


def draw_no_scores(figure, place) -> None:
    axes = figure.add_subplot(place)
    axes.axis("off")
    hint = "no scores yet: python evaluate.py --ckpt RUN, at any moment of a run"
    axes.text(0.5, 0.5, hint, ha="center", va="center", fontsize=11, color="#666666")


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of each value and its neighbours, as many on either side; NaN counts nowhere.

    (A mean would lie above a loss that falls steeply.)
    """
    reach = round(len(values) * SMOOTHED_OVER / 2)
    medians = np.full(len(values), math.nan)
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        near = values[i - side : i + side + 1]
        known = near[np.isfinite(near)]
        if len(known):
            medians[i] = np.median(known)
    return medians


# --------------------------------------------------------------------------------------------------
# matplotlib: the race's picture uses these, too


def new_figure(width: float, height: float):
    """An empty figure of so many inches. NoMatplotlib, with what to do, where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "curves are drawn by matplotlib: pip install -r requirements-maps.txt"
        raise NoMatplotlib(message) from None
    warnings.filterwarnings("ignore", "Glyph .* missing")  # a run may have any name
    return Figure((width, height), DOTS_PER_INCH, layout="constrained")


def new_panel(figure, place, title: str, x_label: str, **options):
    """Axes with a title and a grid; numbers below them as 50k, 1.5M."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot(place, **options)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
    return axes


def thousands(x: float) -> str:
    if abs(x) >= 1e6:
        return f"{x / 1e6:g}M"
    if abs(x) >= 1e3:
        return f"{x / 1e3:g}k"
    return f"{x:g}"


def log_scale(axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def style(i: int) -> tuple[str, str]:
    """Colour and dash of run i, the same in all panels."""
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]


def draw_line(axes, points, i: int, marker: str = "o") -> None:
    """points: (x, y) each."""
    color, dash = style(i)
    places = np.array(list(points), np.float64).reshape(-1, 2)
    axes.plot(*places.T, color=color, linestyle=dash, linewidth=1.8, marker=marker, markersize=4)


def add_legend(figure, names: list[str]) -> None:
    """One legend for all panels, above them: the name of run i beside its line."""
    from matplotlib.lines import Line2D

    lines = []
    for i in range(len(names)):
        color, dash = style(i)
        lines.append(Line2D([], [], color=color, linestyle=dash, linewidth=2.5))
    letters = figure.get_figwidth() * 11  # so many fit beside each other
    columns = max(1, int(letters / (8 + max(map(len, names)))))
    shown = [f"\u200b{name}" for name in names]
    legend = figure.legend(
        lines, shown, loc="outside upper left", ncols=columns, fontsize=11, frameon=False
    )
    for text, name in zip(legend.get_texts(), names):
        text.set_parse_math(False)  # a name may have a $
        text.set_text(name)


def as_picture(figure) -> Image.Image:
    """A figure as pixels."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


# --------------------------------------------------------------------------------------------------
# the command


def print_last(logs: list[RunLog]) -> None:
    """The last values of each run."""
    suites = list(dict.fromkeys(suite for log in logs for suite in log.scores))
    width = max(len("run"), max(len(log.name) for log in logs))
    heads = "".join(f"  {suite}" for suite in suites)
    bins = max(log.loss_by_t.shape[1] for log in logs)
    by_t = f"by t, 0 to 1 in {bins} bins"
    columns = f"{'step':>9}{'pictures':>12}{'loss':>8}  {by_t:{7 * bins}}{'/s':>7}"
    print(f"{'run':{width}}{columns}{heads}")
    for log in logs:
        cells = "".join(f"{loss:7.3f}" for loss in log.loss_by_t[-1])
        numbers = f"{log.steps[-1]:9,}{log.images[-1]:12,.0f}{log.loss[-1]:8.4f}"
        line = f"{log.name:{width}}{numbers}  {cells:{7 * bins}}{log.speed[-1]:7.0f}"
        for suite in suites:
            score = "-"
            if suite in log.scores:
                score = f"{log.scores[suite][-1][1]:.2f}"
            line += f"  {score:>{len(suite)}}"
        print(line)


def png_file(text: str) -> Path:
    """argparse type: a file name that ends in .png."""
    if not text.lower().endswith(".png") or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected the name of a .png file")
    return Path(text)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Curves of runs, several on one sheet.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder")
    where = "the picture (default: curves.png in the run's folder; of several runs, here)"
    add("--out", type=png_file, metavar="FILE.png", help=where)
    args = parser.parse_args(argv)

    # all that can be refused comes before anything is drawn
    folders = list(dict.fromkeys(Path(run).expanduser().resolve() for run in args.runs))
    out = args.out
    if out is None:
        out = folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png")
    logs = []
    for folder, name in zip(folders, short_names(folders)):
        logs.append(read_run(folder, name))
    new_figure(1, 1)
    make_folder(out.parent)

    print_last(logs)
    figure = draw_curves(logs)
    write_whole(out, lambda file: figure.savefig(file))
    print(f"{out} shows how they got there")


if __name__ == "__main__":
    one_line_errors(main)
