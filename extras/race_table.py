"""What comes of a race: its table, its curves, its picture."""

from pathlib import Path

import numpy as np
from PIL import Image

from extras.grades import grade
from extras.grids import picture_table
from extras.intervals import difference, mean_of_rows
from extras.suites import Prompt, read_suite
from extras.tables import LEFT_OUT, signed

ON_THE_WAY = {"geneval": 8, "languages": 4}  # suites of the curves, and prompts of each row
CONTROL = "dense"  # the bridge that hears nothing of the LLM: the others are compared with it


def race_table(logs: list[dict], speeds: dict[str, list[float]]) -> dict:
    """racer -> parameters, images per second, the LLM's share; its scores; its curves, against
    images, and minutes at that speed. logs: a run each. -> JSON

    speeds: steps a second, pictures a step, the LLM's share of the time.
    """
    table = {}
    for racer in dict.fromkeys(log["racer"] for log in logs):
        mine = [log for log in logs if log["racer"] == racer]
        steps_per_second, batch_size, llm_share = speeds[racer]
        rate = steps_per_second * batch_size
        curves = []
        for log in mine:
            curve = []
            for point in log["curve"]:
                curve.append(point | {"minutes": point["images"] / rate / 60})
            curves.append(curve)
        suites = {}
        for suite in mine[0]["suites"]:
            suites[suite] = suite_scores(racer, suite, logs)
        table[racer] = {
            "parameters": mine[0]["parameters"],
            "images": mine[0]["curve"][-1]["images"],
            "images/s": rate,
            "llm_share": llm_share,
            "seeds": [log["seed"] for log in mine],
            "suites": suites,
            "curves": curves,
        }
    return table


def suite_scores(racer: str, suite: str, logs: list[dict]) -> dict:
    """The rows of a suite and their mean over all seeds, with an interval, the mean of each seed,
    and the difference to the first racer of the CONTROL's bridge, whatever its flags. -> JSON"""
    drawn = suite in LEFT_OUT
    runs = runs_of(racer, suite, logs)
    control = {}
    if not is_control(racer):
        controls = [log["racer"] for log in logs if is_control(log["racer"])]
        control = runs_of(controls[0], suite, logs) if controls else {}
    mine = [log for log in logs if log["racer"] == racer]
    rows = {}
    for row in mine[0]["suites"][suite]["rows"]:
        tallies = {log["seed"]: {row: log["suites"][suite]["rows"][row]} for log in mine}
        rows[row] = mean_of_rows(tallies)
    scores = mean_of_rows(runs, drawn)
    scores["seeds"] = [log["suites"][suite]["mean"]["score"] for log in mine]
    scores["minus control"] = difference(runs, control, drawn)
    scores["rows"] = rows
    return scores


def is_control(racer: str) -> bool:
    return racer.split(":")[0] == CONTROL


def runs_of(racer: str, suite: str, logs: list[dict]) -> dict[int, dict[str, dict]]:
    """seed -> row -> tally, of a racer's runs and the rows that count."""
    runs = {}
    for log in logs:
        if log["racer"] == racer:
            rows = dict(log["suites"][suite]["rows"])
            for row in LEFT_OUT.get(suite, ()):
                rows.pop(row, None)
            runs[log["seed"]] = rows
    return runs


def print_race(table: dict) -> None:
    suites = list(next(iter(table.values()))["suites"])
    heads = "".join(f"{suite:>22}" for suite in suites)
    print(f"{'':22}{'parameters':>11}{'images/s':>10}{'LLM':>6}  {heads}")
    for racer, line in table.items():
        cells = ""
        against = ""
        for scores in line["suites"].values():
            low, high = scores["interval"]
            cell = f"{scores['score']:5.2f} {low:.2f} to {high:.2f}"
            cells += f"{cell:>22}"
            paired = scores["minus control"]
            against += f"{signed(paired) if paired else '':>22}"
        rate = f"{line['images/s']:10.0f}{line['llm_share']:6.0%}"
        print(f"{racer:22}{line['parameters']:>11,}{rate}  {cells}")
        if against.strip():
            name = f"  minus {CONTROL}"
            print(f"{name:51}{against}")


# --------------------------------------------------------------------------------------------------
# the picture

HEIGHT = 380  # of the curves, below the pictures


def shown_prompts(one: bool) -> list[Prompt]:
    """What every racer draws for the picture of the race. one: prompts for one object alone."""
    prompts = []
    for suite in ("geneval", "languages", "knowledge", "position"):
        only = None
        if suite == "languages":
            only = ["Italian", "Spanish", "Chinese", "Japanese", "Hindi"]
        prompts += read_suite(suite, 1, only, one)
    return prompts


def race_picture(table: dict, folders: dict[str, Path], one: bool) -> Image.Image:
    """The same prompts and noise, a line for each racer, and below it the scores on the way.

    folders: racer -> a run of it, with drawn.png.
    """
    # the pictures
    prompts = shown_prompts(one)
    lines = {}
    for racer in table:
        drawn = np.asarray(Image.open(folders[racer] / "drawn.png"))
        cells = []
        for prompt, picture in zip(prompts, np.hsplit(drawn, len(prompts))):
            cells.append((picture, prompt.text, grade(prompt, picture).reason is None))
        lines[racer] = cells
    top = picture_table([("", lines)])

    # the scores on the way, below them
    below = race_curves(table, top.width)
    sheet = Image.new("RGB", (top.width, top.height + below.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(below, (0, top.height))
    return sheet


def race_curves(table: dict, width: int) -> Image.Image:
    """Each suite's scores on the way, against pictures seen and against minutes: a line for each
    seed, in the racer's colour. NoMatplotlib where it is missing."""
    from extras.maps import DOTS_PER_INCH, add_legend, as_picture, draw_line, new_figure, new_panel

    figure = new_figure(width / DOTS_PER_INCH, HEIGHT / DOTS_PER_INCH)
    places = figure.add_gridspec(1, 2 * len(ON_THE_WAY))
    column = 0
    for suite in ON_THE_WAY:
        for unit, label in (("images", "pictures seen"), ("minutes", "minutes")):
            axes = new_panel(figure, places[column], f"{suite}, share right", label)
            column += 1
            for i, line in enumerate(table.values()):
                for curve in line["curves"]:
                    draw_line(axes, [(point[unit], point[suite]) for point in curve], i)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
    add_legend(figure, list(table))
    return as_picture(figure)
