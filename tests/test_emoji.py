"""The emoji suites: true glyphs rank first, noise by chance; no name of a suite was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import refusal

import cli
import train
from extras import emoji
from extras.emoji import Emoji
from extras.emoji_suites import AS_IN_ENGLISH, read_emoji_suite
from extras.intervals import wilson
from extras.likeness import learned_features, pixel_features, rank_scores, ranks


@pytest.fixture(scope="module")
def source():
    try:
        return Emoji(16)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_emoji_command(source, tiny_run, tmp_path, capsys):
    """A tiny run on emoji, its scores and its probe."""
    train.main([*tiny_run, "--data", "emoji", "--patch", "8", "--steps", "2"])
    short = "--limit 40 --steps 1 --device cpu --dtype float32".split()
    run = ["--ckpt", str(tmp_path / "run")]
    emoji.main([*run, *short, "--rows", "en,it,zh", "--probe"])
    out = tmp_path / "run" / "partial"
    results = json.loads((out / "evaluate.json").read_text("utf-8"))
    suite = results["emoji-languages"]
    assert list(suite["rows"]) == ["en", "it", "zh"]
    assert suite["mean"]["pixels"]["n"] == 80, "the mean leaves English out"
    rows = results["unseen-names"]["rows"]
    assert rows["en"]["pixels"]["n"] + rows[AS_IN_ENGLISH]["pixels"]["n"] == 40
    found = results["probe"]["layer 1"]["nearest name"]
    assert 500 <= found["n"] < 13 * 40
    blind = results["probe"]["layer 0"]["nearest name"]
    middle = (len(source.trained) + 1) / 2
    tied = "the first layer's values after the caption know nothing of it: all are tied"
    assert blind["median rank"]["score"] == middle, tied
    assert results["probe"]["layer 1"]["in a caption"]["n"] == 40
    assert Image.open(out / "evaluate-emoji-languages.png").width > 100

    with pytest.raises(SystemExit, match="2"):
        cli.one_line_errors(lambda: emoji.main([*run, "--suite", "geneval"]))
    told = capsys.readouterr().err
    expected = "recall,emoji-languages,unseen-names"
    assert f"--suite geneval: for a run on emoji expected some of {expected}" in told


def test_emoji_suites(source):
    """What is asked for: no name that training has taught, but in the row that says so."""
    asked = read_emoji_suite("emoji-languages", source, 128)
    foreign = [prompt for row, prompt, _ in asked if row not in ("en", AS_IN_ENGLISH)]
    english = {name.lower() for text in source.trained for name in source.names[text]}
    same = english & {prompt.lower() for prompt in foreign}
    assert not same, "a name as in English tests no other language"
    assert len([row for row, *_ in asked if row == AS_IN_ENGLISH]) == 56
    assert len(foreign) == 13 * 128 - 56
    unseen = read_emoji_suite("unseen-names", source, None)
    called_so = [prompt for row, prompt, _ in unseen if row == AS_IN_ENGLISH]
    assert called_so == ["rabbit", "kiss"], "others are called so too"
    assert {text for *_, text in unseen} == source.held_out
    halves = []
    for half in ("choose", "report"):
        halves.append(read_emoji_suite("recall", source, None, half=half))
    assert not set(halves[0]) & set(halves[1])
    assert sum(map(len, halves)) == len(source.trained)
    assert all(0.45 < len(half) / len(source.trained) < 0.55 for half in halves)
    with pytest.raises(ValueError, match="klingon: the rows of emoji-languages are en, "):
        read_emoji_suite("emoji-languages", source, None, ["klingon"])
    asked = read_emoji_suite("emoji-languages", source, None)
    assert len({row for row, *_ in asked}) == 14 + 1
    assert {text for *_, text in asked} <= set(source.trained)
    asked = read_emoji_suite("emoji-languages", source, 2000)
    assert ("it", "muso di gatto") in {(row, prompt) for row, prompt, _ in asked}


def test_ranks(source):
    """Pictures that are the true glyphs rank first, noise ranks by chance."""
    glyphs = np.stack(list(source.glyphs.values()))
    truth = list(range(len(glyphs)))
    noise = np.random.default_rng(0).integers(0, 256, glyphs.shape, np.uint8)
    for features in (pixel_features, learned_features(glyphs, steps=20)):
        assert (ranks(features(glyphs), features(glyphs), truth) == 1).all()
        places = ranks(features(noise), features(glyphs), truth)
        share = np.median(places) / len(glyphs)
        assert 0.4 < share < 0.6, "noise is as near to one glyph as to another"
    scores = rank_scores(np.array([1] * 30 + [4] * 30 + [50] * 40), 100)
    assert scores["top 1"]["score"] == 0.3 and scores["top 5"]["score"] == 0.6
    assert scores["median rank"]["score"] == 4
    low, high = scores["top 1"]["interval"]
    expected = "a bootstrap of 100 prompts: about 1.96 sqrt(0.3 0.7 / 100) each way"
    assert 0.2 < low < 0.25 and 0.35 < high < 0.4, expected


def test_a_font_without_colours_is_refused(tmp_path, capsys):
    """One that has the face in black, and one whose face is empty."""
    fonts = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf"
    for name in ("DejaVuSans.ttf", "STIXGeneral.ttf"):
        font = ["--data", f"emoji:font={fonts / name}", "--out", tmp_path / "run"]
        told = refusal(capsys, train.main, *font, "--device", "cpu")
        assert f"{name} has no colours; expected a colour-emoji font such as Noto" in told


def test_where_no_or_every_picture_is_right_the_interval_is_not_a_point():
    """As wide as if each prompt, or each emoji that several share, were right or wrong as a
    whole."""
    scores = rank_scores(np.array([5] * 20), 1240)
    assert scores["top 1"] == {"score": 0.0, "interval": wilson(0, 20)}
    assert scores["top 5"] == {"score": 1.0, "interval": wilson(20, 20)}
    shared = [f"emoji {i % 4}" for i in range(20)], ["it", "zh"] * 10
    few = rank_scores(np.array([5] * 20), 1240, *shared)
    assert few["top 1"]["interval"] == wilson(0, 4) and few["top 5"]["interval"] == wilson(4, 4)
    alone = rank_scores(np.array([1] * 5 + [9] * 5), 1240, ["cat"] * 10)
    assert alone["top 1"]["interval"] == wilson(0.5, 1), "one emoji says little of others"
