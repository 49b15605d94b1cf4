"""Joint attention of a frozen text tower and a trainable image tower: Mixture-of-Transformers with one softmax.

Two ways to compute the same thing:

    joint_attention_definition   the whole joint sequence, text and image queries, hybrid mask, plain float32 softmax
    joint_attention              image queries only, over the text keys and values that the LLM has already computed: one call
                                 of SDPA, or on a GPU the Triton kernel below, which reads both where they lie

They agree because no text token ever sees an image token: the text half of the definition does not depend on the image
at all, so it is computed once per caption and kept. tests/test_joint.py proves it through whole models.

Shapes: B images, T text tokens (right-padded), N image tokens, H query heads, G key/value heads (H a multiple of G:
grouped queries), Dk and Dv head widths. Everything is (B, heads, tokens, head_width).
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without a GPU: the kernels are there to be read
    triton = tl = None
jit, constexpr = (triton.jit, tl.constexpr) if triton else (lambda kernel: kernel, int)


def hybrid_mask(lengths: Tensor, T: int, N: int) -> Tensor:
    """Who may look at whom in [text; image]: (B, 1, T+N, T+N) bool, True where the row sees the column.

    Text is causal and never sees the image; an image token sees the valid text and the whole image.
    lengths: (B,) valid text tokens of each row. A padded token sees itself too, so that no row is empty.
    """
    device = lengths.device
    place = torch.arange(T + N, device=device)
    is_image = place >= T
    valid = is_image | (place < lengths[:, None])  # (B, T+N)
    causal = place[:, None] >= place[None, :]
    sees = torch.where(is_image[:, None], torch.ones_like(causal), causal & ~is_image[None, :])
    padded_self = torch.eye(T + N, dtype=torch.bool, device=device) & ~valid[:, None, :]
    return ((sees & valid[:, None, :]) | padded_self)[:, None]


def joint_attention_definition(joint_q: Tensor, joint_k: Tensor, joint_v: Tensor, mask: Tensor) -> Tensor:
    """One softmax over the joint sequence, as Mixture-of-Transformers defines it, in float32 and without any trick.

    joint_q (B, H, T+N, Dk), already multiplied by its scale (text and image towers may scale differently);
    joint_k (B, G, T+N, Dk), joint_v (B, G, T+N, Dv), mask from hybrid_mask. Returns (B, H, T+N, Dv).
    """
    groups = joint_q.shape[1] // joint_k.shape[1]
    joint_k = joint_k.repeat_interleave(groups, dim=1)  # (B, H, T+N, Dk)
    joint_v = joint_v.repeat_interleave(groups, dim=1)  # (B, H, T+N, Dv)
    scores = joint_q.float() @ joint_k.float().transpose(-2, -1)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ joint_v.float()).to(joint_v.dtype)


def joint_attention(
    img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor, lengths: Tensor, backend: str | None = None
) -> Tensor:
    """The image rows of the definition: softmax(q [k_txt; k_img]^T / sqrt(Dk)) [v_txt; v_img].

    img_q (B, H, N, Dk), img_k (B, G, N, Dk), img_v (B, G, N, Dv), txt_k (B, G, T, Dk), txt_v (B, G, T, Dv);
    lengths (B,) valid text tokens of each row. Returns (B, H, N, Dv). backend: "triton" or "sdpa"; by default the variable
    JOINT_ATTENTION, or Triton on a GPU where there is one and no head is wider than 256, and SDPA otherwise.
    """
    fits = triton is not None and img_q.is_cuda and max(img_q.shape[-1], img_v.shape[-1]) <= 256
    fits = fits and img_q.shape[2] == img_k.shape[2]
    if (backend or os.environ.get("JOINT_ATTENTION") or ("triton" if fits else "sdpa")) == "triton":
        return fused_attention(img_q, img_k, img_v, txt_k.to(img_k.dtype), txt_v.to(img_v.dtype), lengths)[0]
    B, H, N, _ = img_q.shape
    G = img_k.shape[1]
    joint_k = torch.cat([txt_k.to(img_k.dtype), img_k], dim=2)  # (B, G, T+N, Dk)
    joint_v = torch.cat([txt_v.to(img_v.dtype), img_v], dim=2)  # (B, G, T+N, Dv)
    img_q = img_q.reshape(B, G, H // G * N, -1)  # grouped queries are just more rows that ask the same keys
    mask = text_mask(lengths, txt_k.shape[2], img_k.shape[2])
    if img_q.device.type == "cpu" and torch.is_grad_enabled():
        out = matrix_products(img_q, joint_k, joint_v, mask)
    else:
        out = F.scaled_dot_product_attention(img_q, joint_k, joint_v, attn_mask=mask)
    return out.reshape(B, H, N, -1)


def matrix_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA written out, for training on a CPU: half the time of SDPA's forward and backward there (at N = 16 and 64).

    q (B, G, R, Dk), k (B, G, S, Dk), v (B, G, S, Dv), mask (B, 1, 1, S) -> (B, G, R, Dv).
    """
    B, G, R, Dk = q.shape
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    hidden = hidden.expand(B, G, 1, -1).flatten(0, 1)  # (B G, 1, S)
    scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=Dk**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).unflatten(0, (B, G))


