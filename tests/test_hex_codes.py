"""Pictures of hex codes: the colours are the codes', none is one that the suite asks for, and a run
learns from them beside the shapes."""

import json

import numpy as np
from PIL import Image
from test_cli import refusal

import train
from checkpoint import load_expert
from conftest import CPU
from data import SHAPES, Group, Scene
from extras import hex_codes
from extras.judge import judge
from extras.suites import read_suite


def test_codes_are_not_the_suites_and_more_begin_with_the_same():
    many = hex_codes.codes(500, 0)
    assert len(set(many)) == 500
    assert not set(many) & {prompt.rgb for prompt in read_suite("colors")}
    assert hex_codes.codes(10, 0) == many[:10]
    assert hex_codes.codes(10, 1) != many[:10]


def test_each_picture_has_the_colour_and_the_shape_that_its_caption_says(tmp_path, capsys):
    hex_codes.main(["--codes", "3", "--out", str(tmp_path / "made")])
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


def test_a_run_learns_from_them_beside_the_shapes(tiny_run, tmp_path, capsys):
    folder = tmp_path / "made"
    hex_codes.main(["--codes", "1", "--image-size", "16", "--out", str(folder)])
    train.main([*tiny_run, "--data", f"shapes:0.5,{folder}:0.5", "--steps", "2"])
    made_for = load_expert(str(tmp_path / "run"), CPU).made_for
    assert made_for["mixed"] == ["shapes", str(folder)]
    said = refusal(capsys, hex_codes.main, "--out", folder)
    assert "is there" in said
