"""The frozen tower: captions in, keys and values out.

    llm = load_llm("gemma-3-270m", device, dtype)        # loading.py
    context = llm.context(["a red circle", ""])          # once per caption, then from its cache

`Context` is what the LLM hands over. `FrozenLLM` makes it: any Hugging Face decoder, read only. It
holds no trainable parameter, runs over each caption once, and caches the result.
"""

import inspect
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import inspection

ROWS = 32  # captions go through the LLM so many at a time,
TOKENS = 4096  # long ones fewer: at most so many tokens, and one caption
BUCKET = 4  # they are padded to a multiple of so many tokens (see FrozenLLM.encode)
NO_LIMIT = 10**9


@dataclass
class Context:
    """The frozen LLM's reading of a batch of prompts; l runs over the attention layers it keeps.

    keys[l] (B, G, T, Dk) and values[l] (B, G, T, Dv), right-padded; lengths (B,) valid text tokens,
    0 is legal. padded: False where it is known, without asking a GPU, that every row has T tokens.

    Where an LLM has rotary positions, all image tokens stand at the one after the caption (as in
    BAGEL). Attention sees only differences of positions. So instead of turning every image query
    and key forward by the caption's length, at every layer of every step, the text keys are turned
    back by it, once: the image stands at the origin and needs no rotation.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    padded: bool = True

    def concat(self, other: "Context") -> "Context":
        """Both batches as one, padded to the longer: for the two branches of guidance."""
        keys = [concat_padded(a, b, dim=2) for a, b in zip(self.keys, other.keys)]
        values = [concat_padded(a, b, dim=2) for a, b in zip(self.values, other.values)]
        lengths = torch.cat([self.lengths, other.lengths])
        same_length = [k.shape[2] for k in self.keys] == [k.shape[2] for k in other.keys]
        padded = self.padded or other.padded or not same_length
        return Context(keys, values, lengths, padded)


def concat_padded(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Two batches, zeros at the end of `dim` where one is shorter."""
    longest = max(a.shape[dim], b.shape[dim])
    padded = []
    for x in (a, b):
        after = x.dim() - 1 - dim  # F.pad counts dimensions from the last
        padded.append(F.pad(x, (0, 0) * after + (0, longest - x.shape[dim])))
    return torch.cat(padded)


@dataclass(frozen=True)
class TextLayer:
    """An attention layer of the LLM, as the expert must know it: G heads of widths Dk and Dv."""

    index: int  # among the LLM's attention layers
    kv_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Reading:
    """What the LLM reads of a caption: token ids, of which the image may look at ids[start:]."""

    ids: list[int]
    start: int = 0


