"""Curves of runs: whatever state a run's folder is in, the sheet is drawn or one line says why not;
scores on the way gather by themselves."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from extras import maps, run_logs
from extras.race_table import race_curves

pytest.importorskip("matplotlib", reason="pip install -r requirements-maps.txt")
ROOT = Path(__file__).parent.parent
BATCH = 64


def log_line(i: int, **others) -> dict:
    """The i-th line of a run's metrics.jsonl, of one that was never resumed."""
    loss = 0.5 / i
    return {
        "step": 50 * i,
        "loss": loss,
        "loss_by_t": [loss, loss, loss, 2 * loss, 5 * loss],
        "images_per_second": 100.0,
        "images": 50 * i * BATCH,
        "resumed_at": 0,
    } | others


def make_run(folder: Path, n: int = 10, **others) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(log_line(i, **others)) for i in range(1, n + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read(folder: Path) -> run_logs.RunLog:
    return run_logs.read_run(folder, folder.name)


def colors_of(path: Path) -> set[tuple[int, int, int]]:
    picture = np.asarray(Image.open(path).convert("RGB"))
    return set(map(tuple, np.unique(picture.reshape(-1, 3), axis=0).tolist()))


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_one_run_and_several(tmp_path, monkeypatch, capsys):
    """Each run has a colour of its own, and its name is as long as it must be."""
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / place / "shapes") for place in ("a", "b")]
    maps.main([str(runs[0])])
    assert rgb(maps.COLORS[0]) in colors_of(runs[0] / "curves.png")
    assert rgb(maps.COLORS[1]) not in colors_of(runs[0] / "curves.png")

    runs += [make_run(tmp_path / f"run{i}") for i in range(10)]
    maps.main([*map(str, runs), str(runs[0])])
    assert set(map(rgb, maps.COLORS)) <= colors_of(tmp_path / "curves.png")
    lines = capsys.readouterr().out.splitlines()[-13:]
    names = [line.split()[0] for line in lines]
    assert names == ["a/shapes", "b/shapes", *[f"run{i}" for i in range(10)], "curves.png"]
    assert lines[0].split()[1:4] == ["500", f"{500 * BATCH:,}", "0.0500"]
    assert len({maps.style(i) for i in range(12)}) == 12


