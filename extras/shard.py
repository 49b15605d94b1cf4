"""Several processes train one expert, and each keeps a part: for what does not fit on one GPU.

    torchrun --nproc_per_node=8 train.py --shard

The same run as that of extras/parallel.py: it goes on with --shard or without, on any number of
GPUs. But each keeps an even part of the expert's weights, gradients and moments, of the average of
the weights, and of the LLM's layers (ZeRO, stage 3: Rajbhandari et al. 2020, section 5; torch's
FSDP): 16 bytes a parameter of the expert (20 under AdamW), divided by the GPUs. A block, or a layer
of the LLM, is put together where it runs and taken apart after it; what lies around the blocks is
whole from the first to the last. All draw the samples, since all must run the average.

Whole at the start: the LLM on each GPU, where it is looked at, and expert, average and moments in
each process's RAM. Its table of words stays whole. What cannot be is in check_shards. (Tested with
gloo on a CPU; with NCCL on several GPUs it has not run yet.)
"""

import dataclasses
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from assemble import build_optimizers
from extras.mirror import layers_of
from extras.separation import SeparatedTower
from llm import BUCKET, FrozenLLM
from model import ExpertBlock, ImageExpert


def check_shards(expert: ImageExpert, llm: FrozenLLM, tasks) -> None:
    """ValueError for what cannot lie in parts."""
    if not hasattr(fsdp.FSDPModule, "reset_iter_state"):
        raise ValueError(f"--shard needs torch 2.13 or newer; this is {torch.__version__}")
    what = None
    if tasks:  # they run blocks outside of the expert's forward, and not as often in each process
        what = "--describe or --data edits"
    elif isinstance(expert, SeparatedTower):  # shares layers with the LLM
        what = "--bridge mirror with separation= or lr-ratio="
    elif hasattr(llm.reader, "written"):  # the LLM runs once a token, until this caption's end
        what = "--read think or --read rewrite"
    if what:
        raise ValueError(f"--shard does not go with {what}: leave one out")


def shard(run) -> None:
    """Of a train.Run, keep this process's part alone, on its device."""
    run.device = run.llm.device
    mesh = init_device_mesh(run.device.type, (dist.get_world_size(),))
    moments = moments_of(run)
    shard_tower(run.expert, mesh, run.dtype)
    shard_tower(run.ema, mesh, run.dtype)
    shard_llm(run.llm, mesh)

    # optimizers of the parts, which remember of them what those of the whole did
    run.optimizers = build_optimizers(run.expert, run.args.lr, run.args.weight_decay, ShardedMuon)
    optimizer_of = {}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)
    for name, p in run.expert.named_parameters():
        for key, value in moments[name].items():
            value = value.to(run.device)
            if value.shape == p.shape:  # not the number of steps
                value = distribute_tensor(value, mesh, p.placements, src_data_rank=None)
            optimizer_of[p].state[p][key] = value


def moments_of(run) -> dict[str, dict[str, Tensor]]:
    """Name of a parameter -> what its optimizer remembers of it."""
    moments = {}
    for optimizer in run.optimizers:
        moments |= optimizer.state
    named = {}
    for name, p in run.expert.named_parameters():
        named[name] = dict(sorted(moments.get(p, {}).items()))  # all gather in one order
    return named