class FrozenLLM:
    """Any Hugging Face decoder, frozen: captions in, `Context` out.

    `reader` turns a caption into what the LLM reads: None means the caption's own tokens; otherwise
    an object with one method, read(caption) -> Reading, or -> a finished row (T, W) as `pack` makes
    it. `keep` says which attention layers are handed over. Setting either empties the cache of
    captions, which holds up to cache_mb megabytes (MB = 10^6 bytes); the least recently used go
    first.

    revision: the commit of its Hub repository, None for a local model. writes: whether it has a
    language-model head. identity: what a checkpoint keeps of it. seconds: time spent in the LLM.
    ValueError if the model has no key-value cache or is not causal.
    """

    frozen = True  # (extras/separation.py has one that is not)

    def __init__(
        self,
        model,
        tokenizer,
        name: str,
        cache_mb: float = 512,
        revision: str | None = None,
        writes: bool = True,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.device = model.device
        self.dtype = model.dtype
        self.revision = revision
        self.writes = writes
        self.identify()
        config = model.config.get_text_config()
        self.max_tokens = (getattr(config, "max_position_embeddings", None) or NO_LIMIT) - 1
        self.vocab_size = getattr(model.get_input_embeddings(), "num_embeddings", NO_LIMIT)
        self.room = 0  # positions that extras/ keep free after the caption
        self.seconds = 0.0
        self._warned = False
        self._reader = None
        self._cache_limit = int(cache_mb * 1e6)
        self._cached: OrderedDict[str, Tensor] = OrderedDict()  # caption -> (T, W)
        self._cached_bytes = 0
        self.inspect_model()
        self.keep(range(len(self.layers)))

    def identify(self) -> None:
        self.identity = inspection.llm_identity(self.model, self.tokenizer)
        self.fingerprint = self.identity["llm_fingerprint"]

    def inspect_model(self) -> None:
        """Find the attention layers, and how their keys turn with the position."""
        seen = inspection.inspect(self.model, self.run)
        self.layers = [TextLayer(n, *heads) for n, heads in enumerate(seen.heads)]
        self.cache_index = seen.places
        self.rotary = seen.rotary
        self.key_sizes = seen.key_sizes

    @property
    def reader(self):
        return self._reader

    @reader.setter
    def reader(self, reader) -> None:
        self._reader = reader
        self.forget()

    def keep(self, indices: Iterable[int]) -> None:
        """Hand over only these attention layers (the expert's own), in this order."""
        self.kept = [self.layers[i] for i in indices]
        self.widths = []  # of the columns of a packed row
        for layer in self.kept:
            self.widths += [layer.kv_heads * layer.key_width, layer.kv_heads * layer.value_width]
        self.forget()

    def forget(self) -> None:
        """Empty the cache of captions."""
        self._cached.clear()
        self._cached_bytes = 0

    # -- captions to contexts
    #
    # context: lookup (caption -> row, from the cache or by encode), batch (rows -> one padded
    #          tensor), unpack (-> keys and values of each layer)
    # encode:  run (token ids -> the LLM's own cache), pack (keys turned back, all layers side by
    #          side: a row (T, W) of W numbers a token is easy to cache)

    def context(self, captions: list[str]) -> Context:
        """captions (B of them, repeats are free) -> Context."""
        found = self.lookup(captions)
        packed, lengths, which = self.batch(found, captions)
        context = self.unpack(packed[which], lengths[which])
        context.padded = any(len(row) < packed.shape[1] for row in found.values())
        return context

    def batch(self, found: dict[str, Tensor], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Pad the rows that lookup found into one tensor (U distinct captions, T, W); also their
        lengths (U,), and which of them each of the B captions is, (B,)."""
        row_of = {caption: i for i, caption in enumerate(found)}
        lengths = torch.tensor([len(row) for row in found.values()], device=self.device)
        packed = pad_sequence(list(found.values()), batch_first=True)
        T = round_up(packed.shape[1], BUCKET)  # few distinct shapes: kinder to compilers
        packed = F.pad(packed, (0, 0, 0, T - packed.shape[1]))
        which = torch.tensor([row_of[caption] for caption in captions], device=self.device)
        return packed, lengths, which

    def lookup(self, captions: list[str]) -> dict[str, Tensor]:
        """caption -> (T, W), in the order asked; the LLM runs over new ones alone, each once."""
        started = time.perf_counter()
        # the order must not depend on what the cache holds
        found: dict[str, Tensor | None] = dict.fromkeys(captions)
        unread: dict[int, list[tuple[str, Reading]]] = {}  # padded length -> captions

        # from the cache, or to be read
        for caption in found:
            if caption in self._cached:
                self._cached.move_to_end(caption)
                found[caption] = self._cached[caption]
        new = [caption for caption, row in found.items() if row is None]
        for caption, reading in zip(new, self.read_all(new)):
            if isinstance(reading, Tensor):
                found[caption] = self._store(caption, reading)
            else:
                length = round_up(len(reading.ids), BUCKET)
                unread.setdefault(length, []).append((caption, reading))

        # captions of one length go through the LLM together
        for length, group in sorted(unread.items()):
            count = max(1, min(ROWS, TOKENS // max(1, length)))
            for start in range(0, len(group), count):
                chunk = group[start : start + count]
                packed = self.encode([reading.ids for _, reading in chunk], length, count)
                for row, (caption, reading) in zip(packed, chunk):
                    shown = row[reading.start : len(reading.ids)].clone()
                    found[caption] = self._store(caption, shown)
        if unread and self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time is the LLM's
        # forget the least recently used; `found` still holds what was asked
        while self._cached_bytes > self._cache_limit:
            _, oldest = self._cached.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        self.seconds += time.perf_counter() - started
        return found

    def _store(self, caption: str, row: Tensor) -> Tensor:
        self._cached[caption] = row
        self._cached_bytes += row.nbytes
        return row

    # -- captions to tokens

    def read(self, caption: str) -> "Reading | Tensor":
        """What the reader makes of a caption; without one, its tokens."""
        if self.reader is None:
            return Reading(self.tokenize(caption))
        return self.reader.read(caption)

    def read_all(self, captions: list[str]) -> "list[Reading | Tensor]":
        """As read, of several: a reader that has the LLM write does so side by side."""
        together = getattr(self.reader, "read_all", None)
        return together(captions) if together else [self.read(caption) for caption in captions]

    def tokenize(self, caption: str) -> list[int]:
        """The caption's tokens; where the LLM takes no more, it is cut."""
        return self.cut(self.tokenizer(caption).input_ids)

    def open_ids(self, text: str) -> list[int]:
        """Tokens of a text to be continued: without the end that embedding LLMs' tokenizers add."""
        ids = self.tokenizer(text).input_ids
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]
        return ids

    def cut(self, ids: list[int], after: int = 0) -> list[int]:
        """The first tokens, as many as fit with `after` more; ValueError for an unknown one."""
        most = max(0, self.max_tokens - after - self.room)
        if len(ids) > most and not self._warned:
            said = f"a caption of {len(ids)} tokens is cut to the {most} that {self.name} takes"
            warnings.warn(said, stacklevel=4)
            self._warned = True
        ids = ids[:most]
        if ids and max(ids) >= self.vocab_size:
            text = self.tokenizer.decode(ids)
            raise ValueError(
                f"{text[:60]!r} has the token {max(ids)}, and {self.name} embeddings of "
                f"{self.vocab_size}; was resize_token_embeddings forgotten?"
            )
        return ids

    # -- tokens to keys and values

    def encode(self, token_lists: list[list[int]], length: int, count: int) -> Tensor:
        """At most `count` lists of tokens -> (count, length, W): their packed rows.

        Always the same shape for the same caption, whatever its neighbours: matrix kernels choose
        their summation order by shape, and a caption's keys must come out bit for bit the same
        after a resume as before.
        """
        if length == 0 or not self.widths:  # the empty prompt of a tokenizer without BOS
            shape = (count, length, sum(self.widths))
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        ids = torch.zeros(count, length, dtype=torch.long)
        lengths = torch.zeros(count, dtype=torch.long)
        for i, tokens in enumerate(token_lists):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            lengths[i] = len(tokens)
        lengths = lengths.to(self.device)
        return self.pack(self.run_kept(ids.to(self.device), lengths), lengths)

    def run_kept(self, ids: Tensor, lengths: Tensor) -> DynamicCache:
        """ids (B, T) of which lengths (B,) are valid -> the cache, up to the last layer kept."""
        return self.run(ids, max(self.cache_index[layer.index] for layer in self.kept))

    @torch.no_grad()
    def run(self, ids: Tensor, up_to: int = NO_LIMIT, **inputs) -> DynamicCache:
        """ids (B, T) -> the LLM's key-value cache up to that layer, without its head.

        No padding mask: a causal model's valid tokens never see what stands to their right. Called
        outside of autocast: a caption's keys must not depend on who asked first.
        """
        cache = CacheUpTo(self.model.config, up_to)
        decoder = self.model.base_model
        with suppress(Enough):
            decoder(input_ids=ids, **with_cache(decoder, cache), **inputs)
        return cache

    def pack(self, cache: DynamicCache, lengths: Tensor) -> Tensor:
        """Keys and values of the kept layers, side by side (B, T, W): W = sum of G (Dk + Dv). The
        keys are turned back by lengths (B,), so that the image stands at the origin."""
        config = self.model.config.get_text_config()
        columns = []
        for layer in self.kept:
            state = cache.layers[self.cache_index[layer.index]]
            keys, values = inspection.layer_states(config, state)
            keys = self.turn_back(layer, keys, lengths)
            columns.append(keys.transpose(1, 2).flatten(2))  # (B, T, G Dk)
            columns.append(values.transpose(1, 2).flatten(2))  # (B, T, G Dv)
        return torch.cat(columns, dim=-1)

    def turn_back(self, layer: TextLayer, keys: Tensor, lengths: Tensor) -> Tensor:
        """keys (B, G, T, Dk), as seen from the position after the caption."""
        return self.rotary[layer.index](keys.float(), -lengths).to(keys.dtype)

    def unpack(self, packed: Tensor, lengths: Tensor) -> Context:
        """The inverse of pack: (B, T, W) -> the kept layers, each with its heads."""
        columns = packed.split(self.widths, dim=-1)
        keys = []
        values = []
        for i, layer in enumerate(self.kept):
            keys.append(columns[2 * i].unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2))
            values.append(columns[2 * i + 1].unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2))
        return Context(keys, values, lengths)  # (B, G, T, Dk) and (B, G, T, Dv)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Enough(Exception):
    """Raised where an LLM need not compute any further."""


