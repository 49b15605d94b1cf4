"""What a training step takes, counted on fake tensors: those of torch's FakeTensorMode have shapes
and dtypes and no numbers, and the code that runs on them is the real one.

    with FakeTensorMode():
        counted = count_step(tower, optimizers, context_of, loss, (64, 3, 256, 256), dtype)

What no tensor shows is not counted: the workspaces of libraries, the gaps of allocators.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import ImageExpert
from train import LARGEST_GRADIENT

ATEN = torch.ops.aten
FLOPS = flop_registry | {  # and SDPA on a CPU, which is not in it
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        ATEN._scaled_dot_product_flash_attention
    ],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass
class Counted:
    """Bytes: of a batch's pictures and noise, of the context of one part of it, of what its forward
    keeps for its way back, of what the optimizers keep between steps, and of all that a step has at
    most at once, these included. flops: floating-point operations of the whole step."""

    batch: int = 0
    context: int = 0
    activations: int = 0
    state: int = 0
    most: int = 0
    flops: int = 0


def count_step(
    tower: ImageExpert,
    optimizers: list[torch.optim.Optimizer],
    context_of: Callable,
    loss: Callable,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    parts: int = 1,
    ranks: int = 1,
) -> Counted:
    """Go through a step as train.train_step does, on a batch (B, C, height, width) in so many
    parts, in one of so many processes. context_of(n) -> the Context of n pictures."""
    counted = Counted()
    live = Live(tower.parameters())
    part = shape[0] // parts
    with live:
        data = torch.randn(shape)
        noise = torch.randn(shape)
        counted.batch = live.now

        # from the second step on the optimizers have a state: so they come first here
        for p in tower.parameters():
            p.grad = torch.zeros_like(p)
        nn.utils.clip_grad_norm_(tower.parameters(), LARGEST_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counted.state = live.now - counted.batch
        updating = live.flops

        # two parts: the second finds the gradients of the first
        for i in range(min(2, parts)):
            some = slice(i * part, (i + 1) * part)
            before = live.now
            context = context_of(part)
            counted.context = live.now - before
            of_part = forward(tower, loss, data[some], noise[some], context, dtype)
            counted.activations = live.now - before - counted.context
            of_part.backward()
            if i == 0:
                counted.flops = updating + parts * (live.flops - updating)
        if ranks > 1:  # all gradients in one row: extras/parallel.py
            torch.cat([p.grad.flatten() for p in tower.parameters()])
    counted.most = live.most
    return counted


def forward(tower, loss: Callable, data: Tensor, noise: Tensor, context, dtype) -> Tensor:
    """The mean loss of some pictures, as train.losses_of has it."""
    t = torch.rand(len(data))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return loss(tower, data, noise, t, context).mean()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside of it and are still there: `now`, and
    `most` at once; and floating-point operations, by the library's formulae. before: tensors that
    were there before, and are changed in place."""

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.flops = 0
        self.now = 0
        self.most = 0
        self.known = {x.untyped_storage()._cdata for x in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FLOPS.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self.add(x.untyped_storage())
        return out

    def add(self, storage) -> None:
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


# -------------------------------------------------------------------------------------------------
# fake tensors lie on the CPU: what is otherwise on a GPU


def norms_in_float32(tower: nn.Module) -> None:
    """Have the tower's group norms in float32, as autocast has them on a GPU and not on a CPU."""
    for module in tower.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())


@contextmanager
def fused_attention() -> Iterator[None]:
    """Meanwhile attention is one kernel, which keeps no scores."""
    before = os.environ.get("JOINT_ATTENTION")
    os.environ["JOINT_ATTENTION"] = "sdpa"
    try:
        yield
    finally:
        os.environ.pop("JOINT_ATTENTION")
        if before is not None:
            os.environ["JOINT_ATTENTION"] = before
