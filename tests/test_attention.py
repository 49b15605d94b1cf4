"""The Triton kernel against the definition in float64: on a GPU, or on a CPU in Triton's interpreter."""

import pytest
import torch

from attention import fused_attention, fused_attention_backward, hybrid_mask, joint_attention, joint_attention_definition
from conftest import random_expert

pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not know bfloat16
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {})
SHAPES = [  # B, H, G, T, N, Dk, Dv
    (3, 4, 2, 7, 9, 8, 8),
    (2, 6, 3, 5, 4, 8, 12),
    (2, 2, 1, 0, 6, 16, 4),  # no text at all
    (1, 4, 4, 3, 1, 5, 3),  # one image token, widths that are no powers of two
    (2, 4, 1, 70, 100, 80, 80),  # several blocks of text, rows and keys
    (2, 2, 1, 16, 64, 256, 256),  # gemma-3-270m and the default expert
    (1, 14, 2, 33, 65, 64, 64),  # Qwen2.5-0.5B's heads
    (2, 3, 3, 65, 33, 192, 128),  # latent attention: Dk and Dv differ
    (5, 1, 1, 130, 16, 24, 16),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel does not write to is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def inputs(shape, dtype, requires_grad: bool = True):
    """img_q, img_k, img_v, txt_k, txt_v as the models make them (heads and tokens swapped in memory), and the lengths."""
    B, H, G, T, N, Dk, Dv = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (H, N, Dk), (G, N, Dk), (G, N, Dv), (G, T, Dk), (G, T, Dv)
    made = [torch.randn(B, n, h, d, generator=generator).to(DEVICE, dtype).transpose(1, 2) for h, n, d in sizes]
    lengths = torch.randint(0, T + 1, (B,), generator=generator).to(DEVICE)
    return [x.requires_grad_(requires_grad) for x in made], lengths


def definition(img_q, img_k, img_v, txt_k, txt_v, lengths):
    """The image rows of the joint definition, in float64."""
    T, N = txt_k.shape[2], img_q.shape[2]
    joint_k, joint_v = torch.cat([txt_k, img_k], 2), torch.cat([txt_v, img_v], 2)
    groups = img_q.shape[1] // img_k.shape[1]
    scores = img_q * img_q.shape[-1] ** -0.5 @ joint_k.repeat_interleave(groups, 1).transpose(-1, -2)
    weights = scores.masked_fill(~hybrid_mask(lengths, T, N)[:, :, T:], float("-inf")).softmax(-1)
    return weights @ joint_v.repeat_interleave(groups, 1)


def relative(ours, exact) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_definition_with_gradients(shape, dtype):
    made, lengths = inputs(shape, dtype)
    out = joint_attention(*made, lengths, backend="triton")
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in made]
    expected = definition(*exact, lengths)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    errors = [relative(out, expected)]
    ours, theirs = torch.autograd.grad(out, made, grad), torch.autograd.grad(expected, exact, grad.double())
    errors += [relative(a, b) for a, b in zip(ours, theirs)]
    assert max(errors) < BOUNDS[dtype], errors
    for gradient in ours[3:]:
        padding = torch.arange(shape[3], device=DEVICE) >= lengths[:, None]  # (B, T)
        assert not gradient.transpose(1, 2)[padding].any(), "padding has no gradient"


def test_the_definition_here_is_the_one_in_attention():
    made, lengths = inputs(SHAPES[1], torch.float64, requires_grad=False)
    T = SHAPES[1][3]
    joint_q = torch.cat([torch.zeros_like(made[0][:, :, :1]).expand(-1, -1, T, -1), made[0] * made[0].shape[-1] ** -0.5], 2)
    joint_k, joint_v = torch.cat([made[3], made[1]], 2), torch.cat([made[4], made[2]], 2)
    plain = joint_attention_definition(joint_q, joint_k, joint_v, hybrid_mask(lengths, T, SHAPES[1][4]))[:, :, T:]
    assert (plain - definition(*made, lengths)).abs().max() < 1e-6, "that one is float32 inside"


def test_text_gradients_are_computed_only_when_asked_for():
    made, lengths = inputs(SHAPES[0], torch.float32, requires_grad=False)
    out, lse = fused_attention(*made, lengths)
    sizes = [x.numel() for x in fused_attention_backward(torch.ones_like(out), out, lse, *made, lengths, False)]
    assert sizes == [x.numel() for x in made[:3]] + [0, 0]
    trained = [x.clone().requires_grad_() for x in made[:3]]
    joint_attention(*trained, *made[3:], lengths, backend="triton").sum().backward()
    assert all(x.grad is not None for x in trained) and made[3].grad is None


def test_it_is_a_proper_operator():
    """torch's own checks: the fake implementation, the autograd registration, tracing with dynamic shapes."""
    made, lengths = inputs(SHAPES[0], torch.float32)
    torch.library.opcheck(fused_attention, (*made, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_the_expert_with_the_kernel(kind, tiny_llm, monkeypatch):
    """Through the whole expert: the kernel and SDPA, eager and traced, the picture and every gradient."""
    llm = tiny_llm(kind)
    expert = random_expert(llm).to(DEVICE)
    context = llm.context(["a red circle", "", "the heart is to the left of the gold ring"])
    context.keys, context.values = ([x.to(DEVICE) for x in xs] for xs in (context.keys, context.values))
    context.lengths = context.lengths.to(DEVICE)
    x_t, t = torch.randn(3, 3, 16, 16, device=DEVICE), torch.rand(3, device=DEVICE)
    results = {}
    for name, predict in (("sdpa", expert), ("triton", expert), ("traced", torch.compile(expert, backend="aot_eager"))):
        monkeypatch.setenv("JOINT_ATTENTION", "sdpa" if name == "sdpa" else "triton")
        expert.zero_grad()
        out = predict(x_t, t, context)
        out.square().mean().backward()
        results[name] = [out.detach(), *(p.grad.clone() for p in expert.parameters())]
    for name in ("triton", "traced"):
        errors = [relative(a, b.double()) for a, b in zip(results[name], results["sdpa"])]
        assert max(errors) < 1e-4, (name, max(errors))
