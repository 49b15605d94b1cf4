"""Several processes train one expert, each on its own part of every batch (data parallel).

    torchrun --nproc_per_node=8 train.py --batch-size 512

Every process has the expert and the LLM; the gradients are averaged, so all take the same step. The
batch is what --batch-size says, and data and noise of a step depend on the seed and the step alone:
1, 2 and 8 processes give the same run, but for the rounding of sums (and for which pictures are
described: --describe takes its share of each process's part). The first writes, the others are
silent. A run goes on with another number of processes. What does not fit on one GPU: shard.py.
(Tested with gloo on a CPU; with NCCL on several GPUs it has not run yet.)
"""

import argparse
import atexit
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from cli import STOPS

ASKED: list[int] = []  # signals to stop that this process has had
TOGETHER: list[torch.Tensor] = []  # all gradients in one row; to ask for new memory takes longer
PATIENCE = timedelta(hours=1)  # the first one draws samples while the others wait


def join(args: argparse.Namespace) -> tuple[int, int]:
    """Meet the other processes that torchrun has started -> this one's rank, and how many there
    are. ValueError if a batch has no equal part for each, or one alone would share with others."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:  # with --shard
        raise ValueError(
            "--shard: one process has nobody to share with; start several: "
            "torchrun --nproc_per_node=8 train.py --shard"
        )
    check_parts(args, ranks)
    rank = int(os.environ["RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(leave)
    for number in STOPS:
        signal.signal(number, lambda number, frame: ASKED.append(number))
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def check_parts(args: argparse.Namespace, ranks: int) -> None:
    """ValueError if a batch does not divide into equal parts of whole captions."""
    parts = f"the {ranks} processes"
    if args.accumulate > 1:
        parts += f" times --accumulate {args.accumulate}"
    if args.batch_size // args.draws % (ranks * args.accumulate):
        raise ValueError(
            f"--batch-size {args.batch_size}: expected a multiple of --draws {args.draws} times "
            f"{parts}"
        )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def average_gradients(model: nn.Module) -> int:
    """Replace each gradient by its mean over the processes (those of --shard are so already).
    -> SIGTERM if one of them is to stop, else 0: so all stop after the same step."""
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    device = next(model.parameters()).device
    asked = torch.tensor([float(bool(ASKED))], device=device)
    sizes = [p.numel() for p in parameters] + [1]
    if not TOGETHER or TOGETHER[0].numel() != sum(sizes):
        TOGETHER[:] = [torch.empty(sum(sizes), device=device)]
    together = TOGETHER[0]
    torch.cat([p.grad.float().flatten() for p in parameters] + [asked], out=together)
    dist.all_reduce(together)
    together /= dist.get_world_size()
    *means, stops = together.split(sizes)
    for p, mean in zip(parameters, means):
        p.grad = mean.view_as(p).to(p.dtype)
    return int(signal.SIGTERM) if stops.item() else 0


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """x of all processes together, in place. -> x"""
    if dist.get_backend() == "nccl":
        on_gpu = x.cuda()
        dist.all_reduce(on_gpu)
        return x.copy_(on_gpu)
    dist.all_reduce(x)
    return x
