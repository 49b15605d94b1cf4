"""Does the LLM's knowledge reach the picture? Exact scores on prompts that training never sees.

    python evaluate.py --ckpt runs/shapes           # every suite: a table, a JSON, a picture each
    python evaluate.py --ckpt runs/shapes --suite languages,colors --n 4
    python evaluate.py --ckpt runs/shapes --versus runs/shapes-random-llm       # side by side

No network judges: extras/judge.py reads every picture by geometry, and extras/grades.py holds it
against its prompt. These stand in assets/prompts/SUITE.jsonl, one JSON object a line with row (of
the table), prompt, groups ([count, color or null, shape]), and where it applies relation, or
palette (the exact colour of each group).

Each suite has two halves (--half): what is chosen by its score (layers, guidance, a template, a
budget) is chosen on one, and the other is what a report is about. The same scene is on the same
side in every row, language and suite.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from assemble import llm_as_asked
from checkpoint import SHIPPED, load_expert, pick_checkpoint, step_of_run
from cli import (
    OneLineParser,
    between,
    guidance_form,
    make_folder,
    one_line_errors,
    parse_json,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
    write_text,
    write_whole,
)
from extras.grades import Graded, grade
from extras.suites import (
    HALVES,
    OTHER_SUITES,
    Prompt,
    hashed,
    read_suite,
    settings_of,
    split_rows,
)
from llm import FrozenLLM
from model import ImageExpert
from sample import GUIDANCE, RENOISE, RENOISE_HELP, draw, file_words

SUITES = "geneval unseen languages colors palettes emoji ascii knowledge parrot position".split()
FILES = ("evaluate.json", "versus.json")  # the scores of the run, and of the one beside it


@dataclass
class LoadedRun:
    """name: as it was given. expert and llm: what it trained, and what that reads. step: at which
    it stands, if its folder tells."""

    name: str
    expert: ImageExpert
    llm: FrozenLLM
    step: int | None


def evaluate_suites(
    args: argparse.Namespace, runs: list[LoadedRun]
) -> tuple[dict[str, dict], Graded]:
    """Score, print and picture the suites of one run, or of two side by side.

    -> run -> suite -> scores (JSON), and the grades of the first run's pictures.
    """
    from extras.tables import compare, print_suite, sheet, summarize

    # all prompts first: a row that is not there is refused before anything is drawn
    one = all("one_object" in run.expert.made_for for run in runs)
    asked = {}
    for suite in args.suite:
        prompts = read_suite(suite, args.limit, args.rows, one, args.half)
        asked[suite] = []
        for prompt in prompts:
            asked[suite] += [prompt] * args.n

    results = {}
    for run in runs:
        results[run.name] = {}
    graded = []
    for suite, prompts in asked.items():
        # each picture has a noise of its own, and it is the same one for both runs
        texts = [prompt.text for prompt in prompts]
        seeds = list(range(args.seed, args.seed + len(prompts)))
        drawn = []
        shown = {}
        for run in runs:
            way = {"renoise": args.renoise}
            pictures = draw(run.expert, run.llm, texts, seeds, args.steps, *args.guidance, **way)
            grades = list(map(grade, prompts, pictures))
            drawn.append((run.name, pictures, grades))
            scores = summarize(suite, prompts, grades)
            for row, share in chance(prompts, pictures).items():
                scores["rows"][row]["chance"] = share
            results[run.name][suite] = scores
            shown[run.name] = scores

        # side by side, in numbers and in pictures
        first = drawn[0][2]
        if len(runs) > 1:
            shown[args.ckpt]["difference"] = compare(suite, prompts, first, drawn[1][2])
        print_suite(suite, shown)
        write_whole(args.out / f"evaluate-{suite}.png", sheet(prompts, drawn).save)
        for prompt, its_grade in zip(prompts, first):
            graded.append((suite, prompt, its_grade))
    return results, graded


# --------------------------------------------------------------------------------------------------
# chance


def chance(prompts: list[Prompt], pictures: np.ndarray) -> dict[str, float]:
    """row -> the share that would be right by chance.

    Every picture is held against the next prompt of its row that asks for another scene. A row that
    asks for one scene alone has no chance.
    """
    right: dict[str, list[bool]] = {}
    for i, prompt in enumerate(prompts):
        for other in prompts[i + 1 :] + prompts[:i]:  # the next ones, round and round
            if other.row == prompt.row and other.scene_id != prompt.scene_id:
                passed = grade(other, pictures[i]).reason is None
                right.setdefault(prompt.row, []).append(passed)
                break
    shares = {}
    for row, passed in right.items():
        shares[row] = float(np.mean(passed))
    return shares


# --------------------------------------------------------------------------------------------------
# runs and their results


def open_runs(args: argparse.Namespace, kind: str, suites: list[str]) -> list[LoadedRun]:
    """The run, and the other one beside it; fills in args.suite.

    kind: the data that the suites are for. ValueError if a run is of another, or a suite is not
    among them.
    """
    # the experts first: they are small, and say whether the LLMs are worth loading
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    experts = {args.ckpt: load_expert(args.ckpt, device, vae=args.vae)}
    if args.versus:
        experts[args.versus] = load_expert(args.versus, device, vae=args.vae)
    steps = {name: step_of_run(name) for name in experts}  # now: the run may still go on
    for name, expert in experts.items():
        data = expert.made_for.get("data")
        kinds = expert.made_for.get("mixed", [data])  # of several, their names
        fits = kind in kinds or (kind == "shapes" and data == "edits")
        if not fits and args.suite != "held-out":
            raise ValueError(
                f"{name} was trained on {data}; the suites are {','.join(suites)} for {kind}, and "
                "two runs must be of one kind (for other data: --suite held-out, and extras/)"
            )
    args.suite = args.suite.split(",") if args.suite else list(suites)
    for suite in args.suite:
        if kind == "shapes" and suite in OTHER_SUITES:
            for name, expert in experts.items():
                other_suite(suite)[0](expert, name)
        elif suite not in suites:
            expected = f"for a run on {kind} expected some of {','.join(suites)}"
            raise ValueError(f"--suite {suite}: {expected}")

    # each with an LLM of its own: what it hands over and reads is the run's
    runs = []
    for name, expert in experts.items():
        llm = llm_as_asked(expert, args, device, dtype)
        runs.append(LoadedRun(name, expert, llm, steps[name]))
    return runs


def other_suite(name: str) -> tuple[Callable, Callable]:
    """What refuses a run that has not learned it, and what scores one."""
    if name.startswith("describe"):
        from extras.describing import check_describes, evaluate_describing

        return check_describes, partial(evaluate_describing, name)
    if name == "held-out":
        from extras.held_out import check_held_out, evaluate_held_out

        return check_held_out, evaluate_held_out
    from extras.editing import check_edits, evaluate_edits

    return check_edits, evaluate_edits


def read_results(path: Path) -> dict:
    """The results already in the file, or {}. ValueError if it is no evaluation."""
    try:
        return {} | parse_json(path.read_text("utf-8")) if path.exists() else {}
    except (TypeError, ValueError):
        raise ValueError(
            f"{path} is cut, or no evaluation; move it away, or give another --out"
        ) from None


def save_results(args: argparse.Namespace, runs: list[LoadedRun], results: dict) -> None:
    """Merge each run's scores into its file; other suites' scores there stay."""
    for run, file in zip(runs, FILES):
        entries = {"run": run.name, "made_for": run.expert.made_for}
        for name, scores in results[run.name].items():
            entries[name] = scores
            if name in args.suite:
                entries[name] = scores | {"settings": settings_of(args, name)}
        write_json(args.out / file, read_results(args.out / file) | entries)
    if runs[0].step is not None:
        from extras.run_logs import log_scores

        suites = {suite: results[runs[0].name][suite] for suite in args.suite}
        log_scores(args.out, runs[0].step, suites, settings_of(args) | {"rows": args.rows})
    where = args.out / FILES[0]
    print(
        f"half {args.half}: {where}, and a picture of each suite beside it: "
        "green is right, red wrong"
    )


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------
# the command


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which runs").add_argument
    add("--ckpt", help="a run's folder or a Hub id (default: the newest under runs/, or ours)")
    add("--versus", help="another run, to stand beside it")
    add("--llm", help="where their LLM lies now, if it has moved")
    add("--vae", help="where their autoencoder lies now, if it has moved")
    add("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    add("--rows", help="only these rows of the suite, with commas")
    first = "what the LLM does first, think:40 or rewrite say: see extras/readers.py"
    add("--read", metavar="HOW", help=first)
    own = "the run's own; its partial/ for --rows, --limit or --half choose"
    add("--out", help=f"folder for the JSON and the pictures (default: {own})")


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is drawn").add_argument
    add("--suite", help="which suites, with commas (default: all that are for the run's data)")
    halves = "part of each suite, split by a hash of the scene: choose on one, report the other"
    add("--half", choices=HALVES, default="report", help=halves)
    add("--n", type=positive(int), default=1, help="pictures of each prompt")
    add("--limit", type=positive(int), help="only the first so many prompts of each row")
    add("--steps", type=positive(int), default=24, help="Euler steps")
    add("--renoise", type=between(0, 1), default=RENOISE, help=RENOISE_HELP)
    add("--guidance", type=guidance_form, default=str(GUIDANCE), help="as sample.py takes it")
    noise = "of the noise: picture k of all starts from seed + k"
    add("--seed", type=seed_number, default=0, help=noise)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    arithmetic = "arithmetic of the LLM and the expert"
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help=arithmetic)


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """The newest run and its folder, where they are not named; rows as a list."""
    if args.read:
        from extras.readers import drawing_form

        drawing_form(args.read)  # refused before anything is loaded
    args.ckpt, why_ckpt = pick_checkpoint(args.ckpt)
    print(f"checkpoint {args.ckpt} ({why_ckpt})")
    args.rows = split_rows(args.rows) if args.rows else None
    if args.out is None:
        args.out = "evaluation"
        if Path(args.ckpt).is_dir() and Path(args.ckpt).resolve() != SHIPPED.resolve():
            args.out = args.ckpt
        if args.rows or args.limit or args.half == "choose":
            args.out = Path(args.out) / "partial"
    own = file_words(args.read or "")
    if len(args.read or "") > 60:  # of which file_words has cut the end
        own += f"-{hashed(args.read)}"
    args.out = Path(args.out) / own
    return args


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description="Score a run's pictures.",
    )
    add_run_flags(parser)
    add_score_flags(parser)
    args = fill_in(parser.parse_args(argv))
    runs = open_runs(args, "shapes", SUITES)
    make_folder(args.out)
    for file in FILES:
        read_results(args.out / file)  # refused before the work
    suites = args.suite
    args.suite = [suite for suite in suites if suite in SUITES]
    results, _ = evaluate_suites(args, runs)
    for suite in suites:
        if suite in OTHER_SUITES:
            for name, scores in other_suite(suite)[1](args, runs).items():
                results[name][suite] = scores
    args.suite = suites
    save_results(args, runs, results)


if __name__ == "__main__":
    import evaluate  # under its own name, by which extras/tables.py knows it

    one_line_errors(evaluate.main)
