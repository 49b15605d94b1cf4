"""A run that is killed, stopped, or out of room goes on to the end that it would have had, bit for
bit; and no two of them write into one folder.

The commands are real processes (tests/forks.py): killed by the system, at moments that are random
but for the seed. More of them, and before every change of a file:

    KILLS=20 CHANGES= pytest tests/test_nothing_lost.py -k killed -rP
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forks import Child, Forks
from PIL import Image
from safetensors.torch import load_file
from test_cli import refusal

import train
from checkpoint import KEPT, STATE, pick_checkpoint, step_of_run
from cli import STOPS
from conftest import TINY_RUN
from weights import read_safetensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
]
WEIGHTS = "model.safetensors"
BESIDE = f"tmp-{STATE}"  # is there while a checkpoint is written
RESUME = ["train.py", "--resume", "--out", "run"]
SMALL = [*TINY_RUN, "--patcher", "linear", "--patch", "8", "--batch-size", "4"]


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture
def new(llm_folder):
    """The command of a run of some 20 ms a step, into run/ of where it is started."""
    small = ["--llm", llm_folder("qwen2"), "--out", "run", *SMALL]
    return ["train.py", *small, "--sample-every", "1000"]


def place_for(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir()
    return place


def left_alone(forks: Forks, folder: Path, *words) -> Path:
    """A run that nothing happens to -> its folder."""
    place = place_for(folder, "alone")
    child = forks.run(*words, place=place)
    assert child.status == 0, child.errors
    return place / "run"


def until(happened, child: Child) -> None:
    """Wait for it, or for the end of the child."""
    while not happened() and not child.ended(0.002):
        pass


def mark(path: Path) -> tuple | None:
    """Tells a file or a folder from another one of that name, and from none."""
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def lines_of(run: Path) -> list[dict]:
    """metrics.jsonl, without what a clock says and where the run went on."""
    lines = []
    for text in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        line = json.loads(text)
        for name in ("images_per_second", "llm_share", "data_share", "resumed_at"):
            del line[name]
        lines.append(line)
    return lines


def check_equal(run: Path, alone: Path) -> None:
    """Every tensor to the bit, and what is stored beside it; every line of metrics.jsonl, every
    grid; and nothing else in the folder."""
    assert sorted(path.name for path in run.iterdir()) == sorted(p.name for p in alone.iterdir())
    for name in (STATE, WEIGHTS):
        ours, tensors = read_safetensors(run / name)
        theirs, expected = read_safetensors(alone / name)
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert tensor.isfinite().all() and torch.equal(tensor, expected[key]), key
        assert without_resume(ours) == without_resume(theirs)
    assert lines_of(run) == lines_of(alone)
    for grid in alone.glob("samples-*.png"):
        assert (run / grid.name).read_bytes() == grid.read_bytes()


def without_resume(metadata: dict) -> dict:
    args = json.loads(metadata.get("args", "{}"))
    args.pop("resume", None)
    return metadata | {"args": args}


def check_whole(run: Path) -> None:
    """Each file that is there can be read to its end."""
    for path in (run / STATE, run / WEIGHTS):
        assert not path.exists() or load_file(path)
    for path in run.glob("samples-*.png"):
        Image.open(path).load()


# -------------------------------------------------------------------------------------------------
# SIGKILL

KILLS = int(os.environ.get("KILLS", 1))  # of each bridge but mot, which has 20
LARGER = ["--width", "64", "--depth", "6"]  # beside which a connector has its place
BRIDGES = {
    "mot": ("qwen2", ["--patcher", "unet", "--patch", "4", "--depth", "1"], 20),
    "dense": ("deep", LARGER, KILLS),
    "last": ("qwen2", [], KILLS),
    "kv": ("qwen2", [], KILLS),
    "hsi": ("qwen2", [], KILLS),
    "lap": ("deep", LARGER, KILLS),
    "metaqueries:queries=4": ("qwen2", [], KILLS),
    "mirror": ("llama", [], KILLS),
}


def flags_of(bridge: str, llm_folder) -> tuple[list, int]:
    kind, more, kills = BRIDGES[bridge]
    size = [*SMALL, *more]
    if bridge == "mirror":  # it has the LLM's size
        for flag in ("--width", "--depth"):
            del size[size.index(flag) : size.index(flag) + 2]
    steps = ["--steps", 2 * kills + 4, "--save-every", "1", "--sample-every", "1000"]
    return ["--llm", llm_folder(kind), "--bridge", bridge, *size, *steps, "--out", "run"], kills


@pytest.mark.parametrize("bridge", BRIDGES)
def test_killed_at_random_moments(bridge, forks, llm_folder, tmp_path):
    """Half of them while it saves, or a moment after; the others in its start or its first step."""
    flags, kills = flags_of(bridge, llm_folder)
    new = ["train.py", *flags]
    alone = left_alone(forks, tmp_path, *new)
    place = place_for(tmp_path, "killed")
    run = place / "run"
    chance = random.Random(bridge)
    first_save = 1.0  # seconds that it takes until then
    cut_saves = 0
    for kill in range(kills):
        before = step_of_run(str(run))
        state = mark(run / STATE)
        left = mark(run / BESIDE)  # by the kill before
        child = forks.start(*(RESUME if before else new), place=place)
        started = time.monotonic()
        if kill % 2 == 0:
            until(lambda: mark(run / BESIDE) not in (left, None), child)
            first_save = time.monotonic() - started
            time.sleep(chance.uniform(0, 0.02))
        else:
            moment = started + chance.uniform(0, 1.2 * first_save)
            until(lambda: time.monotonic() > moment or mark(run / STATE) != state, child)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, f"it ended before its kill: {child.errors}"
        cut_saves += mark(run / BESIDE) not in (left, None)
        if before and "data shapes" in child.said:
            assert f"resumed at step {before}\n" in child.said
        assert (step_of_run(str(run)) or 0) >= (before or 0)
        check_whole(run)
    child = forks.run(*(RESUME if step_of_run(str(run)) else new), place=place)
    assert child.status == 0, child.errors
    check_equal(run, alone)
    print(f"{bridge}: {cut_saves} of {kills} kills cut a save")
    assert cut_saves >= kills // 5


def test_killed_at_every_change_of_a_file(forks, new, tmp_path):
    """Each rename of the last save, and what comes after it: killed right before it, the run goes
    on to the same end. With --keep, which does most of them."""
    kinds = os.environ.get("CHANGES", "os.rename")  # "": all of forks.CHANGES
    flags = ["--steps", "3", "--save-every", "1", "--keep", "1"]
    alone = left_alone(forks, tmp_path, *new, *flags)
    begun = place_for(tmp_path, "begun")
    last = ["os.rename", "tmp-step-000002", 1]  # with which the third save begins
    assert forks.run(*new, *flags, place=begun, killed_at=last).status == -signal.SIGKILL
    assert step_of_run(str(begun / "run")) == 2
    cut = 0
    while True:
        place = shutil.copytree(begun, tmp_path / f"cut-{cut}")
        status = forks.run(*RESUME, place=place, killed_at=[kinds, "run/", cut + 1]).status
        if status == 0:
            break
        assert status == -signal.SIGKILL
        check_whole(place / "run")
        again = forks.run(*RESUME, place=place)
        done = "stands at step 3 of 3: nothing left to do" in again.errors
        assert again.status == (2 if done else 0), again.errors
        check_equal(place / "run", alone)
        assert load_file(place / "run" / "step-000002" / WEIGHTS)
        cut += 1
    print(f"killed before {cut} changes")
    assert cut >= 7


def test_a_grid_that_was_cut_is_drawn(forks, new, tmp_path):
    """Killed while it draws, after the checkpoint of that step, in between and at the end."""
    flags = ["--steps", "4", "--save-every", "2", "--sample-every", "2"]
    alone = left_alone(forks, tmp_path, *new, *flags)
    place = place_for(tmp_path, "killed")
    words = [*new, *flags]
    for step, grid in ((2, 1), (4, 2)):
        child = forks.run(*words, place=place, killed_at=["os.rename", "tmp-samples", grid])
        assert child.status == -signal.SIGKILL
        assert step_of_run(str(place / "run")) == step
        words = RESUME
    child = forks.run(*RESUME, place=place)
    assert child.status == 0 and "samples-000004.png was cut, and is there now" in child.said
    check_equal(place / "run", alone)
    child = forks.run(*RESUME, place=place)
    assert child.status == 2 and "nothing left to do" in child.errors


# -------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM


def check_stopped(child: Child, number: int, command: str = "train.py") -> None:
    assert child.wait() == 128 + number, child.errors
    assert child.errors.splitlines()[-1] == f"{command}: stopped"
    assert "Traceback" not in child.errors and child.errors.count("stopped") == 1


def no_leftovers(place: Path) -> bool:
    return not list(place.rglob("tmp-*"))


def test_stopped_at_random_moments(forks, new, tmp_path):
    """What was done is saved, with a line in metrics.jsonl of the steps since the last one. The
    run that goes on replaces it by the line of the whole interval: in the end no step is missing
    there, and none counted twice; the LLM's loss among them."""
    flags = ["--describe", "0.25", "--steps", "60", "--save-every", "1000", "--sample-every", "25"]
    started = time.monotonic()
    alone = left_alone(forks, tmp_path, *new, *flags)
    seconds = time.monotonic() - started
    assert [line["step"] for line in lines_of(alone)] == [50, 60]
    place = place_for(tmp_path, "stopped")
    run = place / "run"
    chance = random.Random(0)
    words = [*new, *flags]
    before = 0
    for stop in range(5):
        number = STOPS[stop % 2]
        child = forks.start(*words, place=place)
        until(lambda: "step" in child.errors, child)  # its bar
        time.sleep(chance.uniform(0, 0.1 * seconds))
        child.send(number)
        if stop > 2:  # an impatient user
            child.send(number)
        if child.wait() == 0:
            break  # it was faster this time
        check_stopped(child, number)
        step = step_of_run(str(run))
        if step is None:
            continue
        words = RESUME
        assert child.said.splitlines()[-1].startswith(f"saved at step {step} of 60: --resume")
        assert before <= step < 60 and no_leftovers(run)
        lines = lines_of(run)
        expected = [50] if step > 50 else []
        assert [line["step"] for line in lines] == [*expected, step]
        before = step
    else:
        child = forks.run(*RESUME, place=place)
    assert before > 0 and child.status == 0, child.errors
    check_equal(run, alone)


