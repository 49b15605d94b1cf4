"""A probe that is shown the kind that it is asked for never sees the scene that it is asked."""

import json
import re

import pytest
import torch
from test_cli import refusal

from data import SHAPES
from extras import kinds
from extras.probe import TERMS, training_captions
from extras.suites import is_in, read_suite


def prompts_of(kind: str) -> list:
    suite, rows = kinds.KINDS[kind]
    return [prompt for prompt in read_suite(suite, None, rows) if prompt.is_of_one_thing]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_it_finds_what_the_kind_alone_tells(kind):
    """Values that say what is asked, but not as the captions say it; of two layers the first says
    only which scene it is, which helps nobody who has not seen the scene."""
    prompts = prompts_of(kind)
    known = kinds.targets_of(prompts)
    captions, targets = training_captions(0, 50)
    scenes = sorted({prompt.scene_id for prompt in prompts})
    place = torch.tensor([scenes.index(prompt.scene_id) for prompt in prompts])
    scene = torch.nn.functional.one_hot(place, len(scenes)).float()
    terms, shapes, _ = known.split([len(TERMS), len(SHAPES), 3], dim=1)
    answer = torch.cat([terms, shapes], 1)
    turned = answer.roll(1, 1)  # the captions say it in other places
    said = torch.cat([targets[:, : answer.shape[1]], torch.zeros(len(targets), len(scenes))], 1)
    heard = [
        torch.cat([torch.zeros_like(answer), 9 * scene], 1),
        torch.cat([turned, torch.zeros_like(scene)], 1),
    ]
    table = kinds.probe_kind(prompts, heard, [said, said], targets)
    english, both = table["English captions"], table["and the kind"]
    assert both["layer"] == 1
    for what in ("color", "shape"):
        assert both[what]["n"] > 0 and not both[what].keys() ^ english[what].keys()
        assert both[what]["score"] > english[what]["score"], what
        assert kinds.gained(table)[what]["score"] > 0
    alone = kinds.probe_kind(prompts, heard[:1], [said], targets)["and the kind"]
    counted = [p.scene_id for p in prompts if is_in("report", p.scene_id)]
    assert alone["shape"]["scenes"].split() == counted, "the other half"
    most = max(known[:, : len(TERMS)].sum(0)) / known[:, : len(TERMS)].sum()
    assert alone["color"]["score"] <= 2 * most + 0.1, "the scene alone tells nothing"


@pytest.mark.parametrize("limit, half", [(1, "report"), (2, "choose")])
def test_a_half_without_prompts_is_refused(limit, half, tmp_path, capsys):
    """Before anything is loaded: there would be nothing to choose a layer on, or to report."""
    told = refusal(capsys, kinds.main, "--llm", "nowhere", "--limit", limit, "--out", tmp_path)
    assert re.search(f"--limit {limit}: no prompt of .* is in the half {half}; expected a la", told)


def test_few_prompts_are_enough():
    assert kinds.read_kinds(3).keys() == kinds.KINDS.keys()


@pytest.mark.slow
def test_the_command(llm_folder, tmp_path, capsys):
    llm = str(llm_folder("qwen2"))
    kinds.main(["--llm", llm, "--limit", "6", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "probe-kinds.json").read_text())
    for name in ("pretrained", "random"):
        assert content[name].keys() == kinds.KINDS.keys()
        for ways in content[name].values():
            for way in kinds.WAYS:
                assert 0 <= ways[way]["color"]["score"] <= 1
    assert "probe-kinds.json" in capsys.readouterr().out
    assert "nowhere" in refusal(capsys, kinds.main, "--llm", "nowhere", "--out", tmp_path)
