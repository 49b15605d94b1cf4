"""What LMFusion compares itself with (section 5.1): less of the image tower its own, or an LLM that
learns too.

    python train.py --bridge mirror:separation=shallow
    python train.py --bridge mirror:separation=none:lr-ratio=0.1 --describe 0.2
    python train.py --bridge mirror:separation=none:lr-ratio=1 --random-llm    # Transfusion
    python -m extras.perplexity --ckpt runs/shapes-mirror                      # what it has cost

separation: "deep", the tower has attention and feed-forward layers of its own (mirror.py as it is);
"shallow", feed-forward layers alone; "none", nothing but the two ends, the U-Net. What is not its
own is the LLM's. lr-ratio: the LLM's learning rate, as a share of the tower's; at 0 it is frozen.

With a ratio above 0 THE LLM IS NOT FROZEN: it trains, is a part of the tower, and is saved with it.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from extras.mirror import MirrorTower, layers_of
from llm import Context, FrozenLLM

SEPARATIONS = ("deep", "shallow", "none")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")  # what architectures call that part of a layer


class SeparatedTower(MirrorTower):
    """A mirrored tower that uses modules of the LLM in the place of its own, or trains the LLM.

    separation, llm_lr_ratio: see above. whole_config: with a ratio above 0, the configuration of
    the LLM with its head, as a dict; the rest is MirrorTower's.
    """

    without_dropout = ("decoder", "llm")

    def __init__(
        self,
        llm_config: dict,
        separation: str = "deep",
        llm_lr_ratio: float = 0.0,
        whole_config: dict | None = None,
        **options,
    ):
        super().__init__(llm_config, **options)
        self.config["separation"] = separation
        self.config["llm_lr_ratio"] = llm_lr_ratio
        self.config["whole_config"] = whole_config
        self.separation = separation
        self.llm_lr_ratio = llm_lr_ratio
        if separation == "shallow":
            self.feed_forward = nn.ModuleList()
            for block in self.blocks:
                self.feed_forward.append(getattr(block, feed_forward_of(block)))
        if separation != "deep":
            del self.decoder  # the LLM's stands in its place: see attach
        self.model = (None,)  # in a tuple: its parts are registered below, its head but once
        if whole_config:
            config = CONFIG_MAPPING[whole_config["model_type"]].from_dict(whole_config)
            self.hold(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())

    def hold(self, model: nn.Module) -> None:
        """Take the LLM as a part of this tower."""
        self.model = (model,)
        self.llm = model.base_model
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            self.llm_head = head

    def llm_parameters(self) -> list[nn.Parameter]:
        (own,) = self.model
        return [] if own is None else list(own.parameters())

    def attach(self, llm: FrozenLLM) -> None:
        """Read with the LLM; or have the one that is trained with the tower take its place."""
        (own,) = self.model
        if own is not None:
            if llm.frozen:
                print(f"LLM {llm.name}: NOT as it was, its weights were trained with the expert")
            llm.model = own
            llm.dtype = own.dtype  # float32, in which it is trained
        super().attach(llm)  # and forget what another has read
        if self.separation != "deep":
            # not as a module: what the LLM has, it keeps
            object.__setattr__(self, "decoder", llm.model.get_decoder())

    def decode(self, img: Tensor, context: Context, cache=None) -> Tensor:
        with self.own_feed_forward():
            return super().decode(img, context, cache)

    @contextmanager
    def own_feed_forward(self) -> Iterator[None]:
        """Meanwhile the LLM's layers have the tower's feed-forward layers, if it has such."""
        if self.separation != "shallow":
            yield
            return
        theirs = []
        try:
            for block, own in zip(self.blocks, self.feed_forward):
                name = feed_forward_of(block)
                theirs.append((block, name, getattr(block, name)))
                setattr(block, name, own)
            yield
        finally:
            for block, name, before in theirs:
                setattr(block, name, before)

    # -- building one beside an LLM

    @classmethod
    def beside(
        cls, llm: FrozenLLM, init: str, separation: str, llm_lr_ratio: float, **options
    ) -> "SeparatedTower":
        """As MirrorTower.beside; the LLM that is trained with it begins as this one."""
        if llm_lr_ratio:
            options["whole_config"] = json.loads(llm.model.config.to_json_string())
        more = {"separation": separation, "llm_lr_ratio": llm_lr_ratio}
        return super().beside(llm, init, **more, **options)

    def copy_weights(self, llm: FrozenLLM) -> None:
        if self.separation == "deep":
            super().copy_weights(llm)
        elif self.separation == "shallow":
            decoder = llm.model.get_decoder()
            for theirs, mine in zip(layers_of(decoder, len(self.reads)), self.feed_forward):
                mine.load_state_dict(getattr(theirs, feed_forward_of(theirs)).state_dict())

    def check(self, llm: FrozenLLM) -> None:
        """As MirrorTower.check, of the architecture."""
        if self.separation == "deep":
            super().check(llm)
        else:
            MirrorTower(self.config["llm_config"], self.rotary).check(llm)
        (own,) = self.model
        if own is not None:
            own.load_state_dict(llm.model.state_dict())


def feed_forward_of(block: nn.Module) -> str:
    """The name of its feed-forward layer. ValueError for an architecture that has another."""
    for name in FEED_FORWARD:
        if hasattr(block, name):
            return name
    raise ValueError(f"separation=shallow: expected layers with one of {', '.join(FEED_FORWARD)}")


class TrainedLLM(FrozenLLM):
    """The LLM of a run that trains it: in float32, each caption read anew, with a graph."""

    frozen = False

    def __init__(self, model, tokenizer, name: str, cache_mb: float = 0, *rest):
        super().__init__(model.float(), tokenizer, name, 0, *rest)

    run = inspect.unwrap(FrozenLLM.run)  # without its no_grad

    def encode(self, token_lists: list[list[int]], length: int, count: int) -> Tensor:
        """Of these captions alone: what is read does not stay, so its last bit need not either."""
        return super().encode(token_lists, length, len(token_lists))


def moved(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """Kind of parameter -> how far training has moved it, ||after - before|| / ||before||."""
    kinds: dict[str, list[Tensor]] = {}
    theirs = dict(before.named_parameters())
    for name, p in after.named_parameters():
        step = (p.detach().float().cpu() - theirs[name].detach().float().cpu()).square().sum()
        size = theirs[name].detach().float().cpu().square().sum()
        kinds.setdefault(kind_of(name), []).append(torch.stack([step, size]))
    distances = {}
    for kind, sums in kinds.items():
        step, size = torch.stack(sums).sum(dim=0)
        distances[kind] = (step / size).sqrt().item()
    return distances


def kind_of(name: str) -> str:
    """What a parameter of an LLM belongs to, by its name."""
    if "norm" in name or "ln_" in name:
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    if any(part in name.split(".") for part in FEED_FORWARD):
        return "feed-forward"
    return "embeddings and head"
