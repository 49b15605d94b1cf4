"""Joint attention of a frozen text tower and a trainable image tower: Mixture-of-Transformers with one softmax.

Two ways to compute the same thing:

    joint_attention_definition   the whole joint sequence, text and image queries, hybrid mask, plain float32 softmax
    joint_attention              image queries only, over the text keys and values that the LLM has already computed

They agree because no text token ever sees an image token: the text half of the definition does not depend on the image
at all, so it is computed once per caption and kept. tests/test_joint.py proves it through whole models.

Shapes: B images, T text tokens (right-padded), N image tokens, H query heads, G key/value heads (H a multiple of G:
grouped queries), Dk and Dv head widths. Everything is (B, heads, tokens, head_width).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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
    img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor, txt_mask: Tensor | None
) -> Tensor:
    """The image rows of the definition in one fused call: softmax(q [k_txt; k_img]^T / sqrt(Dk)) [v_txt; v_img].

    img_q (B, H, N, Dk), img_k (B, G, N, Dk), img_v (B, G, N, Dv), txt_k (B, G, T, Dk), txt_v (B, G, T, Dv);
    txt_mask (B, 1, 1, T+N) bool from text_mask, or None where no text is padded. Returns (B, H, N, Dv).
    """
    B, H, N, _ = img_q.shape
    G = img_k.shape[1]
    joint_k = torch.cat([txt_k.to(img_k.dtype), img_k], dim=2)  # (B, G, T+N, Dk)
    joint_v = torch.cat([txt_v.to(img_v.dtype), img_v], dim=2)  # (B, G, T+N, Dv)
    img_q = img_q.reshape(B, G, H // G * N, -1)  # grouped queries are just more rows that ask the same keys
    # on a CPU, SDPA's fused backward takes twice as long as plain matrix products (measured at N = 16 and 64)
    plain = img_q.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        out = F.scaled_dot_product_attention(img_q, joint_k, joint_v, attn_mask=txt_mask)
    return out.reshape(B, H, N, -1)


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