def test_logs_as_a_kill_a_full_disk_or_a_young_run_leave_them(tmp_path):
    """One line, a cut one, NaN, bins of t without a picture, strange names."""
    young = make_run(tmp_path / "_young $x$ \u65e5", 1)
    cut = make_run(tmp_path / "cut")
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\x00\n{"step": "7"}\n{"step": 550, "lo')
    broken = make_run(tmp_path / "broken", 3, loss=math.nan, images_per_second=None)
    empty_bin = make_run(tmp_path / "bin", 3, loss_by_t=[0.1, 0, 0.2])
    assert read(cut).steps == [50 * i for i in range(1, 11)]
    assert np.isnan(read(empty_bin).loss_by_t[:, 1]).all()
    out = tmp_path / "sheets" / "all.PNG"
    maps.main([*map(str, [young, cut, broken, empty_bin]), "--out", str(out)])
    assert {rgb(maps.COLORS[i]) for i in range(4)} <= colors_of(out)
    maps.main([str(broken)])


def test_what_is_no_run_is_one_line_with_status_2(tmp_path):
    """As a terminal sees it. Nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    run = make_run(tmp_path / "run")
    (tmp_path / "taken.png").mkdir()
    hide = "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None; "
    main = "import cli; cli.start(); from extras import maps; cli.one_line_errors(maps.main)"
    for code, words, told in (
        (main, [tmp_path], "expected the folder of a run, with metrics.jsonl in it"),
        (main, [run, tmp_path / "empty"], "holds no line of a training run"),
        (main, [run, "--out", tmp_path / "x.pdf"], "expected the name of a .png file"),
        (main, [run, "--out", tmp_path / "taken.png"], "expected the name of a .png file"),
        (hide + main, [run], "pip install -r requirements-maps.txt"),
    ):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert told in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert not list(tmp_path.rglob("curves.png"))


def test_the_speed_is_that_of_each_interval(tmp_path):
    """A line holds the mean since the run began or was resumed."""
    seconds = [10.0, 5.0, 20.0, 8.0]  # of each 50 steps; resumed after the second
    lines = []
    for i, resumed_at, spent in ((1, 0, 10), (2, 0, 15), (3, 100, 20), (4, 100, 28)):
        mean = (50 * i - resumed_at) * BATCH / spent
        lines.append(log_line(i, resumed_at=resumed_at, images_per_second=mean))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = read(folder)
    assert np.allclose(log.speed, 50 * BATCH / np.array(seconds))
    assert log.resumed == [100 * BATCH]
    assert np.array_equal(log.images, BATCH * np.array([50, 100, 150, 200]))


def test_the_line_is_the_median_of_its_neighbours():
    values = np.arange(60.0)
    assert np.array_equal(maps.running_median(values), values), "what falls evenly stays"
    values[30] = math.nan
    values[10] = 1000
    smooth = maps.running_median(values)
    assert np.isfinite(smooth).all() and smooth.max() < 60


@pytest.mark.slow
def test_a_run_and_its_scores_on_the_way(tiny_run, tmp_path):
    """Trained, scored, resumed, scored again: two points of one curve, whatever else was scored."""
    folder = tmp_path / "run"
    score = ["--ckpt", str(folder), "--suite", "geneval", "--device", "cpu", "--dtype", "float32"]
    few = ["--limit", "1", "--steps", "1"]
    train.main([*tiny_run, "--steps", "2"])
    evaluate.main([*score, *few])
    train.main(["--resume", "--out", str(folder), "--steps", "4"])
    evaluate.main([*score, *few, "--seed", "1"])
    evaluate.main([*score, *few])
    scores = run_logs.read_run(folder, "run").scores
    assert list(scores) == ["geneval"]
    assert [images for images, _ in scores["geneval"]] == [2 * 8, 4 * 8]
    last = json.loads((folder / "partial" / "evaluate.json").read_text("utf-8"))
    assert scores["geneval"][-1][1] == last["geneval"]["mean"]["score"]

    log = read(folder)
    assert log.resumed == [2 * 8] and (log.speed > 0).all()
    assert np.array_equal(log.images, [2 * 8, 4 * 8])
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    older = []
    for line in map(json.loads, lines):
        del line["images"], line["resumed_at"]
        older.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(older))
    assert np.array_equal(read(folder).images, log.images), "the run's state knows the batch size"
    (folder / "train_state.safetensors").unlink()
    with pytest.raises(ValueError, match="expected train_state.safetensors"):
        read(folder)


def test_scores_of_a_race_are_a_curve_and_others_a_point(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "partial").mkdir()
    entry = {"geneval": {"mean": {"score": 0.5}}, "run": "run", "made_for": {"mean": 1}}
    (folder / "partial" / "evaluate.json").write_text(json.dumps(entry))
    assert read(folder).scores == {"geneval": [(500 * BATCH, 0.5)]}
    curve = [{"images": 8, "llm_share": 0.1, "geneval": 0.0}, {"images": 16, "geneval": 0.25}]
    (folder / "race.json").write_text(json.dumps({"curve": curve}))
    assert read(folder).scores == {"geneval": [(8, 0.0), (16, 0.25)]}
    maps.main([str(folder)])


def test_the_races_curves(tmp_path):
    """Those of the committed race: a colour for each racer."""
    table = json.loads((ROOT / "assets" / "results" / "race" / "table.json").read_text("utf-8"))
    path = tmp_path / "curves.png"
    race_curves(table, 1400).save(path)
    assert Image.open(path).width == 1400
    assert {rgb(color) for color in maps.COLORS[: len(table)]} <= colors_of(path)
