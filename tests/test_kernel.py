"""The Triton kernel: in Triton's interpreter on a CPU, or on a GPU, against the definition in
float64; and compiled ahead of time for the cards that are not here."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from attention import hybrid_mask, joint_attention, text_mask
from cli import pick_dtype
from conftest import random_expert

pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")

from extras import fused, trust
from extras.fused import fused_attention, fused_attention_backward

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU float32 is SDPA's, and the interpreter does not know bfloat16.
BOUNDS = {torch.float16: 5e-3}
BOUNDS |= {torch.bfloat16: 2e-2} if DEVICE == "cuda" else {torch.float32: 1e-5}
FIRST = next(iter(BOUNDS)) if DEVICE == "cuda" else torch.float32
SHAPES = [  # B, H, G, T, N, Dk, Dv
    (3, 4, 2, 7, 9, 8, 8),
    (2, 6, 3, 5, 4, 8, 12),
    (2, 2, 1, 0, 6, 16, 4),  # no text at all
    (1, 4, 4, 3, 1, 5, 3),  # one image token, widths that are no powers of two
    (2, 2, 1, 70, 100, 80, 80),  # several blocks of text, rows and keys
    (2, 2, 1, 16, 64, 256, 256),  # gemma-3-270m and the default expert
    (1, 7, 1, 33, 65, 64, 64),  # Qwen2.5-0.5B's heads
    (2, 2, 2, 65, 33, 192, 128),  # latent attention: Dk and Dv differ
    (4, 1, 1, 130, 16, 24, 16),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel does not write to is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.fixture
def forgotten():
    """No trial has been made yet, nor is one remembered."""
    trust.kernel_agrees.cache_clear()
    yield
    trust.kernel_agrees.cache_clear()


def inputs(shape, dtype, requires_grad: bool = True):
    """img_q, img_k, img_v, txt_k, txt_v as the models make them (heads and tokens swapped in
    memory), and the lengths."""
    B, H, G, T, N, Dk, Dv = shape
    generator = torch.Generator().manual_seed(0)
    made = []
    for heads, tokens, width in ((H, N, Dk), (G, N, Dk), (G, N, Dv), (G, T, Dk), (G, T, Dv)):
        x = torch.randn(B, tokens, heads, width, generator=generator).to(DEVICE, dtype)
        made.append(x.transpose(1, 2).requires_grad_(requires_grad))
    lengths = torch.randint(0, T + 1, (B,), generator=generator, dtype=torch.int32)
    return made, lengths.to(DEVICE)


def definition(img_q, img_k, img_v, txt_k, txt_v, lengths):
    """The image rows of the joint definition, in float64."""
    T = txt_k.shape[2]
    N = img_q.shape[2]
    group = img_q.shape[1] // img_k.shape[1]
    joint_k = torch.cat([txt_k, img_k], 2).repeat_interleave(group, 1)
    joint_v = torch.cat([txt_v, img_v], 2).repeat_interleave(group, 1)
    scores = img_q * img_q.shape[-1] ** -0.5 @ joint_k.transpose(-1, -2)
    seen = hybrid_mask(lengths, T, N)[:, :, T:]
    if not img_k.shape[2]:
        seen = seen[..., :T]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ joint_v


def relative(ours, exact) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def errors_of(made, lengths) -> list[float]:
    """Of the output and of all gradients."""
    out = fused_attention(*made, lengths)[0]
    exact = [x.detach().double().requires_grad_() for x in made]
    expected = definition(*exact, lengths)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(out.device, out.dtype)
    ours = torch.autograd.grad(out, made, grad)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for gradient in ours[3:]:
        padding = torch.arange(gradient.shape[2], device=out.device) >= lengths[:, None]  # (B, T)
        assert not gradient.transpose(1, 2)[padding].any(), "padding has no gradient"
    return [relative(a, b) for a, b in zip([out, *ours], [expected, *theirs])]


CASES = [(shape, FIRST) for shape in SHAPES]
CASES += [(shape, dtype) for dtype in BOUNDS for shape in SHAPES[4:6] if dtype != FIRST]


@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_kernel_equals_definition_with_gradients(shape, dtype):
    made, lengths = inputs(shape, dtype)
    errors = errors_of(made, lengths)
    assert all(e < BOUNDS[dtype] for e in errors), errors


def test_queries_of_the_text_alone():
    """N queries and no image keys, as in the relatives' encoder: nothing is read out of bounds."""
    made, _ = inputs((2, 2, 1, 9, 9, 8, 8), FIRST)
    made[1] = made[1][:, :, :0]
    made[2] = made[2][:, :, :0]
    errors = errors_of(made, torch.tensor([9, 2], dtype=torch.int32, device=DEVICE))
    assert all(e < BOUNDS[FIRST] for e in errors), errors
    out, lse = fused_attention(*made, torch.tensor([9, 0], dtype=torch.int32, device=DEVICE))
    assert (out[1] == 0).all() and out[0].isfinite().all(), "who sees nothing gets zeros"


