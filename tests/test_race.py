"""The race: one run of each bridge and seed, wherever it was stopped; the LLM's time is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import refusal

import checkpoint
import evaluate
import train
from extras import race
from extras.race_table import race_table, suite_scores

RESULTS = Path(__file__).parent.parent / "assets" / "results"


def test_the_llms_time_is_counted_whoever_runs_it(tiny_run):
    """The captions' pass, which stops early, and metaqueries' own."""
    args = train.parse_args([*tiny_run, "--bridge", "metaqueries:queries=4"])
    run = train.prepare(args, {}, {})
    with race.stopwatch(run.llm.model.base_model) as clock:
        run.llm.lookup(["a red circle"])
        assert len(clock) == 2
        train.train_step(run, run.expert, ["a red circle"], np.zeros((1, 16, 16, 3), np.uint8))
        assert len(clock) == 4 and sorted(clock) == clock
    run.llm.lookup(["a blue square"])
    assert len(clock) == 4
    with pytest.raises(KeyboardInterrupt), race.stopwatch(run.llm.model.base_model) as clock:
        raise KeyboardInterrupt
    run.llm.lookup(["a green star"])
    assert not clock, "the hooks go whatever happens"


@pytest.mark.slow
def test_the_race_goes_on_where_it_stopped(llm_folder, tmp_path, monkeypatch, capsys):
    """Two bridges: as many pictures for each, each run trained and scored once, wherever the
    command was stopped."""
    place = tmp_path / "race"
    flags = "mot,last:state=2 --seeds 1 --minutes 0.001 --suite geneval,position --limit 1".split()
    flags += "--steps 1 --device cpu --dtype float32 --batch-size 8 --width 64 --depth 3".split()
    flags += ["--llm", str(llm_folder("qwen2")), "--out", str(place)]
    asked = []
    whole = evaluate.evaluate_suites

    def counted(args, loaded):
        asked.append(args.ckpt)
        return whole(args, loaded)

    monkeypatch.setattr(evaluate, "evaluate_suites", counted)
    save = checkpoint.save_run

    def dies(run: train.Run) -> None:
        save(run)
        if run.args.bridge == "last:state=2":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_run", dies)
    with pytest.raises(KeyboardInterrupt):
        race.main(flags)
    monkeypatch.setattr(checkpoint, "save_run", save)
    race.main(flags)
    assert [Path(name).name for name in asked] == ["mot-seed1", "last-state-2-seed1"]
    table = json.loads((place / "table.json").read_text("utf-8"))
    for weights in place.glob("*/*.safetensors"):
        weights.unlink()
    race.main(flags)  # what is finished is kept without its weights
    assert len(asked) == 2
    assert json.loads((place / "table.json").read_text("utf-8")) == table
    assert set(table) == {"mot", "last:state=2"}
    assert len({line["images"] for line in table.values()}) == 1
    for line in table.values():
        assert line["seeds"] == [1]
        assert [len(curve) for curve in line["curves"]] == [race.LEGS]
        assert line["curves"][0][-1]["minutes"] == line["images"] / line["images/s"] / 60 > 0
        scores = line["suites"]["geneval"]
        assert scores["seeds"] == [scores["score"]], "of one seed, the mean is its own"
        assert set(line["suites"]) == {"geneval", "position"}
        assert set(line["suites"]["position"]["rows"]) == {"early", "late"}
    assert Image.open(place / "race.png").width > 1000
    assert "last:state=2" in capsys.readouterr().out


REFUSED = {  # a race, and what is said of it
    "mot,lsat": "lsat: expected one of mot, dense, last",
    "mot,lap:strid=1": "unrecognized arguments: --strid",
    "mot,lap:stride": "--bridge lap:stride: expected stride=VALUE",
    "mot,lap:stride=0": "--bridge lap:stride=0: expected a whole number above zero",
    "mot,last:state=4": "--bridge last:state=4: expected last, penultimate, or a number from 0 to",
    "mot,mot:layers=7": "--layers 7: expected",
    "mot,kv:layers=7": "--layers is not for --bridge kv",
    "mot --suite held-out": "--suite held-out: expected some of geneval,unseen,",
    "mot --suite geneval,poems": "--suite poems: expected some of geneval,unseen,",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_a_race_that_would_stop_on_its_way_is_not_begun(asked, tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", None)
    told = refusal(capsys, race.main, *asked.split(), *tiny_run)
    assert REFUSED[asked] in told
    assert not Path(tiny_run[tiny_run.index("--out") + 1]).exists()


def test_what_is_named_twice_is_one_run():
    args, _ = race.parse_args(["mot,mot,lap", "--seeds", "1,1,2"])
    assert args.racers == ["mot", "lap"] and args.seeds == [1, 2]


def test_a_racer_is_a_bridge_with_flags_of_its_own():
    """The bridge's options go with --bridge, all others are flags of train.py."""
    racer = "lap:stride=1:no-refiner:layers=0-5:random-llm"
    spec = ["--bridge", "lap:stride=1:no-refiner", "--layers", "0-5", "--random-llm"]
    assert race.flags_of(racer) == spec
    with pytest.raises(ValueError, match="64: expected one of mot, .*stand before all flags"):
        race.flags_of("64")
    _, more = race.parse_args(["mot", "--width", "64", "--data", "shapes:one-object"])
    assert more[-4:] == ["--width", "64", "--data", "shapes:one-object"]


def test_the_committed_table_is_that_of_the_committed_runs():
    logs = []
    for path in sorted((RESULTS / "race").glob("*/race.json")):
        logs.append(json.loads(path.read_text("utf-8")))
    speeds = json.loads((RESULTS / "race" / "race.json").read_text("utf-8"))["speeds"]
    committed = json.loads((RESULTS / "race" / "table.json").read_text("utf-8"))
    again = json.loads(json.dumps(race_table(logs, speeds)))
    assert list(again) == list(committed)
    for racer, line in committed.items():
        assert again[racer] == line, f"{racer}: table.json is not what its runs give"


def test_the_control_may_have_flags_of_its_own():
    logs = []
    for name in ("mot-seed0", "dense-seed0"):
        logs.append(json.loads((RESULTS / "race" / name / "race.json").read_text("utf-8")))
    found = suite_scores("mot", "languages", logs)["minus control"]
    logs[1]["racer"] = "dense:lr=0.004"
    assert found["score"] > 0 and suite_scores("mot", "languages", logs)["minus control"] == found
    assert suite_scores("dense:lr=0.004", "languages", logs)["minus control"] is None
    assert suite_scores("mot", "languages", logs[:1])["minus control"] is None
