"""Which word does each patch look at?

    python sample.py --prompt "a red circle left of a blue square" --maps
    python sample.py --prompt "a red circle left of a blue square" --maps circle

Beside NAME.png lie NAME-maps.png, a map for each word over the picture, and NAME-layers.png, the
map of one word at each layer and step: of the word that is named, or else of the one whose map is
the most uneven.

A map is the weight of the joint softmax (attention.py) that image tokens give the word's tokens, a
mean over heads, layers and steps. The weights come from the definition, by another pass over the
states that the drawing went through, beside the prompt alone: guidance's other branch has no words.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attention import joint_weights, text_mask
from cli import caption_font, write_whole
from extras.grids import spread
from extras.sheets import LETTERS, Tile, cut, enlarge, heat, sheet, stretch
from extras.thinking import Thinking, read_inside
from extras.trajectory import State
from llm import Context, FrozenLLM, Reading
from model import ImageExpert

START = "(start)"  # the token that some LLMs read first; much attention rests there
SIDE = 128  # pixels that a map has at least
COLUMNS = 8  # of the maps
LAYER_SIDE = 48  # the same of the sheet of one word
LAYER_COLUMNS = 12
# Letters of scripts without spaces (Thai to Khmer, kana, Han): there each token is a word
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def attend(
    expert: ImageExpert, x_t: Tensor, t: Tensor, context: Context
) -> tuple[Tensor, list[Tensor]]:
    """ImageExpert.forward with the softmax written out: the same velocity, and of each block the
    weights, a mean over its heads, (B, N, T+N) in float32: text first, rows that sum to 1."""
    img, modulations, way_out = expert.tokens_of(x_t, t)  # (B, N, D)
    T = context.keys[0].shape[2]
    mask = text_mask(context.lengths, T, img.shape[1])
    seen = []
    for block, m, txt_k, txt_v in zip(expert.blocks, modulations, context.keys, context.values):
        img_q, img_k, img_v = block.project(img, m)  # (B, H or G, N, Dk or Dv)
        txt_k = block.scale_keys(txt_k)  # (B, G, T, Dk)
        joint_k = torch.cat([txt_k.to(img_k.dtype), img_k], dim=2)  # (B, G, T+N, Dk)
        joint_v = torch.cat([txt_v.to(img_v.dtype), img_v], dim=2)  # (B, G, T+N, Dv)
        scale = img_q.shape[3] ** -0.5
        weights = joint_weights(scale * img_q, joint_k, mask)  # (B, H, N, T+N)
        joint_v = joint_v.repeat_interleave(block.heads // joint_v.shape[1], dim=1)
        attended = (weights.to(joint_v.dtype) @ joint_v).to(img_v.dtype)  # (B, H, N, Dv)
        img = block.finish(img, attended, m)  # (B, N, D)
        seen.append(weights.mean(dim=1))
    return expert.velocity_of(img, way_out, x_t, t), seen


@dataclass
class WordMaps:
    """The words that the image sees, and how much each patch looks at each of them.

    maps (words, steps, layers, rows, columns): the part of a patch's attention, from 0 to 1.
    text_share: the part of all attention that goes to the text, the rest is for the picture.
    """

    words: list[str]
    maps: np.ndarray
    text_share: float

    def mean(self) -> np.ndarray:
        """(words, rows, columns), over steps and layers."""
        return self.maps.mean(axis=(1, 2))

    def index(self, word: str) -> int:
        """The place of a word; "" is the word whose map is the most uneven, START aside."""
        if word:
            return [plain(known) for known in self.words].index(plain(word))
        uneven = self.mean().std(axis=(1, 2))
        for i, known in enumerate(self.words):
            if known == START:
                uneven[i] = -1
        return int(uneven.argmax())


@torch.no_grad()
def word_maps(expert: ImageExpert, llm: FrozenLLM, prompt: str, states: list[State]) -> WordMaps:
    """The maps of one picture, from the states (see Windows) it went through."""
    x_t = torch.stack([state.x for state in states]).to(llm.device)  # (S, C, height, width)
    t = torch.tensor([state.t for state in states], device=llm.device)  # (S,)
    context = llm.context([prompt] * len(states))
    _, seen = attend(expert, x_t, t, context)  # in float32, outside of autocast
    weights = torch.stack(seen, dim=1)  # (S, L, N, T+N)
    T = context.keys[0].shape[2]
    text_share = weights[..., :T].sum(-1).mean().item()

    # the tokens of a word are added up, and its patches laid out row by row
    columns = x_t.shape[3] // expert.patch
    words = []
    maps = []
    for word, tokens in words_of(llm, prompt):
        words.append(word)
        maps.append(weights[..., tokens].sum(-1).unflatten(-1, (-1, columns)))
    return WordMaps(words, torch.stack(maps).cpu().numpy(), text_share)


# -------------------------------------------------------------------------------------------------
# which token belongs to which word


def words_of(llm: FrozenLLM, prompt: str) -> list[tuple[str, list[int]]]:
    """The words that the image sees of a prompt, each with the places of its tokens in the context.

    Whatever the reader has made of the prompt: with --template the words around it too, with
    --read think those that the LLM wrote. Tokens that are no text, but for the first, are left out.
    """
    ids = shown_ids(llm, prompt)
    text, begins = text_of(llm.tokenizer, ids)
    spans = word_spans(text, begins)
    special = set(llm.tokenizer.all_special_ids)
    places: dict[int, list[int]] = {}  # word -> its tokens
    for i, begin in enumerate(begins):
        if ids[i] in special:
            continue
        for number, (_, end) in enumerate(spans):
            if end > begin:  # a space before a word belongs to it
                places.setdefault(number, []).append(i)
                break
    words = []
    if ids and ids[0] in special:
        words.append((START, [0]))
    for number, tokens in sorted(places.items()):
        begin, end = spans[number]
        words.append((text[begin:end], tokens))
    return words


def shown_ids(llm: FrozenLLM, prompt: str) -> list[int]:
    """The tokens that the prompt's row of the context stands for, one each. ValueError where they
    are no text."""
    reader = llm.reader
    reading = None
    if isinstance(reader, Thinking) and prompt:
        llm.lookup([prompt])  # it has written, or does now
        if reader.show != "reencode":
            return reader.shown[prompt]
        reading = read_inside(reader, reader.written[prompt] or prompt)
    elif not hasattr(reader, "picture"):
        reading = llm.read(prompt)
    if not isinstance(reading, Reading):
        raise ValueError(
            "--maps shows words, and with --read image:FILE the LLM reads a picture too: leave one "
            "out"
        )
    return reading.ids[reading.start :]


def text_of(tokenizer, ids: list[int]) -> tuple[str, list[int]]:
    """The text of tokens, and where in it each begins. (A tokenizer's own offsets are of the text
    it was given; what an LLM has written was never given to it.)"""
    begins = []
    text = ""
    for end in range(1, len(ids) + 1):
        begins.append(len(text))
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if end < len(ids):
            text = text.rstrip("\ufffd")  # a letter of which some bytes are still to come
    return text, begins


def word_spans(text: str, begins: list[int]) -> list[tuple[int, int]]:
    """Where the words of a text begin and end: between spaces, or a token each where the script has
    none."""
    spans = []
    for chunk in re.finditer(r"\S+", text):
        cuts = [chunk.start()]
        if UNSPACED.search(chunk.group()):
            cuts += [begin for begin in dict.fromkeys(begins) if cuts[0] < begin < chunk.end()]
        spans += zip(cuts, [*cuts[1:], chunk.end()])
    return spans


def plain(word: str) -> str:
    """A word without its punctuation, in small letters."""
    return re.sub(r"^\W+|\W+$", "", word.casefold()) or word


def check_maps(expert: ImageExpert, llm: FrozenLLM, prompts: list[str], word: str) -> None:
    """ValueError, before anything is drawn, if there is nothing to show: the expert reads something
    else than words, or does not see this one."""
    check_expert(expert)
    for prompt in dict.fromkeys(prompts):
        words = [known for known, _ in words_of(llm, prompt)]
        if not words:
            raise ValueError(f"--maps: the prompt {prompt!r} has no words to look at")
        if word and plain(word) not in [plain(known) for known in words]:
            shown = ", ".join(dict.fromkeys(words))
            raise ValueError(f"--maps {word}: expected a word that the image sees: {shown}")


def check_expert(expert: ImageExpert) -> None:
    """ValueError if its image tokens do not look at the LLM's keys as ImageExpert's do."""
    if type(expert).forward is not ImageExpert.forward:
        raise ValueError(
            f"--maps shows how image tokens look at the LLM's keys, and a {type(expert).__name__} "
            "has a way of its own; expected an expert of --bridge mot or kv"
        )


# -------------------------------------------------------------------------------------------------
# the pictures


def save_maps(
    path: Path, picture: np.ndarray, states: list[State], found: WordMaps, word: str, layers: list
) -> list[Path]:
    """Both sheets of a picture (height, width, 3) uint8, beside its file `path`. layers: the number
    of each block's layer in the LLM."""
    sheets = {
        path.with_name(f"{path.stem}-maps.png"): maps_sheet(picture, found),
        path.with_name(f"{path.stem}-layers.png"): layers_sheet(states, found, word, layers),
    }
    for file, image in sheets.items():
        write_whole(file, image.save)
    return list(sheets)


