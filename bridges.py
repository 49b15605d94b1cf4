"""Other towers beside the same frozen LLM, with the same predict(x_t, t, context) as `ImageExpert`.

`MirrorTower`: the papers' own expert, a trainable copy of the LLM's decoder. The others have the transformer blocks of
`ImageExpert`, and differ in how the LLM's reading of the caption reaches them:

    mot           its keys and values, the keys turned back, each layer to a block: shared attention (model.ImageExpert)
    dense         not at all: text embeddings of its own
    last          one hidden state, the last, before the image tokens
    kv            its keys and values as they are
    hsi           a hidden state after every block
    lap           hidden states of every third layer, pooled over the layers, before the image tokens
    metaqueries   what it says to learned queries after the caption, before the image tokens
"""

import copy
import json
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModel, DynamicCache

from attention import joint_attention, text_mask
from model import (
    Context,
    ExpertBlock,
    FrozenLLM,
    ImageExpert,
    TextLayer,
    Tower,
    patchify,
    places,
    rms_norm,
    sinusoid,
    text_gains,
    text_layers,
    with_cache,
)


class ReadOnlyCache(DynamicCache):
    """The text's keys and values, in front of whatever a layer hands in; that is not kept, so a layer may run twice."""

    def __init__(self, context: Context, reads: list[int]):
        super().__init__()
        for index, keys, values in zip(reads, context.keys, context.values):
            super().update(keys, values, index)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        text, dtype = self.layers[layer_idx], key_states.dtype
        return torch.cat([text.keys.to(dtype), key_states], 2), torch.cat([text.values.to(dtype), value_states], 2)