def test_stopped_within_a_step(forks, new, tmp_path):
    """It saves at every step: what the folder said when the signal was sent is the step before
    the last, or the one before that, if a save was just ending."""
    place = place_for(tmp_path, "stopped")
    words = [*new, "--steps", "1000", "--save-every", "1"]
    for number in STOPS:
        child = forks.start(*words, place=place)
        before = step_of_run(str(place / "run")) or 0
        until(lambda: (step_of_run(str(place / "run")) or 0) > before + 2, child)
        told = step_of_run(str(place / "run"))
        child.send(number)
        check_stopped(child, number)
        assert told <= step_of_run(str(place / "run")) <= told + 2
        words = RESUME


def test_stopped_while_it_starts(forks, new, tmp_path):
    """Before the first step: one line, nothing half-written; and the same command can begin
    again."""
    place = place_for(tmp_path, "stopped")
    words = [*new, "--steps", "1000"]
    started = time.monotonic()
    child = forks.start(*words, place=place_for(tmp_path, "timed"))
    until(lambda: "step" in child.errors, child)
    seconds = time.monotonic() - started
    child.send(signal.SIGKILL)
    child.wait()
    chance = random.Random(0)
    within = 0
    for stop in range(10):
        child = forks.start(*words, place=place)
        time.sleep(chance.uniform(0, 0.8 * seconds))
        child.send(STOPS[stop % 2])
        check_stopped(child, STOPS[stop % 2])
        if (place / "run" / STATE).exists():
            shutil.rmtree(place / "run")  # it was faster this time
            continue
        within += child.errors == "train.py: stopped\n"
        assert no_leftovers(place)
        assert {path.name for path in place.glob("run/*")} <= {".lock", "metrics.jsonl"}
    assert within >= 5
    assert forks.run(*new, "--steps", "1", place=place).status == 0


