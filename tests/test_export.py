"""An expert to share, in bfloat16; and which checkpoint a command takes where none is named."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import assemble
import checkpoint
import evaluate
import sample
import train
from checkpoint import load_expert, pick_checkpoint
from conftest import CPU
from extras import export

DRAW = "--device cpu --dtype float32 --steps 2 --prompt a-circle --out".split()


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """A run's folder in an empty place."""
    monkeypatch.chdir(tmp_path)
    train.main([*tiny_run, "--steps", "3", "--out", "runs/first"])
    return tmp_path / "runs" / "first"


def test_an_export_is_half_as_large_and_draws_alike(run, tmp_path, capsys):
    export.main(["--ckpt", str(run), "--out", "shared"])
    assert "shared/model.safetensors: " in capsys.readouterr().out.replace(os.sep, "/")
    files = {path.name for path in (tmp_path / "shared").iterdir()}
    assert files == {"model.safetensors", "config.json", "about.json"}
    stored = load_file(tmp_path / "shared" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    # it loads as float32, and each weight is the nearest bfloat16
    expert = load_expert(str(run), CPU)
    shared = load_expert("shared", CPU)
    assert shared.config == expert.config
    for a, b in zip(expert.parameters(), shared.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.bfloat16().float(), b)
    llm = assemble.llm_of(shared, None, CPU, torch.float32)
    pictures = []
    for each in (expert, shared):
        pictures.append(sample.draw(each, llm, ["a red circle"], [0], 4).astype(int))
    difference = np.abs(pictures[0] - pictures[1]).max()
    assert difference <= 8, difference

    # what is known of it
    about = json.loads((tmp_path / "shared" / "about.json").read_text("utf-8"))
    assert about["step"] == 3 and about["settings"]["width"] == 32
    assert about["last line of metrics.jsonl"]["loss"] > 0


def test_an_export_overwrites_nothing_but_an_export(run, llm_folder, tmp_path):
    export.main(["--ckpt", str(run), "--out", "shared"])
    export.main(["--ckpt", str(run), "--out", "shared"])
    llm = tmp_path / "llm"
    shutil.copytree(llm_folder("qwen2"), llm)
    before = (llm / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is not an image expert"):
        export.main(["--ckpt", str(run), "--out", str(llm)])
    assert (llm / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="holds a run; --out names another folder"):
        export.main(["--ckpt", str(run), "--out", str(run)])
    with pytest.raises(ValueError, match="--ckpt nowhere: expected the folder of a run"):
        export.main(["--ckpt", "nowhere", "--out", "other"])
    assert not (tmp_path / "other").exists()


def test_the_shipped_expert_serves_until_there_is_a_run(run, tmp_path, monkeypatch, capsys):
    """In the repository's folder it has a short name; scores are not written beside it."""
    export.main(["--ckpt", str(run), "--out", "assets/expert"])
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "assets" / "expert")
    monkeypatch.setattr(evaluate, "SHIPPED", tmp_path / "assets" / "expert")
    assert pick_checkpoint(None)[0] == os.path.join("runs", "first")
    shutil.rmtree(run)
    sample.main([*DRAW, "a.png"])
    said = capsys.readouterr().out
    shown = os.path.join("assets", "expert")
    assert f"checkpoint {shown} (shipped; no run under runs/ yet)" in said
    short = "--device cpu --dtype float32 --steps 1 --suite geneval --limit 1".split()
    evaluate.main(short)
    assert f"checkpoint {shown} (shipped; " in capsys.readouterr().out
    assert (tmp_path / "evaluation" / "partial" / "evaluate.json").exists()
    assert {path.name for path in (tmp_path / shown).iterdir()} == {
        "model.safetensors",
        "config.json",
        "about.json",
    }
    shutil.rmtree(tmp_path / shown)
    with pytest.raises(ValueError, match="no checkpoint under runs/: train one first"):
        sample.main([*DRAW, "b.png"])


def test_no_place_of_this_machine_is_told(run, tmp_path):
    """A run that began with another names it, not the folder that it lay in."""
    flags = ["--from", str(run), "--steps", "1", "--warmup", "1", "--device", "cpu"]
    train.main([*flags, "--batch-size", "8", "--out", "runs/second"])
    export.main(["--ckpt", "runs/second", "--out", "shared"])
    for name in ("about.json", "config.json"):
        told = (tmp_path / "shared" / name).read_text("utf-8")
        assert "first" in told and str(run.parent) not in told
    assert str(run.parent).encode() not in (tmp_path / "shared" / "model.safetensors").read_bytes()
