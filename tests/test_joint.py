"""The one idea, proved: attending to the LLM's cache is the joint forward of Mixture-of-
Transformers."""

import shutil

import pytest
import torch

from attention import hybrid_mask, joint_attention, joint_attention_definition, text_mask
from conftest import CPU, DECODERS, random_expert
from extras.joint import joint_forward
from extras.readers import Template
from loading import load_llm
from model import RMSNorm

CAPTIONS = [
    "a red circle",
    "",
    "the heart is to the left of the gold ring",
    "three small teal stars",
]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def noisy_batch(expert, n: int):
    generator = torch.Generator().manual_seed(0)
    shape = (n, expert.channels, expert.image_size, expert.image_size)
    return torch.randn(shape, generator=generator), 0.9 * torch.rand(n, generator=generator)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(
    "depth, layers, template, expose",
    [
        (2, "all", "{}", "all"),
        (3, "all", "{}", "all"),
        (4, "1,2", "{}", "all"),
        (2, "all", "say {}\nin words: a", "all"),
        (3, "all", "say {}\nin words: a", "after"),
    ],
)
def test_cached_path_equals_joint_forward(kind, depth, layers, template, expose, tiny_llm):
    """Both towers in lockstep over the whole joint sequence, against the expert over cached keys
    and values."""
    llm = tiny_llm(kind)
    if template != "{}":
        llm.reader = Template(llm, template, expose)
    expert = random_expert(llm, depth, layers)
    x_t, t = noisy_batch(expert, len(CAPTIONS))
    with torch.no_grad():
        cached = expert(x_t, t, llm.context(CAPTIONS))
    joint = joint_forward(llm, expert, x_t, t, CAPTIONS)
    assert cached.abs().mean() > 0.1, "the towers must say something for this test to mean anything"
    assert largest(cached, joint) < 1e-5, f"largest difference {largest(cached, joint):.2e}"
    other = expert(x_t, t, llm.context(["an orange cross"] * len(CAPTIONS)))
    assert largest(cached, other) > 1e-3, "the caption must reach the picture"


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("template, expose", [("{}", "all"), ("say {}\nin words: a", "after")])
def test_batch_equals_one_by_one(kind, template, expose, tiny_llm):
    """Prompts of different length in one batch, the empty one too, each give what they give
    alone."""
    llm = tiny_llm(kind)
    if template != "{}":
        llm.reader = Template(llm, template, expose)
    expert = random_expert(llm)
    x_t, t = noisy_batch(expert, len(CAPTIONS))
    with torch.no_grad():
        together = expert(x_t, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = expert(x_t[i : i + 1], t[i : i + 1], llm.context([caption]))
            assert largest(together[i : i + 1], alone) < 1e-5, (
                f"{caption!r}: {largest(together[i : i + 1], alone):.2e}"
            )


def test_empty_prompt_without_bos_has_no_token(tiny_llm):
    llm = tiny_llm("qwen2")
    expert = random_expert(llm)
    context = llm.context(["", ""])
    assert context.lengths.tolist() == [0, 0] and context.keys[0].shape[2] == 0
    x_t, t = noisy_batch(expert, 2)
    assert torch.isfinite(expert(x_t, t, context)).all()
    assert tiny_llm("llama").context([""]).lengths.tolist() == [1]


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 7, 9, 8, 8), (2, 6, 3, 5, 4, 8, 12), (2, 2, 1, 0, 6, 16, 4), (1, 4, 4, 3, 1, 5, 3)],
)
def test_fused_equals_definition_with_gradients(shape):
    """The image rows of the definition against the one SDPA call, float64, any Dk and Dv, no text
    at all too."""
    B, H, G, T, N, Dk, Dv = shape
    torch.manual_seed(0)
    txt = [torch.randn(B, G, T, D, dtype=torch.float64) for D in (Dk, Dv)]
    img = [
        torch.randn(B, h, N, D, dtype=torch.float64, requires_grad=True)
        for h, D in ((H, Dk), (G, Dk), (G, Dv))
    ]
    lengths = torch.randint(0, T + 1, (B,))
    mask = text_mask(lengths, T, N)
    fused = joint_attention(*img, *txt, mask)
    joint_q = torch.cat([torch.zeros(B, H, T, Dk, dtype=torch.float64), img[0] * Dk**-0.5], dim=2)
    joint_k, joint_v = torch.cat([txt[0], img[1]], dim=2), torch.cat([txt[1], img[2]], dim=2)
    plain = joint_attention_definition(joint_q, joint_k, joint_v, hybrid_mask(lengths, T, N))[
        :, :, T:
    ]
    assert largest(fused, plain) < 1e-6, (
        f"largest difference {largest(fused, plain):.2e}"
    )  # the definition is float32 inside
    with torch.no_grad():
        inference = joint_attention(*img, *txt, mask)
    assert largest(inference, fused) < 1e-12, (
        f"with and without gradients: {largest(inference, fused):.2e}"
    )
    grad = torch.randn_like(plain)
    for ours, reference in zip(
        torch.autograd.grad(fused, img, grad), torch.autograd.grad(plain, img, grad)
    ):
        assert largest(ours, reference) < 1e-5, (
            f"largest difference of a gradient {largest(ours, reference):.2e}"
        )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager(tiny_llm):
    """--compile changes the speed and not the picture, nor the gradient, at a second length of text
    too."""
    llm = tiny_llm("qwen2")
    expert = random_expert(llm, depth=1)
    compiled = torch.compile(expert)
    x_t, t = noisy_batch(expert, 2)
    for captions in (["a red circle", ""], ["the heart is to the left of the gold ring"] * 2):
        answers = [predict(x_t, t, llm.context(captions)) for predict in (expert, compiled)]
        assert largest(*answers) < 1e-5, f"largest difference {largest(*answers):.2e}"
        gradients = [
            torch.autograd.grad(answer.square().mean(), expert.blocks[0].qkv.weight)[0]
            for answer in answers
        ]
        assert largest(*gradients) < 1e-4 * gradients[0].abs().max(), f"{largest(*gradients):.2e}"


