"""How any LLM is understood: by its behaviour, never by its name.

Where do its attention layers keep keys and values, is it causal, how do its keys turn with the
position, and is it still the LLM that an expert was trained beside? A few tokens are run through
it, and then run again at other positions.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention import Rotary

ROWS = 16  # texts that are run through an LLM to see what it does
TOKENS = 8  # of each
SHIFT = 7  # they stand at SHIFT and on (at 0 some recurrent layers begin anew), then SHIFT later
LAW_ERROR = 0.05  # largest error of a law that explains the keys; bfloat16 alone makes about 0.005

# -------------------------------------------------------------------------------------------------
# where keys and values are, and whether earlier tokens see later ones


@dataclass(frozen=True)
class Inspection:
    """What is seen of an LLM: of each layer that keeps keys, its place in the cache, the shapes of
    its heads (G, Dk, Dv), how its keys turn, and how large they are (root mean square, of G)."""

    places: list[int]
    heads: list[tuple[int, int, int]]
    rotary: list[Rotary]
    key_sizes: list[list[float]]


def inspect(model: nn.Module, run: Callable) -> Inspection:
    """Find the attention layers, check that the model is causal, find how its keys turn.

    run(ids, **more) -> its cache. ValueError, in one line, if no image can attend to it.
    """
    who = type(model).__name__
    config = model.config.get_text_config()

    # tokens 3, 4, 5, ... of the lower half of what the model knows; 3: the first ones are special
    known = getattr(model.get_input_embeddings(), "num_embeddings", 200)
    words = min(200, known) // 2 - 2
    ids = 3 + torch.arange(ROWS * TOKENS, device=model.device).view(ROWS, TOKENS) % words
    ids[:, -1] = ids[:, 0]  # the first token again: see positions_unseen

    def states(tokens: Tensor, **more) -> dict[int, tuple[Tensor, Tensor]]:
        return kept_states(config, run(tokens, **more))

    # is there anything to attend to?
    why = "an encoder such as BERT and a state-space model such as Mamba have none"
    found = {}
    try:
        found = states(ids)
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
    if not found:
        raise ValueError(
            f"{who} keeps no key-value cache that an image could attend to; "
            f"expected a decoder LLM ({why})"
        )
    for keys, values in found.values():
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise ValueError(
                f"{who}: its keys or values are not finite (nan or inf); are its weights broken?"
            )

    # does a later token change an earlier one?
    other = ids.clone()
    other[:, TOKENS // 2 :] += words
    if sees_ahead(found, states(other), model.dtype):
        raise ValueError(
            f"{who} is not causal: a later token changes the keys of an earlier one; "
            "expected a decoder LLM"
        )

    # what does another position change?
    states(ids)  # how_keys_turn: the state of recurrent layers
    frequencies = rotary_frequencies(model)
    rotary = how_keys_turn(who, found, lambda at: states(ids, position_ids=at), frequencies)
    heads = []
    key_sizes = []
    for keys, values in found.values():
        heads.append((keys.shape[1], keys.shape[3], values.shape[3]))
        key_sizes.append(keys.square().mean(dim=(0, 2, 3)).sqrt().tolist())
    return Inspection(list(found), heads, rotary, key_sizes)


def kept_states(config, cache) -> dict[int, tuple[Tensor, Tensor]]:
    """Place in the cache -> keys and values, of the layers that keep some for every token."""
    found = {}
    for place, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is None:
            continue
        keys, values = layer_states(config, layer)
        if keys.dim() == 4 and keys.shape[2] == values.shape[2] == TOKENS:
            found[place] = (keys.float(), values.float())
    return found


def layer_states(config, layer) -> tuple[Tensor, Tensor]:
    """Keys (B, G, T, Dk) and values (B, G, T, Dv) of a cache's layer.

    Latent attention (DeepSeek-V2, section 2.1) keeps one latent for all heads, and one key that
    turns: heads ask for both side by side, and what they read is the latent.
    """
    widths = (layer.keys.shape[-1], layer.values.shape[-1])
    latent = (getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None))
    if widths == latent:
        return torch.cat([layer.keys, layer.values], dim=-1), layer.keys
    return layer.keys, layer.values


def sees_ahead(states: dict, after_change: dict, dtype: torch.dtype) -> bool:
    """Whether the first half's last keys differ when the second half of the tokens is another.

    In a causal model they are the same bits, but for the rounding of mixtures of experts, whose
    matrices have other sizes then: 5e-7 in float32, none in bfloat16 on a CPU. A BERT of fresh
    weights: 1e-3.
    """
    last = max(states)
    before = states[last][0][:, :, : TOKENS // 2]
    after = after_change[last][0][:, :, : TOKENS // 2]
    exact = dtype == torch.float32 or before.device.type == "cpu"
    noise = 1e-5 if exact else 2e-3
    return not (after - before).norm() <= noise * before.norm()  # nan: it does


# -------------------------------------------------------------------------------------------------
# how keys turn: of the first token alone
# The first token of a causal model attends to itself and to nothing else, so its hidden states
# depend on no position, at any layer. What its keys do when the text is moved is the rotation and
# nothing else, without the noise that other tokens' scores bring up through the layers.


def how_keys_turn(who: str, found: dict, run_at: Callable, known: list[Tensor]) -> list[Rotary]:
    """The law of each layer. ValueError for one whose keys neither stay nor turn by a known law.

    run_at(position_ids (ROWS, TOKENS)) -> the states with the text at those positions.
    """
    # the same text at two places
    device = next(iter(found.values()))[0].device
    positions = SHIFT + torch.arange(TOKENS, device=device).expand(ROWS, TOKENS)
    try:
        here = run_at(positions)
        run_at(positions - SHIFT)  # as before the other run: recurrent layers may keep a state
        moved = run_at(positions + SHIFT)
    except (TypeError, ValueError, RuntimeError, IndexError):
        here = moved = found  # a model that takes no positions

    # positions that are added to the embeddings (GPT-2) change all that follows, and nothing turns
    first = min(found)
    values = here[first][1][:, :, :1]
    moved_values = moved[first][1][:, :, :1]
    added = not known and not torch.equal(values, moved_values)

    # the best law of each layer
    laws = []
    for place in found:
        keys, values = first_token(here[place])
        moved_keys, moved_values = first_token(moved[place])
        candidates = list(rotary_laws(known, keys.shape[-1], device))
        errors = [law_error(law, keys, moved_keys) for law in candidates]
        error = min(errors)
        values_error = law_error(no_rotation(values.shape[-1], device), values, moved_values)
        if added:
            laws.append(candidates[0])
            continue
        if not (error <= LAW_ERROR and values_error <= LAW_ERROR):
            raise ValueError(
                f"{who}: the keys of attention layer {len(laws)} neither stay nor turn by a known "
                f"law when the text is moved, or its values do not stay (errors {error:.2f}, "
                f"{values_error:.2f}; expected at most {LAW_ERROR}): an image would stand in the "
                "wrong place"
            )
        laws.append(candidates[errors.index(error)])
    if positions_unseen(found, laws):
        raise ValueError(
            f"{who}: its keys turn with the position, but it takes no position_ids to see how"
        )
    return laws


def first_token(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, T, D) of a layer -> those of the first token (B, G, 1, D)."""
    keys, values = pair
    return keys[:, :, :1], values[:, :, :1]


