"""Which way joint attention goes, and what it needs to know; test_joint.py has that it is right."""

import ast
from pathlib import Path

import pytest
import torch

import attention
from attention import (
    hybrid_mask,
    joint_attention,
    joint_attention_definition,
    matrix_products,
    text_mask,
)
from conftest import random_expert
from extras import rivals
from llm import Context

ROOT = Path(__file__).parent.parent


def made(T: int = 6, N: int = 5, dtype=torch.float64) -> list[torch.Tensor]:
    """img_q, img_k, img_v, txt_k, txt_v of B 3, H 4, G 2, Dk 8, Dv 12."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, N, 8), (2, N, 8), (2, N, 12), (2, T, 8), (2, T, 12)
    return [torch.randn(3, *size, generator=generator, dtype=dtype) for size in sizes]


def test_the_text_mask_is_the_images_rows_of_the_hybrid_mask():
    lengths = torch.tensor([0, 3, 6])
    rows = hybrid_mask(lengths, 6, 5)[:, :, 6:]
    assert torch.equal(text_mask(lengths, 6, 5).expand_as(rows), rows)


@pytest.mark.parametrize("grad", [True, False])
def test_no_mask_is_the_mask_of_rows_that_are_not_padded(grad):
    """Both ways of a CPU: products while it trains, SDPA when it draws."""
    tensors = [x.requires_grad_(grad) for x in made()]
    mask = text_mask(torch.tensor([6, 6, 6]), 6, 5)
    with torch.set_grad_enabled(grad):
        difference = joint_attention(*tensors, None) - joint_attention(*tensors, mask)
    assert difference.abs().max() < 1e-12


def test_no_row_reads_its_padding():
    """Neither the result nor a gradient changes with it, even if it is not finite in places that
    a mask could not cure: here large."""
    lengths = torch.tensor([0, 3, 6])
    mask = text_mask(lengths, 6, 5)
    results = []
    for padding in (0.0, 1e4):
        tensors = made()
        for x in tensors[3:]:
            x[torch.arange(6)[None, None].expand(3, 2, 6) >= lengths[:, None, None]] = padding
        for x in tensors:
            x.requires_grad_()
        out = joint_attention(*tensors, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors[:3])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_queries_of_the_text_alone():
    """The relatives' encoder: N queries, no image keys."""
    q, k, v, txt_k, txt_v = made(T=5)
    lengths = torch.tensor([1, 4, 5])
    out = joint_attention(q, k[:, :, :0], v[:, :, :0], txt_k, txt_v, text_mask(lengths, 5, 0))
    for row, length in enumerate(lengths):
        seen = [x[row : row + 1, :, :length] for x in (txt_k, txt_v)]
        alone = joint_attention_definition(
            q[row : row + 1] * 8**-0.5, *seen, torch.ones(1, 1, 5, length, dtype=torch.bool)
        )
        assert (out[row] - alone[0]).abs().max() < 1e-5, "that one is float32 inside"


def test_products_with_and_without_a_mask_are_sdpa():
    q, k, v, *_ = made()
    rows = q.reshape(3, 2, 10, 8)
    for mask in (None, text_mask(torch.tensor([1, 2, 3]), 3, 2)):
        sdpa = torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        assert (matrix_products(rows, k, v, mask) - sdpa).abs().max() < 1e-12


def test_a_context_knows_whether_a_row_is_padded(tiny_llm):
    llm = tiny_llm("qwen2")
    random_expert(llm)
    empty = llm.context(["", ""])
    assert not empty.padded, "no text at all is no padding"
    some = llm.context(["a red circle", ""])
    assert some.padded
    for context in (empty, some, some.concat(empty), empty.concat(some), empty.concat(empty)):
        T = context.keys[0].shape[2]
        assert context.padded == bool((context.lengths < T).any())
    token = llm.context(["a red circle"]).keys
    T = token[0].shape[2]
    full = Context(token, token, torch.tensor([T]), padded=False)
    longer = [torch.cat([x, x], 2) for x in token]
    two = full.concat(Context(longer, longer, torch.tensor([2 * T]), padded=False))
    assert two.padded and two.lengths.tolist() == [T, 2 * T]
    assert not full.concat(full).padded


