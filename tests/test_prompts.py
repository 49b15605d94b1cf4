"""Pictures lie as the official evaluators of three benchmarks read them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train

DRAWS_FAST = "--steps 1 --device cpu --dtype float32".split()


def test_layouts_of_the_official_evaluators(tiny_run, tmp_path):
    """GenEval: a folder a prompt with its metadata line and four samples. DPG-Bench: a two by two
    grid named after the prompt's file. WISE: one picture named after the prompt's id."""
    train.main([*tiny_run, "--steps", "2"])
    star = {"tag": "colors", "include": [{"class": "star", "count": 1}]}
    records = [
        star | {"prompt": "a photo of a red star"},
        {"tag": "counting", "include": [], "prompt": "a photo of two rings"},
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(lines))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "COCOval2014000000001241.txt").write_text("A red star.\n")
    banana = {"Prompt": "a ripe banana", "Explanation": "yellow", "prompt_id": 401}
    (tmp_path / "wise.json").write_text(json.dumps([banana]))

    def run(layout: str, prompts: str, *more: str) -> Path:
        out = tmp_path / f"for-{layout}"
        flags = ["--ckpt", str(tmp_path / "run"), "--out", str(out), *DRAWS_FAST, *more]
        sample.main(["--prompts", f"{tmp_path / prompts}:{layout}", *flags])
        return out

    out = run("geneval", "evaluation_metadata.jsonl")
    files = []
    for i in range(2):
        files.append(f"0000{i}/metadata.jsonl")
        files += [f"0000{i}/samples/0000{k}.png" for k in range(4)]
    found = [path.relative_to(out).as_posix() for path in out.rglob("*.*")]
    assert sorted(found) == sorted(files)
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == records[1]

    out = run("dpg", "dpg")
    assert [path.name for path in out.iterdir()] == ["COCOval2014000000001241.png"]
    grid = np.asarray(Image.open(out / "COCOval2014000000001241.png"))
    assert grid.shape == (32, 32, 3), "two by two pictures of 16 pixels"
    different = not np.array_equal(grid[:16, :16], grid[:16, 16:])
    assert different, "four pictures, from four noises"

    assert [path.name for path in run("wise", "wise.json").iterdir()] == ["401.png"]
    refused = [
        ("wise", "wise.json", ("--n", "2")),
        ("geneval", "dpg", ()),
        ("dpg", "dpg", ("--prompt", "x")),
    ]
    for layout, prompts, more in refused:
        with pytest.raises(ValueError):
            run(layout, prompts, *more)
    (tmp_path / "broken.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="broken.jsonl"):
        run("geneval", "broken.jsonl")