def cache_mask(context: Context, N: int, dtype: torch.dtype, causal: bool) -> Tensor:
    """(B, 1, N, T+N): 0 where N tokens after the caption see it and each other (causally, if so), the least number else."""
    hidden = torch.arange(context.keys[0].shape[2], device=context.lengths.device) >= context.lengths[:, None]  # (B, T)
    later = torch.ones(N, N, dtype=torch.bool, device=hidden.device).triu(1) & causal
    hidden = torch.cat([hidden[:, None].expand(-1, N, -1), later.expand(len(hidden), N, N)], dim=2)
    return torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


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
        # rotary: the text's keys are turned back, the picture stands at the origin (see Context); else at the place after it
        position = torch.zeros_like(context.lengths) if self.rotary else context.lengths
        return self.decoder(
            inputs_embeds=img,
            attention_mask=cache_mask(context, N, img.dtype, causal=False),
            position_ids=position[:, None].expand(B, N),
            **with_cache(self.decoder, ReadOnlyCache(context, self.reads)),
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


# ---------------------------------------------------------------------------------------------------------------------
# text tokens in front of the image tokens


class KeyValueFusion(ImageExpert):
    """Key-value fusion (UniFusion, section 2.1, after Playground v3): as many layers and heads as the LLM has, and its keys and
    values as they are: turned to where the words stand, beside image keys that have no norm and no rotation.

    Deviation: the tower's own width need not be the LLM's, since nothing but keys and values passes.
    """

    qk_norm, turned = False, False


class Prepending(ImageExpert):
    """A single stream: text tokens and then image tokens through the same blocks, all seeing all but the padding.

    `text` makes the text tokens out of a Context, (B, T, D); or (B, T, blocks D), of which the first D are the tokens and the
    others are added to them after each block but the last. Text tokens get the sine-cosine table of their places.
    states: the hidden states that it reads (see FrozenLLM.keep), of width text_width. text_layers: only the shapes of heads.

    Deviation: hidden states are normed and then standardized, each dimension by its mean and deviation over some captions. Of
    the energy of gemma-3-270m's middle layers 97 % lies in 4 dimensions of 640, nearly the same for every token (massive
    activations, Sun et al. 2024): after a norm alone, what tells words apart is too faint to learn from.
    """

    def __init__(self, text_layers: list[dict], states: list[int], text_width: int, **options):
        super().__init__(text_layers, **options)
        self.config |= {"states": states, "text_width": text_width}
        self.reads, self.states = [], states
        self.register_buffer("mean", torch.zeros(len(states), text_width))
        self.register_buffer("deviation", torch.ones(len(states), text_width))

    @torch.no_grad()
    def measure(self, llm: FrozenLLM, captions: list[str]) -> None:
        """Take mean and deviation from these captions."""
        self.attach(llm)
        context = llm.context(captions)
        valid = torch.arange(context.hidden[0].shape[1], device=llm.device) < context.lengths[:, None]  # (B, T)
        for i, hidden in enumerate(context.hidden):
            x = rms_norm(hidden[valid].float())
            self.mean[i], self.deviation[i] = x.mean(0), x.std(0) + 0.01

    def standardized(self, context: Context) -> list[Tensor]:
        """The hidden states, (B, T, text_width) each."""
        return [(rms_norm(x.float()) - m) / d for x, m, d in zip(context.hidden, self.mean, self.deviation)]

    def text(self, context: Context) -> Tensor:
        raise NotImplementedError

    def prepare(self, context: Context) -> Context:
        if context.text is not None:
            return context
        once, rows = context.distinct or (context, slice(None))  # each caption once, however many pictures it has
        text = self.text(once)
        place = sinusoid(torch.arange(text.shape[1], device=text.device), self.width).to(text.dtype)
        text = text + F.pad(place, (0, text.shape[-1] - self.width))
        return replace(context, text=text[rows])

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict(x_t, t, context) -> v: x_t (B, C, height, width), t (B,) in [0, 1]."""
        context = self.prepare(context)
        txt, *later = context.text.split(self.width, dim=-1)
        img, modulations, last = self.begin(x_t, t)
        T, N = txt.shape[1], img.shape[1]
        both = torch.cat([txt.to(img.dtype), img], dim=1)  # (B, T+N, D)
        mask = text_mask(context.lengths, T, N) if context.padded else None
        for i, (block, m) in enumerate(zip(self.blocks, modulations)):
            q, k, v = block.project(both, m)
            attended = joint_attention(q, k[:, :, T:], v[:, :, T:], k[:, :, :T], v[:, :, :T], mask)
            both = block.finish(both, attended, m)
            if i < len(later):
                both = both + F.pad(later[i].to(both.dtype), (0, 0, 0, N))
        return self.end(both[:, T:], last, x_t, t)


class Dense(Prepending):
    """Nothing of the LLM but its tokenizer: text embeddings learned from the training captions alone (Mural's dense baseline).

    The embedding of a token is the sum of two rows, for its number divided by 1,024 and for the remainder: every token has one
    of its own, in few parameters.
    """

    tokens = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.low, self.high = nn.Embedding(1024, self.width), nn.Embedding(1024, self.width)

    def text(self, context: Context) -> Tensor:
        return self.low(context.tokens % 1024) + self.high(context.tokens // 1024 % 1024)


class HiddenStates(Prepending):
    """Hidden states, each projected. One of them: the usual text encoder, with the last layer's or the one's before
    (UniFusion, section 2.1). One for the input and one after every block but the last, behind which no image token would hear
    of it: hidden-state injection (the same section).

    Deviation for injection: the projection, because the tower is narrower than the LLM; and its blocks may be fewer than the
    LLM's layers, which are then taken evenly spread.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.project = nn.ModuleList(nn.Linear(self.config["text_width"], self.width) for _ in self.states)

    def text(self, context: Context) -> Tensor:
        return torch.cat([project(x) for project, x in zip(self.project, self.standardized(context))], dim=-1)


class Encoder(nn.Module):
    """Standard transformer blocks, each token seeing all others: `ExpertBlock` without time (shift and scale 0, gates 1)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        layer = TextLayer(0, max(1, width // 64), min(64, width), min(64, width))
        self.blocks = nn.ModuleList(ExpertBlock(width, layer.kv_heads, width, layer) for _ in range(depth))
        still = torch.tensor([0.0, 0, 1, 0, 0, 1]).view(1, 6, 1, 1).expand(1, 6, 1, width)
        self.register_buffer("still", still, persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T, D) of which lengths (B,) are valid -> the same shape. A row without any sees its padding, harmlessly."""
        if x.numel() == 0:
            return x
        mask = text_mask(lengths.clamp_min(1), x.shape[1], 0)
        for block in self.blocks:
            q, k, v = block.project(x, self.still.to(x.dtype))
            none = slice(0, 0)
            attended = joint_attention(q, k[:, :, none], v[:, :, none], k, v, mask)
            x = block.finish(x, attended.to(x.dtype), self.still.to(x.dtype))
        return x


class LayerPooling(nn.Module):
    """Layerwise attention pooling (UniFusion, section 2.1): per token, two blocks attend across layers, and one linear layer
    makes the result a single vector.

    Deviations: it works in the tower's width, not the LLM's, and each layer is marked by a learned vector: attention alone
    could tell the layers apart only by what is in them.
    """

    def __init__(self, layers: int, text_width: int, width: int):
        super().__init__()
        self.enter, self.place = nn.Linear(text_width, width), nn.Parameter(0.02 * torch.randn(layers, width))
        self.across, self.pool = Encoder(width, 2), nn.Linear(layers * width, width)

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """hidden[i] (B, T, d) -> (B, T, D)."""
        x = self.enter(torch.stack(hidden, dim=2)) + self.place  # (B, T, layers, D)
        tokens = x.flatten(0, 1)  # (B T, layers, D)
        tokens = self.across(tokens, torch.full((len(tokens),), tokens.shape[1], device=x.device))
        return self.pool(tokens.flatten(1)).unflatten(0, x.shape[:2])


class LayerwisePooling(Prepending):
    """LAP, UniFusion's own bridge (sections 2.1, 3.1, 3.2): hidden states of every third layer, pooled over the layers, then a
    refiner of two bidirectional blocks over the tokens, which mends the bias of causal attention; before the image tokens,
    at the input only. per_layer: a pooling for every block, injected as hidden states are (its appendix A.2).
    """

    def __init__(self, *args, refiner: bool = True, per_layer: bool = False, **options):
        super().__init__(*args, **options)
        self.config |= {"refiner": refiner, "per_layer": per_layer}
        n = len(self.blocks) if per_layer else 1
        self.pools = nn.ModuleList(LayerPooling(len(self.states), self.config["text_width"], self.width) for _ in range(n))
        self.refine = Encoder(self.width, 2 if refiner else 0)

    def text(self, context: Context) -> Tensor:
        hidden = self.standardized(context)
        return torch.cat([self.refine(pool(hidden), context.lengths) for pool in self.pools], dim=-1)


class MetaQueries(Prepending):
    """Learned queries that the frozen LLM reads after the caption; what it makes of them, through a bidirectional connector, is
    the text (MetaQueries, section 3). Gradients flow through the LLM to the queries, and none stays in it.

    The queries run over the caption's cache, once per caption, as one more reader of it. They are a parameter of their own: as
    rows of the vocabulary they would let weight decay shrink the frozen table. Deviations: the connector has two blocks in the
    tower's width, where the paper's has 24 in the LLM's, and the result is prepended, not cross-attended to.
    """

    def __init__(self, *args, reads: list[int], queries: int = 64, rotary: bool = True, **options):
        super().__init__(*args, **options)
        self.config |= {"reads": reads, "queries": queries, "rotary": rotary}
        self.reads, self.rotary, self.room = reads, rotary, queries
        self.queries = nn.Parameter(torch.randn(queries, self.config["text_width"]))
        self.project = nn.Linear(self.config["text_width"], self.width)
        self.connect = Encoder(self.width, 2)

    def attach(self, llm: FrozenLLM) -> None:
        super().attach(llm)
        self.llm = (llm.model.base_model,)  # in a tuple, so that it is no part of this module

    def text(self, context: Context) -> Tensor:
        (model,), (N, _), (B,) = self.llm, self.queries.shape, context.lengths.shape
        position = torch.arange(N, device=self.queries.device) + (0 if self.rotary else context.lengths[:, None])  # see Context
        with torch.autocast(self.queries.device.type, enabled=False):
            said = model(
                inputs_embeds=self.queries.to(model.dtype).expand(B, -1, -1),
                attention_mask=cache_mask(context, N, model.dtype, causal=True),
                position_ids=position.expand(B, N),
                **with_cache(model, ReadOnlyCache(context, self.reads)),
            ).last_hidden_state
        x = self.project(rms_norm(said.float()))
        return rms_norm(self.connect(x, torch.full((B,), N, device=x.device)))

    def prepare(self, context: Context) -> Context:
        if context.text is not None:
            return context
        prepared = super().prepare(context)
        return replace(prepared, lengths=torch.full_like(context.lengths, len(self.queries)), padded=False)


# ---------------------------------------------------------------------------------------------------------------------
# building them, all of one size

BRIDGES = {
    "mot": ImageExpert,
    "dense": Dense,
    "last": HiddenStates,
    "kv": KeyValueFusion,
    "hsi": HiddenStates,
    "lap": LayerwisePooling,
    "metaqueries": MetaQueries,
}
ON_HIDDEN_STATES = ("last", "hsi", "lap")  # which can do with an encoder


def build_bridge(
    name: str, llm: FrozenLLM, width: int, depth: int | None = None, heads: int | None = None, part: str = "middle",
    hidden_state: str = "last", stride: int = 3, refiner: bool = True, per_layer: bool = False, queries: int = 64, **shared,
) -> ImageExpert:  # fmt: skip
    """A bridge to this LLM, with as many trainable parameters as `mot` has: what a connector takes is taken from the insides of
    the blocks' SwiGLU (not so with per_layer). ValueError if the LLM or the sizes do not allow it. shared: patch, image_size
    and what else every tower takes.
    """
    available = len(llm.layers)
    if available == 0 and name not in (*ON_HIDDEN_STATES, "dense"):
        raise ValueError(f"--bridge {name} needs keys and values, which {llm.name} has not; expected a decoder LLM, or --bridge"
                         f" {' or '.join(ON_HIDDEN_STATES)}")  # fmt: skip
    depth = depth or min(9, available or 9)
    own = [asdict(TextLayer(0, max(1, width // 64), 64, 64))] * depth  # the heads beside an encoder
    layers = text_layers(llm, depth, part) if available else own
    heads = heads or layers[0]["kv_heads"] * max(1, round(2 * width / (layers[0]["key_width"] * layers[0]["kv_heads"])))
    shape = {"text_layers": layers, "width": width, "heads": heads, **shared}
    if name == "mot":
        return ImageExpert(**shape, text_gains=text_gains(llm, layers))
    with torch.device("meta"):
        wanted = count_parameters(ImageExpert(**shape))
    if name == "kv":
        shape |= {"text_layers": text_layers(llm, available), "heads": llm.model.config.get_text_config().num_attention_heads}
        shape["width"] = max(32, width * depth // available // 32 * 32)  # as deep as the LLM, and so not as wide as the others
        return of_size(name, wanted, shape)
    top = len(llm.hidden_widths) - 1  # hidden states are numbered from 0, the embeddings, to this
    shape |= {"text_width": llm.hidden_widths[-1], "states": []}
    if name == "last":
        number = {"last": top, "penultimate": top - 1}.get(hidden_state, hidden_state)
        if not str(number).isdecimal() or int(number) > top:
            raise ValueError(f"--hidden-state {hidden_state}: expected last, penultimate, or a number from 0 to {top}")
        shape["states"] = [int(number)]
    elif name == "hsi":
        shape["states"] = [round(i * top / max(1, depth - 1)) for i in range(depth)]
    elif name == "lap":
        if stride > top:
            raise ValueError(f"--stride {stride}: {llm.name} has {top} layers; expected at most that")
        shape |= {"states": list(range(0, top + 1, stride)), "refiner": refiner, "per_layer": per_layer}
        if per_layer:  # so many poolings are more than all of mot: they come on top
            return LayerwisePooling(**shape)
    elif name == "metaqueries":
        rotary = any(len(layer.frequencies) for layer in llm.rotary)
        shape |= {"reads": list(range(available)), "queries": queries, "rotary": rotary}
    tower = of_size(name, wanted, shape)
    if name == "metaqueries":
        begin(tower, llm)
    return tower


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_size(name: str, wanted: int, shape: dict) -> ImageExpert:
    """The tower of this shape with about so many trainable parameters: its SwiGLU takes up the difference."""
    with torch.device("meta"):
        at_64, at_128 = (count_parameters(BRIDGES[name](hidden=hidden, **shape)) for hidden in (64, 128))
    hidden = 64 + round((wanted - at_64) * 64 / (at_128 - at_64) / 16) * 16
    if hidden < 32:
        raise ValueError(f"--bridge {name}: with the {wanted} parameters that --bridge mot has, there are too few beside its "
                         "connector; expected a larger --width or --depth, or a smaller connector")  # fmt: skip
    return BRIDGES[name](hidden=hidden, **shape)


def begin(tower: MetaQueries, llm: FrozenLLM) -> None:
    """Queries of the size of the LLM's embeddings; ValueError if it cannot read them after a caption's cache."""
    kind = type(llm.model).__name__
    try:
        if len(llm.layers) != llm.model.config.get_text_config().num_hidden_layers:
            raise ValueError("expected keys and values in every layer")
        if tower.room >= llm.max_tokens // 2:
            raise ValueError(f"{tower.room} of them are too many for an LLM of {llm.max_tokens} tokens")
        with torch.no_grad():
            embedded = llm.model.get_input_embeddings()(torch.arange(3, 99, device=llm.device) % 90)
            tower.queries.mul_(embedded.float().std().item())
            here = copy.deepcopy(tower).to(llm.device)
            here.attach(llm)
            both, one = here.text(llm.context(["a red circle", "two"])), here.text(llm.context(["two"]))
        if not torch.allclose(both[1:], one, rtol=0.1, atol=0.1):
            raise ValueError("padding changes what it says")
    except Exception as error:  # an architecture may fail in any way: each becomes one clear line
        raise ValueError(f"--bridge metaqueries: {kind} cannot read queries: {' '.join(str(error).split())[:200]}") from None
