"""Several runs that differ by their seed alone, as one: scores over scenes, languages and seeds.

    for n in 0 1 2; do python train.py --seed $n --out runs/mine-$n; done
    for n in 0 1 2; do python evaluate.py --ckpt runs/mine-$n; done        # and of the control
    python -m extras.seeds runs/mine-0 runs/mine-1 runs/mine-2 --versus runs/control-0 ...

Reads what evaluate.py has left in each run's folder, or such evaluate.json files. The first
of the one is compared with the first of the other, picture by picture, and so on: they should have
the same seeds.
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.seeds")
    import cli

    cli.start()

from pathlib import Path

from cli import OneLineParser, make_folder, one_line_errors
from evaluate import FILES, read_results, write_json
from extras.intervals import Tallies, difference, mean_of_rows
from extras.suites import read_suite
from extras.tables import LEFT_OUT, signed


def read_scores(places: list[str]) -> list[dict]:
    """What evaluate.py says of each run. ValueError for one that has not been evaluated."""
    scores = []
    for place in places:
        path = Path(place)
        path = path / FILES[0] if path.is_dir() else path
        found = read_results(path)
        if not found:
            raise ValueError(f"{place} has no {FILES[0]}: python evaluate.py --ckpt {place}")
        scores.append(found)
    return scores


def suites_of(scores: list[dict]) -> list[str]:
    """The suites of rows that all runs have, scored with the same settings; held-out has none.
    ValueError if there is no such suite."""
    suites = []
    for name, first in scores[0].items():
        if isinstance(first, dict) and first.keys() >= {"settings", "rows"}:
            if all(same_way(run.get(name, {}), first) for run in scores):
                suites.append(name)
    if not suites:
        raise ValueError("these runs have no suite in common that was scored in the same way")
    return suites


def same_way(one: dict, other: dict) -> bool:
    """Whether a suite was scored with the same settings on the same rows, and kept its verdicts."""
    if one.get("settings") != other["settings"] or one["rows"].keys() != other["rows"].keys():
        return False
    return all("right" in tally for tally in one["rows"].values())


# -------------------------------------------------------------------------------------------------
# tables


def tables_of(suite: str, scores: list[dict]) -> dict[str, Tallies]:
    """What has a score -> run -> row -> tally: each row, their mean; of languages, one and two
    objects."""
    runs = {i: run[suite]["rows"] for i, run in enumerate(scores)}
    tables = {}
    for row in runs[0]:
        tables[row] = {i: {row: rows[row]} for i, rows in runs.items()}
    counted = [row for row in runs[0] if row not in LEFT_OUT.get(suite, ())] or list(runs[0])
    if suite == "languages":
        things = {prompt.scene_id: len(prompt.scene.groups) for prompt in read_suite(suite)}
        for name, count in (("one object", 1), ("two objects", 2)):
            table = {}
            for i, rows in runs.items():
                table[i] = {row: only(rows[row], things, count) for row in counted}
            if all(tally["n"] for rows in table.values() for tally in rows.values()):
                tables[name] = table
    tables["mean"] = {i: {row: rows[row] for row in counted} for i, rows in runs.items()}
    return tables


def only(tally: dict, things: dict[str, int], count: int) -> dict:
    """Of a row the pictures of scenes with so many things."""
    right = ""
    scenes = []
    for verdict, scene in zip(tally["right"], tally["scenes"].split()):
        if things.get(scene) == count:
            right += verdict
            scenes.append(scene)
    share = right.count("1") / len(right) if right else 0.0
    return {
        "n": len(right),
        "score": share,
        "right": right,
        "scenes": " ".join(scenes),
        "wrong": {},
    }


def summarize(suite: str, scores: list[dict]) -> dict:
    """Of each row and mean the score over all runs, its interval, that of each run, and what would
    be right by chance. -> JSON"""
    summary = {}
    for name, runs in tables_of(suite, scores).items():
        drawn = suite in LEFT_OUT and len(runs[0]) > 1
        entry = mean_of_rows(runs, drawn)
        entry["of each run"] = [mean_of_rows({0: rows}, drawn)["score"] for rows in runs.values()]
        by_chance = [tally.get("chance") for rows in runs.values() for tally in rows.values()]
        if None not in by_chance:
            entry["chance"] = sum(by_chance) / len(by_chance)
        summary[name] = entry
    return summary


def compare(suite: str, ours: list[dict], theirs: list[dict]) -> dict:
    """The paired difference in each row and mean. -> JSON"""
    first = tables_of(suite, ours)
    second = tables_of(suite, theirs)
    differences = {}
    for name, runs in first.items():
        drawn = suite in LEFT_OUT and len(runs[0]) > 1
        differences[name] = difference(runs, second[name], drawn)
    return differences


def print_suite(suite: str, result: dict) -> None:
    print(suite)
    for name, entry in result["runs"].items():
        low, high = entry["interval"]
        each = " ".join(f"{share:.2f}" for share in entry["of each run"])
        line = f"  {name:24}{entry['score']:.2f}  {low:.2f} to {high:.2f}  [{each}]"
        if "versus" in result:
            other = result["versus"][name]
            low, high = other["interval"]
            line += f"   {other['score']:.2f}  {low:.2f} to {high:.2f}"
            paired = result["difference"][name]
            line += f"   {signed(paired)}" if paired else ""
        by_chance = entry.get("chance")
        line += "" if by_chance is None else f"   chance {by_chance:.2f}"
        print(line)


# -------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Runs of several seeds as one score.")
    parser.add_argument("runs", nargs="+", help="folders that evaluate.py has scored")
    parser.add_argument("--versus", nargs="+", metavar="RUN", help="as many of the control")
    parser.add_argument("--out", default="evaluation", help="a folder for seeds.json")
    args = parser.parse_args(argv)
    if args.versus and len(args.versus) != len(args.runs):
        raise ValueError(f"--versus: expected {len(args.runs)} runs, as many as before it")
    ours = read_scores(args.runs)
    theirs = read_scores(args.versus or [])
    results = {"runs": args.runs, "versus": args.versus}
    for suite in suites_of(ours + theirs):
        result = {"runs": summarize(suite, ours)}
        if theirs:
            result["versus"] = summarize(suite, theirs)
            result["difference"] = compare(suite, ours, theirs)
        print_suite(suite, result)
        results[suite] = result
    path = make_folder(args.out) / "seeds.json"
    write_json(path, results)
    print(path)


if __name__ == "__main__":
    one_line_errors(main)
