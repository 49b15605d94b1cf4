"""Joint attention of the same tensors in all the ways that one could choose, and what each takes:
`python -m extras.bench attention`.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention import hybrid_mask, joint_attention, joint_attention_definition, text_mask
from extras.timing import timed

aten = torch.ops.aten

HEADS = {  # H query heads, G key/value heads, D = Dk = Dv
    "Qwen2.5-0.5B": (14, 2, 64),
    "gemma-3-270m": (4, 1, 256),
    "Llama-3-8B": (32, 8, 128),
}
MOST_TOKENS = 65_536  # of the images of a batch


def bench_attention(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Forward and backward of the same attention in all ways, over a grid of sizes."""
    gpu = device.type == "cuda"
    batch_sizes = (1, 16, 64) if gpu else (4,)
    texts = (16, 64, 512) if gpu else (16, 64)
    images = (64, 256, 1024, 4096) if gpu else (16, 64, 256)
    rows = []
    told = set()
    for heads, B, T, N in itertools.product(HEADS, batch_sizes, texts, images):
        if N * B > MOST_TOKENS:
            continue
        sizes = (*HEADS[heads], B, T, N)
        these, left_out = time_attention(sizes, args.seconds, device, dtype, peak)
        for way, why in left_out.items():
            if (way, why) not in told:
                told.add((way, why))
                print(f"left out from heads {heads}, T {T}, N {N}, B {B} on: {way} ({why})")
        for row in these:
            rows.append({"heads": heads, "T": T, "N": N, "B": B, **row})
    return rows


