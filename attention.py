"""Joint attention of a frozen text tower and a trainable image tower: Mixture-of-Transformers with
one softmax.

Two ways to compute the same thing:

    joint_attention_definition   the whole joint sequence, text and image queries, hybrid mask,
                                 plain float32 softmax
    joint_attention              image queries only, over the text keys and values that the LLM has
                                 already computed: one call of SDPA, or, where it is asked for, of
                                 the Triton kernel in extras/kernel.py

They agree because no text token ever sees an image token: the text half of the definition does not
depend on the image at all, so it is computed once per caption and kept. tests/test_joint.py proves
it through whole models.

Shapes: B images, T text tokens (right-padded), N image tokens, H query heads, G key/value heads, Dk
and Dv head widths. H is a multiple of G: H // G query heads share one key/value head (grouped
queries). All tensors are (B, heads, tokens, head_width).
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_attention(
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    mask: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """The image rows of the definition: softmax(q [k_txt; k_img]^T / sqrt(Dk)) [v_txt; v_img].

    img_q (B, H, N, Dk), img_k (B, G, N, Dk), img_v (B, G, N, Dv); txt_k (B, G, T, Dk), txt_v
    (B, G, T, Dv); mask from text_mask, or None where no row is padded. Returns (B, H, N, Dv).
    (Image keys may be fewer than queries: none, where only the text is asked, as extras/ do.)
    backend: "sdpa" or "triton", see wants_kernel. JOINT_ATTENTION=sdpa: SDPA on a CPU, too.
    """
    B, H, N, Dk = img_q.shape
    G = img_v.shape[1]
    Dv = img_v.shape[3]
    txt_k = txt_k.to(img_k.dtype)
    txt_v = txt_v.to(img_v.dtype)
    if wants_kernel(backend, img_q.device):
        from extras.trust import kernel_attention

        out = kernel_attention(img_q, img_k, img_v, txt_k, txt_v, mask)
        if out is not None:
            return out
    joint_k = torch.cat([txt_k, img_k], dim=2)  # (B, G, T+N, Dk)
    joint_v = torch.cat([txt_v, img_v], dim=2)  # (B, G, T+N, Dv)
    # the H // G query heads that share a key head, and all image tokens, share one mask as well: so
    # those heads can simply be more rows of queries
    rows = img_q.reshape(B, G, H // G * N, Dk)
    on_cpu = img_q.device.type == "cpu" and torch.is_grad_enabled()
    if on_cpu and os.environ.get("JOINT_ATTENTION") != "sdpa":
        out = matrix_products(rows, joint_k, joint_v, mask)
    else:
        out = F.scaled_dot_product_attention(rows, joint_k, joint_v, attn_mask=mask)
    return out.reshape(B, H, N, Dv)


def matrix_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA written out, for training on a CPU: half the time of SDPA's forward and backward there
    (at N = 16 and 64). q (B, G, R, Dk), k (B, G, J, Dk), v (B, G, J, Dv) -> (B, G, R, Dv)."""
    B, G, R, Dk = q.shape
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias.expand(B, G, 1, -1).flatten(0, 1)  # (B G, 1, J)
    keys = k.flatten(0, 1).transpose(1, 2)  # (B G, Dk, J)
    scores = torch.baddbmm(bias, q.flatten(0, 1), keys, alpha=Dk**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).unflatten(0, (B, G))


def text_mask(lengths: Tensor, T: int, N: int) -> Tensor:
    """What an image token sees, the same at every layer: the valid text and the whole image.
    lengths (B,) -> (B, 1, 1, T+N) bool."""
    place = torch.arange(T + N, device=lengths.device)
    return ((place < lengths[:, None]) | (place >= T))[:, None, None, :]


# -------------------------------------------------------------------------------------------------
# the definition, which tests compare with


