"""extras/bench.py measures what it says: every section runs, on a tiny LLM, and its numbers hang
together."""

import json
import time

import pytest
import torch

from conftest import CPU, random_expert
from extras import bench, rivals, timing
from extras.joint import joint_fast, joint_forward


@pytest.mark.slow
def test_every_section_runs(llm_folder, tmp_path, monkeypatch, capsys):
    small = ["--width=32", "--depth=2", "--batch-size=8", "--image-size=16"]  # flags of train.py
    flags = ["--llm", str(llm_folder("qwen2")), "--seconds", "0.001", "--device", "cpu"]
    monkeypatch.setattr(rivals, "HEADS", {"tiny": (4, 2, 16)})
    monkeypatch.setattr(
        "sys.argv", ["bench.py", *flags, *small, "--out", str(tmp_path / "bench.json")]
    )
    bench.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert (
        list(results) == ["machine", *bench.SECTIONS]
        and results["machine"]["matmul peak TFLOP/s"] > 0
    )
    for name in bench.SECTIONS:
        assert results[name] and all(
            value > 0 for row in results[name] for value in row.values() if isinstance(value, float)
        )
    ways = {"definition", "sdpa", "sdpa, no row padded", "two calls, merged"}
    assert {row["way"] for row in results["attention"]} == ways, "what a CPU can run"
    assert all(row["sdpa / this"] == 1 for row in results["attention"] if row["way"] == "sdpa")
    ways = [row["way"] for row in results["train"]]
    assert ways[1:] == [
        "joint forward, fast attention",
        "LLM over the distinct captions of each step",
        "caption cache",
    ]
    assert "of the time in matrix products and attention" in capsys.readouterr().out
    mirror = [
        "train",
        "--mirror",
        "--batch-size=4",
        "--image-size=16",
        "--out",
        str(tmp_path / "mirror.json"),
    ]
    monkeypatch.setattr("sys.argv", ["bench.py", *flags, *mirror])
    bench.main()
    results = json.loads((tmp_path / "mirror.json").read_text())
    assert {row["expert"] for row in results["train"]} == {"tiny", "mirror"}


def test_timing_is_paired_and_a_median():
    ran = []
    result = timing.timed(
        {"a": lambda: ran.append("a"), "b": lambda: (ran.append("b"), time.sleep(0.01))}, CPU, 0.05
    )
    assert "".join(ran[4:]).replace("ab", "") == "", "after the warm-up every round runs each once"
    assert 10 <= result["b"]["ms"] < 100 and result["a"]["ms"] < 1


def test_a_context_without_the_cache_is_the_same(tiny_llm):
    llm = tiny_llm("gemma3")
    llm.keep([0, 2])
    captions = ["a red circle", "three small teal stars", "a red circle"]
    cached, fresh = llm.context(captions), bench.fresh_context(llm, captions)
    assert torch.equal(cached.lengths, fresh.lengths)
    for ours, theirs in zip([*fresh.keys, *fresh.values], [*cached.keys, *cached.values]):
        for i, n in enumerate(cached.lengths):
            assert (ours[i, :, :n] - theirs[i, :, :n]).abs().max() < 1e-5


def test_the_fast_rival_computes_what_the_definition_says(tiny_llm):
    llm = tiny_llm("gemma3")
    expert = random_expert(llm)
    captions = ["a red circle", "three small teal stars", "a red circle"]
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            definition = joint_forward(llm, expert, x_t, t, captions)
            fast = joint_forward(llm, expert, x_t, t, captions, joint_fast)
        error = (definition - fast).abs().max().item()
        assert error < 1e-5 and definition.std() > 0.01, error


def test_unknown_sections_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "speed"])
    with pytest.raises(ValueError, match="speed: expected some of attention, train, sample, llm"):
        bench.main()