def text_mask(lengths: Tensor, T: int, N: int) -> Tensor:
    """What an image token sees: the valid text and the whole image. (B, 1, 1, T+N) bool, the same for every layer."""
    place = torch.arange(T + N, device=lengths.device)
    return ((place < lengths[:, None]) | (place >= T))[:, None, None, :]


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) in the half-split layout of Hugging Face's Llama family.

    x (B, heads, tokens, D); angle (B, R/2) in radians, one position for all tokens of a row. The first R of the D
    dimensions turn, in pairs (i, i + R/2); the rest stay (partial rotary). R = 0 leaves x as it is.
    """
    half = angle.shape[-1]
    cos, sin = angle.cos().to(x.dtype)[:, None, None], angle.sin().to(x.dtype)[:, None, None]  # (B, 1, 1, R/2)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass
class Rotary:
    """How one layer's keys turn with the position: by `frequencies` (R/2,), in radians per token, in the dimensions that
    `order` (Dk,) brings to the front, half-split as `rotate` has them. R = 0 where they do not turn."""

    frequencies: Tensor
    order: Tensor

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, heads, tokens, Dk), turned forward by positions (B,)."""
        if not len(self.frequencies):
            return x
        return rotate(x[..., self.order], positions[:, None] * self.frequencies)[..., self.order.argsort()]


def find_rotary(here: Tensor, moved: Tensor, shift: int, known: list[Tensor]) -> Rotary:
    """How a layer's keys (B, G, T, Dk) turn, from what they are `here` and with the text `moved` on by `shift` positions: where
    positions are relative, nothing else changes.

    Every layout that models have is tried with the `known` frequencies: Llama's halves and GPT-J's pairs, at the front or
    (latent attention) at the end of the width, either way round. Where none explains half of the change (absolute positions,
    ALiBi), or nothing changes, the layer has no rotation.
    """
    width, device = here.shape[-1], here.device
    best = Rotary(torch.zeros(0, device=device), torch.arange(width, device=device))
    least, positions = 0.5 * (here - moved).norm(), torch.full((len(here),), shift, device=device)
    for frequencies in (f for f in known if 0 < 2 * len(f) <= width):
        turning = torch.arange(2 * len(frequencies), device=device)
        for layout in (turning, torch.cat([turning[::2], turning[1::2]])):
            for start in {0, width - len(turning)}:
                rest = [i for i in range(width) if not start <= i < start + len(turning)]
                order = torch.cat([layout + start, torch.tensor(rest, dtype=torch.long, device=device)])
                for candidate in (Rotary(frequencies, order), Rotary(-frequencies, order)):
                    if (error := (candidate(here, positions) - moved).norm()) < least:
                        best, least = candidate, error
    return best


# ---------------------------------------------------------------------------------------------------------------------
# the same in one pass over memory: FlashAttention (Dao et al. 2022) with two sources of keys
#
# Softmax needs the largest score and the sum of all before it can weigh a single value. Kept for what has been seen so far,
# both can be mended whenever a larger score turns up, so that the scores are never written to memory (Milakov & Gimelshein
# 2018). A program takes a block of rows (image queries) and walks over the text's keys, then over the image's, block by
# block. The text's end is its length: no mask, no padding read, nothing concatenated. The H/G heads that share a key are
# one long list of rows, so keys are read once for all of them.
#
# Letters: M = H/G N rows for each (b, g); BM, BN rows and keys in a block; BK, BV the head widths, rounded up to powers of 2.
# *_at: a tensor's strides. Scores are kept in powers of two, exp(x) = exp2(x log2 e): that is what the hardware computes.