def test_a_row_is_the_same_to_the_last_bit_whatever_stands_beside_it():
    """In another batch, at another place in it, with more padding, with garbage for padding."""
    made, _ = inputs((3, 2, 1, 40, 70, 16, 16), FIRST)
    lengths = torch.tensor([40, 7, 0], dtype=torch.int32, device=DEVICE)
    do = torch.randn(3, 2, 70, 16).to(DEVICE, FIRST)
    out, lse = fused_attention(*made, lengths)
    together = [out, *torch.autograd.grad(out, made, do)]
    for row in range(3):
        length = int(lengths[row])
        alone = [x.detach()[row : row + 1] for x in made]
        longer = torch.full((1, 1, 90, 16), float("nan"), dtype=FIRST, device=DEVICE)
        for i in (3, 4):
            padded = longer.clone()
            padded[:, :, :length] = alone[i][:, :, :length]
            alone[i] = padded
        alone = [x.requires_grad_() for x in alone]
        own = fused_attention(*alone, lengths[row : row + 1])[0]
        gradients = torch.autograd.grad(own, alone, do[row : row + 1])
        assert torch.equal(own[0], out[row])
        for name, a, b in zip("qkvkv", gradients, together[1:]):
            tokens = min(a.shape[2], b.shape[2])
            assert torch.equal(a[0, :, :tokens], b[row, :, :tokens]), name
            assert not a[0, :, tokens:].any()


def test_text_gradients_are_computed_only_when_asked_for():
    made, lengths = inputs(SHAPES[0], FIRST, requires_grad=False)
    out, lse = fused_attention(*made, lengths)
    gradients = fused_attention_backward(torch.ones_like(out), out, lse, *made, lengths, False)
    assert [x.numel() for x in gradients] == [x.numel() for x in made[:3]] + [0, 0]
    trained = [x.clone().requires_grad_() for x in made[:3]]
    fused_attention(*trained, *made[3:], lengths)[0].sum().backward()
    assert all(x.grad is not None for x in trained) and made[3].grad is None


def test_it_is_a_proper_operator():
    """torch's own checks: the fakes, the autograd registration, tracing with dynamic shapes."""
    made, lengths = inputs((1, 2, 1, 3, 2, 8, 8), FIRST)
    torch.library.opcheck(fused_attention, (*made, lengths), rtol=1e-4, atol=1e-5)


def test_what_32_bits_cannot_address_is_sdpas(monkeypatch):
    monkeypatch.setattr(trust, "in_this_graph", lambda *what: True)
    far = torch.empty(0, dtype=FIRST).as_strided((0, 2, 9, 8), (1, 8, 2**28, 1))
    assert trust.kernel_attention(far, far, far, far, far, None) is None


# --------------------------------------------------------------------------------------------------
# trust


ASKED = (3, 4, 2, 7, 9, 8, 8)


def attend(made, lengths, **options):
    return joint_attention(*made, text_mask(lengths, ASKED[3], ASKED[4]), **options)


def scale_it(monkeypatch):
    monkeypatch.setattr(fused, "LOG2_E", 1.0)


def fail_to_launch(monkeypatch):
    def launch(*args):
        raise RuntimeError("out of resource: shared memory\nRequired: 131072, limit: 101376")

    monkeypatch.setattr(fused, "launch", launch)


def lose_a_gradient(monkeypatch):
    correct = fused.fused_attention_backward

    def backward(*args):
        dq, dk, *others = correct(*args)
        return dq, torch.full_like(dk, float("nan")), *others

    monkeypatch.setattr(fused, "fused_attention_backward", backward)


def lose_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


FAULTS = [
    (scale_it, "in a trial the output differs by .* % from SDPA"),
    (fail_to_launch, "RuntimeError: out of resource: shared memory Required: 131072"),
    (lose_a_gradient, "in a trial the gradient of img_k differs by nan %"),
    (lose_triton, "ModuleNotFoundError: .*triton"),
]


@pytest.mark.parametrize("sabotage, said", FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_kernel_that_is_wrong_here_is_not_used(sabotage, said, monkeypatch, forgotten):
    """One warning, and SDPA's own numbers, eager and in a graph without a break."""
    made, lengths = inputs(ASKED, FIRST)
    expected = attend(made, lengths, backend="sdpa")
    sabotage(monkeypatch)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=said) as warned:
        results = [compiled(made, lengths, backend="triton")]
        results.append(attend(made, lengths, backend="triton"))
    assert len([w for w in warned if "Triton kernel" in str(w.message)]) == 1
    for result in results:
        assert torch.equal(result, expected)
        assert all(g.isfinite().all() for g in torch.autograd.grad(result.sum(), made))


