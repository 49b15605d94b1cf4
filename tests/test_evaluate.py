"""The suites ask for what training never saw; scores are right; the command writes what it says."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refusal

import assemble
import checkpoint
import cli
import evaluate
import train
from conftest import CPU
from data import TEST_PROMPTS, Shapes, draw_things, lay_out
from evaluate import SUITES
from extras.grades import Grade, grade
from extras.intervals import difference, mean_of_rows, wilson
from extras.suites import is_in, read_suite, split_rows
from extras.tables import tally
from inspection import fingerprint
from loading import load_llm

ALL = {name: read_suite(name) for name in SUITES}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_a_hundred_distinct_prompts(name):
    prompts = [(prompt.row, prompt.text) for prompt in ALL[name]]
    assert len(prompts) >= 100 and len(set(prompts)) == len(prompts)


def test_the_suites_have_the_rows_that_were_asked_for():
    def rows(name: str) -> list[str]:
        return list(dict.fromkeys(prompt.row for prompt in ALL[name]))

    assert rows("geneval") == [
        "single object",
        "two objects",
        "counting",
        "colors",
        "position",
        "color attribution",
    ]
    assert set(rows("unseen")) < set(rows("geneval"))
    assert len(rows("languages")) >= 17 and {"English", "Italian", "Chinese", "Hindi"} <= set(
        rows("languages")
    )
    scenes = {
        row: [prompt.scene for prompt in ALL["languages"] if prompt.row == row]
        for row in rows("languages")
    }
    assert all(scenes[row] == scenes["English"] for row in scenes), (
        "every language asks for the same scenes"
    )
    assert rows("knowledge") == ["culture", "space and time", "nature"]
    held_out = [prompt.scene.is_held_out() for prompt in ALL["unseen"]]
    assert all(held_out) and not any(
        prompt.scene.is_held_out() for prompt in ALL["geneval"] + ALL["languages"]
    )


def test_prompts_for_one_object():
    """What a run that was trained on shapes:one-object is asked for."""
    for name in SUITES:
        ones = read_suite(name, one=True)
        assert 0 < len(ones) < len(ALL[name]) or name in ("colors", "position")
        assert ones == [
            p for p in ALL[name] if len(p.scene.groups) == 1 and p.scene.groups[0].count == 1
        ]
    assert {p.row for p in read_suite("geneval", one=True)} == {"single object", "colors"}


def test_no_prompt_is_a_training_caption():
    """Word for word; nor do captions hold another script, a hex code, or a number beyond counts."""
    captions = [Shapes(32, seed).caption(i)[0] for seed in range(3) for i in range(10_000)]
    assert not [caption for caption in captions if caption.lower() in TEST_PROMPTS]
    assert {prompt.text.lower() for prompts in ALL.values() for prompt in prompts} == TEST_PROMPTS
    words = {word for caption in captions for word in caption.replace(",", " ").split()}
    assert all(
        word.isascii() and (word.replace("-", "").isalpha() or word in ("2", "3", "4"))
        for word in words
    ), words
    new = {prompt.text.split()[1] for prompt in ALL["colors"] if prompt.row == "new color words"}
    assert len(new) >= 50 and not new & words, "these colour words are never trained on"


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_the_true_picture_is_right_and_another_is_wrong(name):
    """Every scene, drawn by data.py as it is asked for; then another's picture in its place."""
    rng = np.random.default_rng(0)
    prompts, pictures = list({p.scene_id: p for p in ALL[name]}.values()), []
    for prompt in prompts:
        things = lay_out(prompt.scene, rng)
        if prompt.palette:
            exact = {g.shape: rgb for g, rgb in zip(prompt.scene.groups, prompt.palette)}
            things = [replace(thing, rgb=exact[thing.shape] or thing.rgb) for thing in things]
        pictures.append(draw_things(things, 32))
    right = [grade(prompt, picture).reason is None for prompt, picture in zip(prompts, pictures)]
    assert sum(right) >= 0.99 * len(right), [
        prompt.text for prompt, ok in zip(prompts, right) if not ok
    ]
    wrong = [
        grade(prompt, picture) for prompt, picture in zip(prompts, pictures[7:] + pictures[:7])
    ]
    different = [
        (a.scene, a.palette) != (b.scene, b.palette)
        for a, b in zip(prompts, prompts[7:] + prompts[:7])
    ]
    passed = [g for g, other in zip(wrong, different) if other and g.reason is None]
    assert len(passed) <= 0.08 * len(prompts), (
        "only scenes that leave a colour or a place open may pass for one another"
    )


