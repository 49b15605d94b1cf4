"""LMFusion (Shi et al. 2024): one frozen LLM and one image tower that draw, describe and edit.

    python train.py --describe 0.2                     # a fifth of each batch is image first
    python sample.py --describe picture.png            # describing.py
    python train.py --from runs/shapes --data edits    # a picture, an instruction, a picture
    python sample.py --image in.png --prompt "make the circle red"     # edits.py

The cache is the interface in both directions. Texts and pictures may stand in any order: each part
is run by its own tower, reads what all parts before it have left in the cache, and leaves its own
keys and values there. A picture first, then text: the image tower runs over the clean picture
(t = 1), and the frozen LLM goes on from what it wrote; the language-model loss on the caption flows
through the frozen LLM into the image tower alone.

Where the tower is paired with fewer layers than the LLM has, the others see the text alone.

Shapes: B sequences; T tokens of a text, N + 1 entries of a picture (the first is begin-of-image,
which is learned); S entries so far in one layer; G heads of widths Dk and Dv.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import joint_attention, text_mask
from extras.joint import run_with_attention
from extras.mirror import MirrorTower, ReadOnlyCache
from llm import Context, FrozenLLM
from model import ExpertBlock, ImageExpert
from sample import GUIDANCE, RENOISE, data_of, integrate, noise_of, pixels_of

LINE = "\n"  # stands between a picture and its caption
PADDING = -1
IGNORED = -100  # no target: cross_entropy leaves it out
EDIT_GUIDANCE = (GUIDANCE, 1.5)  # of the instruction, and of the picture


@dataclass
class Entries:
    """What stands in the cache at one attention layer of the LLM: keys (B, G, S, Dk), turned to
    where they stand, values (B, G, S, Dv), and where each stands, place (B, S); PADDING nowhere."""

    keys: Tensor
    values: Tensor
    place: Tensor

    def then(self, keys: Tensor, values: Tensor, place: Tensor) -> "Entries":
        """These and, after them, those."""
        return Entries(
            torch.cat([self.keys, keys.to(self.keys.dtype)], dim=2),
            torch.cat([self.values, values.to(self.values.dtype)], dim=2),
            torch.cat([self.place, place], dim=1),
        )

    @property
    def seen(self) -> Tensor:
        """(B, S): which are no padding."""
        return self.place != PADDING


class Sequence:
    """B sequences of texts and pictures. They begin with what the tokenizer puts before any text.

    layers: attention layer of the LLM -> its Entries. position (B,): where the next part begins; a
    text takes a position a token, a picture one.
    """

    def __init__(self, llm: FrozenLLM, expert: ImageExpert, B: int):
        self.llm = llm
        self.expert = expert
        self.layers: dict[int, Entries] = {}
        self.position = torch.zeros(B, dtype=torch.long, device=llm.device)
        self.before = llm.open_ids("")
        for layer in llm.layers:
            keys = torch.empty(B, layer.kv_heads, 0, layer.key_width, dtype=llm.dtype)
            values = torch.empty(B, layer.kv_heads, 0, layer.value_width, dtype=llm.dtype)
            place = torch.empty(B, 0, dtype=torch.long)
            empty = [x.to(llm.device) for x in (keys, values, place)]
            self.layers[llm.cache_index[layer.index]] = Entries(*empty)
        self.read_tokens([self.before] * B)

    # -- texts, by the frozen LLM

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, without what the tokenizer puts before any."""
        ids = self.llm.open_ids(text)
        if ids[: len(self.before)] == self.before:
            return ids[len(self.before) :]
        return ids

    def read_text(self, texts: list[str]) -> None:
        """A text for each of the B sequences."""
        self.read_tokens([self.tokens(text) for text in texts])

    def read_tokens(self, token_lists: list[list[int]]) -> Tensor | None:
        """Tokens for each of the B sequences -> the LLM's last hidden states (B, T, d); None if
        there are none, or no room for any.

        The LLM runs with its own weights and positions; its attention looks at the cache, and
        causally at the new tokens.
        """
        llm = self.llm
        rows = [llm.cut(ids, start) for ids, start in zip(token_lists, self.position.tolist())]
        if not any(rows):
            return None
        lengths = torch.tensor([len(ids) for ids in rows], device=llm.device)
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(ids, batch_first=True).to(llm.device)  # (B, T)
        B, T = ids.shape
        own = torch.arange(T, device=llm.device)
        positions = (self.position[:, None] + own).clamp(max=llm.max_tokens)  # (B, T)
        place = positions.masked_fill(own >= lengths[:, None], PADDING)

        def attend(module, q, k, v, attention_mask, scaling=None, sliding_window=None, **_):
            entries = self.layers[module.layer_idx].then(k, v, place)
            self.layers[module.layer_idx] = entries
            # a token sees what stands before its text and what is left of it there; itself, so that
            # no row of padding is empty
            S = entries.place.shape[1] - T
            before = entries.seen[:, None, :S].expand(B, T, S)
            causal = (own[:, None] >= own).expand(B, T, T)
            mask = torch.cat([before, causal], dim=2)  # (B, T, S+T)
            if sliding_window:
                mask = mask & (positions[:, :, None] - entries.place[:, None] < sliding_window)
            out = F.scaled_dot_product_attention(
                q, entries.keys, entries.values, mask[:, None], scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None

        with torch.autocast(llm.device.type, enabled=False):  # the LLM as it always is
            out = run_with_attention(llm, ids, attend, position_ids=positions)
        self.position = self.position + lengths
        return out.last_hidden_state

    # -- pictures, by the image tower

    def read_picture(self, pictures: Tensor) -> None:
        """A clean picture for each of the B sequences, (B, C, height, width) in [-1, 1]."""
        llm = self.llm
        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            written = write_picture(self.expert, pictures, self.context())
        for index, (keys, values) in written.items():
            keys = llm.rotary[index](keys.float(), self.position)
            place = self.position[:, None].expand(-1, keys.shape[2])
            layer = llm.cache_index[index]
            self.layers[layer] = self.layers[layer].then(keys, values, place)
        self.position = self.position + 1

    def context(self) -> Context:
        """All so far, as the image tower reads it at the next position."""
        llm = self.llm
        keys = []
        values = []
        for layer in llm.kept:
            entries = to_the_front(self.layers[llm.cache_index[layer.index]])
            keys.append(llm.turn_back(layer, entries.keys, self.position))
            values.append(entries.values)
        lengths = entries.seen.sum(dim=1)
        return Context(keys, values, lengths, padded=not bool(entries.seen.all()))


def to_the_front(entries: Entries) -> Entries:
    """The same with all padding at the end. (A key says by its turn where it stands: the order in
    memory says nothing.)"""
    if entries.seen.all():
        return entries
    order = (~entries.seen).int().argsort(dim=1, stable=True)  # (B, S)
    sorted_parts = []
    for x in (entries.keys, entries.values):
        index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        sorted_parts.append(x.gather(2, index))
    return Entries(*sorted_parts, entries.place.gather(1, order))


def interleave(llm: FrozenLLM, expert: ImageExpert, parts: list) -> Sequence:
    """A list of parts, each a list of B texts or a tensor of B pictures, in any order."""
    sequence = Sequence(llm, expert, len(parts[0]))
    for part in parts:
        if isinstance(part, Tensor):
            sequence.read_picture(part)
        else:
            sequence.read_text(part)
    return sequence


def write_picture(
    expert: ImageExpert, pictures: Tensor, context: Context
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the tower's blocks leave in the cache for clean pictures (B, C, height, width): layer of
    the LLM -> keys (B, G, N+1, Dk), unturned, and values (B, G, N+1, Dv).

    Of several blocks that read one layer, the last writes.
    """
    t = torch.ones(len(pictures), device=pictures.device)
    img, *rest = expert.tokens_of(pictures, t)  # (B, N, D)
    entry = expert.begin_of_image.to(img.dtype).expand(len(img), 1, -1)
    img = torch.cat([entry, img], dim=1)  # (B, N+1, D)
    if isinstance(expert, MirrorTower):
        cache = ReadOnlyCache(context, expert.reads)
        expert.decode(img, context, cache)
        return cache.written
    modulations = rest[0]
    T = context.keys[0].shape[2]
    mask = text_mask(context.lengths, T, img.shape[1]) if context.padded else None
    written = {}
    for block, m, txt_k, txt_v in zip(expert.blocks, modulations, context.keys, context.values):
        img_q, img_k, img_v = block.project(img, m)
        txt_k = block.scale_keys(txt_k)
        attended = joint_attention(img_q, img_k, img_v, txt_k, txt_v, mask)
        img = block.finish(img, attended, m)
        written[block.layer.index] = (in_the_scale_of_text(block, img_k), img_v)
    return written


def in_the_scale_of_text(block: ExpertBlock, img_k: Tensor) -> Tensor:
    """The inverse of scale_keys, for a picture's keys (B, G, N, Dk) that the LLM will ask."""
    if block.txt_gain is None:
        return img_k
    return img_k / (block.start_gain * block.txt_gain).to(img_k.dtype)[:, None, None]


# -------------------------------------------------------------------------------------------------
# describing


def after_pictures(llm: FrozenLLM, expert: ImageExpert, pictures: Tensor) -> Sequence:
    """What the LLM knows before it describes these pictures, (B, C, height, width) in [-1, 1]."""
    sequence = Sequence(llm, expert, len(pictures))
    sequence.read_picture(pictures)
    return sequence


def caption_loss(
    llm: FrozenLLM, expert: ImageExpert, pictures: Tensor, captions: list[str]
) -> Tensor:
    """The LLM's own loss on each caption after its picture (LMFusion, eq. 4): (B,), in nats a
    token."""
    sequence = after_pictures(llm, expert, pictures)
    line = sequence.tokens(LINE)
    place = int(sequence.position[0])  # the same for all
    rows = []
    targets = []
    for caption in captions:
        ids = sequence.tokens(caption)
        wanted = [IGNORED] * (len(line) - 1) + ids + [end_of(sequence)]
        rows.append(llm.cut(line + ids, place))
        targets.append(torch.tensor(wanted[: len(rows[-1])]))
    hidden = sequence.read_tokens(rows)  # (B, T, d)
    wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(llm.device)
    asked = wanted != IGNORED  # (B, T)
    # the vocabulary is large: only states that are asked go through the head
    losses = F.cross_entropy(logits_of(llm, hidden[asked]), wanted[asked], reduction="none")
    per_token = torch.zeros(asked.shape, device=llm.device).masked_scatter(asked, losses)
    return per_token.sum(dim=1) / asked.sum(dim=1)


def logits_of(llm: FrozenLLM, hidden: Tensor) -> Tensor:
    """The LLM's last hidden states (..., d) -> its logits (..., vocabulary) in float32."""
    config = llm.model.config.get_text_config()
    with torch.autocast(llm.device.type, enabled=False):
        logits = llm.model.get_output_embeddings()(hidden).float()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return cap * torch.tanh(logits / cap)
    return logits if scale == 1 else scale * logits


def end_of(sequence: Sequence) -> int:
    """The token that ends a caption: the tokenizer's end, or a line's."""
    end = sequence.llm.tokenizer.eos_token_id
    return sequence.tokens(LINE)[-1] if end is None else end


# -------------------------------------------------------------------------------------------------
# editing: a picture, an instruction, and the picture after it


def edit_contexts(
    llm: FrozenLLM, expert: ImageExpert, pictures: Tensor, instructions: list[str]
) -> list[Context]:
    """What the tower reads before it draws the edited pictures, the weakest first: nothing, the
    picture (B, C, height, width), and the picture and its instruction."""
    sequence = Sequence(llm, expert, len(pictures))
    nothing = sequence.context()
    sequence.read_picture(pictures)
    picture = sequence.context()
    sequence.read_text([LINE + text for text in instructions])
    return [nothing, picture, sequence.context()]


@torch.no_grad()
def draw_edits(
    expert: ImageExpert,
    llm: FrozenLLM,
    before: np.ndarray,
    instructions: list[str],
    seeds: list[int],
    steps: int = 24,
    guidance: tuple[float, float] = EDIT_GUIDANCE,
    renoise: float = RENOISE,
    batch_size: int = 32,
) -> np.ndarray:
    """Each picture, (n, height, width, C) uint8, after its instruction, from the noise of its seed.

    guidance: away from the picture without its instruction, and away from no picture, as
    InstructPix2Pix has them (section 3.2.1, eq. 3): v = v(0) + s_I (v(I) - v(0)) + s_T (v(I, T) -
    v(I)).
    """
    text_scale, picture_scale = guidance
    shape = expert.shape(before.shape[1:3])
    edited = []
    for start in range(0, len(before), batch_size):
        some = slice(start, start + batch_size)
        noise = noise_of(seeds[some], shape, llm.device)
        pictures = data_of(expert, before[some], llm.device)
        nothing, picture, full = edit_contexts(llm, expert, pictures, instructions[some])
        every = nothing.concat(picture).concat(full)

        def guided(x_t: Tensor, t: Tensor, context: Context) -> Tensor:
            v = expert(torch.cat([x_t] * 3), torch.cat([t] * 3), context)
            v_nothing, v_picture, v_full = v.chunk(3)
            v = v_nothing + picture_scale * (v_picture - v_nothing)
            return v + text_scale * (v_full - v_picture)

        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            x = integrate(expert, guided, noise, every, steps, renoise)
        edited.append(pixels_of(expert, x))
    return np.concatenate(edited)
