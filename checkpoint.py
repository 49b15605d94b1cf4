"""A run's folder: what training writes there, and how it goes on from it.

train_state.safetensors holds all that --resume needs; model.safetensors the expert's average, to
draw with; metrics.jsonl a line per interval. A run that was killed and resumed has the same numbers
as one that never was.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import it_may_have_moved, remove, write_whole
from inspection import check_same_llm
from loading import ask_hub
from model import ImageExpert
from weights import name_of, read_config, read_expert, read_safetensors

STATE = "train_state.safetensors"
WEIGHTS = ("model.safetensors", "config.json")  # what is there to draw with
KEPT = "kept.json"  # marks a folder that --keep has made
LEFTOVERS = (f"tmp-{STATE}", "tmp-metrics.jsonl", "tmp-samples-*.png", "tmp-step-*")  # of a kill

# -------------------------------------------------------------------------------------------------
# the state of a run


def save_run(run) -> None:
    """Each file is written beside and then renamed: a kill at any moment leaves whole files, the
    old or the new. Of several processes the first writes for all."""
    if run.args.shard:
        from extras.shard import gathered

        run = gathered(run)
    if run.rank:
        return
    out = Path(run.args.out)
    moments = {}  # parameter -> what its optimizer remembers of it
    for optimizer in run.optimizers:
        moments |= optimizer.state
    tensors = {f"ema.{name}": p for name, p in run.ema.named_parameters()}
    for name, buffer in run.expert.state_dict().items():
        tensors[f"expert.{name}"] = buffer
    for name, p in run.expert.named_parameters():
        for key, value in moments.get(p, {}).items():  # none, if it never had a gradient
            tensors[f"{key}.{name}"] = value
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "step": str(run.step),
        "args": json.dumps(vars(run.args)),
        "tower": type(run.expert).__name__,
        "config": json.dumps(run.expert.config),
        "interval": json.dumps(
            [run.logged, run.losses.tolist(), list(chain(*map(Tensor.tolist, run.lm_losses)))]
        ),
        **run.data_identity,
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(tensors, folder / STATE, metadata=metadata)
        run.ema.save_pretrained(folder)
        if (out / "README.md").exists():  # the user's own
            (folder / "README.md").unlink()

    if run.args.keep:
        from extras.keeping import keep_present, remove_older

        keep_present(out)
    write_whole(out / STATE, write)
    if run.args.keep:
        remove_older(out, run.args.keep)


def put_in_order(run) -> None:
    """What a kill has left half done in the run's folder, which is locked now, is finished or
    cleared away. ValueError if another process has trained there since this run was read."""
    out = Path(run.args.out)
    if not run.step:
        refuse_overwriting(run.args.out)
    elif step_of_run(run.args.out) not in (run.step, None):
        raise ValueError(f"{out}: another process has trained there meanwhile; start once more")
    beside = out / f"tmp-{STATE}"
    if run.step and not (beside / STATE).exists():  # the first to be moved: all were whole
        for name in (*WEIGHTS, "README.md"):
            if (beside / name).exists():
                os.replace(beside / name, out / name)
    for pattern in LEFTOVERS:
        for path in out.glob(pattern):
            remove(path)
    if run.args.keep:
        from extras.keeping import remove_older

        remove_older(out, run.args.keep)


def load_run(run, metadata: dict, tensors: dict) -> None:
    """The inverse of save_run, in place. ValueError if the run was made with another LLM, or
    another expert."""
    stored = read_config(metadata)
    check_same_llm(stored["made_for"], run.expert.made_for)
    for key, value in run.expert.config.items():
        # the rest of made_for comes from the run's own flags
        if key != "made_for" and stored.get(key, value) != value:
            raise ValueError(
                f"--resume: the run's expert has {key} {stored[key]}, and would now have {value}; "
                "go on with the LLM and the code that it was made with, or start another run "
                "(--out)"
            )
    run.step = run.logged = int(metadata["step"])
    if "interval" in metadata:  # older runs have none
        run.logged, losses, lm_losses = json.loads(metadata["interval"])
        run.losses.copy_(torch.tensor(losses))
        if lm_losses:
            run.lm_losses.append(torch.tensor(lm_losses, device=run.device))
    parts = {}  # name of a parameter -> {"expert", "ema", and the optimizer's moments of it}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(name_of(name), {})[part] = value.to(run.device)
    optimizer_of = {}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)
    with torch.no_grad():
        for (name, p), average in zip(run.expert.named_parameters(), run.ema.parameters()):
            moments = MOMENTS[type(optimizer_of[p])]
            check_parts(name, p, parts.get(name, {}), moments)
            p.copy_(parts[name]["expert"])
            average.copy_(parts[name]["ema"])
            for moment in moments & parts[name].keys():
                optimizer_of[p].state[p][moment] = parts[name][moment]
        for tower in (run.expert, run.ema):
            for name, buffer in tower.named_buffers():
                if name in parts:
                    buffer.copy_(parts[name]["expert"])


MOMENTS = {  # what an optimizer remembers of a parameter
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}


def check_parts(name: str, p: Tensor, parts: dict[str, Tensor], moments: set[str]) -> None:
    """ValueError if what is stored of a parameter is not what a run stores."""
    found = moments & parts.keys()  # none, if it never had a gradient
    whole = {"expert", "ema"} <= parts.keys() and found in (set(), moments)
    for part, value in parts.items():
        shape = () if part == "step" else p.shape
        whole = whole and value.shape == shape and value.is_floating_point()
    if not whole:
        stored = {part: tuple(value.shape) for part, value in parts.items()}
        raise ValueError(
            f"--resume: {STATE} has of {name}, of shape {tuple(p.shape)}, {stored or 'nothing'}: "
            "it is damaged, or another version's; start another run (--out)"
        )


def data_of(source) -> dict[str, str]:
    """What is kept of the data, to know them again on resuming; of shapes, drawn from the seed, no
    fingerprint."""
    data = {"data_about": source.about()}
    fingerprint = source.fingerprint()
    if fingerprint:
        data["data_fingerprint"] = fingerprint
    return data


def check_data(name: str, stored: dict[str, str], now: dict[str, str]) -> None:
    """ValueError if a run goes on with other data than it was trained on (older runs have not
    stored what that was)."""
    before = stored.get("data_fingerprint")
    if before and before != now.get("data_fingerprint"):
        raise ValueError(
            f"--resume: --data {name} has changed (then: {stored['data_about']}; now: "
            f"{now['data_about']}; names, captions or contents differ); put it back as it was, or "
            "start another run (--out)"
        )


def refuse_overwriting(out: str) -> None:
    if (Path(out) / STATE).exists():
        raise ValueError(
            f"{out} already holds a run: --resume goes on with it, --out NAME starts another"
        )
    for name in (*WEIGHTS, f"step-*/{KEPT}"):  # of an LLM, say, or of a downloaded run
        for path in Path(out).glob(name):
            raise ValueError(
                f"{out} already holds a {path.relative_to(out)}, which a run would overwrite; "
                "--out NAME names another folder"
            )


# -------------------------------------------------------------------------------------------------
# going on

MAY_CHANGE = {"resume", "out", "steps", "device", "compile", "sample_every", "save_every", "keep"}
MAY_CHANGE |= {"checkpointing", "accumulate", "shard", "plan"}  # what a step takes, not what it is
MAY_MOVE = {"llm", "data", "vae"}  # places: it is what lies there that must be the same


def settings(argv: list[str] | None, parse_args: Callable) -> tuple[argparse.Namespace, dict, dict]:
    """The command line, and for --resume the stored run, whose settings win: args, metadata,
    tensors. parse_args(argv, stored settings) -> args."""
    args = parse_args(argv)
    if not args.resume:
        if args.plan is None:
            refuse_overwriting(args.out)
        return args, {}, {}
    state = Path(args.out) / STATE
    if not state.exists():
        raise ValueError(
            f"--resume: there is no run in {args.out} (no {STATE}); --out names the run"
        )
    metadata, tensors = read_safetensors(state)
    try:
        stored = json.loads(metadata["args"])
        stored.pop("shard", None)  # it is asked for anew
        config = json.loads(metadata["config"])
        if "checkpointing" not in stored:  # an older run
            from extras.older_runs import in_new_words

            stored = in_new_words(stored, config)
        stored = vars(parse_args(["--out", args.out], stored))
        check_agree(stored, read_config(metadata))
        if int(metadata["step"]) < 0:
            raise ValueError(f"step {metadata['step']}")
    except Exception as error:  # in a stranger's JSON anything can stand
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{state} is not the state of a training run ({why})") from error
    merged = parse_args(argv, stored)
    may_change = MAY_CHANGE | MAY_MOVE
    if "data_fingerprint" not in metadata:  # nothing would tell that they are others
        may_change -= {"data"}
    for key, value in vars(merged).items():
        if key not in may_change and value != stored.get(key):
            flag = key.replace("_", "-")
            raise ValueError(
                f"--resume: this run has --{flag} {stored.get(key)}; another value needs a new run "
                "(--out)"
            )
    return merged, metadata, tensors


def check_agree(stored: dict, config: dict) -> None:
    """ValueError if a run's settings mean another expert than its own, before that is built."""
    config["made_for"]
    if "text_layers" not in config:  # the LLM's own sizes: --bridge mirror
        return
    sizes = config | {"depth": len(config["text_layers"])}
    if stored["bridge"] == "kv":  # as deep as the LLM, and so less wide
        sizes = {}
    for name in ("width", "depth", "heads", "patch", "image_size"):
        if stored[name] is not None and stored[name] != sizes.get(name, stored[name]):
            raise ValueError(f"its --{name} is {stored[name]}, and its expert has {sizes[name]}")