def test_each_thing_has_its_own_code():
    """Of a palette: both codes on their shapes; swapped, or one of them alone, is wrong."""
    for prompt in [p for p in ALL["palettes"] if p.row == "two codes"]:
        first, second = prompt.palette
        shapes = [group.shape for group in prompt.scene.groups]
        things = lay_out(prompt.scene, np.random.default_rng(0))
        for colors, reason in (
            ((first, second), None),
            ((second, first), "swapped colors"),
            ((first, first), "wrong color"),
            ((second, second), "wrong color"),
        ):
            rgb = dict(zip(shapes, colors))
            picture = draw_things([replace(t, rgb=rgb[t.shape]) for t in things], 32)
            assert grade(prompt, picture).reason == reason, (prompt.text, colors)


def tallied(bits: str, *scenes: int) -> dict:
    """A row of pictures with these verdicts, of the prompts of a row of `position`, or of these."""
    prompts = [p for p in ALL["position"] if p.row == "early"]
    prompts = [prompts[i] for i in scenes] if scenes else prompts
    grades = [Grade(None if bit == "1" else "missing", None, None) for bit in bits]
    return tally(list(zip(prompts, grades)))


def test_tallies_and_their_means():
    row = tallied("1110000000")
    assert row["score"] == 0.3 and row["interval"] == wilson(3, 10) and row["right"] == "1110000000"
    assert row["scenes"].split() == [p.scene_id for p in ALL["position"][:10]]
    even = mean_of_rows({0: {"a": row, "b": tallied("1" * 9 + "0")}})
    assert (
        even["score"] == pytest.approx(0.6) and even["wrong"] == {"missing": 8} and even["n"] == 20
    )
    low, high = tallied("11110000", *[0] * 4, *[1] * 4)["interval"]
    assert high - low > 0.8, "two scenes, not eight"
    uneven = mean_of_rows({0: {"a": tallied("1100"), "b": tallied("10" * 25)}})
    assert uneven["score"] == 0.5 and uneven["interval"][0] < wilson(27, 54)[0], (
        "few pictures in a row widen the interval"
    )


def test_a_difference_is_paired():
    """Runs that are wrong about the same scenes differ for sure; shares of others do not tell."""
    control, better, other = (
        "0" * 30 + "10" * 15,
        "0" * 24 + "1" * 6 + "10" * 15,
        "1" * 21 + "0" * 39,
    )
    same = difference({0: {"a": tallied(better)}}, {0: {"a": tallied(control)}})
    assert same["score"] == pytest.approx(0.1) and same["interval"][0] > 0.02
    apart = difference({0: {"a": tallied(other)}}, {0: {"a": tallied(control)}})
    assert apart["score"] == pytest.approx(0.1) and apart["interval"][0] < 0 < apart["interval"][1]
    old = {0: {"a": {"score": 0.5, "n": 60, "wrong": {}}}}
    assert difference(old, {0: {"a": tallied(control)}}) is None, (
        "which scenes were right is not known"
    )
    assert difference({0: {"a": tallied(control)}}, {1: {"a": tallied(control)}}) is None, (
        "no seed in common"
    )


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_a_half_to_choose_on_and_one_to_report(name):
    """No scene is on both sides, in whatever row, language or suite; half of a row is on each."""
    halves = {half: read_suite(name, half=half) for half in ("choose", "report")}
    assert sorted(map(repr, halves["choose"] + halves["report"])) == sorted(map(repr, ALL[name]))
    elsewhere = {
        p.scene_id for prompts in ALL.values() for p in prompts if is_in("choose", p.scene_id)
    }
    assert not elsewhere & {p.scene_id for p in halves["report"]}
    assert not {p.text for p in halves["choose"]} & {p.text for p in halves["report"]}
    for one in (False, True):
        for row in {p.row for p in read_suite(name, one=one)}:
            share = len(read_suite(name, only=[row], one=one, half="report")) / len(
                read_suite(name, only=[row], one=one)
            )
            assert 0.4 <= share <= 0.6, f"{row}: {share}"