def test_a_kernel_that_agrees_is_used_where_it_is_asked_for(monkeypatch, forgotten):
    """Eager, in inference, and in a graph without a break, of symbols; nothing is asked twice."""
    made, lengths = inputs(ASKED, FIRST)
    used = []
    correct = fused.launch
    monkeypatch.setattr(fused, "launch", lambda *args: used.append(args[0]) or correct(*args))
    expected = attend(made, lengths)
    assert not used, "SDPA is the default"
    monkeypatch.setenv("JOINT_ATTENTION", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.inference_mode():
            assert relative(attend(made, lengths), expected.double()) < BOUNDS[FIRST]
        asked = len(used)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
        results = [attend(made, lengths), compiled(made, lengths)]
    assert len(used) == asked + 2, "one launch each, and no other trial"
    for result in results:
        assert relative(result, expected.double()) < BOUNDS[FIRST]
    before = len(used)
    attend(made, lengths, backend="sdpa")
    assert len(used) == before


def test_where_it_cannot_run():
    dtype = torch.bfloat16
    cpu = torch.device("cpu")
    assert "heads are 512 wide" in trust.why_not(cpu, dtype, 512, 64, 1)
    assert "it needs an NVIDIA GPU, not meta" in without_interpreter(torch.device("meta"), dtype)


def without_interpreter(device, dtype) -> str:
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        return trust.why_not(device, dtype, 64, 64, 1)


CARDS = [  # compute capability, what the driver says of it
    ((7, 5), torch.float16, "compute capability 8.0"),
    ((8, 0), torch.float32, "float32 has no tensor cores"),
    ((12, 0), torch.float64, "float64 has no tensor cores"),
]


@pytest.mark.parametrize("capability, dtype, said", CARDS)
def test_cards_and_dtypes_that_are_sdpas(capability, dtype, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert said in trust.why_not(torch.device("cuda", 1), dtype, 64, 64, 1)


def test_amd_takes_sdpa(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    said = trust.why_not(torch.device("cuda"), torch.bfloat16, 64, 64, 1)
    assert "NVIDIA" in said


def test_a_card_that_emulates_bfloat16_takes_float32(monkeypatch):
    """A T4, which says that it supports it."""

    def supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert pick_dtype("auto", torch.device("cuda"))[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_dtype("auto", torch.device("cuda"))[0] == torch.bfloat16


def test_the_expert_with_the_kernel(tiny_llm, monkeypatch):
    """Through the whole expert: the kernel and SDPA, eager and traced, the picture and every
    gradient, those of the text's gains too."""
    llm = tiny_llm("qwen2")
    expert = random_expert(llm).to(DEVICE)
    context = llm.context(["a red circle", "", "the heart is to the left"])
    context.keys = [x.to(DEVICE) for x in context.keys]
    context.values = [x.to(DEVICE) for x in context.values]
    context.lengths = context.lengths.to(DEVICE)
    x_t = torch.randn(3, 3, 16, 16, device=DEVICE)
    t = torch.rand(3, device=DEVICE)
    traced = torch.compile(expert, backend="aot_eager")
    results = {}
    for name, predict in (("sdpa", expert), ("triton", expert), ("traced", traced)):
        monkeypatch.setenv("JOINT_ATTENTION", "sdpa" if name == "sdpa" else "triton")
        expert.zero_grad()
        out = predict(x_t, t, context)
        out.square().mean().backward()
        results[name] = [out.detach(), *(p.grad.clone() for p in expert.parameters())]
    for name in ("triton", "traced"):
        errors = [relative(a, b.double()) for a, b in zip(results[name], results["sdpa"])]
        assert all(e < 1e-4 for e in errors), (name, errors)


# --------------------------------------------------------------------------------------------------
# cards that are not here

ROOT = Path(__file__).parent.parent
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
EVERY = list(itertools.product(SHARED_KB, (64, 128, 256), (0, 1, 2)))  # card, width, kernel
# A compilation takes a second or more. Each card has each kernel and each width once; together the
# cards that share a table (80, 86 and 120) have all of it.
SOME = [(80, 64, 0), (80, 128, 1), (80, 256, 2), (86, 256, 0), (86, 64, 1), (86, 128, 2)]
SOME += [(120, 128, 0), (120, 256, 1), (120, 64, 2), (90, 256, 0), (90, 64, 1), (90, 128, 2)]
SOME += [(100, 64, 0), (100, 128, 1), (100, 256, 2)]
VARIANTS = EVERY if os.environ.get("KERNEL_EVERY_CARD") else SOME


def test_compiled_ahead_of_time_it_fits_every_card():
    """Triton and ptxas need no GPU. Shared memory is within the card's, and no loop spills
    registers to memory. KERNEL_EVERY_CARD=1 takes every card at every width."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/ahead_of_time.py", json.dumps(VARIANTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == len(VARIANTS)
    for one in compiled:
        assert 0 < one["shared"] <= 1024 * SHARED_KB[one["card"]], one
        assert one["loops"] > 0, one
        assert one["spills in loops"] == 0, one