# -------------------------------------------------------------------------------------------------
# finding a run again, to draw with


SHIPPED = Path(__file__).parent / "assets" / "expert"  # comes with the repository


def pick_checkpoint(name: str | None) -> tuple[str, str]:
    """--ckpt, or the run under runs/ that was written last, or the shipped expert -> the folder (or
    Hub id), and why. ValueError if there is none."""
    if name:
        return name, "asked for"
    folder = Path("runs")
    runs = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if runs:
        return str(runs[-1].parent), "the newest run"
    if (SHIPPED / "model.safetensors").is_file():
        shown = SHIPPED
        if SHIPPED.is_relative_to(Path.cwd()):
            shown = SHIPPED.relative_to(Path.cwd())
        return str(shown), f"shipped; no run under {folder}/ yet"
    raise ValueError(
        f"no checkpoint under {folder}/: train one first (python train.py), or name one with --ckpt"
    )


def step_of_run(ckpt: str) -> int | None:
    """The step at which a run's folder stands; None of an expert without its training's state."""
    try:
        with safe_open(Path(ckpt) / STATE, "pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def load_expert(
    ckpt: str, device: torch.device, flag: str = "--ckpt", vae: str | None = None
) -> ImageExpert:
    """A run's folder or a Hub id, which a flag names -> the expert. vae: where its autoencoder lies
    now, if it has moved. ValueError, in one line, if that cannot be."""
    path = find_checkpoint(ckpt, flag)
    metadata, _ = read_safetensors(path)
    expert = read_expert(path, tower_of(metadata, path)).to(device)
    if "vae" in expert.made_for:
        from extras.latents import VAE

        stored = expert.made_for["vae"]
        with it_may_have_moved(stored["name"], "--vae", not vae):
            expert.vae = VAE(vae or stored["name"], device, stored)
    return expert


def tower_of(metadata: dict[str, str], path: Path) -> type:
    """The class of the expert in a file."""
    kind = metadata.get("tower", "ImageExpert")
    if kind == "ImageExpert":
        return ImageExpert
    from extras.bridges import towers

    if kind not in towers():
        raise ValueError(f"{path} is not an image expert of this project (a {kind})")
    return towers()[kind]


def find_checkpoint(ckpt: str, flag: str = "--ckpt") -> Path:
    """The file of a run's folder, or of a Hub id, fetched if it is not there yet."""
    path = Path(ckpt) / "model.safetensors"
    if path.is_file():
        return path
    if Path(ckpt).exists() or len(Path(ckpt).parts) != 2:
        expected = "the folder of a run, with model.safetensors in it, or a Hub id"
        raise ValueError(f"{flag} {ckpt}: expected {expected}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line says what is wrong
    try:
        return Path(hf_hub_download(ckpt, path.name, local_files_only=True))
    except (OSError, HFValidationError):
        why = ask_hub(ckpt)
    if why:
        raise ValueError(f"{flag} {ckpt}: no such folder, and as a Hub id: {why}")
    return Path(hf_hub_download(ckpt, path.name))
