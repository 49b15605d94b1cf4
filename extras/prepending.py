"""Towers with the caption's tokens in front of the image's, in one stream: where the text tokens
come from is what tells them apart.

    dense         an embedding of their own, nothing of the LLM
    last          one of the LLM's hidden states
    hsi           a hidden state after every block
    lap           hidden states of every third layer, pooled over the layers
    metaqueries   what the LLM says to learned queries after the caption
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import joint_attention, text_mask
from extras.bridge_llm import BridgeContext, BridgeLLM
from extras.mirror import ReadOnlyCache, cache_mask
from llm import TextLayer, with_cache
from model import ExpertBlock, ImageExpert, rms_norm, timestep_embedding


class Prepending(ImageExpert):
    """A single stream: text tokens and then image tokens through the same blocks, all seeing all
    but the padding.

    `make_text` makes the text tokens out of a BridgeContext, (B, T, D); or (B, T, blocks D), of
    which the first D are the tokens and the others are added to them after each block but the last.
    Text tokens get the sine-cosine table of their places.

    states: the hidden states that it reads (see BridgeLLM.keep), of width text_width. text_layers:
    only the shapes of heads.

    Deviation: hidden states are normed and then standardized, each dimension by its mean and
    deviation over some captions. Of the energy of gemma-3-270m's middle layers 97 % lies in 4
    dimensions of 640, nearly the same for every token (massive activations, Sun et al. 2024): after
    a norm alone, what tells words apart is too faint to learn from.
    """

    needs_tokens = False  # whether it reads token ids
    room = 0  # positions of the LLM that stay free after the caption

    def __init__(self, text_layers: list[dict], states: list[int], text_width: int, **options):
        super().__init__(text_layers, **options)
        self.config |= {"states": states, "text_width": text_width}
        self.reads = []
        self.states = states
        self.register_buffer("mean", torch.zeros(len(states), text_width))
        self.register_buffer("deviation", torch.ones(len(states), text_width))

    def attach(self, llm: BridgeLLM) -> None:
        """Have this LLM hand over what the tower reads."""
        llm.keep(self.reads, self.states, self.needs_tokens, room=self.room)

    def forward(self, x_t: Tensor, t: Tensor, context: BridgeContext) -> Tensor:
        """predict(x_t, t, context) -> v: x_t (B, C, height, width), t (B,) in [0, 1]."""
        txt, *later = self.text_of(context).split(self.width, dim=-1)  # (B, T, D) each
        img, modulations, last = self.tokens_of(x_t, t)
        T = txt.shape[1]
        N = img.shape[1]
        mask = self.mask_of(context, T, N)
        both = torch.cat([txt.to(img.dtype), img], dim=1)  # (B, T+N, D)
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(both, modulations[i])
            txt_k = k[:, :, :T]
            txt_v = v[:, :, :T]
            attended = joint_attention(q, k[:, :, T:], v[:, :, T:], txt_k, txt_v, mask)
            both = block.finish(both, attended, modulations[i])
            if i < len(later):  # injection: to the text tokens alone
                both = both + F.pad(later[i].to(both.dtype), (0, 0, 0, N))
        return self.velocity_of(both[:, T:], last, x_t, t)

    def text_of(self, context: BridgeContext) -> Tensor:
        """The text tokens (B, T, D), made once for each caption, however many pictures it has; and
        in a drawing once for all of its steps. A training step changes the weights, and makes them
        anew."""
        if context.text is not None and context.made_by is self:
            return context.text

        once = context
        if context.distinct:
            once, rows = context.distinct
        text = self.make_text(once)

        # where each token stands, in the tokens alone and not in what is added after the blocks
        place = torch.arange(text.shape[1], device=text.device)
        table = timestep_embedding(place, self.width).to(text.dtype)
        text = text + F.pad(table, (0, text.shape[-1] - self.width))
        if context.distinct:
            text = text[rows]  # (B, T, D)
        if not torch.is_grad_enabled():
            context.text = text
            context.made_by = self
        return text

    def make_text(self, context: BridgeContext) -> Tensor:
        raise NotImplementedError

    def mask_of(self, context: BridgeContext, T: int, N: int) -> Tensor | None:
        """What all tokens see: the valid text, and the whole image."""
        return text_mask(context.lengths, T, N) if context.padded else None

    @torch.no_grad()
    def measure(self, llm: BridgeLLM, captions: list[str]) -> None:
        """Take mean and deviation of the hidden states from these captions."""
        self.attach(llm)
        context = llm.context(captions)
        place = torch.arange(context.length, device=llm.device)
        valid = place < context.lengths[:, None]  # (B, T)
        for i, hidden_states in enumerate(context.hidden_states):
            x = rms_norm(hidden_states[valid].float())
            self.mean[i] = x.mean(0)
            self.deviation[i] = x.std(0) + 0.01

    def standardized(self, context: BridgeContext) -> list[Tensor]:
        """The hidden states, (B, T, text_width) each."""
        result = []
        for x, mean, deviation in zip(context.hidden_states, self.mean, self.deviation):
            result.append((rms_norm(x.float()) - mean) / deviation)
        return result


class Dense(Prepending):
    """Nothing of the LLM but its tokenizer: text embeddings learned from the training captions
    alone (Mural's dense baseline).

    The embedding of a token is the sum of two rows, for its number divided by 1,024 and for the
    remainder: every token has one of its own, in few parameters.
    """

    needs_tokens = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.low = nn.Embedding(1024, self.width)
        self.high = nn.Embedding(1024, self.width)

    def make_text(self, context: BridgeContext) -> Tensor:
        return self.low(context.tokens % 1024) + self.high(context.tokens // 1024 % 1024)


class HiddenStates(Prepending):
    """Hidden states, each projected. One of them: the usual text encoder, with the last layer's or
    the one's before (UniFusion, section 2.1). One for the input and one after every block but the
    last, behind which no image token would hear of it: hidden-state injection (the same section).

    Deviation for injection: the projection, because the tower is narrower than the LLM; and its
    blocks may be fewer than the LLM's layers, which are then taken evenly spread.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        text_width = self.config["text_width"]
        self.project = nn.ModuleList(nn.Linear(text_width, self.width) for _ in self.states)

    def make_text(self, context: BridgeContext) -> Tensor:
        text = []
        for project, x in zip(self.project, self.standardized(context)):
            text.append(project(x))
        return torch.cat(text, dim=-1)


class LayerwisePooling(Prepending):
    """LAP, UniFusion's own bridge (sections 2.1, 3.1, 3.2): hidden states of every third layer,
    pooled over the layers, then a refiner of two bidirectional blocks over the tokens, which mends
    the bias of causal attention; before the image tokens, at the input only. per_layer: a pooling
    for every block, injected as hidden states are (its appendix A.2).
    """

    def __init__(self, *args, refiner: bool = True, per_layer: bool = False, **options):
        super().__init__(*args, **options)
        self.config |= {"refiner": refiner, "per_layer": per_layer}
        text_width = self.config["text_width"]
        self.pools = nn.ModuleList()
        for _ in range(len(self.blocks) if per_layer else 1):
            self.pools.append(LayerPooling(len(self.states), text_width, self.width))
        self.refine = Encoder(self.width, 2 if refiner else 0)

    def make_text(self, context: BridgeContext) -> Tensor:
        hidden_states = self.standardized(context)
        text = []
        for pool in self.pools:
            text.append(self.refine(pool(hidden_states), context.lengths))
        return torch.cat(text, dim=-1)


class MetaQueries(Prepending):
    """Learned queries that the frozen LLM reads after the caption; what it makes of them, through a
    bidirectional connector, is the text (MetaQueries, section 3). Gradients flow through the LLM to
    the queries, and none stays in it.

    The queries run over the caption's cache, once per caption, as one more reader of it. They are a
    parameter of their own: as rows of the vocabulary they would let weight decay shrink the frozen
    table. Deviations: the connector has two blocks in the tower's width, where the paper's has 24
    in the LLM's, and the result is prepended, not cross-attended to.
    """

    def __init__(self, *args, reads: list[int], queries: int = 64, rotary: bool = True, **options):
        super().__init__(*args, **options)
        self.config |= {"reads": reads, "queries": queries, "rotary": rotary}
        self.reads = reads
        self.rotary = rotary
        self.room = queries
        text_width = self.config["text_width"]
        self.queries = nn.Parameter(torch.randn(queries, text_width))
        self.project = nn.Linear(text_width, self.width)
        self.connect = Encoder(self.width, 2)

    def attach(self, llm: BridgeLLM) -> None:
        super().attach(llm)
        self.llm = (llm.model.base_model,)  # in a tuple, so that it is no part of this module

    def make_text(self, context: BridgeContext) -> Tensor:
        (model,) = self.llm
        B = len(context.lengths)
        N = len(self.queries)
        device = self.queries.device
        position = torch.arange(N, device=device).expand(B, N)
        if not self.rotary:  # else the keys are turned back: see Context
            position = position + context.lengths[:, None]
        # the LLM in its own arithmetic; its cache is read and not written
        with torch.autocast(device.type, enabled=False):
            said = model(
                inputs_embeds=self.queries.to(model.dtype).expand(B, -1, -1),
                attention_mask=cache_mask(context, N, model.dtype, causal=True),
                position_ids=position,
                **with_cache(model, ReadOnlyCache(context, self.reads)),
            ).last_hidden_state
        x = self.project(rms_norm(said.float()))
        return rms_norm(self.connect(x, torch.full((B,), N, device=device)))

    def mask_of(self, context: BridgeContext, T: int, N: int) -> None:
        """Nothing is masked: there are as many text tokens as queries, whatever the caption."""
        return None


# -------------------------------------------------------------------------------------------------
# connectors


class LayerPooling(nn.Module):
    """Layerwise attention pooling (UniFusion, section 2.1): per token, two blocks attend across
    layers, and one linear layer makes the result a single vector.

    Deviations: it works in the tower's width, not the LLM's, and each layer is marked by a learned
    vector: attention alone could tell the layers apart only by what is in them.
    """

    def __init__(self, layers: int, text_width: int, width: int):
        super().__init__()
        self.enter = nn.Linear(text_width, width)
        self.place = nn.Parameter(0.02 * torch.randn(layers, width))
        self.across = Encoder(width, 2)
        self.pool = nn.Linear(layers * width, width)

    def forward(self, hidden_states: list[Tensor]) -> Tensor:
        """hidden_states[i] (B, T, d) -> (B, T, D)."""
        x = self.enter(torch.stack(hidden_states, dim=2)) + self.place  # (B, T, layers, D)
        tokens = x.flatten(0, 1)  # (B T, layers, D)
        every = torch.full((len(tokens),), tokens.shape[1], device=x.device)
        tokens = self.across(tokens, every)
        return self.pool(tokens.flatten(1)).unflatten(0, x.shape[:2])


class Encoder(nn.Module):
    """Standard transformer blocks, each token seeing all others: `ExpertBlock` without time (shift
    and scale 0, gates 1)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        head_width = min(64, width)
        layer = TextLayer(0, max(1, width // 64), head_width, head_width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(ExpertBlock(width, layer.kv_heads, width, layer))
        still = torch.tensor([0.0, 0, 1, 0, 0, 1]).view(1, 6, 1, 1).expand(1, 6, 1, width)
        self.register_buffer("still", still, persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T, D) of which lengths (B,) are valid -> the same shape. A row without any sees its
        padding, harmlessly."""
        if x.numel() == 0:
            return x
        mask = text_mask(lengths.clamp_min(1), x.shape[1], 0)
        for block in self.blocks:
            q, k, v = block.project(x, self.still.to(x.dtype))
            # all keys are the text's: there is no image here
            attended = joint_attention(q, k[:, :, :0], v[:, :, :0], k, v, mask)
            x = block.finish(x, attended.to(x.dtype), self.still.to(x.dtype))
        return x
