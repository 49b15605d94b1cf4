"""How the frozen LLM reaches the tower that draws: Mural's shared attention and its relatives, all
with the same predict(x_t, t, context), and built with the same number of parameters.

    python train.py --bridge lap:stride=1

    mot           its keys and values, the keys turned back, each layer to a block: model.py
    dense         not at all: text embeddings of its own
    last          one hidden state, the last, before the image tokens
    kv            its keys and values as they are
    hsi           a hidden state after every block
    lap           hidden states of every third layer, pooled over the layers, before the image
    metaqueries   what it says to learned queries after the caption, before the image tokens
    mirror        its keys and values, read by a trainable copy of its own decoder
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn

from cli import between, colon_form
from extras.bridge_llm import BridgeLLM, any_class
from extras.mirror import MirrorTower
from extras.prepending import Dense, HiddenStates, LayerwisePooling, MetaQueries
from extras.separation import SEPARATIONS, SeparatedTower, TrainedLLM
from llm import FrozenLLM, TextLayer, select_layers
from model import ImageExpert, default_heads


class KeyValueFusion(ImageExpert):
    """Key-value fusion (UniFusion, section 2.1, after Playground v3): as many layers and heads as
    the LLM has, and its keys and values as they are: turned to where the words stand, beside image
    keys that have no norm and no rotation. kv:as-mot instead has the layers, width and heads of
    `mot`: then nothing else sets the two apart.

    Deviation: the tower's own width need not be the LLM's, since nothing but keys and values
    passes.
    """

    qk_norm = False

    def attach(self, llm: BridgeLLM) -> None:
        llm.keep(self.reads, turned=False)


BRIDGES = {  # name -> tower
    "mot": ImageExpert,
    "dense": Dense,
    "last": HiddenStates,
    "kv": KeyValueFusion,
    "hsi": HiddenStates,
    "lap": LayerwisePooling,
    "metaqueries": MetaQueries,
    "mirror": MirrorTower,
}
OPTIONS = {  # name -> its own options, as in lap:stride=1
    "mot": (),
    "dense": (),
    "last": ("state=",),
    "kv": ("as-mot",),
    "hsi": (),
    "lap": ("stride=", "no-refiner", "per-layer"),
    "metaqueries": ("queries=",),
    "mirror": ("init=", "separation=", "lr-ratio="),
}
ON_HIDDEN_STATES = ("last", "hsi", "lap")  # which can do with an encoder


def towers() -> dict[str, type]:
    """Name of a class, as a checkpoint has it -> the class."""
    return {tower.__name__: tower for tower in (*BRIDGES.values(), SeparatedTower)}


def bridge_of(expert: ImageExpert) -> str:
    """The bridge that an expert out of a checkpoint is, without its options."""
    if type(expert) is HiddenStates and len(expert.states) > 1:
        return "hsi"
    names = {tower: name for name, tower in BRIDGES.items() if name != "hsi"}
    names[SeparatedTower] = "mirror"
    return names[type(expert)]


def llm_options(bridge: str | None = None) -> dict:
    """How load_llm makes the LLM that a bridge needs, "lap:stride=1"; without one, for any tower
    out of a checkpoint. ValueError for one that is not known, or has no such option."""
    name = None
    options = {}
    if bridge:
        name, options = colon_form(bridge, OPTIONS, "--bridge")
    if name == "mirror" and lr_ratio(options):
        return {"frozen": TrainedLLM}
    if name is None or name in ON_HIDDEN_STATES:
        return {"frozen": BridgeLLM.for_model, "auto_class": any_class}
    return {"frozen": BridgeLLM}


def build(
    name: str,
    options: dict,
    llm: FrozenLLM,
    captions: Sequence[str] = (),
    width: int = 256,
    depth: int | None = None,
    heads: int | None = None,
    layers: str = "middle",
    **shared,
) -> nn.Module:
    """A bridge to this LLM, with as many trainable parameters as `mot` has: what a connector takes
    is taken from the insides of the blocks' SwiGLU (not so with lap:per-layer, and mirror is as
    large as the LLM). ValueError if the LLM or the sizes do not allow it.

    options: as cli.colon_form reads them. captions: by whose hidden states all are standardized.
    shared: patch, image_size and what else every tower takes.
    """
    if name == "mirror":
        return build_mirror(llm, options, **shared)
    if not llm.layers and name not in (*ON_HIDDEN_STATES, "dense"):
        raise ValueError(
            f"--bridge {name} needs keys and values, which {llm.name} has not; expected a decoder "
            f"LLM, or --bridge {' or '.join(ON_HIDDEN_STATES)}"
        )
    depth = depth or min(9, len(llm.layers) or 9)
    if name == "mot":
        return ImageExpert.beside(llm, width, depth, heads, layers, **shared)
    shape = shape_of_mot(llm, width, depth, heads, layers) | shared
    with torch.device("meta"):  # to count the parameters, no memory is needed
        wanted = count_parameters(ImageExpert(**shape))

    # what the bridge has of its own
    if name == "kv":
        own = {} if switch("kv", options, "as_mot") else shape_of_kv(llm, width, depth)
        return of_size(name, wanted, shape | own)
    shape["text_width"] = llm.hidden_widths[-1]
    shape |= shape_of_text(name, options, llm, depth)
    if shape.get("per_layer"):  # so many poolings are more than all of mot: they come on top
        tower = LayerwisePooling(**shape)
    else:
        tower = of_size(name, wanted, shape)
    if name == "metaqueries":
        start_queries(tower, llm)
    if tower.states and captions:
        tower.measure(llm, list(captions))
    return tower


def shape_of_mot(llm: FrozenLLM, width: int, depth: int, heads: int | None, layers: str) -> dict:
    """Layers, width and heads of the tower that all others are measured by."""
    if llm.layers:
        text_layers = select_layers(llm, depth, layers)
    else:  # beside an encoder, heads of a size of their own
        text_layers = [asdict(TextLayer(0, max(1, width // 64), 64, 64))] * depth
    heads = heads or default_heads(text_layers[0], width)
    return {"text_layers": text_layers, "width": width, "heads": heads}


def shape_of_kv(llm: FrozenLLM, width: int, depth: int) -> dict:
    """As deep as the LLM, and so not as wide as the others."""
    available = len(llm.layers)
    return {
        "text_layers": select_layers(llm, available),
        "heads": llm.model.config.get_text_config().num_attention_heads,
        "width": max(32, width * depth // available // 32 * 32),
    }


def shape_of_text(name: str, options: dict, llm: BridgeLLM, depth: int) -> dict:
    """Which hidden states are read (numbered from 0, the embeddings, to `top`), and what else a
    bridge that prepends has of its own."""
    top = len(llm.hidden_widths) - 1
    if name == "last":
        return {"states": [state_number(options, top)]}
    if name == "hsi":
        return {"states": [round(i * top / max(1, depth - 1)) for i in range(depth)]}
    if name == "lap":
        stride = whole_number("lap", options, "stride", 3)
        if stride > top:
            raise ValueError(
                f"--bridge lap:stride={stride}: {llm.name} has {top} layers; expected at most that"
            )
        return {
            "states": list(range(0, top + 1, stride)),
            "refiner": not switch("lap", options, "no_refiner"),
            "per_layer": switch("lap", options, "per_layer"),
        }
    if name == "metaqueries":
        return {
            "states": [],
            "reads": list(range(len(llm.layers))),
            "queries": whole_number("metaqueries", options, "queries", 64),
            "rotary": any(len(layer.frequencies) for layer in llm.rotary),
        }
    return {"states": []}  # dense


def state_number(options: dict, top: int) -> int:
    """last:state=NUMBER, of the hidden state that is read."""
    state = options.get("state", "last")
    number = {"last": top, "penultimate": top - 1}.get(state, state)
    if not str(number).isdecimal() or int(number) > top:
        raise ValueError(
            f"--bridge last:state={state}: expected last, penultimate, or a number from 0 to {top}"
        )
    return int(number)


def build_mirror(llm: FrozenLLM, options: dict, **shared) -> MirrorTower:
    init = options.get("init", "llm")
    if init not in ("llm", "random"):
        raise ValueError(f"--bridge mirror:init={init}: expected llm or random")
    separation = options.get("separation", "deep")
    if separation not in SEPARATIONS:
        raise ValueError(
            f"--bridge mirror:separation={separation}: expected one of {', '.join(SEPARATIONS)}"
        )
    ratio = lr_ratio(options)
    if separation == "deep" and not ratio:
        return MirrorTower.beside(llm, init, **shared)
    return SeparatedTower.beside(llm, init, separation, ratio, **shared)


def lr_ratio(options: dict) -> float:
    """mirror:lr-ratio=0.1, from 0 (the LLM is frozen) to 1."""
    text = str(options.get("lr_ratio", "0"))
    try:
        return between(0, 1)(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise ValueError(
            f"--bridge mirror:lr-ratio={text}: expected a number from 0 to 1"
        ) from None


def whole_number(name: str, options: dict, option: str, default: int) -> int:
    value = str(options.get(option, default))
    if not value.isdecimal() or not 0 < int(value) < 2**31:
        raise ValueError(f"--bridge {name}:{option}={value}: expected a whole number above zero")
    return int(value)


def switch(name: str, options: dict, option: str) -> bool:
    """Whether an option without a value is given."""
    value = options.get(option, False)
    if value not in (True, False):
        flag = option.replace("_", "-")
        raise ValueError(f"--bridge {name}:{flag}={value}: expected {flag} without a value")
    return value


# -------------------------------------------------------------------------------------------------
# all of one size


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_size(name: str, wanted: int, shape: dict) -> ImageExpert:
    """The tower of this shape with about so many trainable parameters: its SwiGLU takes up the
    difference."""
    tower = BRIDGES[name]
    with torch.device("meta"):
        at_64 = count_parameters(tower(intermediate=64, **shape))
        at_128 = count_parameters(tower(intermediate=128, **shape))
    intermediate = 64 + round((wanted - at_64) * 64 / (at_128 - at_64) / 16) * 16
    if intermediate < 32:
        raise ValueError(
            f"--bridge {name}: with the {wanted} parameters that --bridge mot has, there are too "
            "few beside its connector; expected a larger --width or --depth, or a smaller connector"
        )
    return tower(intermediate=intermediate, **shape)


def start_queries(tower: MetaQueries, llm: FrozenLLM) -> None:
    """Queries of the size of the LLM's embeddings; ValueError if it cannot read them after a
    caption's cache."""
    try:
        if len(llm.layers) != llm.model.config.get_text_config().num_hidden_layers:
            raise ValueError("expected keys and values in every layer")
        if tower.room >= llm.max_tokens // 2:
            raise ValueError(
                f"{tower.room} of them are too many for an LLM of {llm.max_tokens} tokens"
            )
        with torch.no_grad():
            some = torch.arange(3, 99, device=llm.device) % 90
            embedded = llm.model.get_input_embeddings()(some)
            tower.queries.mul_(embedded.float().std().item())
            here = copy.deepcopy(tower).to(llm.device)
            here.attach(llm)
            both = here.make_text(llm.context(["a red circle", "two"]))
            alone = here.make_text(llm.context(["two"]))
        if not torch.allclose(both[1:], alone, rtol=0.1, atol=0.1):
            raise ValueError("padding changes what it says")
    except Exception as error:  # an architecture may fail in any way: each becomes one clear line
        kind = type(llm.model).__name__
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"--bridge metaqueries: {kind} cannot read queries: {why}") from None
