"""Shapes as a folder: what training would draw; or colours by hex code, none of them the suite's,
and a run learns from them beside the shapes."""

import json
import re

import numpy as np
from PIL import Image
from test_cli import refusal

import train
from checkpoint import load_expert
from conftest import CPU
from data import SHAPES, Group, Scene, Shapes
from extras import shapes_folder
from extras.grades import grade
from extras.judge import judge
from extras.suites import Prompt, read_suite


def test_codes_are_not_the_suites_and_more_begin_with_the_same():
    many = shapes_folder.codes(500, 0)
    assert len(set(many)) == 500
    for suite in ("colors", "palettes"):
        assert not set(many) & {rgb for prompt in read_suite(suite) for rgb in prompt.palette}
    assert shapes_folder.codes(10, 0) == many[:10]
    assert shapes_folder.codes(10, 1) != many[:10]


def test_each_picture_has_the_colour_and_the_shape_that_its_caption_says(tmp_path, capsys):
    shapes_folder.main(["--codes", "3", "--out", str(tmp_path / "made")])
    assert "24 pictures" in capsys.readouterr().out
    lines = (tmp_path / "made" / "metadata.jsonl").read_text("utf-8").splitlines()
    shapes = []
    for line in map(json.loads, lines):
        picture = np.asarray(Image.open(tmp_path / "made" / line["file_name"]))
        shape, code = line["text"].removeprefix("a ").split(" in the color #")
        found = judge(picture, Scene((Group(1, None, shape),))).found
        assert [thing.shape for thing in found] == [shape]
        assert np.abs(np.array(found[0].rgb) - list(bytes.fromhex(code))).max() <= 1
        shapes.append(shape)
    assert shapes == list(SHAPES) * 3


def test_pairs_have_one_code_and_one_word(tmp_path, capsys):
    """Either may come first; the single ones are those that come without pairs."""
    made, alone = tmp_path / "made", tmp_path / "alone"
    shapes_folder.main(["--codes", "3", "--pairs", "--out", str(made)])
    shapes_folder.main(["--codes", "3", "--out", str(alone)])
    for picture in alone.glob("*.png"):
        assert (made / picture.name).read_bytes() == picture.read_bytes()
    code_first = []
    for line in map(json.loads, (made / "metadata.jsonl").read_text("utf-8").splitlines()):
        if " and " not in line["text"]:
            continue
        groups = []
        palette = []
        for words in line["text"].split(" and "):
            coded = re.fullmatch(r"a (\w+) in the color #(\w+)", words)
            named = re.fullmatch(r"an? (\w+) (\w+)", words)
            groups.append(Group(1, *((None, coded[1]) if coded else named.groups())))
            palette.append(tuple(bytes.fromhex(coded[2])) if coded else None)
        prompt = Prompt("", line["text"], Scene(tuple(groups)), tuple(palette))
        picture = np.asarray(Image.open(made / line["file_name"]))
        found = grade(prompt, picture)
        assert found.reason is None and found.off < 1, line
        code_first.append(palette[0] is not None)
    assert len(code_first) == 24 and 0 < sum(code_first) < 24
    said = refusal(capsys, shapes_folder.main, "--pairs", "--out", tmp_path / "other")
    assert "--codes N" in said


def test_plain_ones_are_what_training_draws(tmp_path, capsys):
    flags = ["--captions", "5", "--one-object", "--image-size", "32", "--seed", "3"]
    shapes_folder.main([*flags, "--out", str(tmp_path / "made")])
    source = Shapes(32, 3, one_object=True)
    lines = (tmp_path / "made" / "metadata.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 5
    for i, line in enumerate(map(json.loads, lines)):
        caption, pictures = source.example(i, 1)
        assert line["text"] == caption
        drawn = Image.open(tmp_path / "made" / line["file_name"])
        assert np.array_equal(drawn, pictures[0])


def test_a_run_learns_from_them_beside_the_shapes(tiny_run, tmp_path, capsys):
    folder = tmp_path / "made"
    shapes_folder.main(["--codes", "1", "--image-size", "16", "--out", str(folder)])
    train.main([*tiny_run, "--data", f"shapes:0.5,{folder}:0.5", "--steps", "2"])
    made_for = load_expert(str(tmp_path / "run"), CPU).made_for
    assert made_for["mixed"] == ["shapes", str(folder)]
    said = refusal(capsys, shapes_folder.main, "--out", folder)
    assert "is there" in said
