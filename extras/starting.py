"""train.py --from CKPT: a new run that starts from an expert's weights.

    python train.py --from runs/shapes --data emoji
    python train.py --from runs/shapes --image-size 128 --lr 5e-4 --out runs/larger

What makes the expert comes from the checkpoint: its LLM and how that reads, layers, width, depth,
heads, patches. Data, size of the pictures (positions are computed, so the same weights serve any),
budget and seed are the new run's own; its optimizers and its step are fresh.
"""

import argparse
from pathlib import Path

import torch

from checkpoint import STATE, find_checkpoint, load_expert, tower_of
from inspection import check_same_llm
from loading import file_sha256
from model import ImageExpert
from weights import read_config

MAY_DIFFER = {"llm", "vae", "image_size"}  # places: it is what lies there that must be the same


def expert_like(
    args: argparse.Namespace,
    origin: ImageExpert | None,
    metadata: dict,
    made_for: dict,
    reads_pictures: bool = False,
) -> ImageExpert:
    """The expert of a new run, with the weights of `origin`; made_for gets where it comes from.

    Of a run that goes on: the architecture is in its state's metadata, the weights are brought by
    checkpoint.load_run, and no origin is needed. ValueError if the LLM is another.
    """
    if origin is None:
        config = read_config(metadata)
        made_for["from"] = config["made_for"].get("from")
        config["made_for"] = made_for
        return tower_of(metadata, Path(STATE))(**config)
    check_same_llm(origin.made_for, made_for)
    weights = find_checkpoint(args.start, "--from")
    made_for["from"] = {"name": args.start, "sha256": file_sha256(weights)}
    new = {"image_size": args.image_size, "made_for": made_for}
    if "reads_pictures" in origin.config:
        new["reads_pictures"] = reads_pictures
    torch.manual_seed(args.seed)
    expert = type(origin)(**origin.config | new)
    weights = origin.state_dict()
    if reads_pictures and "begin_of_image" not in weights:  # it learns to
        weights["begin_of_image"] = expert.begin_of_image.detach()
    elif not reads_pictures:  # no longer
        weights.pop("begin_of_image", None)
    expert.load_state_dict(weights)
    return expert


def flags_of(plain: argparse.Namespace) -> dict:
    """What the expert that --from names says of train.py's flags. None: there is no such thing in
    it, or no flag can say it."""
    if plain.resume:
        raise ValueError(
            "--from starts a new run, and --resume goes on with one: give one of the two"
        )
    expert = load_expert(plain.start, torch.device("cpu"), "--from")
    made_for = expert.made_for
    if not (made_for.get("llm") and made_for.get("llm_fingerprint")):
        raise ValueError(
            f"--from {plain.start} does not say which LLM it was trained with; expected a "
            "checkpoint that train.py wrote"
        )
    flags = {
        "llm": made_for["llm"],
        "random_llm": made_for.get("random_llm") is not None,
        "template": made_for.get("template") or "{}",
        "read": None,
        "bridge": "mot",
        "vae": made_for.get("vae", {}).get("name"),
        "size": None,
        "depth": None,
        "layers": None,
    }
    if made_for.get("expose") == "after" and not made_for.get("thinking"):
        flags["read"] = "after"
    for name in ("width", "heads", "patch", "patcher", "prediction", "image_size"):
        flags[name] = expert.config.get(name)
    flags["objective"] = "ddpm" if expert.prediction == "noise" else "flow"
    if "text_layers" in expert.config:
        flags["depth"] = len(expert.config["text_layers"])
        flags["layers"] = ",".join(map(str, expert.reads)) or None
    if type(expert) is not ImageExpert:
        from extras.bridges import bridge_of

        flags["bridge"] = bridge_of(expert)
    return flags


def check_flags(args: argparse.Namespace, own: dict) -> None:
    """ValueError for a flag that contradicts what the expert says of it."""
    for name, its_value in own.items():
        value = getattr(args, name)
        if name in MAY_DIFFER or value == its_value:
            continue
        said = "--" + name.replace("_", "-")
        if value is not True:  # which is a flag without a value
            said += f" {value}"
        if its_value is None or its_value is False:
            its_value = "its own"
        raise ValueError(
            f"{said}: {args.start} has {its_value}; leave it out, or start without --from"
        )
