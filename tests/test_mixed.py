"""Several sources in one run: who comes when, what resuming asks, and which suites are for it."""

import json

import numpy as np
import pytest
from PIL import Image

import cli
import evaluate
import train
from checkpoint import load_expert
from conftest import CPU
from data import TEST_PROMPTS, open_source
from extras import emoji
from flags import data_form


def opened(text: str, image_size: int = 16, seed: int = 0):
    name, options = data_form(text)
    return open_source(name, image_size, seed, **options)


def make_pictures(folder, *colors):
    folder.mkdir()
    for color in colors:
        Image.new("RGB", (30, 20), color).save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} field")
    return folder


@pytest.fixture(scope="module")
def has_emoji():
    try:
        emoji.Emoji(16)
    except ValueError as error:
        pytest.skip(str(error))


def test_sources_take_turns(tmp_path):
    """In their own order, and each as it would be alone."""
    folder = make_pictures(tmp_path / "mine", "red", "blue", "green")
    mixed = opened(f"shapes:one-object,{folder}:weight=2", seed=3)
    alone = [opened("shapes:one-object", seed=3), opened(str(folder), seed=3)]
    turns = [(1, 0), (0, 0), (1, 1), (1, 2), (0, 1), (1, 3), (1, 4)]
    for index, (i, own) in enumerate(turns):
        caption, pictures = mixed.example(index, 2)
        its_caption, its_pictures = alone[i].example(own, 2)
        assert caption == its_caption
        assert np.array_equal(pictures, its_pictures)
    assert "33% shapes (" in mixed.about() and "67% " in mixed.about()
    assert mixed.made_for == {"mixed": ["shapes", str(folder)], "one_object": True}
    assert set(alone[1].prompts) <= set(mixed.prompts) and "a red circle" in mixed.prompts


def test_weights_are_numbers_and_turns_are_even(tmp_path):
    folder = make_pictures(tmp_path / "mine", "red")
    whose = {}
    for weights in ("0.5,0.5", "3,1.5", "0.3,0.7", "weight=2,weight=5"):
        own, other = weights.split(",")
        whose[weights] = "".join(str(i) for i, _ in opened(f"shapes:{own},{folder}:{other}").turns)
    assert whose == {
        "0.5,0.5": "01",
        "3,1.5": "010",
        "0.3,0.7": "1011011101",
        "weight=2,weight=5": "1011101",
    }


def test_a_folder_with_commas_is_a_folder(tmp_path, monkeypatch):
    make_pictures(tmp_path / "shapes,emoji", "red")
    monkeypatch.chdir(tmp_path)
    source = opened("shapes,emoji")
    assert source.prompts == ("a red field",)
    assert source.made_for == {}
    assert opened("shapes,emoji,shapes:one-object").made_for["mixed"] == ["shapes,emoji", "shapes"]
    font = tmp_path / "a,b.ttf"
    font.write_bytes(b"")
    parts = data_form(f"shapes,emoji:weight=2,emoji:font={font}")[1]["parts"]
    assert parts == [("shapes,emoji", {"weight": "2"}), ("emoji", {"font": str(font)})]


def test_what_is_no_mixture_is_refused(tmp_path):
    folder = make_pictures(tmp_path / "mine", "red")
    cases = {
        "shapes,shapez": "--data shapez: expected shapes, emoji, edits, hf:NAME, .tar files, or an existing folder",
        "shapes,": "--data shapes,: expected a source on each side of a comma",
        "shapes,shapes:one-object": "--data shapes,shapes: expected shapes once, not twice",
        "shapes:variants,emoji": "--data shapes has no option 'variants'; it has one-object",
        f"shapes,{folder}:weight=0": "mine:0: expected one weight, a number above zero",
        f"shapes,{folder}:weight": "expected one weight, a number above zero, as in 2, 0.5",
        f"shapes,{folder}:0.5:weight=2": "mine:0.5: expected one weight",
        f"shapes:nan,{folder}": "--data shapes has no option 'nan'",
        f"shapes:1e9,{folder}": "the weights make 1000000001 turns; expected rounder numbers",
    }
    for text, message in cases.items():
        with pytest.raises(ValueError, match=message.replace("(", "[(]")):
            opened(text)


def test_emoji_beside_shapes_leave_them_their_words(has_emoji):
    """One prompt, one picture: and what the suites ask for is never a training caption."""
    beside = opened("shapes,emoji").sources[1]
    alone = opened("emoji")
    assert "⭐" in alone.trained and "⭐" not in beside.trained
    for fruit in "🍋🍑🍅":  # colours, too, but no shape
        assert fruit in beside.trained
    assert beside.held_out <= alone.held_out
    captions = set()
    for text in beside.trained:
        for name in beside.names[text]:
            captions.update(form.format(n=name, a=f"a {name}").lower() for form in beside.forms)
    assert len(captions) > 5000
    assert not captions & TEST_PROMPTS
    assert beside.fingerprint() != alone.fingerprint()


def test_a_run_on_two_sources_resumes_while_both_are_the_same(tiny_run, tmp_path):
    folder = make_pictures(tmp_path / "mine", "red", "blue")
    data = f"shapes,{folder}"
    train.main([*tiny_run, "--steps", "1", "--data", data])
    run = str(tmp_path / "run")
    assert load_expert(run, CPU).made_for["data"] == data
    train.main(["--resume", "--out", run, "--steps", "2"])
    again = ["--resume", "--out", run, "--steps", "3"]
    with pytest.raises(ValueError, match="has changed .*50% shapes"):
        train.main([*again, "--data", f"{folder},shapes"])
    (folder / "red.txt").write_text("another caption")
    with pytest.raises(ValueError, match="--resume: --data .* has changed"):
        train.main(again)


@pytest.mark.slow
def test_a_run_on_shapes_and_emoji_is_scored_on_both(has_emoji, tiny_run, tmp_path, capsys):
    train.main([*tiny_run, "--steps", "2", "--data", "shapes,emoji"])
    run = ["--ckpt", str(tmp_path / "run")]
    short = "--limit 2 --steps 1 --device cpu --dtype float32".split()
    evaluate.main([*run, *short, "--suite", "geneval"])
    emoji.main([*run, *short, "--suite", "recall,unseen-names"])
    results = json.loads((tmp_path / "run" / "partial" / "evaluate.json").read_text("utf-8"))
    assert {"geneval", "recall", "unseen-names"} <= results.keys()
    assert results["recall"]["rows"]["en"]["pixels"]["candidates"] == 1200
    train.main([*tiny_run, "--steps", "1", "--data", "emoji", "--out", str(tmp_path / "emoji")])
    with pytest.raises(SystemExit, match="2"):
        cli.one_line_errors(lambda: evaluate.main(["--ckpt", str(tmp_path / "emoji"), *short]))
    assert "was trained on emoji; the suites are geneval" in capsys.readouterr().err


def test_the_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "mine", "red")
    assert train.parse_args(["--data", "shapes,emoji"]).out == "runs/shapes-emoji"
    assert train.parse_args(["--data", "shapes:weight=2,./mine"]).out == "runs/shapes-mine"