def test_hybrid_mask():
    """Three tokens of text, one of them padding, and two of image."""
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
    assert hybrid_mask(torch.tensor([2]), 3, 2)[0, 0].int().tolist() == expected


@pytest.mark.parametrize("kind, rotary", [("qwen2", 8), ("llama", 8), ("gemma3", 16), ("gpt2", 0)])
def test_rotary_frequencies_are_the_llms_own(kind, rotary, tiny_llm):
    """The same token at every place: the first layer's keys are copies, turned by what we found;
    GPT-2 has no rotation."""
    llm = tiny_llm(kind)
    assert [2 * len(rotary.frequencies) for rotary in llm.rotary] == [rotary] * len(llm.layers)
    if rotary:
        keys = llm.run(torch.full((1, 6), 7)).layers[0].keys
        for place in range(6):
            turned = llm.rotary[0](keys[:, :, :1], torch.tensor([place]))
            assert largest(turned, keys[:, :, place : place + 1]) < 1e-4
    if kind == "gemma3":  # sliding and full layers turn at different speeds
        assert not torch.equal(llm.rotary[0].frequencies, llm.rotary[2].frequencies)


def test_rms_norm_gradient():
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RMSNorm.apply, x)
    expected = torch.nn.functional.rms_norm(x, (6,), eps=0)
    assert largest(RMSNorm.apply(x), expected) < 1e-12


@pytest.mark.slow
def test_the_real_llm(gemma):
    """gemma-3-270m from its package: cached = joint in float32, and it knows a fact."""
    llm = gemma
    expert = random_expert(llm, depth=6, heads=2)
    captions = ["a red circle left of a blue square", "", "un cerchio rosso"]
    x_t, t = noisy_batch(expert, 3)
    with torch.no_grad():
        cached = expert(x_t, t, llm.context(captions))
    joint = joint_forward(llm, expert, x_t, t, captions)
    assert largest(cached, joint) < 1e-5 * cached.abs().max(), (
        f"{largest(cached, joint):.2e} of {cached.abs().max():.2e}"
    )
    ids = torch.tensor([llm.tokenize("Roses are red, violets are")])
    with torch.no_grad():
        word = llm.model(input_ids=ids).logits[0, -1].argmax()
    assert llm.tokenizer.decode(word).strip() == "blue"
    in_bfloat16 = load_llm("gemma-3-270m", CPU, torch.bfloat16)
    own = dict(llm.model.base_model.rotary_emb.named_buffers())
    for kind, *found in zip(llm.model.config.layer_types, llm.rotary, in_bfloat16.rotary):
        for rotary in found:  # exact in bfloat16 too, where the weights are rounded
            assert torch.equal(rotary.frequencies, own[f"{kind}_inv_freq"]) and torch.equal(
                rotary.order, torch.arange(256)
            )
