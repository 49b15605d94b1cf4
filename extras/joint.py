"""The plain joint forward of Mixture-of-Transformers: what the cache saves us from, and what it is
proved equal to (tests/test_joint.py). extras/bench.py times it.
"""

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import hybrid_mask, joint_attention_definition, matrix_products
from llm import Enough, FrozenLLM
from model import ImageExpert


def joint_forward(
    llm: FrozenLLM,
    expert: ImageExpert,
    x_t: Tensor,
    t: Tensor,
    captions: list[str],
    attention: Callable = joint_attention_definition,
) -> Tensor:
    """Both towers in lockstep, one softmax a layer over [text; image] -> velocity like x_t.

    The LLM runs over the captions with its attention replaced by the joint one; whenever it reaches
    a layer that the expert reads, the image tower takes its step of that layer too; after the last
    of them it stops. For LLMs whose attention is a plain softmax, and readers that answer with
    tokens. Gradients reach the image tower alone: the LLM's weights ask for none.
    attention: joint_attention_definition or joint_fast.
    """
    txt_ids, lengths, starts = tokens_of(llm, captions)
    img, modulations, last = expert.tokens_of(x_t, t)

    # who sees whom, and which blocks read which layer
    T = txt_ids.shape[1]
    N = img.shape[1]
    mask = hybrid_mask(lengths, T, N)
    shown = torch.arange(T + N, device=llm.device) >= starts[:, None, None, None]
    img_mask = mask[:, :, T:] & shown
    tower = {}  # layer of the LLM -> the blocks that read it
    for block, modulation in zip(expert.blocks, modulations):
        place = llm.cache_index[block.layer.index]
        tower.setdefault(place, []).append((block, modulation))

    def attend(module, txt_q, txt_k, txt_v, attention_mask, scaling=None, **_):
        nonlocal img
        if scaling is None:
            scaling = txt_q.shape[-1] ** -0.5
        txt_q = txt_q * scaling
        joint_k = txt_k
        joint_v = txt_v
        for block, modulation in tower.get(module.layer_idx, []):
            img_q, img_k, img_v = block.project(img, modulation)
            rotary = llm.rotary[block.layer.index]
            img_q = rotary(img_q * img_q.shape[-1] ** -0.5, lengths)  # the place after the text
            img_k = rotary(img_k, lengths)
            joint_k = torch.cat([txt_k, img_k], dim=2)  # (B, G, T+N, Dk)
            joint_v = torch.cat([txt_v, img_v], dim=2)  # (B, G, T+N, Dv)
            seen_k = torch.cat([block.scale_keys(txt_k), img_k], dim=2)
            img = block.finish(img, attention(img_q, seen_k, joint_v, img_mask), modulation)
        if module.layer_idx == max(tower):
            raise Enough

        # the text's rows of the same softmax; a call of its own because the towers may differ in
        # their number of query heads. They see no image, so the fast way does not ask it, and no
        # gradient passes.
        S = T if attention is joint_fast else joint_k.shape[2]
        joint_k = joint_k[:, :, :S].detach()
        joint_v = joint_v[:, :, :S].detach()
        txt_out = attention(txt_q, joint_k, joint_v, mask[:, :, :T, :S])
        return txt_out.transpose(1, 2), None

    run_with_attention(llm, txt_ids, attend)
    return expert.velocity_of(img, last, x_t, t)


def tokens_of(llm: FrozenLLM, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The token ids (B, T), how many are valid (B,), and the first that the image may look at."""
    readings = [llm.read(caption) for caption in captions]
    rows = [torch.tensor(reading.ids, dtype=torch.long) for reading in readings]
    lengths = torch.tensor([len(row) for row in rows], device=llm.device)
    starts = torch.tensor([reading.start for reading in readings], device=llm.device)
    return pad_sequence(rows, batch_first=True).to(llm.device), lengths, starts


def run_with_attention(llm: FrozenLLM, txt_ids: Tensor, attend: Callable, **inputs):
    """Run the LLM over txt_ids (B, T) with this function as its attention. -> its output, without
    the head; None where `attend` has had enough before."""
    before = llm.model.config._attn_implementation
    transformers.AttentionInterface.register("joint", attend)
    try:
        llm.model.set_attn_implementation("joint")
        with suppress(Enough):
            return llm.model.base_model(input_ids=txt_ids, use_cache=False, **inputs)
    finally:
        llm.model.set_attn_implementation(before)


def joint_fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """joint_attention_definition as one would train with it: in the run's own dtype, by SDPA, or
    where joint_attention does without it by the same products. Grouped queries are more rows that
    ask the same keys."""
    B, H, R, Dk = q.shape
    G = k.shape[1]
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    rows = q.reshape(B, G, H // G * R, Dk)
    if q.requires_grad and q.device.type == "cpu":  # image rows, which all see the same
        out = matrix_products(rows * Dk**0.5, k, v, mask[:, :, :1])
    else:
        mask = mask.repeat(1, 1, H // G, 1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=1.0)
    return out.reshape(B, H, R, -1)
