"""Other towers beside the same frozen LLM, with the same predict(x_t, t, context) as `ImageExpert`.

`MirrorTower`: the papers' own expert, a trainable copy of the LLM's decoder.
"""

import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModel, DynamicCache

from model import Context, FrozenLLM, Tower, patchify, places, sinusoid


class ReadOnlyCache(DynamicCache):
    """The text's keys and values, in front of whatever a layer hands in; that is not kept, so a layer may run twice."""

    def __init__(self, context: Context, reads: list[int]):
        super().__init__()
        for index, keys, values in zip(reads, context.keys, context.values):
            super().update(keys, values, index)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        text, dtype = self.layers[layer_idx], key_states.dtype
        return torch.cat([text.keys.to(dtype), key_states], 2), torch.cat([text.values.to(dtype), value_states], 2)


class MirrorTower(Tower):
    """An image tower with the LLM's own architecture, which may start from a copy of its weights.

    BAGEL, LMFusion and Mural's large models pair each layer of the LLM with a trainable copy of it. Image tokens take the
    place of words, all at the position after the caption; time is added to them once, at the input (BAGEL); attention
    over the picture is bidirectional, and reaches the caption in the LLM's cache. Deviations: the place of a patch is the
    additive table of `ImageExpert`, and there is no QK-norm where the LLM has none.

    llm_config: the LLM's text configuration, as a dict. checkpointing: compute each layer's activations again in the
    backward pass instead of keeping them. ValueError if the architecture cannot serve (see `check`).
    """

    def __init__(
        self,
        llm_config: dict,
        rotary: bool = True,
        patch: int = 8,
        image_size: int = 32,
        channels: int = 3,
        prediction: str = "clean",
        checkpointing: bool = False,
        made_for: dict | None = None,
    ):
        super().__init__({"llm_config": llm_config, "rotary": rotary, "patch": patch, "image_size": image_size,
                          "channels": channels, "prediction": prediction, "checkpointing": checkpointing,
                          "made_for": made_for})  # fmt: skip
        config = CONFIG_MAPPING[llm_config["model_type"]].from_dict(llm_config)
        self.decoder = AutoModel.from_config(config, dtype=torch.float32)
        self.decoder.set_input_embeddings(nn.Identity())  # it never sees a word
        self.rotary, self.width = rotary, (width := config.hidden_size)
        self.reads = list(range(config.num_hidden_layers))
        self.embed = nn.Linear(channels * patch**2, width)
        self.embed_time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, channels * patch**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.train()
        if checkpointing:
            for block in self.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def train(self, mode: bool = True) -> "MirrorTower":
        super().train(mode)
        self.decoder.eval()  # no dropout: the chance of a training step is its seed's alone
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        lists = (m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == len(self.reads))
        return next(lists)

    @classmethod
    def beside(cls, llm: FrozenLLM, init: str = "llm", **options) -> "MirrorTower":
        """A tower for this LLM, its weights the LLM's own ("llm") or fresh ("random"). ValueError if it cannot be."""
        config = llm.model.config.get_text_config()
        try:
            if len(llm.layers) != config.num_hidden_layers:
                raise ValueError("expected keys and values in every layer")
            rotary = any(len(layer.frequencies) for layer in llm.rotary)
            tower = cls(json.loads(config.to_json_string()), rotary, **options)
            if init == "llm":
                own = {k: v for k, v in llm.model.get_decoder().state_dict().items() if k in tower.decoder.state_dict()}
                tower.decoder.load_state_dict(own)
            tower.check(llm)
        except Exception as error:  # an architecture may fail in any way: each becomes one clear line
            kind = type(llm.model).__name__
            raise ValueError(f"--expert mirror: {kind} cannot be mirrored: {' '.join(str(error).split())[:200]}") from None
        return tower

    def decode(self, img: Tensor, context: Context) -> Tensor:
        """Image tokens (B, N, D) through the decoder, looking at the caption and at each other -> (B, N, D)."""
        B, N, _ = img.shape
        T = context.keys[0].shape[2]
        padding = torch.arange(T, device=img.device) >= context.lengths[:, None]  # (B, T)
        # rotary: the text's keys are turned back, the picture stands at the origin (see Context); else at the place after it
        position = torch.zeros_like(context.lengths) if self.rotary else context.lengths
        mask = torch.zeros(B, 1, N, T + N, device=img.device, dtype=img.dtype)
        mask[..., :T].masked_fill_(padding[:, None, None], torch.finfo(img.dtype).min)
        return self.decoder(
            inputs_embeds=img,
            attention_mask=mask,
            position_ids=position[:, None].expand(B, N),
            past_key_values=ReadOnlyCache(context, self.reads),
            use_cache=True,
        ).last_hidden_state

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict(x_t, t, context) -> v: x_t (B, C, height, width), t (B,) in [0, 1]."""
        rows, columns = x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        img = self.embed(patchify(x_t, self.patch)) + self.embed_time(sinusoid(1000 * t, 256))[:, None]
        img = img + places(rows, columns, self.width, x_t.device).to(img.dtype)
        return self.velocity(self.head(self.decode(img, context)), x_t, t)

    def check(self, llm: FrozenLLM) -> None:
        """Every image token must see every other, all of the caption and none of the padding: asked of the gradients."""
        llm.keep(self.reads)
        context = llm.context(["a red circle", "two"])
        generator = torch.Generator().manual_seed(0)
        states = [x.detach().float().cpu().requires_grad_() for x in (*context.keys, *context.values)]
        inside = Context(states[: len(self.reads)], states[len(self.reads) :], context.lengths.cpu())
        img = torch.randn(2, 3, self.width, generator=generator).requires_grad_()
        out = self.decode(img, inside)
        some = torch.randn(out.shape, generator=generator)  # a plain sum would be blind: behind a LayerNorm it is constant
        for token in range(3):
            grads = torch.autograd.grad((some * out)[:, token].sum(), [img, *states], retain_graph=True)
            if (grads[0].abs().amax(-1) == 0).any():
                raise ValueError("its attention stays causal over the picture")
            seen = torch.stack([g.abs().amax((1, 3)) for g in grads[1:]]).amax(0) > 0  # (2, T)
            if not torch.equal(seen, torch.arange(seen.shape[1]) < inside.lengths[:, None]):
                raise ValueError("the picture sees padding, or not all of the caption")
        with torch.no_grad():
            longer = Context(*([F.pad(x, (0, 0, 0, 4)) for x in xs] for xs in (inside.keys, inside.values)), inside.lengths)
            if not torch.allclose(self.decode(img, longer), out, rtol=1e-3, atol=1e-3):
                raise ValueError("padding changes the picture")