def shard_tower(tower: ImageExpert, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Blocks and modulation one by one, the rest together. dtype: of autocast; matrices are put
    together in it, so that no copy of them in it stays until the backward pass."""
    options = {"mesh": mesh, "reshard_after_forward": True}
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in tower.blocks:
        if isinstance(block, ExpertBlock):
            # whole from the first matrix of `project` to the last of `finish`
            matrices = [block.qkv, block.out, block.gate_up, block.down]
            fsdp.fully_shard(matrices, mp_policy=policy, **options)
        else:
            fsdp.fully_shard(block, **options)
    if hasattr(tower, "modulation"):
        fsdp.fully_shard(tower.modulation, mp_policy=policy, **options)
    fsdp.fully_shard(tower, **options)


def shard_llm(llm: FrozenLLM, mesh: DeviceMesh) -> None:
    """Its layers one by one.

    Each process has other captions to read, and a layer needs all processes: who has read its own
    runs along with the others, over nothing, until all have.
    """
    decoder = llm.model.get_decoder() if llm.layers else llm.model
    layers = layers_of(decoder, llm.model.config.get_text_config().num_hidden_layers)
    for layer in layers:
        fsdp.fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fsdp.share_comm_ctx(list(layers))
    last = max((llm.cache_index[layer.index] for layer in llm.kept), default=-1)
    run_kept = llm.run_kept
    lookup = llm.lookup

    def anybody(reads: bool) -> bool:
        readers = torch.tensor(float(reads), device=llm.device)
        dist.all_reduce(readers)
        return readers.item() > 0

    def run_along(ids: Tensor, lengths: Tensor):
        cache = run_kept(ids, lengths)
        layers[last].reset_iter_state()  # the run ends within it: see CacheUpTo
        return cache

    def run_own(ids: Tensor, lengths: Tensor):
        anybody(True)
        return run_along(ids, lengths)

    def lookup_together(captions: list[str]) -> dict[str, Tensor]:
        found = lookup(captions)
        nothing = torch.zeros(1, BUCKET, dtype=torch.long, device=llm.device)
        while anybody(False):
            run_along(nothing, nothing[:, 0])
        return found

    llm.run_kept = run_own
    llm.lookup = lookup_together


# -------------------------------------------------------------------------------------------------
# Muon


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon of matrices in parts. The momentum lies in parts too; Newton-Schulz needs a
    whole matrix. Each process puts one together, iterates, and hands out the parts of the step."""

    @torch.no_grad()
    def step(self) -> None:
        ranks = dist.get_world_size()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), ranks):
                self.step_some(matrices[start : start + ranks], group)

    def step_some(self, matrices: list[Tensor], group: dict) -> None:
        """Of at most as many matrices as there are processes, one for each."""
        rank = dist.get_rank()
        for k, p in enumerate(matrices):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            kept = self.state[p]["momentum_buffer"]
            kept.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(kept, group["momentum"]).full_tensor()  # Nesterov
            if k == rank:
                own = update
        if rank < len(matrices):
            own = whole_step(own, group)
        for k, p in enumerate(matrices):
            step = own if k == rank else torch.empty(p.shape, device=p.device)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(distribute_tensor(step, p.device_mesh, p.placements, src_data_rank=k))


def whole_step(update: Tensor, group: dict) -> Tensor:
    """What Muon adds to a matrix for this update, both whole: what it makes of zero, with neither
    momentum nor decay."""
    zero = nn.Parameter(torch.zeros_like(update))
    zero.grad = update
    options = {key: group[key] for key in ("lr", "ns_coefficients", "ns_steps", "eps")}
    options |= {"adjust_lr_fn": group["adjust_lr_fn"], "weight_decay": 0}
    torch.optim.Muon([zero], momentum=0, nesterov=False, **options).step()
    return zero.detach()


# -------------------------------------------------------------------------------------------------
# saving


def gathered(run):
    """A run with whole tensors, for checkpoint.save_run: in the first process's RAM. All must take
    part; the tensors of the others are without numbers."""
    towers = []
    for tower in (run.expert, run.ema):
        with torch.device("meta"):
            whole = type(tower)(**tower.config)
        weights = {name: gather(x) for name, x in tower.state_dict().items()}
        whole.load_state_dict(weights, assign=True)
        towers.append(whole)
    moments = moments_of(run)
    state = {}
    for name, p in towers[0].named_parameters():
        state[p] = {key: gather(value) for key, value in moments[name].items()}
    optimizers = [SimpleNamespace(state=state)]
    return dataclasses.replace(run, expert=towers[0], ema=towers[1], optimizers=optimizers)


def gather(x: Tensor) -> Tensor:
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.to("meta" if dist.get_rank() else "cpu")
