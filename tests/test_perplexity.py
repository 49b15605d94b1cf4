"""Perplexity of an LLM on the project's own texts: what the library's loss says, and the same
before and after a run beside it."""

import math

import pytest
import torch

import train
from conftest import CPU
from extras.perplexity import TEXTS, main, perplexity
from loading import load_llm


def test_it_is_what_the_librarys_loss_says(tiny_llm):
    llm = tiny_llm("llama")
    results = perplexity(llm)
    assert sorted(results) == ["english", "french", "german", "italian", "spanish"]
    text = (TEXTS / "french.txt").read_text("utf-8").strip()
    nats = []
    for paragraph in text.split("\n\n"):
        ids = torch.tensor([llm.cut(llm.open_ids(paragraph))])
        loss = llm.model(input_ids=ids, labels=ids).loss.item()
        nats += [loss] * (ids.shape[1] - 1)
    value, count = results["french"]
    assert count == len(nats)
    assert value == pytest.approx(math.exp(sum(nats) / count), rel=1e-4)


def test_a_run_beside_it_does_not_move_it(tiny_run, llm_folder, capsys):
    folder = str(llm_folder("qwen2"))
    before = perplexity(load_llm(folder, CPU, torch.float32))
    train.main([*tiny_run, "--steps", "2", "--describe", "0.5"])
    assert perplexity(load_llm(folder, CPU, torch.float32)) == before
    capsys.readouterr()
    main(["--llm", folder, "--device", "cpu", "--dtype", "float32"])
    assert len(capsys.readouterr().out.splitlines()) == 5
