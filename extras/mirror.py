"""The papers' own expert beside the same frozen LLM: a trainable copy of its decoder.

    python train.py --bridge mirror                    # starts from the LLM's weights
    python train.py --bridge mirror:init=random --checkpointing

`ReadOnlyCache` and `cache_mask` let any model of the library read on after a caption's cache.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, DynamicCache

from llm import Context, FrozenLLM, with_cache
from model import ImageExpert, sincos_2d, timestep_embedding
from patches import PATCHERS


class MirrorTower(ImageExpert):
    """An image tower with the LLM's own architecture, which may start from a copy of its weights.

    BAGEL, LMFusion and Mural's large models pair each layer of the LLM with a trainable copy of it.
    Image tokens take the place of words, all at the position after the caption; time is added to
    them once, at the input (BAGEL); attention over the picture is bidirectional, and reaches the
    caption in the LLM's cache. Deviations: the place of a patch is the additive table of
    `ImageExpert`, and there is no QK-norm where the LLM has none.

    llm_config: the LLM's text configuration, as a dict. ValueError if the architecture cannot serve
    (see `check`).
    """

    without_dropout: tuple[str, ...] = ("decoder",)

    def __init__(
        self,
        llm_config: dict,
        rotary: bool = True,
        patch: int = 16,
        image_size: int = 64,
        channels: int = 3,
        patcher: str = "unet",
        prediction: str = "clean",
        made_for: dict | None = None,
        reads_pictures: bool = False,
    ):
        nn.Module.__init__(self)  # the decoder stands in the place of ImageExpert's blocks
        self.config = {
            "llm_config": llm_config,
            "rotary": rotary,
            "patch": patch,
            "image_size": image_size,
            "channels": channels,
            "patcher": patcher,
            "prediction": prediction,
            "made_for": made_for or {},
            "reads_pictures": reads_pictures,
        }
        if image_size % patch:
            raise ValueError(f"--image-size {image_size} does not divide by --patch {patch}")
        self.patch = patch
        self.image_size = image_size
        self.channels = channels
        self.prediction = prediction
        self.made_for = self.config["made_for"]
        self.rotary = rotary

        config = CONFIG_MAPPING[llm_config["model_type"]].from_dict(llm_config)
        self.decoder = AutoModel.from_config(config, dtype=torch.float32)
        self.decoder.set_input_embeddings(nn.Identity())  # it never sees a word
        self.width = config.hidden_size
        self.reads = list(range(config.num_hidden_layers))
        fading = prediction == "clean"
        self.patcher = PATCHERS[patcher](self.width, patch, channels, fading)
        if reads_pictures:
            self.begin_of_image = nn.Parameter(torch.randn(self.width))
        self.embed_time = nn.Sequential(
            nn.Linear(256, self.width), nn.SiLU(), nn.Linear(self.width, self.width)
        )
        self.train()

    def train(self, mode: bool = True) -> "MirrorTower":
        super().train(mode)
        for name in self.without_dropout:  # the chance of a training step is its seed's alone
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return layers_of(self.decoder, len(self.reads))

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict(x_t, t, context) -> v: x_t (B, C, height, width), t (B,) in [0, 1]."""
        img, skips, time = self.tokens_of(x_t, t)
        out = self.patcher.decode(self.decode(img, context), skips, time, x_t.shape[2:])
        return self.as_velocity(out, x_t, t)

    def tokens_of(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Image tokens (B, N, D), the patcher's skips, and the time (B, D)."""
        rows = x_t.shape[2] // self.patch
        columns = x_t.shape[3] // self.patch
        time = self.embed_time(timestep_embedding(1000 * t, 256))  # (B, D)
        img, skips = self.patcher.encode(x_t, t, time)  # (B, N, D)
        img = img + time[:, None]
        img = img + sincos_2d(rows, columns, self.width, x_t.device).to(img.dtype)
        return img, skips, time

    def decode(self, img: Tensor, context: Context, cache: DynamicCache | None = None) -> Tensor:
        """Image tokens (B, N, D) through the decoder, looking at the caption and at each other ->
        (B, N, D). cache: in place of the context's ReadOnlyCache."""
        B, N, _ = img.shape
        if cache is None:
            cache = ReadOnlyCache(context, self.reads)
        # rotary: the text's keys are turned back, and the picture stands at the origin (see
        # Context); else at the place after the caption
        position = context.lengths
        if self.rotary:
            position = torch.zeros_like(context.lengths)
        return self.decoder(
            inputs_embeds=img,
            attention_mask=cache_mask(context, N, img.dtype, causal=False),
            position_ids=position[:, None].expand(B, N),
            **with_cache(self.decoder, cache),
        ).last_hidden_state

    # -- building one beside an LLM

    @classmethod
    def beside(cls, llm: FrozenLLM, init: str = "llm", **options) -> "MirrorTower":
        """A tower for this LLM, its weights the LLM's own ("llm") or fresh ("random"). ValueError
        if it cannot be."""
        config = llm.model.config.get_text_config()
        try:
            if len(llm.layers) != config.num_hidden_layers:
                raise ValueError("expected keys and values in every layer")
            rotary = any(len(layer.frequencies) for layer in llm.rotary)
            tower = cls(json.loads(config.to_json_string()), rotary=rotary, **options)
            if init == "llm":
                tower.copy_weights(llm)
            tower.check(llm)
        except Exception as error:  # an architecture may fail in any way: each becomes one line
            kind = type(llm.model).__name__
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"--bridge mirror: {kind} cannot be mirrored: {why}") from None
        return tower

    def copy_weights(self, llm: FrozenLLM) -> None:
        """All of the LLM's decoder but its table of words."""
        mine = self.decoder.state_dict()
        theirs = llm.model.get_decoder().state_dict()
        self.decoder.load_state_dict({name: theirs[name] for name in theirs if name in mine})

    def check(self, llm: FrozenLLM) -> None:
        """Every image token must see every other, all of the caption and none of the padding: asked
        of the gradients. ValueError if it is not so."""
        llm.keep(self.reads)
        context = llm.context(["a red circle", "two"])
        generator = torch.Generator().manual_seed(0)
        states = []
        for x in (*context.keys, *context.values):
            states.append(x.detach().float().cpu().requires_grad_())
        keys = states[: len(self.reads)]
        values = states[len(self.reads) :]
        lengths = context.lengths.cpu()
        img = torch.randn(2, 3, self.width, generator=generator).requires_grad_()
        out = self.decode(img, Context(keys, values, lengths))

        # a plain sum would be blind: behind a LayerNorm it is constant
        some = torch.randn(out.shape, generator=generator)
        for token in range(3):
            asked = (some * out)[:, token].sum()
            grads = torch.autograd.grad(asked, [img, *states], retain_graph=True)
            if (grads[0].abs().amax(-1) == 0).any():
                raise ValueError("its attention stays causal over the picture")
            seen = torch.stack([grad.abs().amax((1, 3)) for grad in grads[1:]])
            seen = seen.amax(0) > 0  # (2, T)
            valid = torch.arange(seen.shape[1]) < lengths[:, None]
            if not torch.equal(seen, valid):
                raise ValueError("the picture sees padding, or not all of the caption")

        # and longer padding must change nothing
        longer_keys = [F.pad(x, (0, 0, 0, 4)) for x in keys]
        longer_values = [F.pad(x, (0, 0, 0, 4)) for x in values]
        with torch.no_grad():
            padded = self.decode(img, Context(longer_keys, longer_values, lengths))
        if not torch.allclose(padded, out, rtol=1e-3, atol=1e-3):
            raise ValueError("padding changes the picture")


