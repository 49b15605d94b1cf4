"""The race: every bridge with the same data, pictures and seeds, scored on its way and at its end.

    python -m extras.race mot,last,lap --minutes 12 --seeds 0,1
    python -m extras.race mot:layers=0-5,last:state=6,lap:stride=1 --data shapes:one-object

A racer is a bridge as --bridge takes it, with flags of its own for train.py: mot:layers=0-5. All
flags that are not listed by --help are train.py's, too. Runs, table.json and race.png go into
--out. What is finished is not done again: of a run, race.json and drawn.png are all that is needed.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.race")
    import cli

    cli.start()

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import batches
import evaluate
import train
from cli import (
    OneLineParser,
    make_folder,
    one_line_errors,
    positive,
    seed_number,
    write_whole,
)
from evaluate import LoadedRun, write_json
from extras.bridges import OPTIONS
from extras.grades import grade
from extras.maps import NoMatplotlib
from extras.race_table import ON_THE_WAY, print_race, race_picture, race_table, shown_prompts
from extras.suites import check_suites, read_suite
from extras.tables import summarize
from sample import draw

LEGS = 4  # a run is scored so many times on its way
WARM_UP = 8  # steps before a racer's speed is taken


def race(args: argparse.Namespace, flags: list[str]) -> None:
    """Train every racer with every seed, for as many steps as the first of them does in --minutes,
    and score all suites; then one table and one picture of all that lies in the folder.

    flags: for train.py.
    """
    out = Path(args.out)
    check_race(args, flags)

    # the plan: all see as many pictures
    plan = out / "race.json"
    if not plan.exists():
        steps_per_second = measure_speed(args.racers[0], flags)[0]
        steps = max(1, round(60 * args.minutes * steps_per_second / LEGS)) * LEGS
        make_folder(out)
        planned = {"steps": steps, "minutes": args.minutes, "of": args.racers[0], "half": args.half}
        write_json(plan, planned)
    planned = json.loads(plan.read_text("utf-8"))
    steps = planned["steps"]
    args.half = planned.get("half", "both")
    print(f"{out}: {steps} steps each; suites: half {args.half}")

    # the runs
    for seed in args.seeds:
        for racer in args.racers:
            folder = folder_of(args, racer, seed)
            if not is_finished(folder):
                log = train_racer(args, racer, seed, steps, folder, flags)
                score_racer(args, log | {"racer": racer, "seed": seed}, folder)

    # all that is finished, of this command or of one before it
    logs = []
    folders = {}  # racer -> one of its runs
    for path in sorted(out.glob("*/drawn.png")):
        log = json.loads((path.parent / "race.json").read_text("utf-8"))
        logs.append(log)
        folders.setdefault(log["racer"], path.parent)
    table = race_table(logs, race_speeds(plan, list(folders), flags))
    write_json(out / "table.json", table)
    print_race(table)
    one = "shapes:one-object" in train.parse_args(flags).data.split(",")
    try:
        picture = race_picture(table, folders, one)
    except NoMatplotlib as error:
        print(f"{out / 'table.json'}; no race.png beside it: {error}")
        return
    write_whole(out / "race.png", picture.save)
    beside = "race.png beside it: the same prompts for all, and how the scores grew"
    print(f"{out / 'table.json'}, and {beside}")


def check_race(args: argparse.Namespace, flags: list[str]) -> None:
    """ValueError for a suite or a racer that would end the race on its way.

    What is not finished is built once: an LLM may have too few layers for a racer, say.
    """
    check_suites(args.suite, evaluate.SUITES)
    with tempfile.TemporaryDirectory() as folder:
        for racer in args.racers:
            settings_of(racer, folder, flags)  # all of them, before an LLM is loaded
        for racer in args.racers:
            if not all(is_finished(folder_of(args, racer, seed)) for seed in args.seeds):
                train.prepare(settings_of(racer, folder, flags), {}, {})


def folder_of(args: argparse.Namespace, racer: str, seed: int) -> Path:
    return Path(args.out) / f"{re.sub('[:=/]', '-', racer)}-seed{seed}"


def is_finished(folder: Path) -> bool:
    return (folder / "drawn.png").exists()


def settings_of(racer: str, folder: str, flags: list[str]) -> argparse.Namespace:
    """Those of train.py, for a run in this folder."""
    return train.parse_args([*flags_of(racer), "--out", folder, *flags])


def flags_of(racer: str) -> list[str]:
    """A racer as train.py takes it: the bridge with its own options, the rest as flags.

    "lap:stride=1:layers=0-5" -> --bridge lap:stride=1 --layers 0-5. ValueError for another bridge.
    """
    bridge, *options = racer.split(":")
    if bridge not in OPTIONS:
        expected = f"one of {', '.join(OPTIONS)}; the racers stand before all flags"
        raise ValueError(f"{racer}: expected {expected}")
    own = [option.removesuffix("=") for option in OPTIONS[bridge]]
    spec = bridge
    flags = []
    for option in options:
        name, _, value = option.partition("=")
        if name in own:
            spec += f":{option}"
        else:
            flags.append(f"--{name}")
            if value:
                flags.append(value)
    return ["--bridge", spec, *flags]


def train_racer(
    args: argparse.Namespace, racer: str, seed: int, steps: int, folder: Path, flags: list[str]
) -> dict:
    """One run of the race, gone on with where it stopped.

    -> what it took, and its scores on the way. JSON
    """
    # a new run, or one that was stopped
    path = folder / "race.json"
    log = {"curve": []}
    if (folder / "train_state.safetensors").exists():
        given = ["--resume", "--out", str(folder)]
        if path.exists():
            log = json.loads(path.read_text("utf-8"))
    else:
        legs = ["--save-every", str(steps // LEGS), "--sample-every", str(steps)]
        own = ["--seed", str(seed), "--out", str(folder), "--steps", str(steps)]
        given = [*flags_of(racer), *own, *legs, *flags]
    if len(log["curve"]) == LEGS:
        return log

    # leg by leg: train, then score
    run = train.prepare(*train.settings(given))
    log["parameters"] = sum(p.numel() for p in run.expert.parameters())
    while len(log["curve"]) < LEGS:
        target = steps // LEGS * (len(log["curve"]) + 1)
        if run.step < target:  # it may have been stopped after its training, before its scores
            train.train(run, target)
        point = {"images": target * run.args.batch_size}
        for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
            measured = json.loads(line)
            if measured["step"] == target:
                point["images_per_second"] = measured["images_per_second"]
                point["llm_share"] = measured["llm_share"]
        log["curve"].append(point | scores_on_the_way(args, run))
        write_json(path, log)
    return log


def scores_on_the_way(args: argparse.Namespace, run: train.Run) -> dict[str, float]:
    """suite -> the mean of a few prompts."""
    scores = {}
    for suite, limit in ON_THE_WAY.items():
        most = min(limit, args.limit or limit)
        half = "both" if args.half == "both" else "choose"  # a curve may decide on a budget
        one = "one_object" in run.expert.made_for
        prompts = read_suite(suite, most, one=one, half=half)
        texts = [prompt.text for prompt in prompts]
        pictures = draw(run.ema, run.llm, texts, list(range(len(texts))), args.steps)
        grades = list(map(grade, prompts, pictures))
        scores[suite] = summarize(suite, prompts, grades)["mean"]["score"]
    return scores


def score_racer(args: argparse.Namespace, log: dict, folder: Path) -> None:
    """Score a finished run on all suites, and draw what the picture of the race shows of it."""
    own = {"ckpt": str(folder), "versus": None, "rows": None, "read": None, "out": folder}
    own |= {"llm": None, "vae": None}
    asked = argparse.Namespace(**vars(args) | own)
    runs = evaluate.open_runs(asked, "shapes", evaluate.SUITES)
    results, _ = evaluate.evaluate_suites(asked, runs)
    write_json(folder / "race.json", log | {"suites": results[asked.ckpt]})
    write_whole(folder / "drawn.png", draw_shown(runs[0], args.steps).save)


def draw_shown(run: LoadedRun, steps: int) -> Image.Image:
    """Side by side, without frames."""
    prompts = shown_prompts("one_object" in run.expert.made_for)
    texts = [prompt.text for prompt in prompts]
    pictures = draw(run.expert, run.llm, texts, list(range(len(texts))), steps)
    return Image.fromarray(np.hstack(pictures))


# --------------------------------------------------------------------------------------------------
# speed


def race_speeds(plan: Path, racers: list[str], flags: list[str]) -> dict[str, list[float]]:
    """The racers' speeds, measured one after another in one go, so that what a busy hour slows is
    no bridge's fault."""
    planned = json.loads(plan.read_text("utf-8"))
    known = planned.get("speeds", {})
    if not set(racers) <= known.keys():
        known = {racer: measure_speed(racer, flags) for racer in racers}
        write_json(plan, planned | {"speeds": known})
    return known


