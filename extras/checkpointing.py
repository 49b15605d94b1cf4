"""Gradient checkpointing: less memory for more time (Chen et al. 2016).

    python train.py --checkpointing
    python train.py --resume --no-checkpointing --out runs/shapes

A layer keeps what comes in, and computes what it needs for its gradients once more on the way back.
No number changes, so it belongs to a run and not to its expert.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from model import ExpertBlock, ImageExpert
from patches import ConvBlock


def checkpoint_layers(tower: ImageExpert) -> None:
    """Checkpoint the layers of a tower, in place: of its own blocks what is before and after the
    attention, whose inputs are kept; of a mirrored one the whole layers; and each ConvBlock.
    ValueError where the layers are the LLM's own."""
    if getattr(tower, "separation", "deep") != "deep":
        raise ValueError(
            f"--checkpointing: with --bridge mirror:separation={tower.separation} the layers are "
            "the LLM's own; leave it out"
        )
    layers = [module for module in tower.modules() if isinstance(module, (ExpertBlock, ConvBlock))]
    for layer in {*layers, *tower.blocks}:
        for name in parts_of(layer):
            part = partial(checkpoint, getattr(layer, name), use_reentrant=False)
            setattr(layer, name, part)


def parts_of(layer: nn.Module) -> tuple[str, ...]:
    """The methods of a layer that are computed twice."""
    return ("project", "finish") if isinstance(layer, ExpertBlock) else ("forward",)
