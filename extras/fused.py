"""The kernels of extras/kernel.py as an operator of torch, with its gradients."""

import torch
from torch import Tensor

from extras.kernel import LOG2_E, _backward_keys, _backward_rows, _forward, launch


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but the last, which must be 1."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _empty(like: Tensor, width: int) -> Tensor:
    """(B, heads, tokens, width), with heads and tokens in memory as the projections want them."""
    B, heads, tokens, _ = like.shape
    return like.new_empty(B, tokens, heads, width).transpose(1, 2)


@torch.library.custom_op("frozen_llm::fused_attention", mutates_args=())
def fused_attention(
    img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """joint_attention, with the valid text tokens of each row, lengths (B,) int32, for the mask ->
    output (B, H, N, Dv) and lse (B, H, N), the log2-sum-exp2 of the scores, float32."""
    H, N, Dk = img_q.shape[1:]
    G, S = img_k.shape[1:3]
    out, lse = _empty_output(img_q, img_k, img_v, txt_k, txt_v, lengths)
    matrices = _dense(img_q, img_k, img_v, txt_k, txt_v)
    scale = Dk**-0.5 * LOG2_E
    launch(_forward, 0, N, H, *matrices, lengths, out, lse, scale, H, G, N, S)
    return out, lse


@fused_attention.register_fake
def _empty_output(img_q, img_k, img_v, txt_k, txt_v, lengths):
    return _empty(img_q, img_v.shape[-1]), img_q.new_empty(img_q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("frozen_llm::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    do: Tensor, out: Tensor, lse: Tensor, img_q: Tensor, img_k: Tensor, img_v: Tensor,
    txt_k: Tensor, txt_v: Tensor, lengths: Tensor, of_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of img_q, img_k, img_v and, if asked for, of txt_k and txt_v (else empty)."""
    H, N, Dk = img_q.shape[1:]
    G, S = img_k.shape[1:3]
    factor = Dk**-0.5
    scale = factor * LOG2_E
    dq, dk, dv, dtk, dtv = _empty_gradients(do, out, lse, img_q, img_k, img_v, txt_k, txt_v,
                                            lengths, of_text)
    do, q, k, v, tk, tv = _dense(do, img_q, img_k, img_v, txt_k, txt_v)
    delta = torch.empty_like(lse)
    launch(_backward_rows, 1, N, H, q, k, v, tk, tv, lengths, out, lse, do, delta, dq, scale,
            factor, H, G, N, S)
    counts = torch.full_like(lengths, S)
    launch(_backward_keys, 2, S, G, q, k, v, counts, lse, do, delta, dk, dv, scale, factor, H, G,
            N, S)
    if of_text:
        T = tk.shape[2]
        launch(_backward_keys, 2, T, G, q, tk, tv, lengths, lse, do, delta, dtk, dtv, scale,
                factor, H, G, N, T)
    return dq, dk, dv, dtk, dtv


@fused_attention_backward.register_fake
def _empty_gradients(do, out, lse, img_q, img_k, img_v, txt_k, txt_v, lengths, of_text):
    text = [_empty(x, x.shape[-1]) if of_text else x.new_empty(0) for x in (txt_k, txt_v)]
    return *[_empty(x, x.shape[-1]) for x in (img_q, img_k, img_v)], *text


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx, do, dlse):
    of_text = any(ctx.needs_input_grad[3:5])
    gradients = fused_attention_backward(do, *ctx.saved_tensors, of_text)
    if not of_text:
        gradients = *gradients[:3], None, None
    return *gradients, None


fused_attention.register_autograd(_backward, setup_context=_remember)


def text_lengths(mask: Tensor | None, txt_k: Tensor) -> Tensor:
    """The inverse of attention.text_mask: (B,) int32, the valid text tokens of each row."""
    B, _, T, _ = txt_k.shape
    if mask is None:
        return torch.full((B,), T, dtype=torch.int32, device=txt_k.device)
    return mask[:, 0, 0, :T].sum(dim=1, dtype=torch.int32)
