"""How any LLM is understood: by its behaviour, never by its name.

Where do its attention layers keep keys and values, is it causal, how do its keys turn with the
position, is all of it there, and is it still the LLM that an expert was trained beside? A few
tokens are run through it, and then run again at other positions.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from attention import Rotary

ROWS, TOKENS = 16, 8  # of the tokens that are run through an LLM to see what it does
SHIFT = 7  # they stand at SHIFT and on (at 0 some recurrent layers begin anew), then SHIFT later
LAW_ERROR = 0.05  # largest error of a law that explains the keys; bfloat16 alone makes about 0.005

# -------------------------------------------------------------------------------------------------
# where keys and values are, and whether earlier tokens see later ones


@dataclass(frozen=True)
class Probe:
    """What is seen of an LLM: of each layer that keeps keys, its place in the cache, the shapes of
    its heads (G, Dk, Dv), how its keys turn, and how large they are (root mean square, G numbers)."""

    places: list[int]
    heads: list[tuple[int, int, int]]
    rotary: list[Rotary]
    key_sizes: list[list[float]]


def layer_states(config, layer) -> tuple[Tensor, Tensor]:
    """Keys (B, G, T, Dk) and values (B, G, T, Dv) of a cache's layer.

    Latent attention (DeepSeek-V2, section 2.1) keeps one latent for all heads, and one key that
    turns: heads ask for both side by side, and what they read is the latent.
    """
    keys, values = layer.keys, layer.values
    latent = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    if (keys.shape[-1], values.shape[-1]) == latent:
        return torch.cat([keys, values], dim=-1), keys
    return keys, values


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


def probe(model: nn.Module, run: Callable) -> Probe:
    """Find the attention layers, check that the model is causal, find how its keys turn.

    run(ids, **more) -> its cache. ValueError, in one line, if no image can attend to it.
    """
    who = type(model).__name__
    config = model.config.get_text_config()
    words = min(200, getattr(model.get_input_embeddings(), "num_embeddings", 200)) // 2 - 2
    ids = 3 + torch.arange(ROWS * TOKENS, device=model.device).view(ROWS, TOKENS) % words
    ids[:, -1] = ids[:, 0]  # the first token again: see positions_unseen

    def states(tokens: Tensor, **more) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}
        for place, layer in enumerate(run(tokens, **more).layers):
            if getattr(layer, "keys", None) is None:
                continue
            keys, values = layer_states(config, layer)
            if keys.dim() == 4 and keys.shape[2] == values.shape[2] == TOKENS:
                found[place] = keys.float(), values.float()
        return found

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
    if not all(x.isfinite().all() for pair in found.values() for x in pair):
        raise ValueError(
            f"{who}: its keys or values are not finite (nan or inf); are its weights broken?"
        )
    other = ids.clone()
    other[:, TOKENS // 2 :] += words
    if sees_ahead(found, states(other), model.dtype):
        raise ValueError(
            f"{who} is not causal: a later token changes the keys of an earlier one; "
            "expected a decoder LLM"
        )
    heads = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in found.values()]
    states(ids)  # how_keys_turn: the state of recurrent layers
    laws = how_keys_turn(
        who, found, lambda first: states(ids, position_ids=first), rotary_frequencies(model)
    )
    sizes = [keys.square().mean(dim=(0, 2, 3)).sqrt().tolist() for keys, _ in found.values()]
    return Probe(list(found), heads, laws, sizes)


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
    return not (after - before).norm() <= noise * before.norm()


# -------------------------------------------------------------------------------------------------
# how keys turn: of the first token alone
#
# The first token of a causal model attends to itself and to nothing else, so its hidden states
# depend on no position, at any layer. What its keys do when the text is moved is the rotation and
# nothing else, without the noise that other tokens' scores bring up through the layers.


def rotary_laws(frequencies: list[Tensor], width: int, device: torch.device) -> Iterator[Rotary]:
    """Every way in which keys of this width may turn, by the frequencies (R/2,) that a model has.

    Not at all; or in Llama's halves or GPT-J's pairs, at the front or (latent attention) at the end
    of the width, either way round.
    """
    every = torch.arange(width, device=device)
    yield Rotary(torch.zeros(0, device=device), every)
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


def how_keys_turn(
    who: str, found: dict, states_from: Callable, known: list[Tensor]
) -> list[Rotary]:
    """The law of each layer. ValueError for one whose keys neither stay nor turn by a known law.

    states_from(position_ids (ROWS, TOKENS)) -> the states with the text at those positions.
    """
    device = next(iter(found.values()))[0].device
    positions = SHIFT + torch.arange(TOKENS, device=device).expand(ROWS, TOKENS)
    try:
        here = states_from(positions)
        states_from(positions - SHIFT)  # as before the other run: recurrent layers may keep a state
        moved = states_from(positions + SHIFT)
    except (TypeError, ValueError, RuntimeError, IndexError):
        here = moved = found  # a model that takes no positions
    # positions that are added to the embeddings (GPT-2) change all that follows, and nothing turns
    first = min(found)
    added = not known and not torch.equal(here[first][1][:, :, :1], moved[first][1][:, :, :1])
    laws = []
    for place in found:
        keys, moved_keys = here[place][0][:, :, :1], moved[place][0][:, :, :1]
        values, moved_values = here[place][1][:, :, :1], moved[place][1][:, :, :1]
        candidates = list(rotary_laws(known, keys.shape[-1], device))
        errors = [law_error(law, keys, moved_keys) for law in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        stays = rotary_laws([], values.shape[-1], device)
        values_error = law_error(next(stays), values, moved_values)
        if added:
            best = 0
        elif not (errors[best] <= LAW_ERROR and values_error <= LAW_ERROR):
            raise ValueError(
                f"{who}: the keys of attention layer {len(laws)} neither stay nor turn by a known "
                f"law when the text is moved, or its values do not stay (errors {errors[best]:.2f}, "
                f"{values_error:.2f}; expected at most {LAW_ERROR}): an image would stand in the "
                "wrong place"
            )
        laws.append(candidates[best])
    if positions_unseen(found, laws):
        raise ValueError(
            f"{who}: its keys turn with the position, but it takes no position_ids to see how"
        )
    return laws


def positions_unseen(found: dict, laws: list[Rotary]) -> bool:
    """Whether no law turns keys, and yet in the first layer one and the same token has the same
    values and other keys where it stands later in the text."""
    keys, values = next(iter(found.values()))
    if any(len(law.frequencies) for law in laws):
        return False
    stays = next(rotary_laws([], keys.shape[-1], keys.device))
    stays_too = next(rotary_laws([], values.shape[-1], keys.device))
    same_token = law_error(stays_too, values[:, :, :1], values[:, :, -1:]) <= LAW_ERROR
    return same_token and law_error(stays, keys[:, :, :1], keys[:, :, -1:]) > LAW_ERROR


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


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bfloat16 values: the same in bfloat16 and float32.

    ValueError if a weight is not finite.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        plain = weight.to("cpu", torch.bfloat16).contiguous()
        if not plain.isfinite().all():
            raise ValueError(
                f"its weight {name} is not finite (nan or inf): a broken file or merge"
            )
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the vocabulary, and of what some texts are in it."""
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    ids = [list(tokenizer(text).input_ids) for text in TEXTS]
    return hashlib.sha256(json.dumps([ids, vocabulary]).encode()).hexdigest()


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
    before, after = was.get("llm_config", {}), now["llm_config"]
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            raise ValueError(
                f"{names}, whose configuration had {key} {before[key]}; {now['llm']} has the same "
                f"weights and {key} {after[key]}: its keys and values mean something else"
            )
    if was.get("llm_tokenizer", now["llm_tokenizer"]) != now["llm_tokenizer"]:
        raise ValueError(f"{names}; {now['llm']} has the same weights and another tokenizer")


