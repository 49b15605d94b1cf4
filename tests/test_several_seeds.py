"""Runs of several seeds as one score: what evaluate.py wrote of each, and no number of its own."""

import json

import pytest
from test_cli import refusal

import evaluate
import train
from extras import seeds

WAY = "--suite geneval,languages --limit 2 --steps 1 --half both"


def tally(right: str, scenes: str) -> dict:
    share = right.count("1") / len(right)
    return {"n": len(right), "score": share, "right": right, "scenes": scenes, "wrong": {}}


def write_run(folder, rows: dict, suite: str = "geneval", **settings):
    """As evaluate.py writes it."""
    folder.mkdir()
    scores = {"rows": rows, "settings": {"half": "report", "n": 1} | settings}
    (folder / evaluate.FILES[0]).write_text(json.dumps({"run": str(folder), suite: scores}))
    return str(folder)


def scores_of(capsys, *args) -> dict:
    seeds.main([str(word) for word in args])
    return json.loads(open(capsys.readouterr().out.split()[-1]).read())


@pytest.fixture
def runs(tmp_path):
    """Two seeds that have 3 and 2 of 4 right, and of their control 1 and 1."""
    rights = {"a": "1110", "b": "1100", "x": "1000", "y": "0100"}
    return {
        name: write_run(tmp_path / name, {"colors": tally(right, "p q r s") | {"chance": 0.25}})
        for name, right in rights.items()
    }


def test_the_score_is_the_mean_of_the_runs(runs, tmp_path, capsys):
    found = scores_of(
        capsys, runs["a"], runs["b"], "--versus", runs["x"], runs["y"], "--out", tmp_path / "out"
    )["geneval"]
    mean = found["runs"]["mean"]
    assert mean["score"] == 5 / 8 and mean["of each run"] == [3 / 4, 2 / 4]
    assert mean["over"] == ["scenes", "seeds"] and mean["chance"] == 0.25
    assert 0 < mean["interval"][0] < 5 / 8 < mean["interval"][1] < 1
    assert found["versus"]["mean"]["score"] == 1 / 4
    assert found["difference"]["mean"]["score"] == pytest.approx(3 / 8)


def test_a_run_beside_itself_does_not_differ(runs, tmp_path, capsys):
    found = scores_of(capsys, runs["a"], "--versus", runs["a"], "--out", tmp_path / "out")
    paired = found["geneval"]["difference"]["colors"]
    assert paired["score"] == 0 and paired["interval"][0] < 0 < paired["interval"][1]


def test_languages_are_drawn_and_english_is_left_out(tmp_path, capsys):
    prompts = [p for p in evaluate.read_suite("languages") if p.row == "Italian"][:40]
    scenes = " ".join(prompt.scene_id for prompt in prompts)
    one = "".join("1" if len(prompt.scene.groups) == 1 else "0" for prompt in prompts)
    rows = {"English": tally("1" * 40, scenes), "Italian": tally(one, scenes)}
    rows["French"] = tally("0" * 40, scenes)
    run = write_run(tmp_path / "a", rows, "languages")
    found = scores_of(capsys, run, "--out", tmp_path / "out")["languages"]["runs"]
    assert found["mean"]["score"] == pytest.approx(one.count("1") / 80)
    assert found["one object"]["score"] == 0.5 and found["two objects"]["score"] == 0
    assert found["mean"]["over"] == ["scenes", "rows"]


def test_what_has_no_rows_is_left_out(runs, tmp_path, capsys):
    """As the losses of --suite held-out."""
    for name in ("a", "b"):
        path = tmp_path / name / evaluate.FILES[0]
        found = json.loads(path.read_text())
        losses = {"pictures": 4, "by_t": [], "all": {"loss": 0.1, "interval": [0.1, 0.2]}}
        found["held-out"] = losses | {"settings": found["geneval"]["settings"]}
        path.write_text(json.dumps(found))
    found = scores_of(capsys, runs["a"], runs["b"], "--out", tmp_path / "out")
    assert found.keys() == {"runs", "versus", "geneval"}
    assert found["geneval"]["runs"]["mean"]["score"] == 5 / 8


def test_what_cannot_be_put_together_is_refused(runs, tmp_path, capsys):
    said = refusal(capsys, seeds.main, str(tmp_path))
    assert "python evaluate.py --ckpt" in said
    said = refusal(capsys, seeds.main, runs["a"], "--versus", runs["x"], runs["y"])
    assert said.endswith("expected 1 runs, as many as before it")
    other = write_run(tmp_path / "o", {"colors": tally("1", "p")}, half="choose")
    fewer = write_run(tmp_path / "f", {"counting": tally("1", "p")})
    old = write_run(tmp_path / "old", {"colors": {"n": 4, "score": 0.5, "wrong": {}}})
    for unlike in (other, fewer, old):
        assert "no suite in common" in refusal(capsys, seeds.main, runs["a"], unlike)


@pytest.mark.slow
def test_it_says_what_evaluate_says(tiny_run, tmp_path, capsys):
    """One run alone: the same scores, and intervals."""
    train.main([*tiny_run, "--steps", "2"])
    out = tiny_run[tiny_run.index("--out") + 1]
    evaluate.main(["--ckpt", out, "--device", "cpu", *WAY.split(), "--out", out])
    capsys.readouterr()
    found = scores_of(capsys, out, "--out", tmp_path / "out")
    said = json.loads(open(f"{out}/{evaluate.FILES[0]}").read())
    for suite in ("geneval", "languages"):
        for row, entry in said[suite]["rows"].items():
            assert found[suite]["runs"][row]["score"] == entry["score"]
        for name in ("mean", "one object", "two objects"):
            if name in said[suite]:
                same = found[suite]["runs"][name]
                assert (same["score"], same["interval"]) == (
                    said[suite][name]["score"],
                    said[suite][name]["interval"],
                )
