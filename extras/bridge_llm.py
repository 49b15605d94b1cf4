"""The frozen LLM as other bridges than shared attention ask it: its hidden states, its token ids,
its keys as they are; and encoders (T5, BERT), which have hidden states alone.

`BridgeLLM` hands over a `BridgeContext`. What a bridge makes of it, its text tokens, is made at the
first step that reads it and kept in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModelForTextEncoding,
    DynamicCache,
)

from extras.readers import check_room
from extras.thinking import check_heard
from llm import (
    NO_LIMIT,
    CacheUpTo,
    Context,
    FrozenLLM,
    Reading,
    TextLayer,
    concat_padded,
    with_cache,
)
from loading import decoder_class


@dataclass
class BridgeContext(Context):
    """A Context with what other bridges than shared attention read.

    hidden_states[i] (B, T, d): the LLM's, of the places that are kept; tokens (B, T): the token
    ids; text (B, T, D): what the tower `made_by` has made of all that. distinct: the same for every
    caption once, and the row in it of each of the B.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None
    text: Tensor | None = None
    made_by: object | None = None
    distinct: "tuple[BridgeContext, Tensor] | None" = None

    @property
    def length(self) -> int:
        """T, of the padded rows."""
        if self.keys:
            return self.keys[0].shape[2]
        if self.hidden_states:
            return self.hidden_states[0].shape[1]
        return self.tokens.shape[1]

    def concat(self, other: "BridgeContext") -> "BridgeContext":
        """Both batches as one, padded to the longer; each distinct caption still once."""
        both = super().concat(other)  # keys, values and lengths
        hidden_states = []
        for a, b in zip(self.hidden_states, other.hidden_states):
            hidden_states.append(concat_padded(a, b, dim=1))
        tokens = None
        if self.tokens is not None:
            tokens = concat_padded(self.tokens, other.tokens, dim=1)
        # text is made anew from both, once for each caption that is distinct in its own batch
        distinct = None
        if self.distinct and other.distinct:
            mine, my_rows = self.distinct
            theirs, their_rows = other.distinct
            rows = torch.cat([my_rows, their_rows + len(mine.lengths)])
            distinct = (mine.concat(theirs), rows)
        return BridgeContext(
            both.keys,
            both.values,
            both.lengths,
            padded=self.padded or other.padded or self.length != other.length,
            hidden_states=hidden_states,
            tokens=tokens,
            distinct=distinct,
        )