# -------------------------------------------------------------------------------------------------
# is it all there: the library makes up what it does not find, and its warnings are off


def broken_file(folder: Path) -> str:
    """Which file of a local model is why it does not load, and what to do; "" if none is found."""
    for path in sorted(folder.glob("*.*")) if folder.is_dir() else []:
        try:
            with path.open("rb") as file:
                if file.read(20) == b"version https://git-":
                    return f"{path.name} is a git-lfs pointer and not the file: run git lfs pull there; "
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return f"{path.name} is cut or damaged: fetch it again; "
    if folder.is_dir() and not (folder / "config.json").exists():
        return "it has no config.json; expected a whole model, an adapter merged into its own; "
    return ""


def check_weights(model: nn.Module, found: dict) -> bool:
    """Whether the model came with a language-model head. ValueError if other weights were missing,
    or of another shape. found: what the library says of them (its output_loading_info).

    A model that was saved without its head (embedding LLMs are) has keys and values all the same:
    the head that the library has made up is set to zero, so that it is no other one at each load.
    """
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"its weight {name} has the shape {tuple(shape)}, and its config.json means "
            f"{tuple(expected)}; expected the two of one model"
        )
    missing = set(found["missing_keys"])
    head = model.get_output_embeddings()
    made_up = set()
    if head is not None:
        own = {id(weight) for weight in head.parameters()}
        made_up = {name for name, weight in model.named_parameters() if id(weight) in own} & missing
    lost = sorted(
        name for name in missing - made_up if not name.startswith("pooler.")
    )  # an encoder's
    if lost:
        raise ValueError(
            f"{len(lost)} of its weights are missing, {lost[0]} first; expected a whole model"
        )
    unused = sorted(found["unexpected_keys"])
    if unused and head is not None:  # of an encoder, its head is left out
        said = f"{len(unused)} weights in the LLM's files are not used, {unused[0]} first"
        warnings.warn(said, stacklevel=2)
    if made_up:
        with torch.no_grad():
            for weight in head.parameters():
                weight.zero_()
    return not made_up


def check_tokenizer(tokenizer, embeddings: int) -> None:
    """ValueError if a tokenizer is empty, or has words that the model has no embedding for."""
    if tokenizer("a red circle").input_ids == tokenizer("three blue stars").input_ids:
        raise ValueError("its tokenizer reads every text alike; are the tokenizer's files missing?")
    for token, added in sorted(getattr(tokenizer, "added_tokens_decoder", {}).items()):
        if token >= embeddings and not added.special:
            raise ValueError(
                f"its tokenizer has the token {added.content!r} as number {token}, and the model "
                f"embeddings of {embeddings}; was resize_token_embeddings forgotten?"
            )
