"""Whether the Triton kernel may be trusted on this machine: asked before its first use.

Compilers have given wrong numbers for right programs, on one architecture only, and what no test
machine has seen (a card with less shared memory, no C compiler, another driver) fails at the first
launch. So the kernel is tried, at the widths, dtype and group size it is wanted for.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from attention import joint_attention, text_mask


def kernel_attention(
    img_q: Tensor, img_k: Tensor, img_v: Tensor, txt_k: Tensor, txt_v: Tensor, mask: Tensor | None
) -> Tensor | None:
    """joint_attention by the kernel; None where it is not to be trusted."""
    sizes = img_q.shape[-1], img_v.shape[-1], img_q.shape[1] // img_k.shape[1]
    numbers = [len(range(n)) for n in sizes]  # in a graph with dynamic shapes they are symbols
    if not in_this_graph(img_q.device, img_q.dtype, *numbers):
        return None
    for x in (img_q, img_k, img_v, txt_k, txt_v):  # the kernels count in 32 bits inside a row
        if max(x.shape[1] * x.stride(1), x.shape[2] * x.stride(2)) >= 2**31:
            return None
    from extras.fused import fused_attention, text_lengths

    return fused_attention(img_q, img_k, img_v, txt_k, txt_v, text_lengths(mask, txt_k))[0]


@torch.compiler.assume_constant_result  # the trial itself is no part of a compiled graph
def in_this_graph(*what) -> bool:
    return kernel_agrees(*what)


@cache
def kernel_agrees(device: torch.device, dtype: torch.dtype, Dk: int, Dv: int, group: int) -> bool:
    """Whether the kernel runs here and is right; if not, one warning says why."""
    try:
        reason = why_not(device, dtype, Dk, Dv, group)
    except Exception as error:  # no triton, no compiler, too little shared memory, a failed launch
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if reason:
        warnings.warn(f"SDPA takes the place of the Triton kernel: {reason}", stacklevel=2)
    return not reason


def why_not(device: torch.device, dtype: torch.dtype, Dk: int, Dv: int, group: int) -> str:
    """Why the kernel must not run here, in a few words; "" if it may."""
    import triton

    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} has no tensor cores; it needs bfloat16 or float16"
    elif not triton.knobs.runtime.interpret:  # its interpreter runs on a CPU, for tests
        return f"it needs an NVIDIA GPU, not {device.type}"
    if max(Dk, Dv) > 256:
        return f"heads are {max(Dk, Dv)} wide; it needs 256 or less"
    for name, error in trial(device, dtype, Dk, Dv, group).items():
        if not error <= 0.02:  # NaN too
            return f"in a trial {name} differs by {100 * error:.3g} % from SDPA in float32"
    return ""


def trial(device: torch.device, dtype: torch.dtype, Dk: int, Dv: int, group: int) -> dict:
    """A small attention with all its gradients: name -> how far each is from what SDPA gives in
    float32, as a share of it. The sizes give every walk whole blocks and a last one."""
    from extras.fused import fused_attention

    T = 70
    N = 150
    sizes = {"img_q": (N, group, Dk), "img_k": (N, 1, Dk), "img_v": (N, 1, Dv),
             "txt_k": (T, 1, Dk), "txt_v": (T, 1, Dv), "do": (N, group, Dv)}
    generator = torch.Generator().manual_seed(0)
    errors = {}
    # wherever the question comes up first: in a sampler, under autocast, while a graph is traced
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast:
        lengths = torch.tensor([T, 3], dtype=torch.int32, device=device)
        made = []
        for size in sizes.values():
            x = torch.randn(2, *size, generator=generator).to(device, dtype)
            made.append(x.transpose(1, 2))
        *ours, do = [x.requires_grad_() for x in made]
        *exact, exact_do = [x.detach().float().requires_grad_() for x in made]
        out = fused_attention(*ours, lengths)[0]
        expected = joint_attention(*exact, text_mask(lengths, T, N), backend="sdpa")
        gradients = torch.autograd.grad(out, ours, do)
        expected_gradients = torch.autograd.grad(expected, exact, exact_do)
        names = ["the output", *[f"the gradient of {name}" for name in sizes]]
        for name, a, b in zip(names, [out, *gradients], [expected, *expected_gradients]):
            errors[name] = ((a.float() - b).norm() / b.norm()).item()
    return errors