class BridgeLLM(FrozenLLM):
    """A FrozenLLM whose `keep` also takes what other bridges ask for."""

    states: Sequence[int] = ()
    tokens = False
    turned = True

    @classmethod
    def for_model(cls, model, *args, **options) -> "BridgeLLM":
        """Around a decoder a BridgeLLM, around an encoder a FrozenEncoder."""
        config = type(model.config)
        encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(config, None)
        if encoder is not None and isinstance(model, encoder):
            return FrozenEncoder(model, *args, **options)
        return cls(model, *args, **options)

    def keep(
        self,
        indices: Iterable[int],
        states: Sequence[int] = (),
        tokens: bool = False,
        turned: bool = True,
        room: int = 0,
    ) -> None:
        """Hand over only these attention layers, in this order; the hidden states of these places
        (0 are the embeddings, l those after layer l); the token ids; the keys turned back (see
        Context), or as the LLM left them. room: positions that stay free after the caption."""
        check_room(self, self.reader, room)
        check_heard(self.reader, tokens)
        super().keep(indices)
        self.states = list(states)
        self.tokens = tokens
        self.turned = turned
        self.room = room
        self.widths += [self.hidden_widths[i] for i in states]

    @cached_property
    def hidden_widths(self) -> list[int]:
        """Of the hidden states: the embeddings' and each layer's."""
        one = torch.full((1, 1), 3, device=self.device)
        return [x.shape[-1] for x in self.run_whole(one).hidden_states]

    # -- captions to contexts

    def context(self, captions: list[str]) -> BridgeContext:
        """captions (B of them, repeats are free) -> BridgeContext."""
        found = self.lookup(captions)
        packed, lengths, rows = self.batch(found, captions)
        once = self.unpack(packed, lengths)
        context = self.unpack(packed[rows], lengths[rows])
        if self.tokens:
            once.tokens = self.token_rows(list(found), packed.shape[1])
            context.tokens = once.tokens[rows]
        # what a bridge computes from a caption it computes once, for all pictures of it
        context.distinct = (once, rows)
        context.padded = any(len(row) < packed.shape[1] for row in found.values())
        return context

    def token_rows(self, captions: list[str], length: int) -> Tensor:
        """The token ids of captions, (B, length), padded with 0."""
        rows = []
        for caption in captions:
            ids = self.read(caption).ids
            rows.append(torch.tensor(ids, dtype=torch.long, device=self.device))
        padded = pad_sequence(rows, batch_first=True)
        return F.pad(padded, (0, length - padded.shape[1]))

    def read(self, caption: str) -> Reading | Tensor:
        """As FrozenLLM.read. A tower that asks for the tokens alone has its own embedding of them,
        in which nothing after the caption knows what it said: it is shown them all."""
        reading = super().read(caption)
        if self.tokens and isinstance(reading, Reading):
            return replace(reading, start=0)
        return reading

    # -- tokens to keys, values and hidden states

    def run(self, ids: Tensor, up_to: int = NO_LIMIT, **inputs) -> DynamicCache:
        """As FrozenLLM.run; the whole LLM where hidden states are asked for."""
        if self.states:
            return self.run_whole(ids, **inputs)
        return super().run(ids, up_to, **inputs)

    @torch.no_grad()
    def run_whole(self, ids: Tensor, **inputs) -> DynamicCache:
        """ids (B, T) -> the key-value cache of all layers, and in its hidden_states those (B, T, d)
        from the embeddings to the last layer."""
        cache = CacheUpTo(self.model.config)
        decoder = self.model.base_model
        options = with_cache(decoder, cache) | inputs
        out = decoder(input_ids=ids, output_hidden_states=True, **options)
        cache.hidden_states = out.get("hidden_states") or ()
        return cache

    def run_kept(self, ids: Tensor, lengths: Tensor) -> DynamicCache:
        if self.states:
            return self.run_whole(ids)
        return super().run_kept(ids, lengths)

    def pack(self, cache: DynamicCache, lengths: Tensor) -> Tensor:
        """As FrozenLLM.pack, and after the layers the hidden states: (B, T, W)."""
        columns = [super().pack(cache, lengths)] if self.kept else []
        columns += [cache.hidden_states[place] for place in self.states]
        return torch.cat(columns, dim=-1)

    def turn_back(self, layer: TextLayer, keys: Tensor, lengths: Tensor) -> Tensor:
        return super().turn_back(layer, keys, lengths) if self.turned else keys

    def unpack(self, packed: Tensor, lengths: Tensor) -> BridgeContext:
        """The inverse of pack."""
        layers = super().unpack(packed, lengths)
        columns = packed.split(self.widths, dim=-1)  # keys, values, keys, ..., hidden states
        hidden_states = list(columns[2 * len(self.kept) :])
        return BridgeContext(layers.keys, layers.values, lengths, hidden_states=hidden_states)


class FrozenEncoder(BridgeLLM):
    """A frozen T5 or BERT: hidden states, but no keys and values that an image could attend to."""

    def __init__(self, model, *args, **options):
        # not among the hidden states, and in many a file not there: another one at each load
        if hasattr(model, "pooler"):
            model.pooler = None
        super().__init__(model, *args, **options)

    def inspect_model(self) -> None:
        self.layers = []
        self.cache_index = []
        self.rotary = []
        self.key_sizes = []

    @torch.no_grad()
    def run_whole(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """ids (B, T) -> the hidden states, and no keys. What stands to the right of a token is
        seen: padding needs a mask (B, T)."""
        out = self.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)
        return SimpleNamespace(hidden_states=out.hidden_states)

    def run_kept(self, ids: Tensor, lengths: Tensor) -> SimpleNamespace:
        place = torch.arange(ids.shape[1], device=ids.device)
        valid = place < lengths[:, None].clamp_min(1)  # (B, T); one at least, for softmax
        return self.run_whole(ids, valid.long())


def any_class(config_class: type):
    """The Auto class that loads a text encoder, and if it is none, a decoder."""
    if config_class in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    return decoder_class(config_class)
