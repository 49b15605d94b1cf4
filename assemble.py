"""Put the parts together: for training from the flags, for drawing from a checkpoint.

`prepare` answers a Run, which is all that train.py's step needs; `open_towers` an expert and its
LLM.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from batches import LOOK_AHEAD
from cli import colon_form, it_may_have_moved, make_folder, pick_device, pick_dtype
from data import open_source
from flags import SIZES, check_writes_keys, data_form
from flow import flow_loss, sample_time
from inspection import check_same_llm
from llm import FrozenLLM
from loading import load_llm
from metrics import TIME_BINS
from model import ExpertBlock, ImageExpert
from patches import Conv


@dataclass
class Run:
    """Everything that a training run holds while it goes on."""

    args: argparse.Namespace
    source: object  # of captions and pictures: see data.py
    llm: FrozenLLM
    expert: ImageExpert
    ema_llm: FrozenLLM  # the same LLM, unless it is trained (extras/separation.py), beside
    ema: ImageExpert  # the moving average of the expert's weights
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    data_identity: dict[str, str]  # what the data is and, unless from the seed, its fingerprint
    step: int = 0  # steps done
    tasks: object = None  # beside drawing from captions: see extras/lmfusion_training.py
    logged: int = 0  # the step of the last line of metrics.jsonl; since then:
    losses: Tensor = field(default_factory=partial(torch.zeros, 2, TIME_BINS))
    lm_losses: list[Tensor] = field(default_factory=list)  # of what was described
    loss: Callable = flow_loss  # the objective,
    law: Callable = sample_time  # and of its times
    rank: int = 0  # this process, of so many: see extras/parallel.py
    ranks: int = 1
    stopping: int = 0  # SIGTERM, once one of them is to stop


def prepare(args: argparse.Namespace, metadata: dict, tensors: dict) -> Run:
    """Load or build all parts, and print what they are. metadata and tensors: the stored run to go
    on with, or empty."""
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    print(f"device {device} ({why_device}); {dtype} ({why_dtype}); seed {args.seed}", flush=True)
    home = torch.device("cpu") if args.shard else device  # each GPU gets its part

    origin, before = beginning(args, metadata, home)
    source, data_identity = open_data(args, metadata)

    # the LLM: the revision, and the text around each caption, are what the weights began with
    revision = before.get("llm_revision") if args.llm == before.get("llm") else None
    random_seed = None
    if args.random_llm:
        random_seed = before.get("random_llm", args.seed)
    with it_may_have_moved(args.llm, "--resume --llm", bool(metadata)):
        llm = open_llm(args, device, dtype, random_seed, revision)
    reading = set_reader(args, llm, before)

    # the expert, the average of its weights, and its optimizers
    name = data_form(args.data)[0]
    made_for = {
        "llm": args.llm,
        "llm_revision": llm.revision,
        **llm.identity,
        "random_llm": random_seed,
        **reading,
        "data": name,
        **source.made_for,
    }
    vae = open_vae(args, source, before, device, made_for)
    if args.buckets:
        use_buckets(args, source, made_for)
    tasks = further_tasks(args, source, llm, made_for)
    expert = begin_expert(args, origin, metadata, made_for, llm, source, tasks is not None)
    expert.to(home)
    expert.attach(llm)
    expert.vae = vae
    expert.shape()  # refused if patches do not fill a picture
    if args.shard:
        from extras.shard import check_shards, shard

        check_shards(expert, llm, tasks)
    make_folder(args.out)  # nothing is written before everything is there
    ema_llm = llm if llm.frozen else copy.copy(llm)
    ema = average_of(expert, ema_llm, home)
    optimizers = build_optimizers(expert, args.lr, args.weight_decay)
    towers = (llm, expert, ema_llm, ema)
    run = Run(args, source, *towers, optimizers, home, dtype, data_identity, tasks=tasks)
    set_objective(run)
    if metadata:
        checkpoint.load_run(run, metadata, tensors)
    if args.shard:
        shard(run)
    print_run(run)
    return run


def open_data(args: argparse.Namespace, metadata: dict) -> tuple[object, dict[str, str]]:
    """The source of --data, and what is kept of it. ValueError if a stored run had another."""
    name, options = data_form(args.data)
    with it_may_have_moved(name, "--resume --data", bool(metadata)):
        source = open_source(name, args.image_size, args.seed, **options)
    if getattr(source, "before_and_after", False):
        check_writes_keys(colon_form(args.bridge)[0], f"--data {name}")
    data_identity = checkpoint.data_of(source)
    checkpoint.check_data(args.data, metadata, data_identity)
    return source, data_identity


def open_vae(args: argparse.Namespace, source, before: dict, device, made_for: dict):
    """The frozen autoencoder whose latents are drawn, or None (extras/latents.py)."""
    if not args.vae and not hasattr(source, "vae") and not before.get("vae"):
        return None
    from extras.latents import made_for_vae, vae_for

    vae = vae_for(args.vae, source, before.get("vae"), device)
    made_for["vae"] = made_for_vae(vae)
    return vae


def use_buckets(args: argparse.Namespace, source, made_for: dict) -> None:
    """ValueError for data whose pictures are of one shape, or are pairs."""
    if not getattr(source, "use_buckets", None) or hasattr(source, "before_and_after"):
        expected = "a folder or .tar files of single pictures"
        raise ValueError(f"--buckets: --data {args.data} has one shape; expected {expected}")
    factor = made_for["vae"]["downsampling"] if "vae" in made_for else 1
    source.use_buckets(factor * args.patch, args.batch_size // args.draws)


def further_tasks(args: argparse.Namespace, source, llm: FrozenLLM, made_for: dict):
    """What the run has to do beside drawing from captions, or None: extras/lmfusion_training.py."""
    if not args.describe and not getattr(source, "before_and_after", False):
        return None
    from extras.lmfusion_training import tasks_of

    made_for["describe"] = args.describe
    return tasks_of(args, source, llm)


def set_objective(run: Run) -> None:
    """The loss of --objective, and the law of its times."""
    if run.args.objective == "ddpm":
        from extras.ddpm import ddpm_loss, uniform_time

        run.loss = ddpm_loss
        run.law = uniform_time


def beginning(
    args: argparse.Namespace, metadata: dict, device: torch.device
) -> tuple[ImageExpert | None, dict]:
    """The expert that a new run starts from, if --from names one; and what the weights, these or
    those of the stored run, were made for."""
    if metadata:
        return None, json.loads(metadata["config"])["made_for"]
    if args.start:
        origin = checkpoint.load_expert(args.start, device, "--from", args.vae)
        return origin, origin.made_for
    return None, {}


def open_llm(
    args: argparse.Namespace, device, dtype, random_seed: int | None, revision: str | None
) -> FrozenLLM:
    """The LLM of --llm, as --bridge needs it."""
    options = {}
    if args.bridge != "mot":
        from extras.bridges import llm_options

        options = llm_options(args.bridge)
    return load_llm(
        args.llm,
        device,
        dtype,
        trust_remote_code=args.trust_remote_code,
        random_seed=random_seed,
        revision=revision,
        **options,
    )


def set_reader(args: argparse.Namespace, llm: FrozenLLM, before: dict) -> dict:
    """Set llm.reader from --template and --read, or as what was stored `before` had it; return what
    the checkpoint stores of it."""
    asked = args.template != "{}" or args.read
    if before:
        asked = before.get("template", "{}") != "{}" or before.get("thinking")
    if not asked:
        return {"template": "{}", "expose": "all", "thinking": None}
    from extras.readers import reader_from, reader_from_flags

    if before:
        llm.reader = reader_from(llm, before)
        return {key: before.get(key) for key in ("template", "expose", "thinking")}
    llm.reader, reading = reader_from_flags(llm, args.template, args.read)
    return reading


def begin_expert(
    args: argparse.Namespace,
    origin: ImageExpert | None,
    metadata: dict,
    made_for: dict,
    llm: FrozenLLM,
    source,
    reads_pictures: bool,
) -> ImageExpert:
    """With the weights of `origin`, or of the size that is asked for, fresh from the seed."""
    if args.start:
        from extras.starting import expert_like

        expert = expert_like(args, origin, metadata, made_for, reads_pictures)
    else:
        expert = build_expert(args, llm, source, made_for, reads_pictures)
    if args.checkpointing:
        from extras.checkpointing import checkpoint_layers

        checkpoint_layers(expert)
    return expert


def average_of(expert: ImageExpert, llm: FrozenLLM, device: torch.device) -> ImageExpert:
    """A copy of the expert, to become the moving average of its weights."""
    ema = type(expert)(**expert.config).to(device).requires_grad_(False)
    ema.load_state_dict(expert.state_dict())
    ema.vae = expert.vae
    ema.attach(llm)  # of use to a tower that holds on to the LLM
    return ema


def build_expert(
    args: argparse.Namespace, llm: FrozenLLM, source, made_for: dict, reads_pictures: bool
) -> ImageExpert:
    """A tower of the size that is asked for, beside this LLM, fresh from the seed."""
    preset = SIZES[args.size]
    most = len(llm.layers) or preset["depth"]
    size = {
        "width": args.width or preset["width"],
        "depth": args.depth or min(preset["depth"], most),
        "heads": args.heads,
        "layers": args.layers,
    }
    shared = {
        "patch": args.patch,
        "patcher": args.patcher,
        "image_size": args.image_size,
        "prediction": args.prediction,
        "made_for": made_for,
        "reads_pictures": reads_pictures,
    }
    if "vae" in made_for:
        shared["channels"] = made_for["vae"]["channels"]
    torch.manual_seed(args.seed)
    name, options = colon_form(args.bridge)
    if name == "mot":
        return ImageExpert.beside(llm, **size, **shared)
    from extras.bridges import build

    captions = [source.example(i, 1)[0] for i in range(LOOK_AHEAD)]
    return build(name, options, llm, captions, **size, **shared)


def print_run(run: Run) -> None:
    """What takes part: the LLM, the expert, the data."""
    args = run.args
    frozen = sum(p.numel() for p in run.llm.model.parameters()) / 1e6
    weights = "fresh from the seed and " if args.random_llm else "all "
    weights += "frozen" if run.llm.frozen else "TRAINED with the expert, and saved with it"
    kind = "an encoder"
    if run.llm.layers:
        layer = run.llm.layers[0]
        kind = f"{len(run.llm.layers)} attention layers with {layer.kv_heads} key/value heads"
        kind += f" of width {layer.key_width}"
    print(f"LLM {args.llm}: {frozen:.0f} M parameters, {weights}; {kind}")
    trained = sum(p.numel() for p in run.expert.parameters()) / 1e6
    _, height, width = run.expert.shape()
    rows = height // args.patch
    columns = width // args.patch
    print(
        f"expert: {trained:.1f} M parameters, all trained; {len(run.expert.blocks)} layers of "
        f"width {run.expert.width}, {rows}x{columns} image tokens"
    )
    began = ""
    if run.step:
        began = f", resumed at step {run.step}"
    elif args.start:
        began = f", started from {args.start}"
    about = run.data_identity["data_about"]
    print(f"data {args.data}: {about}; run {args.out}{began}", flush=True)


def build_optimizers(
    expert: ImageExpert, lr: float, weight_decay: float, muon: type = torch.optim.Muon
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all blocks and convolutions (Jordan et al. 2024), AdamW for all
    else; every parameter once.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both (Liu et
    al. 2025, section 2.2). A tower without such layers trains with AdamW alone.
    """
    matrices = []
    for module in expert.modules():
        if isinstance(module, (ExpertBlock, Conv)):
            matrices += [p for p in module.parameters() if p.dim() == 2]
    of_llm = expert.llm_parameters()
    taken = {id(p) for p in (*matrices, *of_llm)}
    others = [p for p in expert.parameters() if id(p) not in taken]
    options = {"lr": lr, "weight_decay": weight_decay}
    fused = others[0].device.type in ("cpu", "cuda")
    groups = [{"params": others}]
    if of_llm:
        groups.append({"params": of_llm, "ratio": expert.llm_lr_ratio})
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused, **options)]
    if matrices:
        optimizers.insert(0, muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


# -------------------------------------------------------------------------------------------------
# for drawing


def open_towers(args: argparse.Namespace, folder: Path | None) -> tuple[ImageExpert, FrozenLLM]:
    """Load --ckpt and its LLM, with --read applied; ValueError if `folder`, where something will be
    written, cannot be."""
    ckpt, why_ckpt = checkpoint.pick_checkpoint(args.ckpt)
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    why = f"device {device} ({why_device}), {dtype} ({why_dtype})"
    print(f"{why}; checkpoint {ckpt} ({why_ckpt}); seed {args.seed}")
    expert = checkpoint.load_expert(ckpt, device, vae=args.vae)
    if folder:
        make_folder(folder)
    return expert, llm_as_asked(expert, args, device, dtype)


def llm_as_asked(expert: ImageExpert, args: argparse.Namespace, device, dtype) -> FrozenLLM:
    """llm_of, with --llm, --trust-remote-code and --read applied."""
    with it_may_have_moved(expert.made_for.get("llm", ""), "--llm", not args.llm):
        llm = llm_of(expert, args.llm, device, dtype, args.trust_remote_code)
    if args.read:
        from extras.readers import with_reading

        llm.reader = with_reading(llm, args.read)
    return llm


def llm_of(
    expert: ImageExpert, name: str | None, device, dtype, trust_remote_code: bool = False
) -> FrozenLLM:
    """The LLM that the expert was trained with, set up as it was then. ValueError for another LLM
    or revision. name: its new place, if it has moved."""
    made_for = expert.made_for
    if not (made_for.get("llm") and made_for.get("llm_fingerprint")):
        raise ValueError(
            "this checkpoint does not say which LLM it was trained with; expected one that "
            "train.py wrote"
        )
    options = {}
    if type(expert) is not ImageExpert:
        from extras.bridges import llm_options

        options = llm_options()
    llm = load_llm(
        name or made_for["llm"],
        device,
        dtype,
        trust_remote_code=trust_remote_code,
        random_seed=made_for.get("random_llm"),
        revision=None if name else made_for.get("llm_revision"),
        **options,
    )
    check_same_llm(made_for, {"llm": llm.name, **llm.identity})
    expert.attach(llm)
    if made_for.get("template", "{}") != "{}" or made_for.get("thinking"):
        from extras.readers import reader_from

        llm.reader = reader_from(llm, made_for)
    return llm