def layers_of(decoder: nn.Module, count: int) -> nn.ModuleList:
    """A decoder's layers, wherever its architecture keeps them."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError("expected a list of layers")


class ReadOnlyCache(DynamicCache):
    """The text's keys and values, in front of whatever a layer hands in; that is not kept with
    them, so a layer may run twice.

    written: layer -> the keys and values that it handed in last.
    """

    def __init__(self, context: Context, reads: list[int]):
        super().__init__()
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        for index, keys, values in zip(reads, context.keys, context.values):
            super().update(keys, values, index)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        text = self.layers[layer_idx]
        dtype = key_states.dtype
        self.written[layer_idx] = (key_states, value_states)
        keys = torch.cat([text.keys.to(dtype), key_states], dim=2)
        values = torch.cat([text.values.to(dtype), value_states], dim=2)
        return keys, values  # (B, G, T+N, Dk), (B, G, T+N, Dv)


def cache_mask(context: Context, N: int, dtype: torch.dtype, causal: bool) -> Tensor:
    """(B, 1, N, T+N): 0 where N tokens after the caption see it and each other (causally, if so),
    the least number else."""
    device = context.lengths.device
    T = context.keys[0].shape[2]
    B = len(context.lengths)
    padding = torch.arange(T, device=device) >= context.lengths[:, None]  # (B, T)
    later = torch.ones(N, N, dtype=torch.bool, device=device).triu(1) & causal
    unseen = torch.cat([padding[:, None].expand(-1, N, -1), later.expand(B, N, N)], dim=2)
    mask = torch.zeros(unseen.shape, device=device, dtype=dtype)
    return mask.masked_fill_(unseen, torch.finfo(dtype).min)[:, None]