def rotary_frequencies(model: nn.Module) -> list[Tensor]:
    """The rotary frequencies that a model has, each (R/2,); GPT-J keeps a table of RoFormer's."""
    found = []
    for name, buffer in model.base_model.named_buffers():
        if name.endswith("inv_freq"):
            found.append(buffer.float().reshape(-1))
    turning = getattr(model.config.get_text_config(), "rotary_dim", None)
    if not found and turning:
        exponents = torch.arange(0, turning, 2, device=model.device) / turning
        found.append(10_000**-exponents)  # RoFormer, section 3.2.2
    return found


def no_rotation(width: int, device: torch.device) -> Rotary:
    """The law of what stays as it is wherever the text stands."""
    return Rotary(torch.zeros(0, device=device), torch.arange(width, device=device))


def rotary_laws(frequencies: list[Tensor], width: int, device: torch.device) -> Iterator[Rotary]:
    """Every way in which keys of this width may turn, by the frequencies (R/2,) that a model has.

    Not at all; or in Llama's halves or GPT-J's pairs, at the front or (latent attention) at the end
    of the width, either way round.
    """
    yield no_rotation(width, device)
    every = torch.arange(width, device=device)
    for some in frequencies:
        turning = 2 * len(some)
        if not 0 < turning <= width:
            continue
        for start in sorted({0, width - turning}):
            block = every[start : start + turning]
            rest = torch.cat([every[:start], every[start + turning :]])
            for layout in (block, torch.cat([block[::2], block[1::2]])):
                order = torch.cat([layout, rest])
                yield Rotary(some, order)
                yield Rotary(-some, order)


