"""Files of weights, from anybody: nothing in them is run, and no sizes are believed.

    expert = read_expert("runs/shapes/model.safetensors", ImageExpert)

A configuration may say any sizes. So a model is first built without memory, on torch's device
"meta", and it is refused as soon as it has many more weights than its files.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from patches import LARGEST_SIDE

PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
WHAT_TO_DO = (
    "pickled weights can run code and are not opened; expected .safetensors, as save_pretrained "
    "writes them from a copy that you trust"
)


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; nothing is unpickled. ValueError if it is missing, truncated
    or something else."""
    try:
        with safe_open(path, "pt") as file:
            # copies: Windows replaces no file that is still mapped
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return file.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not read as safetensors "
            f"(missing, truncated, a git-lfs pointer, or another kind of file): {error}"
        ) from None


def read_expert(path: str | Path, cls: type) -> nn.Module:
    """A checkpoint's file -> the expert in it, of this class. ValueError for anything else."""
    metadata, weights = read_safetensors(path)
    weights = {name_of(name): weight for name, weight in weights.items()}
    try:
        config = read_config(metadata)
        with torch.device("meta"), no_larger_than(lambda: [Path(path)]):
            check_shapes(cls(**config).state_dict(), weights)
        expert = cls(**config)
        expert.load_state_dict(weights)
    except MemoryError:
        raise
    except Exception as error:  # what a configuration says wrongly can fail anywhere
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        why = kind + " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not an image expert of this project ({why})") from error
    return expert.eval()


def check_shapes(meant: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """ValueError for the first weight that is not as its configuration means it."""
    for name in sorted(meant.keys() | found.keys()):
        shapes = [tuple(of[name].shape) if name in of else "none" for of in (meant, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"its configuration means a weight {name} of {shapes[0]}, and its file has "
                f"{shapes[1]}; expected the two of one expert"
            )


COUNTS = ("width", "heads", "intermediate", "patch", "image_size", "channels")
PREDICTIONS = ("clean", "velocity", "noise")
MADE_FOR = {  # what a checkpoint says that it was made for; None, or of this type
    "llm": str,
    "llm_revision": str,
    "llm_fingerprint": str,
    "llm_config": dict,
    "llm_tokenizer": str,
    "random_llm": int,
    "template": str,
    "expose": str,
    "thinking": list,
    "data": str,
    "mixed": list,
    "from": dict,
}


def read_config(metadata: dict[str, str]) -> dict:
    """The arguments that build an expert again, out of its checkpoint. ValueError for what cannot
    be one."""
    config = json.loads(metadata["config"])
    if not isinstance(config, dict) or not isinstance(config.get("made_for", {}), dict):
        raise ValueError("its config and made_for: expected JSON objects")
    if "hidden" in config:  # the name it had in older checkpoints
        config["intermediate"] = config.pop("hidden")
    config.setdefault("patcher", "linear")  # the only one they knew
    config.pop("checkpointing", None)  # is a run's now
    check_config(config)
    for name in COUNTS:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"its {name} is {value!r}; expected a whole number above zero")
    layers = config.get("text_layers", [])
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        raise ValueError(f"its text_layers: expected a list of at most {MOST_LAYERS}")
    for layer in layers:
        if any(type(value) is not int or value < 0 for value in dict(layer).values()):
            raise ValueError(f"its text_layers have {layer}; expected whole numbers")
    if (config.get("image_size") or 1) > LARGEST_SIDE:
        raise ValueError(
            f"its image_size is {config['image_size']}; expected at most {LARGEST_SIDE}"
        )
    if config.get("prediction", "clean") not in PREDICTIONS:
        raise ValueError(
            f"its prediction is {config['prediction']!r}; expected one of {PREDICTIONS}"
        )
    check_made_for(config.get("made_for", {}))
    return config


def check_made_for(made_for: dict) -> None:
    """ValueError for what cannot be read as what a checkpoint was made for."""
    for name, kind in MADE_FOR.items():
        value = made_for.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"its made_for has {name} {value!r:.60}; expected a {kind.__name__}")
    thinking = made_for.get("thinking")
    if thinking and [type(part) for part in thinking] != [str, int, str]:
        raise ValueError(
            f"its thinking is {thinking!r:.60}; expected a frame, tokens, what to show"
        )


def name_of(weight: str) -> str:
    """A weight's name, also of an older checkpoint, as it is now."""
    return f"patcher.{weight}" if weight.startswith(("embed.", "head.")) else weight


# -------------------------------------------------------------------------------------------------
# pickles


@contextmanager
def nothing_unpickled() -> Iterator[None]:
    """Whatever a library finds to load, and by whatever name: ValueError where it is a pickle."""

    def refuse(file, *args, **options):
        raise ValueError(f"{file}: {WHAT_TO_DO}")

    load = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = load


# -------------------------------------------------------------------------------------------------
# sizes

MOST_LAYERS = 10_000
MOST = {  # what ends like this in a configuration is at most so many
    "layers?|depth": MOST_LAYERS,  # the library makes lists of that length
    "heads": 4096,
    "experts": 100_000,
    "size|width|dim|embd|d_model|d_ff|patch|channels|intermediate": 2**31 - 1,
}


def check_config(config: dict) -> None:
    """ValueError for a size in a configuration that no model has, before a library believes it."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_config(value)
        if not isinstance(value, int):
            continue
        for words, most in MOST.items():
            if value > most and re.search(f"({words})$", key):
                raise ValueError(f"its configuration has {key} {value}; expected at most {most}")


# How many times what its files hold a model may have while it is built: tied weights are there
# twice, packed ones are fewer. And what any model may have.
MORE_WEIGHTS = 4
MORE_TENSORS = 16
SPARE_WEIGHTS = 2**26  # 0.3 GB in float32
SPARE_TENSORS = 2**12


@contextmanager
def no_larger_than(files: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Around the building of a model on the device "meta". ValueError as soon as its weights are
    many more than these files have, which are looked at once it has any."""
    most = []  # weights and tensors,
    built = [0, 0]  # and those of the model so far

    def count(module: nn.Module, name: str, weight: Tensor | None) -> None:
        if weight is None or not weight.is_meta:  # read from the files already
            return
        if not most:
            weights, tensors = capacity(files())
            most.append(MORE_WEIGHTS * weights + SPARE_WEIGHTS)
            most.append(MORE_TENSORS * tensors + SPARE_TENSORS)
        built[0] += weight.numel()
        built[1] += 1
        if built[0] > most[0] or built[1] > most[1]:
            shape = " x ".join(map(str, weight.shape))
            raise ValueError(
                "its configuration means more weights than its files have (among them "
                f"{type(module).__name__}.{name} of {shape}); expected the two of one model"
            )

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def capacity(files: Iterable[Path]) -> tuple[int, int]:
    """How many weights and tensors .safetensors files have at most, from their headers: whole
    numbers may be packed, a weight a bit. One that is broken has none. Of a .gguf file, from its
    size: a weight a bit, a tensor each 32 bytes."""
    weights = 0
    tensors = 0
    for path in files:
        if path.suffix.lower() == ".gguf":
            weights += 8 * path.stat().st_size
            tensors += path.stat().st_size // 32
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    packed = re.fullmatch("[IU]([0-9]+)", part.get_dtype())
                    weights += math.prod(part.get_shape()) * (int(packed[1]) if packed else 1)
                    tensors += 1
        except (OSError, SafetensorError):
            continue
    return weights, tensors