def test_an_expert_needs_no_mask_where_no_row_is_padded(tiny_llm):
    llm = tiny_llm("qwen2")
    expert = random_expert(llm)
    context = llm.context(["a red circle"] * 2)
    length = int(context.lengths[0])
    context.keys = [x[:, :, :length] for x in context.keys]
    context.values = [x[:, :, :length] for x in context.values]
    x_t, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    results = []
    for padded in (True, False):
        context.padded = padded
        results.append(expert(x_t, t, context))
    assert (results[0] - results[1]).abs().max() < 1e-6


def test_sdpa_is_the_default_and_other_words_are_refused(monkeypatch):
    monkeypatch.delenv("JOINT_ATTENTION", raising=False)
    for device in ("cpu", "cuda:1", "mps"):
        assert not attention.wants_kernel(None, torch.device(device))
    assert not attention.MEASURED, "no card has measured it"
    assert attention.wants_kernel("triton", torch.device("cpu"))
    monkeypatch.setenv("JOINT_ATTENTION", "triton")
    assert attention.wants_kernel(None, torch.device("cpu"))
    assert not attention.wants_kernel("sdpa", torch.device("cpu"))
    monkeypatch.setenv("JOINT_ATTENTION", "flash")
    with pytest.raises(ValueError, match="JOINT_ATTENTION=flash: expected sdpa or triton"):
        attention.wants_kernel(None, torch.device("cpu"))


def test_measured_cards_take_it(monkeypatch):
    monkeypatch.delenv("JOINT_ATTENTION", raising=False)
    monkeypatch.setattr(attention, "MEASURED", {(9, 0)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert attention.wants_kernel(None, torch.device("cuda", 0))
    assert not attention.wants_kernel(None, torch.device("cuda", 1))
    assert not attention.wants_kernel(None, torch.device("cpu"))


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_default_compiles_without_a_break(dynamic):
    compiled = torch.compile(joint_attention, backend="eager", fullgraph=True, dynamic=dynamic)
    for N in (4, 5):
        tensors = made(N=N)
        mask = text_mask(torch.tensor([0, 3, 6]), 6, N)
        assert torch.equal(compiled(*tensors, mask), joint_attention(*tensors, mask))


@pytest.mark.parametrize("name", ["attention", "flow", "llm", "model", "data", "train", "sample"])
def test_the_core_imports_neither_triton_nor_an_extra_at_its_top(name):
    """They are there for who asks for them."""
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    imported = []
    for line in tree.body:
        if isinstance(line, ast.Import):
            imported += [alias.name for alias in line.names]
        elif isinstance(line, ast.ImportFrom):
            imported.append(line.module)
    assert imported
    assert not [module for module in imported if module.split(".")[0] in ("triton", "extras")]


def test_the_rivals_compute_the_same():
    """The bench times them: each that runs here, and of the others a word why not. Two calls merged
    by their log-sum-exps have exact gradients."""
    tensors = made(T=16, N=20, dtype=torch.float32)
    tensors[4] = tensors[4][..., :8]
    tensors[2] = tensors[2][..., :8]  # SDPA's kernels want one width
    image = [x.requires_grad_() for x in tensors[:3]]
    ways, left_out = rivals.attention_ways(*tensors, torch.tensor([1, 7, 16]))
    assert set(ways) | set(left_out) == set(rivals.RIVALS) and all(left_out.values())
    if not torch.cuda.is_available():
        assert set(left_out) == {"flex", "varlen", "kernel"}
    do = torch.randn(3, 4, 20, 8, generator=torch.Generator().manual_seed(1))
    results = {}
    for name, call in ways.items():
        out = call()
        results[name] = [out, *torch.autograd.grad(out, image, do)]
    for name in set(ways) - {"definition", "sdpa, no row padded"}:
        for ours, exact in zip(results[name], results["definition"]):
            assert (ours - exact).abs().max() < 1e-5, name
    with torch.no_grad():
        assert rivals.backend_of(ways["sdpa"]) == "flash"
        assert rivals.backend_of(ways["definition"]) == "products"
