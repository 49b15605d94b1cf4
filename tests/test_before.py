"""Checkpoints that were written before the code moved into the house draw the pictures they drew.

tests/before/NAME/model.safetensors: beside the tiny qwen2 of conftest.py, one for each way in which
a caption reaches a tower. `mot` is a run of three steps, with its train_state; all others have
random weights, loud enough that another caption is another picture. drawn.png: what the code of
that day drew, in float32, four prompts side by side. (No dense bridge: 2 MB of embeddings.)
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from assemble import llm_of
from checkpoint import load_expert
from conftest import CPU
from sample import draw

BEFORE = Path(__file__).parent / "before"
PROMPTS = ["a red circle", "two small teal stars", "", "un cerchio rosso"]
SEEDS = [0, 1, 2, 3]


@pytest.mark.parametrize("folder", sorted(BEFORE.iterdir()), ids=lambda folder: folder.name)
def test_an_old_checkpoint_draws_the_same(folder, llm_folder):
    expert = load_expert(str(folder), CPU)
    assert expert.made_for["llm"] == "tiny-qwen2", "which lies elsewhere now"
    llm = llm_of(expert, str(llm_folder("qwen2")), CPU, torch.float32)
    # even steps, all chance in the first noise, and more guidance
    as_then = {"steps": 4, "renoise": 0, "guidance": 3.0}
    drawn = np.hstack(draw(expert, llm, PROMPTS, SEEDS, **as_then)).astype(int)
    then = np.asarray(Image.open(folder / "drawn.png")).astype(int)
    assert then.shape == (16, 4 * 16, 3)
    difference = abs(drawn - then).max()
    assert difference <= 1, f"{folder.name}: {difference} levels of 255"

    # with another caption it would not be: what was read reaches the picture
    if folder.name != "mot":
        other = np.hstack(draw(expert, llm, PROMPTS[::-1], SEEDS, **as_then)).astype(int)
        assert abs(other - then).max() > 10, folder.name


def test_every_way_is_among_them():
    names = {folder.name for folder in BEFORE.iterdir()}
    bridges = {"mot", "last", "kv", "hsi", "lap", "metaqueries", "mirror"}
    assert names == bridges | {"mot-random", "template", "think"}
