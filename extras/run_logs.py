"""What a run's folder tells of its training: metrics.jsonl, and the scores on its way.

extras/maps.py draws it. Nothing heavy is imported: a look at a run that still goes on takes it
nothing away.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import parse_json, write_text

SCORES = "scores.jsonl"


@dataclass
class RunLog:
    """What a run's folder tells of its training: n lines of metrics.jsonl, and scores.

    images (n,): pictures seen. loss (n,), loss_by_t (n, bins), speed (n,) in pictures a second: of
    the interval before each line, NaN where it says nothing. resumed: pictures seen when the run
    went on. scores: suite -> (pictures seen, score) of each time that it was scored.
    """

    name: str
    steps: list[int]
    images: np.ndarray
    loss: np.ndarray
    loss_by_t: np.ndarray
    speed: np.ndarray
    resumed: list[float]
    scores: dict[str, list[tuple[float, float]]]


def read_run(folder: Path, name: str) -> RunLog:
    """ValueError, in one line, if no training has written there."""
    lines = read_lines(folder / "metrics.jsonl")
    pictures = pictures_a_step(folder, lines)
    steps = [line["step"] for line in lines]
    images = pictures * np.array(steps, dtype=np.float64)

    # a bin of t that had no picture says 0
    bins = max(len(values_of(line, "loss_by_t")) for line in lines)
    loss_by_t = np.full((len(lines), bins), math.nan)
    for row, line in zip(loss_by_t, lines):
        values = values_of(line, "loss_by_t")
        row[: len(values)] = values
    loss_by_t[loss_by_t == 0] = math.nan

    return RunLog(
        name,
        steps,
        images,
        loss=np.array([number(line.get("loss")) for line in lines]),
        loss_by_t=loss_by_t,
        speed=interval_speeds(lines, images, pictures),
        resumed=[pictures * step for step in resumed_steps(lines)],
        scores=read_scores(folder, images[-1], pictures),
    )


def read_lines(path: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without one that a kill or a full disk has cut.

    ValueError if there is none.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent}: expected the folder of a run, with {path.name} in it")
    lines = read_json_lines(path)
    lines = [line for line in lines if isinstance(line.get("step"), int) and line["step"] > 0]
    if not any("loss" in line for line in lines):
        wanted = "expected lines with step and loss; training writes one at every interval"
        raise ValueError(f"{path} holds no line of a training run: {wanted}")
    return lines


def read_json_lines(path: Path) -> list[dict]:
    """Every line of a file that is a whole JSON object."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def read_json(path: Path) -> dict:
    """A JSON object, or {} where there is none."""
    try:
        content = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def number(value: object) -> float:
    """A number of a JSON file, NaN for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    return math.nan


def values_of(line: dict, key: str) -> list[float]:
    values = line.get(key)
    return [number(value) for value in values] if isinstance(values, list) else []


def pictures_a_step(folder: Path, lines: list[dict]) -> float:
    """The batch size. Older runs do not log it: then it is in the state that --resume needs."""
    for line in lines:
        if number(line.get("images")) > 0:
            return number(line["images"]) / line["step"]
    from safetensors import SafetensorError, safe_open

    state = folder / "train_state.safetensors"
    try:
        with safe_open(state, "numpy") as file:
            return float(parse_json(file.metadata()["args"])["batch_size"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder}: an older run, whose metrics.jsonl does not count pictures; expected "
            f"{state.name} beside it, which says how many a step has"
        ) from None


def resumed_steps(lines: list[dict]) -> list[int]:
    """Where the run went on in another process, in order."""
    steps = {number(line.get("resumed_at")) for line in lines}
    return sorted(step for step in steps if step > 0)


def interval_speeds(lines: list[dict], images: np.ndarray, pictures: float) -> np.ndarray:
    """Pictures a second of each interval.

    A line has the mean since the run was started or resumed; an older one does not say since when,
    and its mean is taken as it is.
    """
    speeds = []
    before = (None, 0.0, 0.0)  # of the line before: resumed at, pictures, seconds since then
    for line, seen in zip(lines, images):
        mean = number(line.get("images_per_second"))
        resumed_at = line.get("resumed_at")
        seconds = math.nan
        if mean > 0:
            seconds = (seen - pictures * number(resumed_at)) / mean
        if resumed_at == before[0] and seconds > before[2]:
            speeds.append((seen - before[1]) / (seconds - before[2]))
        else:
            speeds.append(mean)
        before = (resumed_at, seen, seconds)
    return np.array(speeds)


# --------------------------------------------------------------------------------------------------
# scores


def log_scores(folder: Path, step: int, results: dict[str, dict], settings: dict) -> None:
    """Add to scores.jsonl what a run's suites score at this step: a line each.

    evaluate.json has the last scores; this file those before it, too.
    """
    path = folder / SCORES
    text = ""
    if path.exists():
        text = path.read_text("utf-8", "replace")
    for suite, scores in results.items():
        if not math.isnan(score_of(scores)):
            line = {"step": step, "suite": suite, "score": score_of(scores), "settings": settings}
            text += json.dumps(line) + "\n"
    write_text(path, text)


def read_scores(folder: Path, end: float, pictures: float) -> dict[str, list[tuple[float, float]]]:
    """suite -> (pictures seen, score) each.

    A race has scored its runs on their way: a curve. evaluate.py scores a run as it stands: a point
    for each step in scores.jsonl, or one at the run's end, of the folder or its partial/.
    """
    scores = scores_of_race(folder / "race.json")
    for place in (folder, folder / "partial"):
        for suite, by_step in scores_by_step(place / SCORES).items():
            points = [(pictures * step, by_step[step]) for step in sorted(by_step)]
            scores.setdefault(suite, points)
        for suite, entry in read_json(place / "evaluate.json").items():
            score = score_of(entry)
            if not math.isnan(score):
                scores.setdefault(suite, [(end, score)])
    return scores


def scores_of_race(path: Path) -> dict[str, list[tuple[float, float]]]:
    curve = read_json(path).get("curve")
    if not isinstance(curve, list):
        return {}
    scores: dict[str, list[tuple[float, float]]] = {}
    for point in curve:
        images = number(point.get("images")) if isinstance(point, dict) else math.nan
        if math.isnan(images):
            continue
        for suite in point:
            if suite not in ("images", "images_per_second", "llm_share"):
                scores.setdefault(suite, []).append((images, number(point[suite])))
    return scores


def scores_by_step(path: Path) -> dict[str, dict[int, float]]:
    """suite -> step -> score, of all that were scored with the settings of the suite's last line:
    others, of fewer prompts say, are no part of the same curve."""
    if not path.is_file():
        return {}
    lines = []
    last = {}
    for line in read_json_lines(path):
        if isinstance(line.get("suite"), str) and isinstance(line.get("step"), int):
            lines.append(line)
            last[line["suite"]] = line.get("settings")
    scores: dict[str, dict[int, float]] = {}
    for line in lines:
        if line.get("settings") == last[line["suite"]]:
            scores.setdefault(line["suite"], {})[line["step"]] = number(line.get("score"))
    return scores


def score_of(entry: object) -> float:
    """The mean of a suite; of emoji, how often the pixels' nearest is the right one; else NaN."""
    try:
        mean = entry["mean"]
        return number(mean["pixels"]["top 1"]["score"] if "pixels" in mean else mean["score"])
    except (KeyError, TypeError):
        return math.nan


def short_names(folders: list[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell two runs apart."""
    names = []
    for folder in folders:
        parts = 1
        while parts < len(folder.parts):
            alike = [other for other in folders if other.parts[-parts:] == folder.parts[-parts:]]
            if len(alike) == 1:
                break
            parts += 1
        names.append("/".join(folder.parts[-parts:]))
    return names
