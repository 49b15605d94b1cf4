"""A run's folder: what training writes there, and how it goes on from it.

train_state.safetensors holds all that --resume needs; model.safetensors the expert's average, to
draw with; metrics.jsonl a line per interval. A run that was killed and resumed has the same numbers
as one that never was.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import write_text, write_whole
from inspection import check_same_llm
from loading import ask_hub
from model import ImageExpert
from weights import name_of, read_config, read_expert, read_safetensors

STATE = "train_state.safetensors"
TIME_BINS = 5  # of equal width in t

# -------------------------------------------------------------------------------------------------
# the state of a run


def save_run(run) -> None:
    """Each file is written beside and then renamed: a kill at any moment leaves whole files, the
    old or the new."""
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
        **run.data_identity,
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(tensors, folder / STATE, metadata=metadata)
        run.ema.save_pretrained(folder)
        if (out / "README.md").exists():  # the user's own
            (folder / "README.md").unlink()

    write_whole(out / STATE, write)


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
    run.step = int(metadata["step"])
    parts = {}  # name of a parameter -> {"expert", "ema", and the optimizer's moments of it}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(name_of(name), {})[part] = value.to(run.device)
    optimizer_of = {}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)
    with torch.no_grad():
        for (name, p), average in zip(run.expert.named_parameters(), run.ema.parameters()):
            p.copy_(parts[name].pop("expert"))
            average.copy_(parts[name].pop("ema"))
            optimizer_of[p].state[p] = parts[name]
        for tower in (run.expert, run.ema):
            for name, buffer in tower.named_buffers():
                if name in parts:
                    buffer.copy_(parts[name]["expert"])


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
    for name in ("model.safetensors", "config.json"):  # of an LLM, say, or of a downloaded run
        if (Path(out) / name).exists():
            raise ValueError(
                f"{out} already holds a {name}, which a run would overwrite; "
                "--out NAME names another folder"
            )


# -------------------------------------------------------------------------------------------------
# going on

MAY_CHANGE = {"resume", "out", "steps", "sample_every", "save_every", "vae"}
MAY_CHANGE |= {"device", "compile", "shard"}  # of the machine
MAY_MOVE = {"llm", "data"}  # places: it is what lies there that must be the same


def settings(argv: list[str] | None, parse_args: Callable) -> tuple[argparse.Namespace, dict, dict]:
    """The command line, and for --resume the stored run, whose settings win: args, metadata,
    tensors. parse_args(argv, stored settings) -> args."""
    args = parse_args(argv)
    if not args.resume:
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
        if "one_object" in stored:
            from extras.older_runs import in_new_words

            stored = in_new_words(stored)
        config = json.loads(metadata["config"])
        if "patcher" not in stored:  # an older run: other defaults, and --size meant other sizes
            stored["patcher"] = "linear"
            if stored["data"] == "shapes":
                stored["data"] = "shapes:colored"
            if "text_layers" in config:
                stored |= {"width": config["width"], "depth": len(config["text_layers"])}
        stored = vars(parse_args(["--out", args.out], stored))
        config["made_for"]
        int(metadata["step"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{state} is not the state of a training run ({why})") from None
    merged = parse_args(argv, stored)
    may_change = MAY_CHANGE | (MAY_MOVE if "data_fingerprint" in metadata else {"llm"})
    for key, value in vars(merged).items():
        if key not in may_change and value != stored.get(key):
            flag = key.replace("_", "-")
            raise ValueError(
                f"--resume: this run has --{flag} {stored.get(key)}; another value needs a new run "
                "(--out)"
            )
    return merged, metadata, tensors


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


def load_expert(ckpt: str, device: torch.device, flag: str = "--ckpt") -> ImageExpert:
    """A run's folder or a Hub id, which a flag names -> the expert. ValueError, in one line, if
    that cannot be."""
    path = find_checkpoint(ckpt, flag)
    metadata, _ = read_safetensors(path)
    expert = read_expert(path, tower_of(metadata, path)).to(device)
    if "vae" in expert.made_for:
        from extras.latents import VAE

        stored = expert.made_for["vae"]
        expert.vae = VAE(stored["name"], device, stored)
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


# -------------------------------------------------------------------------------------------------
# metrics


class Metrics:
    """metrics.jsonl: the loss per bin of t, and the speed, of every interval. A resumed run drops
    what it will do again."""

    def __init__(self, run, batches):
        self.run = run
        self.batches = batches
        self.path = Path(run.args.out) / "metrics.jsonl"
        lines = []
        if self.path.exists():
            lines = self.path.read_text("utf-8", "replace").split("\n")
        kept = [f"{line}\n" for line in lines if step_of(line) <= run.step]
        if run.rank == 0:
            write_text(self.path, "".join(kept))
        self.first = run.step
        self.started = time.perf_counter()
        self.llm_before = run.llm.seconds
        self.sum = torch.zeros(TIME_BINS)
        self.count = torch.zeros(TIME_BINS)

    def add(self, losses: Tensor, t: Tensor) -> None:
        bins = (t.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        self.sum.index_add_(0, bins, losses.cpu())
        self.count.index_add_(0, bins, torch.ones(len(bins)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is not training."""
        before = time.perf_counter()
        llm_before = self.run.llm.seconds
        yield
        self.started += time.perf_counter() - before
        self.llm_before += self.run.llm.seconds - llm_before

    def speed(self) -> tuple[float, float, float]:
        """Images per second; of the time the shares of the LLM, and of waiting for data."""
        seconds = time.perf_counter() - self.started
        images = (self.run.step - self.first) * self.run.args.batch_size
        llm_seconds = self.run.llm.seconds - self.llm_before
        return images / seconds, llm_seconds / seconds, self.batches.waited / seconds

    def write(self, norm: Tensor) -> str:
        if self.run.ranks > 1:
            from extras.parallel import sum_over_ranks

            for counted in (self.sum, self.count):
                sum_over_ranks(counted)
        images_per_second, llm_share, data_share = self.speed()
        loss = (self.sum.sum() / self.count.sum()).item()
        line = {
            "step": self.run.step,
            "loss": loss,
            "loss_by_t": (self.sum / self.count.clamp(min=1)).tolist(),
            "grad_norm": norm.item(),
            "lr": self.run.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images_per_second,
            "llm_share": llm_share,
            "data_share": data_share,
            "images": self.run.step * self.run.args.batch_size,
            "resumed_at": self.first,  # step; images_per_second is the mean since then
        }
        if self.run.lm_losses:
            line["lm_loss"] = torch.stack(self.run.lm_losses).mean().item()
            self.run.lm_losses.clear()
        if self.run.rank == 0:
            self.append(line)
        self.sum.zero_()
        self.count.zero_()
        return f"loss {loss:.4f}, {images_per_second:.0f} images/s"

    def append(self, line: dict) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error}") from error


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; of one that a full disk or a power loss has cut, no step
    of any run."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has had, in GB = 10^9 bytes."""
    try:
        import resource
    except ImportError:
        return "unknown"  # Windows
    per_gb = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB elsewhere
    said = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gb:.1f} GB"
    if device.type == "cuda":
        said += f" ({torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU)"
    return said