@jit
def _load(X, stride, i, count, width, BLOCK: constexpr):
    """Rows i (below count) of a matrix whose rows lie `stride` apart, zeros elsewhere: (len(i), BLOCK)."""
    d = tl.arange(0, BLOCK)
    return tl.load(X + i[:, None] * stride + d[None, :], mask=(i < count)[:, None] & (d < width)[None, :], other=0.0)


@jit
def _rows(X, at, b, g, rows, N, group, width, BLOCK: constexpr):
    """Pointers and mask of a block of rows, (len(rows), BLOCK): row r is token r % N of the group's head r // N."""
    d = tl.arange(0, BLOCK)
    where = b * at[0] + (g * group + rows // N)[:, None] * at[1] + (rows % N)[:, None] * at[2] + d[None, :]
    return X + where, (rows < group * N)[:, None] & (d < width)[None, :]


@jit
def _attend(q, largest, total, out, K, k_at, V, v_at, count, scale, DK, DV, PRECISION: constexpr, BN: constexpr,
            BK: constexpr, BV: constexpr):  # fmt: skip
    """Let a block of rows look at `count` more keys: the three running sums, mended."""
    for start in range(0, count, BN):
        j = start + tl.arange(0, BN)
        k, v = _load(K, k_at, j, count, DK, BK), _load(V, v_at, j, count, DV, BV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BM, BN)
        scores = tl.where((j < count)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, mend = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        total = total * mend + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * mend[:, None], input_precision=PRECISION)
        largest = larger
    return largest, total, out


@jit
def _forward(Q, q_at, K, k_at, V, v_at, TK, tk_at, TV, tv_at, LENGTHS, OUT, out_at, LSE, scale, G, group, N, DK, DV,
             PRECISION: constexpr, BM: constexpr, BN: constexpr, BK: constexpr, BV: constexpr):  # fmt: skip
    """A block of rows: their outputs, and LSE (B, G, M), the log2 of each softmax's denominator, for the backward pass."""
    rows, b, g = tl.program_id(0) * BM + tl.arange(0, BM), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    where, mask = _rows(Q, q_at, b, g, rows, N, group, DK, BK)
    q = tl.load(where, mask=mask, other=0.0)
    largest, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BV], tl.float32)
    largest, total, out = _attend(q, largest, total, out, TK + b * tk_at[0] + g * tk_at[1], tk_at[2],
                                  TV + b * tv_at[0] + g * tv_at[1], tv_at[2], tl.load(LENGTHS + b), scale, DK, DV, PRECISION,
                                  BN, BK, BV)  # fmt: skip
    largest, total, out = _attend(q, largest, total, out, K + b * k_at[0] + g * k_at[1], k_at[2],
                                  V + b * v_at[0] + g * v_at[1], v_at[2], N, scale, DK, DV, PRECISION, BN, BK, BV)  # fmt: skip
    where, mask = _rows(OUT, out_at, b, g, rows, N, group, DV, BV)
    tl.store(where, (out / total[:, None]).to(OUT.dtype.element_ty), mask=mask)
    M = group * N
    tl.store(LSE + (b * G + g) * M + rows, largest + tl.log2(total), mask=rows < M)