def hybrid_mask(lengths: Tensor, T: int, N: int) -> Tensor:
    """Who may look at whom in [text; image]: (B, 1, T+N, T+N) bool, True where the row sees the
    column. Text is causal and never sees the image; an image token sees the valid text and the
    whole image. lengths: (B,) valid text tokens of each row. A padded token sees itself too, so
    that no row is empty."""
    device = lengths.device
    place = torch.arange(T + N, device=device)
    is_image = place >= T
    valid = is_image | (place < lengths[:, None])  # (B, T+N)
    causal = place[:, None] >= place[None, :]
    text_sees = causal & ~is_image[None, :]
    sees = torch.where(is_image[:, None], True, text_sees)  # an image token: everything
    padded_self = torch.eye(T + N, dtype=torch.bool, device=device) & ~valid[:, None, :]
    return ((sees & valid[:, None, :]) | padded_self)[:, None]


def joint_attention_definition(
    joint_q: Tensor, joint_k: Tensor, joint_v: Tensor, mask: Tensor
) -> Tensor:
    """One softmax over the joint sequence, as Mixture-of-Transformers defines it, in float32 and
    without any trick.

    joint_q (B, H, T+N, Dk), already multiplied by its scale (the towers may scale differently);
    joint_k (B, G, T+N, Dk), joint_v (B, G, T+N, Dv), mask from hybrid_mask -> (B, H, T+N, Dv).
    """
    weights = joint_weights(joint_q, joint_k, mask)
    groups = joint_q.shape[1] // joint_v.shape[1]
    joint_v = joint_v.repeat_interleave(groups, dim=1)  # (B, H, T+N, Dv)
    return (weights @ joint_v.float()).to(joint_v.dtype)


def joint_weights(joint_q: Tensor, joint_k: Tensor, mask: Tensor) -> Tensor:
    """How much each query looks at each key, (B, H, queries, T+N) in float32: rows that sum to 1.

    Queries are scaled already, as above; any of the joint rows will do, with a mask that fits them.
    """
    groups = joint_q.shape[1] // joint_k.shape[1]
    joint_k = joint_k.repeat_interleave(groups, dim=1)  # (B, H, T+N, Dk)
    scores = joint_q.float() @ joint_k.float().transpose(-2, -1)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


# -------------------------------------------------------------------------------------------------
# which of the two ways

# Compute capabilities where `python -m extras.bench attention` has shown the kernel to be faster:
# none so far.
MEASURED: set[tuple[int, int]] = set()


def wants_kernel(backend: str | None, device: torch.device) -> bool:
    """Whether to use the Triton kernel instead of SDPA: where `backend`, or JOINT_ATTENTION
    in the environment, asks for it, or else where it is MEASURED."""
    asked = backend or os.environ.get("JOINT_ATTENTION")
    if asked in ("sdpa", "triton"):
        return asked == "triton"
    if asked:
        raise ValueError(f"JOINT_ATTENTION={asked}: expected sdpa or triton")
    if device.type != "cuda" or not MEASURED:
        return False
    return torch.cuda.get_device_capability(device) in MEASURED


# -------------------------------------------------------------------------------------------------
# rotary positions, for llm.py and inspection.py


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) in the half-split layout of Hugging Face's Llama
    family.

    x (B, heads, tokens, D); angle (B, R/2) in radians, one position for all tokens of a row. The
    first R of the D dimensions turn, in pairs (i, i + R/2); the rest stay (partial rotary).
    """
    half = angle.shape[-1]
    cos = angle.cos().to(x.dtype)[:, None, None]  # (B, 1, 1, R/2)
    sin = angle.sin().to(x.dtype)[:, None, None]
    first = x[..., :half]
    second = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass
class Rotary:
    """How one layer's keys turn with the position: by `frequencies` (R/2,), in radians per token,
    in the dimensions that `order` (Dk,) brings to the front, half-split as `rotate` has them: 0, 2,
    1, 3 for neighbours that turn together (GPT-J). R = 0 where they do not turn."""

    frequencies: Tensor
    order: Tensor

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, heads, tokens, Dk), turned forward by positions (B,)."""
        if not len(self.frequencies):
            return x
        angle = positions[:, None] * self.frequencies
        turned = rotate(x[..., self.order], angle)
        return turned[..., self.order.argsort()]  # back to the model's own order