def test_by_chance_a_picture_is_wrong():
    """Pictures of their own prompts are all right; against another's of the row, hardly any is."""
    prompts = [p for p in ALL["geneval"] if p.row in ("colors", "position")]
    rng = np.random.default_rng(0)
    pictures = np.stack([draw_things(lay_out(prompt.scene, rng), 32) for prompt in prompts])
    assert all(share <= 0.02 for share in evaluate.chance(prompts, pictures).values())
    assert evaluate.chance(prompts[:1], pictures[:1]) == {}
    blind = [prompt for prompt in ALL["geneval"] if prompt.row == "single object"][:2]
    circle = np.stack([pictures[0], pictures[0]])
    shares = [grade(prompt, picture).reason is None for prompt, picture in zip(blind, circle)]
    assert evaluate.chance(blind, circle)["single object"] == np.mean(shares), (
        "one picture for all is right by chance alone"
    )


@pytest.fixture(scope="module")
def two_runs(llm_folder, tmp_path_factory):
    """A tiny run on the LLM as it is, and its control."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--device cpu --dtype float32 --batch-size 8 --width 32 --depth 2 --steps 2"
    flags = ["--llm", str(llm_folder("qwen2")), *small.split()]
    train.main([*flags, "--out", str(folder / "pretrained")])
    train.main([*flags, "--out", str(folder / "control"), "--random-llm"])
    return folder / "pretrained", folder / "control"


def test_the_control_has_other_weights_and_is_built_again(two_runs, llm_folder):
    pretrained, control = (checkpoint.load_expert(str(run), CPU) for run in two_runs)
    assert pretrained.made_for["random_llm"] is None and control.made_for["random_llm"] == 0
    trained = load_llm(str(llm_folder("qwen2")), CPU, torch.float32)
    fresh = assemble.llm_of(control, None, CPU, torch.float32)
    assert fresh.fingerprint == fingerprint(fresh.model) == control.made_for["llm_fingerprint"]
    assert fresh.fingerprint != trained.fingerprint
    shapes = [p.shape for p in fresh.model.parameters()]
    assert shapes == [p.shape for p in trained.model.parameters()]
    again = assemble.llm_of(pretrained, None, CPU, torch.float32)
    assert fresh.tokenize("a red circle") == again.tokenize("a red circle")
    other = load_llm(str(llm_folder("qwen2")), CPU, torch.float32, random_seed=1)
    assert other.fingerprint != fresh.fingerprint, "another seed gives other weights"


SHORT = "--limit 2 --steps 1 --device cpu --dtype float32".split()


def test_evaluate_command(two_runs, capsys):
    ours, control = two_runs
    evaluate.main(["--ckpt", str(ours), "--versus", str(control), *SHORT])
    out = ours / "partial"
    results = []
    for name in ("evaluate.json", "versus.json"):
        results.append(json.loads((out / name).read_text("utf-8")))
    for suite in SUITES:
        assert Image.open(out / f"evaluate-{suite}.png").width > 100
        rows = {prompt.row for prompt in ALL[suite]}
        for result in results:
            assert set(result[suite]["rows"]) == rows
            for entry in [result[suite]["mean"], *result[suite]["rows"].values()]:
                assert 0 <= entry["interval"][0] <= entry["score"] <= entry["interval"][1] <= 1
            for entry in result[suite]["rows"].values():
                right = round(entry["score"] * entry["n"])
                assert right + sum(entry["wrong"].values()) == entry["n"]
                assert entry["right"].count("1") == right and len(entry["right"]) == entry["n"]
                # two prompts of a row may ask for the same scene: then there is no chance
                assert 0 <= entry.get("chance", 0) <= 1
            assert result[suite]["settings"]["half"] == "report"
        ours_better = results[0][suite]["difference"]
        assert set(ours_better) >= rows | {"mean"} and "difference" not in results[1][suite]
        means = [result[suite]["mean"]["score"] for result in results]
        assert ours_better["mean"]["score"] == pytest.approx(means[0] - means[1])
    assert results[0]["languages"]["mean"]["over"] == ["scenes", "rows"]
    assert results[1]["made_for"]["random_llm"] == 0
    printed = capsys.readouterr().out
    assert "English" in printed and "one object" in printed and "difference" in printed

    # one suite more beside the others; one row of a suite; a row that is not there
    evaluate.main(["--ckpt", str(ours), "--suite", "parrot", "--n", "2", *SHORT])
    again = json.loads((out / "evaluate.json").read_text("utf-8"))
    assert again["parrot"]["mean"]["n"] == 8 and again["geneval"] == results[0]["geneval"]
    of_languages = ["--ckpt", str(ours), "--suite", "languages", "--rows"]
    evaluate.main([*of_languages, "Hindi", "--out", str(ours / "hindi"), *SHORT])
    hindi = json.loads((ours / "hindi" / "evaluate.json").read_text("utf-8"))
    assert set(hindi["languages"]["rows"]) == {"Hindi"}
    with pytest.raises(ValueError, match="Klingon"):
        evaluate.main([*of_languages, "Klingon", *SHORT])


@pytest.mark.parametrize("name", SUITES)
def test_rows_are_asked_for_by_their_names(name):
    """Whatever commas they have, alone and all at once, as a refusal lists them."""
    rows = list(dict.fromkeys(prompt.row for prompt in ALL[name]))
    for row in rows:
        assert split_rows(row) == [row]
    for comma in (",", ", "):
        assert split_rows(comma.join(rows)) == rows
    assert split_rows("hex, random,hex, randm") == ["hex, random", "hex", "randm"]


def test_rows_with_commas_in_their_names(two_runs, tmp_path, capsys):
    asked = ["--ckpt", str(two_runs[0]), "--suite", "colors", "--out", str(tmp_path), *SHORT]
    evaluate.main([*asked, "--rows", "hex, random,new color words,rgb(), canonical"])
    rows = json.loads((tmp_path / "evaluate.json").read_text("utf-8"))["colors"]["rows"]
    assert list(rows) == ["hex, random", "new color words", "rgb(), canonical"]
    told = refusal(capsys, evaluate.main, *asked, "--rows", "hex, random,hex, randm")
    assert "--rows hex: the rows of colors are " in told


def test_what_the_llm_writes_first_is_scored_apart(two_runs, tmp_path, monkeypatch):
    """--read: such scores stand in a folder of their own, which says how they came about."""
    monkeypatch.chdir(tmp_path)
    Path("ask.txt").write_text("say: {}")
    read = "rewrite:reencode:tokens=2:frame=ask.txt"
    flags = ["--suite", "geneval", "--rows", "colors", "--read", read]
    evaluate.main(["--ckpt", str(two_runs[0]), *flags, *SHORT])
    out = two_runs[0] / "partial" / "rewrite-reencode-tokens-2-frame-ask-txt"
    results = json.loads((out / "evaluate.json").read_text("utf-8"))
    assert results["geneval"]["settings"]["read"] == read


def test_evaluate_refuses_bad_input(two_runs, tmp_path, capsys):
    def answer(*flags) -> str:
        with pytest.raises(SystemExit, match="2"):
            cli.one_line_errors(lambda: evaluate.main([str(flag) for flag in flags]))
        told = capsys.readouterr().err
        assert len(told.strip().splitlines()) == 1, told
        return told

    told = answer("--ckpt", two_runs[0], "--suite", "poems")
    assert "--suite poems: for a run on shapes expected some of geneval,unseen,languages" in told
    assert "nothing" in answer("--ckpt", tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"no weights")
    assert "safetensors" in answer("--ckpt", tmp_path / "foreign")
    expert = checkpoint.load_expert(str(two_runs[0]), CPU)
    expert.config["made_for"] = expert.made_for | {"data": "my-pictures"}
    expert.save_pretrained(tmp_path / "elsewhere")
    told = answer("--ckpt", tmp_path / "elsewhere")
    assert "was trained on my-pictures; the suites are geneval" in told
    assert "for shapes" in told and "for other data: --suite held-out, and extras/" in told
    told = answer("--ckpt", two_runs[0], "--width", "3")
    assert "--width" in told, "a flag of train.py means nothing here"


def test_two_long_readings_are_scored_in_two_folders(two_runs):
    place = "a/" * 40
    folders = set()
    for frame in ("one.txt", "two.txt"):
        args = evaluate.fill_in(
            Namespace(
                read=f"think:4:frame={place}{frame}",
                ckpt=str(two_runs[0]),
                rows=None,
                limit=None,
                half="report",
                out=None,
            )
        )
        folders.add(args.out)
    assert len(folders) == 2
