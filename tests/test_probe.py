"""The probes find what is there and nothing else, and stand beside the run's scores."""

import json

import pytest
import torch
from test_cli import refusal

import train
from evaluate import OTHER_SUITES, SUITES
from extras import probe
from extras.colors import lab
from extras.probe import ridge

LAYERS = {"layer 0", "layer 1", "layer 2"}


def test_the_hex_probe_finds_what_is_there_and_nothing_else(tiny_llm, monkeypatch):
    """A tiny random LLM knows no colour; an LLM whose values were the code's own colour would."""
    llm = tiny_llm("qwen2")
    llm.keep(range(len(llm.layers)))
    blind = probe.probe_hex(llm, 0, 200)
    assert set(blind) == LAYERS
    for cells in blind.values():
        assert cells["interval"][0] < 0.05 and all(x < 0.5 for x in cells["R2"])

    def sees(llm, captions: list[str]) -> list[torch.Tensor]:
        codes = [list(bytes.fromhex(caption.split("#")[1])) for caption in captions]
        return [torch.tensor(lab(codes), dtype=torch.float32)] * len(llm.kept)

    monkeypatch.setattr(probe, "hear", sees)
    seen = probe.probe_hex(llm, 0, 800)
    assert all(x > 0.9 for cells in seen.values() for x in cells["R2"])


def test_tokens_are_alike_where_they_are_the_same(tiny_llm):
    llm = tiny_llm("qwen2")
    llm.keep(range(len(llm.layers)))
    same = probe.likeness(llm, ["qqqqqq", "qqq"])
    assert abs(same[0] - 1) < 1e-5, "values do not know where a token stands"
    caption = "a red circle left of a blue square"
    context = llm.context([caption])
    cosines = []
    for layer in context.values:
        tokens = layer[0, :, 1 : context.lengths[0]].float().transpose(0, 1).flatten(1)
        pairs = torch.combinations(torch.arange(len(tokens)))
        a, b = tokens[pairs[:, 0]], tokens[pairs[:, 1]]
        cosines.append(torch.cosine_similarity(a, b).mean())
    assert all(cosine < 0.99 for cosine in cosines)
    assert torch.allclose(
        torch.tensor(probe.likeness(llm, [caption])), torch.stack(cosines), atol=1e-5
    )


def test_ridge_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 40, generator=generator)
    W = torch.randn(40, 3, generator=generator)
    new = torch.randn(50, 40, generator=generator)
    assert (ridge(X, X @ W + 2, 1e-4)(new) - (new @ W + 2)).abs().max() < 0.05


@pytest.mark.parametrize("suite", [*OTHER_SUITES, "poems"])
def test_a_suite_that_cannot_be_probed_is_refused(suite, capsys, tmp_path):
    """Before anything is loaded: the run is not even there."""
    nowhere = ["--ckpt", tmp_path / "nowhere", "--suite", f"geneval,{suite}"]
    told = refusal(capsys, probe.main, *nowhere)
    assert f"--suite {suite}: expected some of geneval,unseen," in told


def test_probe_command(tiny_run, llm_folder, tmp_path, capsys):
    """Beside a run's scores; and of an LLM alone, with its control."""
    train.main([*tiny_run, "--steps", "2"])
    flags = "--limit 2 --steps 1 --device cpu --dtype float32".split()
    probe.main(["--ckpt", str(tmp_path / "run"), *flags])
    path = tmp_path / "run" / "partial" / "evaluate.json"
    results = json.loads(path.read_text("utf-8"))
    assert set(results["probe-hex"]) == LAYERS
    assert set(results["probe"]) == LAYERS | {"picture"}
    assert set(SUITES) < set(results), "scored as evaluate.py does"
    printed = capsys.readouterr().out
    assert "English" in printed and "layer 2" in printed

    llm = str(llm_folder("qwen2"))
    probe.main(["--llm", llm, "--out", str(tmp_path / "alone"), *flags])
    alone = json.loads((tmp_path / "alone" / "probe-hex.json").read_text("utf-8"))
    assert alone["llm"] == llm and set(alone["pretrained"]) == set(alone["random"]) == LAYERS
    for table in (alone["pretrained"], alone["random"]):
        assert all(-1 <= cells["alike"] <= 1.0001 for cells in table.values())