def measure_speed(racer: str, flags: list[str]) -> tuple[float, int, float]:
    """Steps per second of a racer here and now, over one look-ahead of captions; pictures a step;
    and the share of that time in forward passes of the LLM, a tower's own too, not in gradients."""
    with tempfile.TemporaryDirectory() as folder:
        args = settings_of(racer, folder, flags)
        run = train.prepare(args, {}, {})
        steps = train.Batches(run.source, run.llm, args.batch_size, args.draws, 0)
        with stopwatch(run.llm.model.base_model) as clock:
            for captions, pictures in steps:
                if run.step == WARM_UP:
                    started = time.perf_counter()
                    clock.clear()
                elif run.step == WARM_UP + batches.LOOK_AHEAD:
                    break
                train.train_step(run, run.expert, captions, pictures)
            seconds = time.perf_counter() - started
            inside = sum(clock[1::2]) - sum(clock[::2])
    return batches.LOOK_AHEAD / seconds, args.batch_size, inside / seconds


@contextmanager
def stopwatch(module: torch.nn.Module) -> Iterator[list[float]]:
    """The clock before and after every forward pass of a module, in turn."""
    clock: list[float] = []

    def note(*_) -> None:
        clock.append(time.perf_counter())

    before = module.register_forward_pre_hook(note)
    after = module.register_forward_hook(note, always_call=True)
    try:
        yield clock
    finally:
        before.remove()
        after.remove()


# --------------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is meant for train.py."""
    parser = OneLineParser(
        description="Train and compare bridges; all other flags are train.py's.",
    )
    add = parser.add_argument
    add("racers", type=racer_list, help="with commas, before all flags: mot,lap:stride=1")
    longest = "how long the first of them trains; all see as many pictures"
    add("--minutes", type=positive(float), default=12, help=longest)
    add("--seeds", type=seed_list, default=[0], help="with commas")
    add("--out", default="runs/race", help="folder for the runs, the table and the picture")
    evaluate.add_score_flags(parser)
    args, more = parser.parse_known_args(argv)
    args.trust_remote_code = "--trust-remote-code" in more
    return args, ["--device", args.device, "--dtype", args.dtype, *more]


def racer_list(text: str) -> list[str]:
    """argparse type: racers with commas, each once."""
    return list(dict.fromkeys(text.split(",")))


def seed_list(text: str) -> list[int]:
    """argparse type: seeds with commas, each once."""
    return list(dict.fromkeys(seed_number(part) for part in text.split(",")))


def main(argv: list[str] | None = None) -> None:
    args, flags = parse_args(argv)
    race(args, flags)


if __name__ == "__main__":
    one_line_errors(main)