def time_attention(
    sizes: tuple, seconds: float, device: torch.device, dtype: torch.dtype, peak: float
) -> tuple[list[dict], dict[str, str]]:
    """One row a way for tensors of these sizes (H, G, D, B, T, N); and of the ways that do not go,
    why."""
    H, G, D, B, T, N = sizes
    torch.manual_seed(0)
    image = []
    for heads in (H, G, G):
        x = torch.randn(B, N, heads, D, device=device, dtype=dtype).transpose(1, 2)
        image.append(x.requires_grad_())
    text = []
    for _ in range(2):
        text.append(torch.randn(B, T, G, D, device=device, dtype=dtype).transpose(1, 2))
    lengths = torch.randint(T // 2, T + 1, (B,), device=device)
    ways, left_out = attention_ways(*image, *text, lengths)
    grad = torch.randn(B, H, N, D, device=device, dtype=dtype)

    def backward(way: Callable) -> None:
        torch.autograd.grad(way(), image, grad)

    with torch.no_grad():
        backends = {name: backend_of(way) for name, way in ways.items()}
        forward = timed(ways, device, seconds)
    both = timed({name: partial(backward, way) for name, way in ways.items()}, device, seconds)

    # what has to be computed, and to be moved at least: each number read once, written once
    seen = lengths.sum().item() + B * N
    flops = 4 * H * N * D * seen
    moved = dtype.itemsize * D * (2 * B * H * N + 2 * G * seen)
    rows = []
    for way in ways:
        ms = forward[way]["ms"]
        rows.append(
            {
                "way": way,
                "backend": backends[way],
                "forward ms": ms,
                "forward+backward ms": both[way]["ms"],
                "spread": forward[way]["spread"],
                "TFLOP/s": flops / ms / 1e9,
                "of peak": flops / ms / 1e9 / peak,
                "least GB/s": moved / ms / 1e6,
                "sdpa / this": forward["sdpa"]["ms"] / ms,
                "sdpa / this, both": both["sdpa"]["ms"] / both[way]["ms"],
            }
        )
    return rows, left_out


def attention_ways(
    q: Tensor, k: Tensor, v: Tensor, txt_k: Tensor, txt_v: Tensor, lengths: Tensor
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The ways that this machine can go, forward and backward, name -> call; and of the others,
    name -> why not. What all layers share (masks, lengths) is made here, outside the timing."""
    ways = {}
    left_out = {}
    for name, make in RIVALS.items():
        try:
            call = make(q, k, v, txt_k, txt_v, lengths)
            torch.autograd.grad(call().sum(), [q, k, v])
            ways[name] = call
        except Exception as error:  # an operator that is not for this device, a missing compiler
            words = str(error).split() or [type(error).__name__]
            left_out[name] = " ".join(words)[:80]
    return ways, left_out


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.__name__)
        return operator(*args, **kwargs or {})


def backend_of(call: Callable) -> str:
    """Which of SDPA's backends a call takes: flash, efficient, cudnn, overrideable; or none of
    them, plain products."""
    with Operators() as seen:
        call()
    prefix = "_scaled_dot_product_"
    found = [name for name in seen.names if name.startswith(prefix)]
    return found[0].removeprefix(prefix).split("_attention")[0] if found else "products"


def definition(q, k, v, txt_k, txt_v, lengths):
    T, N = txt_k.shape[2], k.shape[2]
    if N * (T + N) * q.shape[0] * q.shape[1] > 2**31:
        raise ValueError("its scores alone would take many GB")
    mask = hybrid_mask(lengths, T, N)[:, :, T:]
    scale = q.shape[-1] ** -0.5
    return lambda: joint_attention_definition(q * scale, *joined(k, v, txt_k, txt_v), mask)


def sdpa(q, k, v, txt_k, txt_v, lengths):
    mask = text_mask(lengths, txt_k.shape[2], k.shape[2])
    return lambda: joint_attention(q, k, v, txt_k, txt_v, mask, "sdpa")


def sdpa_unpadded(q, k, v, txt_k, txt_v, lengths):
    """What joint_attention does where no row is padded: here the padding is seen too."""
    return lambda: joint_attention(q, k, v, txt_k, txt_v, None, "sdpa")


def flex(q, k, v, txt_k, txt_v, lengths):
    if not q.is_cuda:
        raise ValueError("its gradients are for GPUs")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, H, N, _ = q.shape
    T = txt_k.shape[2]

    def sees(b, h, row, key):
        return (key < lengths[b]) | (key >= T)

    mask = create_block_mask(sees, B, None, N, T + N, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = H != k.shape[1]
    return lambda: compiled(q, *joined(k, v, txt_k, txt_v), block_mask=mask, enable_gqa=gqa)


def varlen(q, k, v, txt_k, txt_v, lengths):
    if not q.is_cuda:
        raise ValueError("it is for GPUs")
    from torch.nn.attention.varlen import varlen_attn

    B, H, N, _ = q.shape
    seen = text_mask(lengths, txt_k.shape[2], N)[:, 0, 0]
    keep = seen.nonzero(as_tuple=True)
    ends = seen.sum(1).cumsum(0)
    starts_k = torch.cat([ends.new_zeros(1), ends]).int()
    starts_q = torch.arange(B + 1, device=q.device, dtype=torch.int32) * N
    longest = int(seen.sum(1).max())
    gqa = H != k.shape[1]

    def call() -> Tensor:
        # valid tokens only: a copy, as everywhere
        packed_k, packed_v = (x.transpose(1, 2)[keep] for x in joined(k, v, txt_k, txt_v))
        rows = q.transpose(1, 2).flatten(0, 1)
        out = varlen_attn(rows, packed_k, packed_v, starts_q, starts_k, N, longest, enable_gqa=gqa)
        return out.unflatten(0, (B, N)).transpose(1, 2)

    return call


def kernel(q, k, v, txt_k, txt_v, lengths):
    if not q.is_cuda:
        raise ValueError("it is for GPUs")  # its interpreter is for tests, not for timing
    from extras.fused import fused_attention
    from extras.trust import kernel_agrees

    if not kernel_agrees(q.device, q.dtype, q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1]):
        raise ValueError("it fails its trial here, see the warning")
    lengths = lengths.int()
    return lambda: fused_attention(q, k, v, txt_k, txt_v, lengths)[0]


def merged(q, k, v, txt_k, txt_v, lengths):
    B, H, N, D = q.shape
    G, T = txt_k.shape[1:3]
    padding = torch.arange(T, device=q.device) >= lengths[:, None]  # (B, T)
    bias = torch.zeros(B, T, device=q.device, dtype=q.dtype).masked_fill(padding, float("-inf"))
    bias = bias[:, None, None].expand(B, G, H // G * N, T)
    if q.is_cuda:
        bias = bias.contiguous()

    def call() -> Tensor:
        rows = q.reshape(B, G, H // G * N, D)  # grouped queries are more rows
        return Merged.apply(rows, k, v, txt_k, txt_v, bias).reshape(B, H, N, -1)

    return call


class Merged(torch.autograd.Function):
    """Attention to the text, with its mask, and to the image, without: two calls of the vendor's
    kernels, nothing concatenated, then one softmax out of both by their log-sum-exps.

    Backward is exact without a line of calculus: a kernel's backward makes its weights as
    exp(score - lse) and its delta as rowsum(dO O). Given the merged O and lse, each part has its
    share of the one softmax's gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, txt_k, txt_v, bias):
        txt_out, txt_lse, txt_seeds = part(q, txt_k, txt_v, bias)
        img_out, img_lse, img_seeds = part(q, k, v, None)
        lse = torch.logaddexp(txt_lse, img_lse)  # (B, G, rows)
        txt_share = (txt_lse - lse).exp()[..., None]
        img_share = (img_lse - lse).exp()[..., None]
        out = (txt_out * txt_share + img_out * img_share).to(q.dtype)
        ctx.save_for_backward(q, k, v, txt_k, txt_v, bias, out, lse)
        ctx.seeds = txt_seeds, img_seeds
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, txt_k, txt_v, bias, out, lse = ctx.saved_tensors
        txt_seeds, img_seeds = ctx.seeds
        txt_dq, *_ = part_backward(do, q, txt_k, txt_v, bias, out, lse, txt_seeds)
        dq, dk, dv, *_ = part_backward(do, q, k, v, None, out, lse, img_seeds)
        return dq + txt_dq, dk, dv, None, None, None


def part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, list]:
    """Output, natural log-sum-exp of the scores (B, G, rows), and what else the backward takes."""
    if not q.is_cuda:
        name = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = name(q, k, v, 0.0, False, attn_mask=bias)
        return out, lse, []
    if bias is None:
        out, lse, *others = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
        return out, lse, others[:6]
    name = aten._scaled_dot_product_efficient_attention
    out, lse, *seeds = name(q, k, v, bias, True)
    return out, lse[:, :, : q.shape[2]], seeds  # it has rows up to a multiple of 32


def part_backward(do, q, k, v, bias, out, lse, others) -> tuple:
    """The gradients of q, k and v of one part."""
    if not q.is_cuda:
        name = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return name(do, q, k, v, out, lse, 0.0, False, attn_mask=bias)
    if bias is None:
        name = aten._scaled_dot_product_flash_attention_backward
        starts_q, starts_k, longest_q, longest_k, seed, offset = others
        return name(do, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, 0.0, False,
                    seed, offset)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
    name = aten._scaled_dot_product_efficient_attention_backward
    return name(do, q, k, v, bias, out, lse, *others, 0.0, [True, False, False, False], False)


def joined(k: Tensor, v: Tensor, txt_k: Tensor, txt_v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([txt_k, k], dim=2), torch.cat([txt_v, v], dim=2)


RIVALS = {
    "definition": definition,
    "sdpa": sdpa,
    "sdpa, no row padded": sdpa_unpadded,
    "two calls, merged": merged,
    "flex": flex,
    "varlen": varlen,
    "kernel": kernel,
}