def law_error(law: Rotary, here: Tensor, moved: Tensor) -> float:
    """How far keys (B, G, 1, Dk) `moved` by SHIFT positions are from what the law makes of `here`.

    The largest over heads and dimensions of error / length, medians over the rows; the length is
    that of the pair that turns. So neither large dimensions (Qwen2's keys have biases of hundreds)
    nor many that stay hide those few that turn, and a row that rounding sends to another expert
    does not count.
    """
    shift = torch.full((len(here),), SHIFT, device=here.device)
    error = (law(here, shift) - moved)[..., law.order].abs()
    length = here[..., law.order].abs()
    half = len(law.frequencies)
    pairs = torch.hypot(length[..., :half], length[..., half : 2 * half])
    length = torch.cat([pairs, pairs, length[..., 2 * half :]], dim=-1)
    return (error / length.clamp_min(1e-30)).median(dim=0).values.max().item()


def positions_unseen(found: dict, laws: list[Rotary]) -> bool:
    """Whether no law turns keys, and yet in the first layer one and the same token has the same
    values and other keys where it stands later in the text."""
    if any(len(law.frequencies) for law in laws):
        return False
    keys, values = next(iter(found.values()))
    keys_stay = no_rotation(keys.shape[-1], keys.device)
    values_stay = no_rotation(values.shape[-1], keys.device)
    values_error = law_error(values_stay, values[:, :, :1], values[:, :, -1:])
    keys_error = law_error(keys_stay, keys[:, :, :1], keys[:, :, -1:])
    return values_error <= LAW_ERROR and keys_error > LAW_ERROR


# -------------------------------------------------------------------------------------------------
# is it the same LLM as before: weights, configuration, tokenizer

BOOKKEEPING = re.compile(  # what a configuration holds that does not change how a text is read
    "_.*|transformers_version|(torch_)?dtype|architectures|use_cache|return_.*|output_.*|tie_.*"
    "|.*dropout.*|.*_token_id|initializer_.*|id2label|label2id|problem_type|quantization_config"
)
TEXTS = (  # read by the tokenizer to tell it from another
    "a red circle left of a blue square",
    "Three  small teal stars,\n#1f77b4 (2,048)!",
    "un cerchio rosso; 一个红色的圆; लाल वृत्त; красный круг; دائرة حمراء",
    "🟥🔵 👩‍🚀",
)


def llm_identity(model: nn.Module, tokenizer) -> dict:
    """What a checkpoint keeps of its LLM, so that another one can be refused."""
    return {
        "llm_fingerprint": fingerprint(model),
        "llm_config": reading_config(model.config),
        "llm_tokenizer": tokenizer_fingerprint(tokenizer),
    }


def check_same_llm(was: dict, now: dict) -> None:
    """ValueError that says what differs, if the LLM that is there `now` is not the one that `was`.

    Both: llm, its name, and llm_identity. What one side does not have (an older checkpoint, another
    version of transformers) is not compared.
    """
    names = f"this checkpoint was trained with {was['llm']}"
    if was["llm_fingerprint"] != now["llm_fingerprint"]:
        raise ValueError(
            f"{names} (weights {was['llm_fingerprint'][:12]}), not with {now['llm']} (weights "
            f"{now['llm_fingerprint'][:12]}): its keys and values mean something else"
        )
    before = was.get("llm_config", {})
    after = now["llm_config"]
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            raise ValueError(
                f"{names}, whose configuration had {key} {before[key]}; {now['llm']} has the same "
                f"weights and {key} {after[key]}: its keys and values mean something else"
            )
    if was.get("llm_tokenizer", now["llm_tokenizer"]) != now["llm_tokenizer"]:
        raise ValueError(f"{names}; {now['llm']} has the same weights and another tokenizer")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bfloat16 values: the same in bfloat16 and float32.

    ValueError if a weight is not finite.
    """
    digest = hashlib.sha256()
    for key, weight in sorted(model.named_parameters()):
        digest.update(f"{key}{tuple(weight.shape)}".encode())
        plain = weight.to("cpu", torch.bfloat16).contiguous()
        if not plain.isfinite().all():
            raise ValueError(f"its weight {key} is not finite (nan or inf): a broken file or merge")
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def reading_config(config) -> dict:
    """What of a text configuration says how a text is read (rope theta, eps, ...), as flat JSON."""
    flat = {}

    def add(prefix: str, values: dict) -> None:
        for key, value in values.items():
            if BOOKKEEPING.fullmatch(key) or value is None:
                continue
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    add("", json.loads(config.get_text_config().to_json_string(use_diff=False)))
    return flat


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the vocabulary, and of what some texts are in it."""
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    ids = [list(tokenizer(text).input_ids) for text in TEXTS]
    return hashlib.sha256(json.dumps([ids, vocabulary]).encode()).hexdigest()