def maps_sheet(picture: np.ndarray, found: WordMaps) -> Image.Image:
    """The picture, and over it the map of each word, from nothing to the word's own largest."""
    large = enlarge(picture, SIDE)
    grey = large.mean(axis=2, keepdims=True)
    tiles: list[Tile] = [(large, "")]
    for word, values in zip(found.words, found.mean()):
        colors = heat(stretch(values / values.max(), large.shape[:2]))
        over = (0.35 * grey + 0.65 * colors).round().astype(np.uint8)
        number = f"  {share(values.mean())}"
        font = caption_font(word, LETTERS)
        tiles.append((over, cut(word, font, len(large) - font.getlength(number)) + number))
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / COLUMNS))  # rows of one length
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    title = (
        f"Of all attention of the patches {share(found.text_share)} goes to the text, "
        f"{share(1 - found.text_share)} to the picture. Above each map: the word, and its share; "
        "bright: the patches that look at it most."
    )
    return sheet(rows, title)


def layers_sheet(states: list[State], found: WordMaps, word: str, layers: list[int]) -> Image.Image:
    """A row a layer, a column a step, on one scale; above them what the picture was to become."""
    index = found.index(word)
    maps = found.maps[index]  # (steps, layers, rows, columns)
    largest = maps.max()
    columns = spread(len(states), LAYER_COLUMNS)
    first = []
    for i in columns:
        clean = enlarge(states[i].clean(), LAYER_SIDE)
        first.append((clean, f"t = {states[i].t:.2f}"))
    size = first[0][0].shape[:2]
    rows = [first]
    for layer in range(len(layers)):
        row = []
        for i in columns:
            row.append((heat(stretch(maps[i, layer] / largest, size)), ""))
        rows.append(row)
    left = ["predicted", *(f"layer {number}" for number in layers)]
    title = (
        f"How much each patch looks at “{found.words[index]}”, by the LLM's layer and the step: "
        f"from 0 (dark) to {share(largest)} (bright)."
    )
    return sheet(rows, title, left)


def share(part: float) -> str:
    """0.123 -> "12 %", 0.0123 -> "1.2 %"; the space is one where no line ends."""
    percent = 100 * part
    digits = 0
    if percent < 9.95:
        digits = 1
    return f"{percent:.{digits}f}\u00a0%"