def test_stopped_while_it_draws(forks, new, tmp_path):
    """sample.py and evaluate.py: one line, and whole files alone."""
    run = left_alone(forks, tmp_path, *new, "--steps", "2")
    drawing = ["--prompt", "a red circle", "--n", "9", "--steps", "30", "--out", "drawn"]
    scoring = ["--suite", "parrot,ascii", "--limit", "2", "--steps", "8", "--out", "scored"]
    chance = random.Random(0)
    for command, flags in (("sample.py", drawing), ("evaluate.py", scoring)):
        words = [command, "--ckpt", run, "--device", "cpu", *flags]
        place = place_for(tmp_path, command)
        started = time.monotonic()
        assert forks.run(*words, place=place).status == 0
        seconds = time.monotonic() - started
        for stop in range(4):
            shutil.rmtree(place)
            place.mkdir()
            child = forks.start(*words, place=place)
            time.sleep(chance.uniform(0, 0.8 * seconds))
            child.send(STOPS[stop % 2])
            if child.wait() == 0:
                continue  # it was faster this time
            check_stopped(child, STOPS[stop % 2], command)
            assert len(child.errors.splitlines()) == 1, child.errors
            assert no_leftovers(place)
            for path in place.glob("*/*.png"):
                Image.open(path).load()
            for path in place.glob("*/*.json"):
                json.loads(path.read_text("utf-8"))