@jit
def _attend_backward(dq, q, dout, lse, delta, K, k_at, V, v_at, count, scale, DK, DV, PRECISION: constexpr, BN: constexpr,
                     BK: constexpr, BV: constexpr):  # fmt: skip
    """What `count` more keys add to the gradient of a block of rows."""
    for start in range(0, count, BN):
        j = start + tl.arange(0, BN)
        k, v = _load(K, k_at, j, count, DK, BK), _load(V, v_at, j, count, DV, BV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weights = tl.where((j < count)[None, :], tl.exp2(scores - lse[:, None]), 0.0)  # the softmax again, from its LSE
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def _backward_rows(Q, q_at, K, k_at, V, v_at, TK, tk_at, TV, tv_at, LENGTHS, DOUT, dout_at, LSE, DELTA, DQ, dq_at, scale,
                   factor, G, group, N, DK, DV, PRECISION: constexpr, BM: constexpr, BN: constexpr, BK: constexpr,
                   BV: constexpr):  # fmt: skip
    """The gradient of a block of rows: the walk of _forward once more."""
    rows, b, g = tl.program_id(0) * BM + tl.arange(0, BM), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    where, mask = _rows(Q, q_at, b, g, rows, N, group, DK, BK)
    q = tl.load(where, mask=mask, other=0.0)
    where, mask = _rows(DOUT, dout_at, b, g, rows, N, group, DV, BV)
    dout = tl.load(where, mask=mask, other=0.0)
    M = group * N
    lse = tl.load(LSE + (b * G + g) * M + rows, mask=rows < M, other=0.0)
    delta = tl.load(DELTA + (b * G + g) * M + rows, mask=rows < M, other=0.0)
    dq = tl.zeros([BM, BK], tl.float32)
    dq = _attend_backward(dq, q, dout, lse, delta, TK + b * tk_at[0] + g * tk_at[1], tk_at[2],
                          TV + b * tv_at[0] + g * tv_at[1], tv_at[2], tl.load(LENGTHS + b), scale, DK, DV, PRECISION, BN, BK,
                          BV)  # fmt: skip
    dq = _attend_backward(dq, q, dout, lse, delta, K + b * k_at[0] + g * k_at[1], k_at[2], V + b * v_at[0] + g * v_at[1],
                          v_at[2], N, scale, DK, DV, PRECISION, BN, BK, BV)  # fmt: skip
    where, mask = _rows(DQ, dq_at, b, g, rows, N, group, DK, BK)
    tl.store(where, (dq * factor).to(DQ.dtype.element_ty), mask=mask)


@jit
def _backward_keys(Q, q_at, K, k_at, V, v_at, COUNTS, DOUT, dout_at, LSE, DELTA, DKEYS, dk_at, DVALUES, dv_at, scale, factor,
                   G, group, N, size, DK, DV, PRECISION: constexpr, BM: constexpr, BN: constexpr, BK: constexpr,
                   BV: constexpr):  # fmt: skip
    """The gradients of a block of keys and values, of the image or (COUNTS their lengths, of `size`) of the text: a walk over
    all rows that look at them. Padding gets zeros."""
    j, b, g = tl.program_id(0) * BN + tl.arange(0, BN), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    count, M = tl.load(COUNTS + b), group * N
    k = _load(K + b * k_at[0] + g * k_at[1], k_at[2], j, count, DK, BK)
    v = _load(V + b * v_at[0] + g * v_at[1], v_at[2], j, count, DV, BV)
    dk, dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    for start in range(0, M, BM):
        rows = start + tl.arange(0, BM)
        where, mask = _rows(Q, q_at, b, g, rows, N, group, DK, BK)
        q = tl.load(where, mask=mask, other=0.0)
        where, mask = _rows(DOUT, dout_at, b, g, rows, N, group, DV, BV)
        dout = tl.load(where, mask=mask, other=0.0)
        lse = tl.load(LSE + (b * G + g) * M + rows, mask=rows < M, other=0.0)
        delta = tl.load(DELTA + (b * G + g) * M + rows, mask=rows < M, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # (BN, BM)
        real = (j < count)[:, None] & (rows < M)[None, :]
        weights = tl.where(real, tl.exp2(scores - lse[None, :]), 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    keys = DKEYS + b * dk_at[0] + g * dk_at[1] + j[:, None] * dk_at[2] + d[None, :]
    values = DVALUES + b * dv_at[0] + g * dv_at[1] + j[:, None] * dv_at[2] + e[None, :]
    tl.store(keys, (dk * factor).to(DKEYS.dtype.element_ty), mask=(j < size)[:, None] & (d < DK)[None, :])
    tl.store(values, dv.to(DVALUES.dtype.element_ty), mask=(j < size)[:, None] & (e < DV)[None, :])


LOG2_E = 1.4426950408889634


def _blocks(q: Tensor, v: Tensor) -> dict[str, int | str]:
    """The sizes that the kernels are compiled for: what fits into a GPU's shared memory. float32 is not cut to TF32."""
    width, exact = max(q.shape[-1], v.shape[-1]), q.dtype == torch.float32
    keys = 64 if width <= 128 and not exact else 32
    wide = width > 128
    return {"BM": 32 if wide and exact else 64, "BN": keys, "BK": max(16, triton.next_power_of_2(q.shape[-1])),
            "BV": max(16, triton.next_power_of_2(v.shape[-1])), "PRECISION": "ieee", "num_warps": 8 if wide else 4,
            "num_stages": 1 if wide or exact else 2}  # fmt: skip


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but the last, which must be 1."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("frozen_llm::fused_attention", mutates_args=())
def fused_attention(
    img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """joint_attention by the Triton kernel -> output (B, H, N, Dv) and log2-sum-exp2 of the scores (B, G, H/G N), float32."""
    img_q, img_k, img_v, txt_k, txt_v = _dense(img_q, img_k, img_v, txt_k, txt_v)
    B, H, N, DK = img_q.shape
    G, DV = img_k.shape[1], img_v.shape[-1]
    out = img_q.new_empty(B, N, H, DV).transpose(1, 2)  # as the projection that follows wants it
    lse = torch.empty(B, G, H // G * N, dtype=torch.float32, device=img_q.device)
    blocks = _blocks(img_q, img_v)
    _forward[(triton.cdiv(H // G * N, blocks["BM"]), B * G)](
        img_q, img_q.stride(), img_k, img_k.stride(), img_v, img_v.stride(), txt_k, txt_k.stride(), txt_v, txt_v.stride(),
        lengths, out, out.stride(), lse, DK**-0.5 * LOG2_E, G, H // G, N, DK, DV, **blocks)  # fmt: skip
    return out, lse


@fused_attention.register_fake
def _(img_q, img_k, img_v, txt_k, txt_v, lengths):
    B, H, N, _ = img_q.shape
    G = img_k.shape[1]
    lse = torch.empty(B, G, H // G * N, dtype=torch.float32, device=img_q.device)
    return img_q.new_empty(B, N, H, img_v.shape[-1]).transpose(1, 2), lse


@torch.library.custom_op("frozen_llm::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor,
    lengths: Tensor, of_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of img_q, img_k, img_v and, if asked for, of txt_k and txt_v (else empty tensors)."""
    dout, img_q, img_k, img_v, txt_k, txt_v = _dense(dout, img_q, img_k, img_v, txt_k, txt_v)
    B, H, N, DK = img_q.shape
    G, DV, M = img_k.shape[1], img_v.shape[-1], H // img_k.shape[1] * N
    delta = (dout.float() * out.float()).sum(-1).reshape(B, G, M)  # FlashAttention, appendix B.4: D = rowsum(dO o O)
    blocks, scale, factor = _blocks(img_q, img_v), DK**-0.5 * LOG2_E, DK**-0.5
    dq = torch.empty_like(img_q)
    _backward_rows[(triton.cdiv(M, blocks["BM"]), B * G)](
        img_q, img_q.stride(), img_k, img_k.stride(), img_v, img_v.stride(), txt_k, txt_k.stride(), txt_v, txt_v.stride(),
        lengths, dout, dout.stride(), lse, delta, dq, dq.stride(), scale, factor, G, H // G, N, DK, DV, **blocks)  # fmt: skip

    def of_keys(keys: Tensor, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        dk, dv, size = torch.empty_like(keys), torch.empty_like(values), keys.shape[2]
        if size:
            _backward_keys[(triton.cdiv(size, blocks["BN"]), B * G)](
                img_q, img_q.stride(), keys, keys.stride(), values, values.stride(), counts, dout, dout.stride(), lse, delta,
                dk, dk.stride(), dv, dv.stride(), scale, factor, G, H // G, N, size, DK, DV, **blocks)  # fmt: skip
        return dk, dv

    image = of_keys(img_k, img_v, torch.full_like(lengths, N))
    text = of_keys(txt_k, txt_v, lengths) if of_text else (txt_k.new_empty(0), txt_v.new_empty(0))
    return dq, *image, *text


@fused_attention_backward.register_fake
def _(dout, out, lse, img_q, img_k, img_v, txt_k, txt_v, lengths, of_text):
    text = [torch.empty_like(x) if of_text else x.new_empty(0) for x in _dense(txt_k, txt_v)]
    return *(torch.empty_like(x) for x in _dense(img_q, img_k, img_v)), *text


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx, dout, dlse):
    of_text = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    gradients = fused_attention_backward(dout, *ctx.saved_tensors, of_text)
    return *(gradients if of_text else (*gradients[:3], None, None)), None


fused_attention.register_autograd(_backward, setup_context=_remember)