class CacheUpTo(DynamicCache):
    """A cache of the LLM's own kind, but for two things.

    Sliding-window layers keep all tokens: a window of the padded row is not one of the caption. And
    once layer `up_to` has handed in its keys and values the model stops: the rest is not needed.
    """

    def __init__(self, config, up_to: int = NO_LIMIT):
        super().__init__(config=config)
        self.up_to = up_to
        for layer in self.layers:
            layer.sliding_window = NO_LIMIT

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        everything = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= self.up_to:
            raise Enough
        return everything


def with_cache(model, cache: DynamicCache) -> dict:
    """A cache as the argument that this model takes it by: transformers 5.24 renamed it, and a
    model's own code may not have."""
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    parameters = inspect.signature(model.forward).parameters
    old = version < (5, 24) or "past_key_values" in parameters
    return {"past_key_values" if old else "cache": cache, "use_cache": True}


# -------------------------------------------------------------------------------------------------
# which layers an expert reads

PARTS = ("all", "lower", "middle", "upper")


def select_layers(llm: FrozenLLM, depth: int, part: str = "all") -> list[dict]:
    """The attention layers that a tower of `depth` blocks reads, one a block, as dicts.

    part: evenly spread over "all", or the "lower", "middle" or "upper" half (or as many layers as
    there are blocks, if that is more); or numbers ("13,15,17", "6-11") or a share of the depth
    ("0.85"), each then read by several blocks if there are more blocks than numbers.

    The middle layers are where words of different languages mean the same; the lower ones still
    know the word, the upper ones already the next.
    """
    available = len(llm.layers)
    if part not in PARTS:
        numbers = layer_numbers(part, available)
        rising = sorted(set(numbers)) == numbers
        if not numbers or max(numbers) >= available or not rising or len(numbers) > depth:
            raise ValueError(
                f"--layers {part}: expected {', '.join(PARTS)}, or at most {depth} rising numbers "
                f"from 0 to {available - 1} (13,15,17 or 6-11), or a share of the depth (0.85)"
            )
        # shared out over the blocks: of 2 numbers, 4 blocks read a, a, b, b
        return [asdict(llm.layers[numbers[i * len(numbers) // depth]]) for i in range(depth)]
    if depth > available:
        raise ValueError(
            f"--depth {depth}: {llm.name} has {available} attention layers to read from; "
            "expected at most that"
        )
    window = available if part == "all" else max(depth, available // 2)
    first = {
        "all": 0,
        "lower": 0,
        "middle": (available - window) // 2,
        "upper": available - window,
    }[part]
    # block i reads the last layer of the i-th of `depth` equal parts of the window
    return [asdict(llm.layers[first + (i + 1) * window // depth - 1]) for i in range(depth)]


def layer_numbers(part: str, available: int) -> list[int]:
    """Parse "13,15", "6-11" or "0.85", a share of the depth; [] if it is none of these."""
    numbers = []
    for piece in part.split(","):
        try:
            ends = [int(float(x) * available) if "." in x else int(x) for x in piece.split("-")]
        except ValueError:
            return []
        last = ends[-1] if len(ends) > 1 else ends[0]
        numbers += range(ends[0], min(last, available) + 1)  # what is beyond is refused
    return numbers