def test_an_interactive_session_ends_with_sigterm(forks, new, tmp_path):
    """Ctrl-C stops a drawing alone."""
    run = left_alone(forks, tmp_path, *new, "--steps", "1")
    words = ["sample.py", "--ckpt", run, "--device", "cpu", "--steps", "30", "--interactive"]
    child = forks.start(*words, place=tmp_path, typed="a star\n" * 1000)
    drawn = tmp_path / "samples"
    until(lambda: len(list(drawn.glob("*.png"))) > 1, child)
    child.send(signal.SIGINT)
    until(lambda: "stopped; /quit ends" in child.said, child)
    before = len(list(drawn.glob("*.png")))
    until(lambda: len(list(drawn.glob("*.png"))) > before, child)
    child.send(signal.SIGTERM)
    check_stopped(child, signal.SIGTERM, "sample.py")
    assert no_leftovers(tmp_path)


# -------------------------------------------------------------------------------------------------
# a full disk


@pytest.mark.parametrize("file", [STATE, WEIGHTS, "metrics.jsonl"])
def test_a_full_disk(file, forks, new, tmp_path):
    """A real error of the system, in the middle of that file: the checkpoint of before stays, one
    line says so, and with room again the run goes on to the same end."""
    flags = ["--steps", "8", "--save-every", "2"]
    alone = left_alone(forks, tmp_path, *new, *flags)
    place = place_for(tmp_path, "full")
    run = place / "run"
    forks.run(*new, *flags, place=place, killed_at=["os.rename", f"{BESIDE}/{STATE}", 3])
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.is_file()}
    sizes = {path.name: len(content) for path, content in before.items()}
    if file == WEIGHTS:
        fate = {"weights_full": sizes[WEIGHTS] // 2}
    elif file == STATE:
        fate = {"full": sizes[STATE] // 2}
    else:
        fate = {"full": len("\n".join((run / file).read_text().split("\n")[:2])) + 100}
    child = forks.run(*RESUME, place=place, **fate)
    told = child.errors.strip().splitlines()[-1]
    assert child.status == 2 and "too large" in told, child.errors
    assert told.endswith("; --resume --out run goes on from step 4"), told
    assert ("metrics.jsonl" if file == "metrics.jsonl" else STATE) in told
    assert step_of_run(str(run)) == 4 and no_leftovers(run)
    for path in before:
        if path.name != "metrics.jsonl":
            assert path.read_bytes() == before[path], path.name
    child = forks.run(*RESUME, place=place)
    assert child.status == 0, child.errors
    check_equal(run, alone)


def test_a_file_that_cannot_take_its_place(forks, new, tmp_path):
    """The state has moved already, and the weights cannot (as on Windows, where somebody reads
    them): they wait beside, and take their place when the run goes on."""
    flags = ["--steps", "4", "--save-every", "2"]
    alone = left_alone(forks, tmp_path, *new, *flags)
    place = place_for(tmp_path, "taken")
    run = place / "run"
    (run / WEIGHTS / "in-the-way").mkdir(parents=True)
    forks.run(*new, *flags, place=place)
    assert not run.joinpath(STATE).exists(), "refused: there is a model.safetensors"
    shutil.rmtree(run / WEIGHTS)
    forks.run(*new, *flags, place=place, killed_at=["os.rename", f"{BESIDE}/{STATE}", 2])
    (run / WEIGHTS).unlink()
    (run / WEIGHTS / "in-the-way").mkdir(parents=True)
    child = forks.run(*RESUME, place=place)
    assert child.status == 2 and f"{STATE} could not be written: " in child.errors
    assert step_of_run(str(run)) == 4
    shutil.rmtree(run / WEIGHTS)
    child = forks.run(*RESUME, place=place)
    assert child.status == 0, child.errors
    check_equal(run, alone)


# -------------------------------------------------------------------------------------------------
# --keep


def kept_in(run: Path) -> dict[str, dict]:
    """Name of each folder of kept weights -> its tensors."""
    return {path.name: load_file(path / WEIGHTS) for path in run.glob("step-*") if path.is_dir()}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_last_checkpoints_are_kept(forks, new, tmp_path):
    flags = ["--steps", "10", "--save-every", "2"]
    run = left_alone(forks, tmp_path, *new, *flags, "--keep", "2")
    kept = kept_in(run)
    assert set(kept) == {"step-000006", "step-000008"}
    assert {path.name for path in (run / "step-000006").iterdir()} == {WEIGHTS, "config.json", KEPT}
    assert not same(kept["step-000006"], kept["step-000008"])
    assert not same(kept["step-000008"], load_file(run / WEIGHTS))

    # they are what a run without --keep has at that step
    place = place_for(tmp_path, "cut")
    forks.run(*new, *flags, place=place, killed_at=["os.rename", f"{BESIDE}/{STATE}", 4])
    assert same(kept["step-000006"], load_file(place / "run" / WEIGHTS))

    # and to be drawn with
    words = ["sample.py", "--ckpt", run / "step-000006", "--device", "cpu", "--steps", "2"]
    child = forks.run(*words, "--prompt", "a star", "--out", "star.png", place=place)
    assert child.status == 0, child.errors
    Image.open(place / "star.png").load()


def test_keep_may_change_and_removes_nothing_of_the_users(forks, new, tmp_path, monkeypatch):
    flags = ["--save-every", "1", "--steps"]
    place = place_for(tmp_path, "runs")
    run = place / "run"
    (run / "step-000002").mkdir(parents=True)  # the user's own, of before
    (run / "step-000002" / "notes.txt").write_text("mine")
    (run / "README.md").write_text("mine too")
    assert forks.run(*new, *flags, "6", "--keep", "4", place=place).status == 0
    own = {"step-000001", "step-000003", "step-000004", "step-000005"}
    assert {path.name for path in run.glob("step-*")} == own | {"step-000002"}
    assert [path.name for path in (run / "step-000002").iterdir()] == ["notes.txt"]

    # fewer: but what something was put into stays
    (run / "step-000003" / "evaluate.json").write_text("{}")
    assert forks.run(*RESUME, "--steps", "7", "--keep", "2", place=place).status == 0
    names = {path.name for path in run.glob("step-*")}
    assert names == {"step-000002", "step-000003", "step-000005", "step-000006"}

    # none: nothing is kept, and nothing removed
    assert forks.run(*RESUME, "--steps", "8", "--keep", "0", place=place).status == 0
    assert {path.name for path in run.glob("step-*")} == names
    assert (run / "README.md").read_text() == "mine too" and no_leftovers(run)

    # the newest run is the run
    monkeypatch.chdir(tmp_path)
    assert pick_checkpoint(None) == (str(Path("runs", "run")), "the newest run")

    # without its files, it is no place for another run
    for name in (STATE, WEIGHTS, "config.json"):
        (run / name).unlink()
    child = forks.run(*new, *flags, "2", place=place)
    assert child.status == 2 and f"/{KEPT}, which a run would overwrite" in child.errors


# -------------------------------------------------------------------------------------------------
# two runs in one folder


def test_two_that_start_at_the_same_moment(forks, new, tmp_path):
    """One trains, to the end that it would have had, and the other is refused in one line."""
    words = [*new, "--steps", "10", "--save-every", "1"]
    alone = left_alone(forks, tmp_path, *words)
    for pair in range(3):
        place = place_for(tmp_path, f"both-{pair}")
        children = [forks.start(*words, place=place) for _ in range(2)]
        statuses = [child.wait() for child in children]
        assert sorted(statuses) == [0, 2], [child.errors for child in children]
        told = children[statuses.index(2)].errors.splitlines()
        assert len(told) == 1
        assert "another process trains there" in told[0] or "already holds a run" in told[0]
        check_equal(place / "run", alone)


def test_no_resuming_while_the_first_one_trains(forks, new, tmp_path):
    """And once it is killed, its lock is gone with it."""
    words = [*new, "--steps", "40", "--save-every", "1"]
    alone = left_alone(forks, tmp_path, *words)
    place = place_for(tmp_path, "both")
    first = forks.start(*words, place=place)
    until((place / "run" / STATE).exists, first)
    second = forks.run(*RESUME, place=place)
    assert not first.ended()
    assert second.status == 2 and second.errors.startswith("train.py: run: another process trains")
    first.send(signal.SIGKILL)
    first.wait()
    assert forks.run(*RESUME, place=place).status == 0
    check_equal(place / "run", alone)


def test_a_resume_that_waited_is_not_behind(tiny_run, tmp_path, capsys):
    """Another process has gone on with the run since this one has read it."""
    run = train.prepare(*train.settings([*tiny_run, "--steps", "3"]))
    train.train(run, until=1)
    resume = ["--resume", "--out", str(tmp_path / "run")]
    slow = train.prepare(*train.settings(resume))
    train.main(resume)
    with pytest.raises(ValueError, match="another process has trained there meanwhile"):
        train.train(slow)
    assert "nothing left to do" in refusal(capsys, train.main, *resume)
