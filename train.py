"""Teach an image expert to draw what a frozen LLM reads.

    python train.py                                    # shapes, gemma-3-270m: under 25 minutes on two CPU cores
    python train.py --llm Qwen/Qwen2.5-0.5B            # any Hugging Face decoder
    python train.py --data emoji                       # 1,300 emoji under their English names
    python train.py --data FOLDER --image-size 64      # your own captioned pictures
    python train.py --resume --out runs/shapes         # go on where a run stopped, bit for bit

Writes into --out: model.safetensors (the expert's EMA weights, config inside), train_state.safetensors (all that --resume
needs), metrics.jsonl, and samples as PNG.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bridges import BRIDGES, ON_HIDDEN_STATES, MirrorTower, build_bridge
from cli import (
    Locked,
    OneLineParser,
    between,
    it_may_have_moved,
    make_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
    share,
    words,
    write_text,
    write_whole,
)
from data import Emoji, Folder, Shapes, open_source
from flow import flow_loss, sample_time
from loading import check_same_llm
from model import ExpertBlock, FrozenLLM, Tower, load_llm, read_safetensors
from sample import add_thinking, captioned_grid, draw, thinking_of, to_tensor

STATE = "train_state.safetensors"  # in the run's folder: all that --resume needs
LOOK_AHEAD = 32  # steps whose captions go to the LLM together
LOOK_AHEAD_BYTES = 500e6  # or fewer: the most that their pictures take
LOG_EVERY = 50  # steps a line of metrics.jsonl
TIME_BINS = 5  # of equal width in t
RECIPES = {  # what --data and --expert change in the defaults (of a name, the LLM knows most once asked to translate it)
    "emoji": {"template": '"{}" in English: "', "expose": "after", "layers": "0.85", "weight_decay": 1.0, "steps": 4500},
    "mirror": {"lr": 3e-4},
}
GOES_WITH = {  # flags that mean something only beside another
    ("data", "shapes"): ("one_object",),
    ("data", "emoji"): ("emoji_font", "emoji_variants"),
    ("expert", "mirror"): ("init", "checkpointing"),
    ("expert", "tiny"): ("width", "heads", "depth", "layers", "bridge"),
    ("bridge", "mot"): ("layers",),
    ("bridge", "last"): ("hidden_state",),
    ("bridge", "lap"): ("stride", "no_refiner", "per_layer"),
    ("bridge", "metaqueries"): ("queries",),
}
MAY_CHANGE = {"resume", "out", "steps", "device", "compile", "sample_every", "save_every", "context_cache_mb"}  # on resuming
MAY_MOVE = {"llm", "data", "emoji_font"}  # on resuming: places, of which it is the content that must be the same


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description="Train an image expert on a frozen LLM.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    add("--random-llm", action="store_true", help="the control: fresh weights, from the seed, in place of the LLM's own")
    add("--template", type=words, default="{}", help="what the LLM reads: a text with {} where the caption stands")
    add("--expose", default="all", choices=["all", "after"], help="which of it the image may look at")
    add("--chat", action="store_true", help="put it into the model's own chat template, as what the user says")
    add_thinking(parser)
    add("--data", default="shapes", help="shapes, emoji (with defaults of its own: RECIPES), or a folder of captioned pictures")
    add("--one-object", action="store_true", help="--data shapes with a single object in each: for small budgets")
    add("--emoji-font", metavar="FILE", help="colour font of --data emoji (default: the system's)")
    add("--emoji-variants", action="store_true", help="--data emoji with skin tones, flags and other sequences")
    add(
        "--out",
        help="folder of the run (default: runs/, the name of the data and, if another is asked for, of the LLM and expert)",
    )
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--steps", type=positive(int), default=3200, help="optimizer steps")
    add("--batch-size", type=positive(int), default=64, help="pictures a step")
    add(
        "--draws",
        type=positive(int),
        default=4,
        help="pictures (or noise draws) of each caption in a batch: divides the LLM's cost",
    )
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate")
    add("--warmup", type=positive(int), default=200, help="steps of linear warm-up; then linear decay to zero")
    add(
        "--weight-decay",
        type=between(0, 1000),
        default=0.01,
        help="the higher, the less the expert trusts what only training shows",
    )
    add("--ema", type=share, default=0.999, help="decay of the weights' moving average")
    add("--caption-dropout", type=share, default=0.1, help="share of pictures trained on the empty prompt, for guidance")
    add("--time-mean", type=between(-10, 10), default=-0.4, help="mean of the logit-normal time; below zero leans to the noise")
    add("--prediction", default="clean", choices=["clean", "velocity"], help="what the network's head gives")
    add("--expert", default="tiny", choices=["tiny", "mirror"], help="the image tower: our own, or a copy of the LLM's decoder")
    add("--init", default="llm", choices=["llm", "random"], help="--expert mirror: start from the LLM's weights or from chance")
    add("--checkpointing", action="store_true", help="--expert mirror: less memory, more time (gradient checkpointing)")
    add("--width", type=positive(int), default=256, help="width of the tiny expert")
    add("--heads", type=positive(int), help="query heads (default: as many as make twice the width)")
    add("--depth", type=positive(int), help="layers (default: 9, or the LLM's if it has fewer)")
    add(
        "--layers",
        default="middle",
        help="the LLM's layers it reads: all, the lower, middle or upper half, numbers (13,15,17 or 6-11), or a share (0.85)",
    )
    add("--bridge", default="mot", choices=BRIDGES, help="how the LLM reaches the tiny expert: see bridges.py")
    add("--hidden-state", default="last", help="--bridge last: last, penultimate, or the number of the LLM's layer")
    add("--stride", type=positive(int), default=3, help="--bridge lap: every so many layers")
    add("--no-refiner", action="store_true", help="--bridge lap: without the two blocks over the tokens")
    add("--per-layer", action="store_true", help="--bridge lap: a pooling for each block, in place of one for the input")
    add("--queries", type=positive(int), default=64, help="--bridge metaqueries: how many")
    add("--patch", type=positive(int), default=8, help="side of a patch in pixels")
    add("--image-size", type=between(1, 16384, int), default=32, help="side of the pictures in pixels")
    add("--context-cache-mb", type=positive(float), default=512, help="most memory for captions' keys and values, in MB")
    add("--seed", type=seed_number, default=0, help="of the weights, the data and the noise")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and of autocast")
    add("--compile", action="store_true", help="torch.compile the expert: faster steps after a minute or two")
    add("--sample-every", type=positive(int), default=1000, help="steps between grids of samples")
    add("--save-every", type=positive(int), default=500, help="steps between checkpoints")
    add("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    plain = parser.parse_args(argv)
    for (flag, value), names in GOES_WITH.items():
        for name in names if getattr(plain, flag) != value and not plain.resume else ():  # then the stored ones count
            if getattr(plain, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} is for --{flag} {value} alone: leave it out")
    parser.set_defaults(**RECIPES.get(plain.data, {}) | RECIPES.get(plain.expert, {}))
    parser.set_defaults(**(stored or {}))
    args = parser.parse_args(argv)
    of_llm = "" if args.llm == parser.get_default("llm") else f"-{Path(args.llm).name}"
    of_llm += ("-random-llm" if args.random_llm else "") + ("-mirror" if args.expert == "mirror" else "")
    of_llm += "" if args.bridge == "mot" else f"-{args.bridge}"
    args.out = args.out or f"runs/{Path(args.data).resolve().name}{of_llm}"
    if args.batch_size % args.draws:
        raise ValueError(f"--batch-size {args.batch_size} does not divide by --draws {args.draws}")
    return args


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict]:
    """The command line, and for --resume the stored run: (args, metadata, tensors). The stored settings win."""
    args = parse_args(argv)
    if not args.resume:
        refuse_overwriting(args.out)
        return args, {}, {}
    state = Path(args.out) / STATE
    if not state.exists():
        raise ValueError(f"--resume: there is no run in {args.out} (no train_state.safetensors); --out names the run")
    metadata, tensors = read_safetensors(state)
    try:
        stored = json.loads(metadata["args"])
        # a run of old has not stored the flags of today
        stored = vars(parse_args(["--out", args.out], stored))
        json.loads(metadata["config"])["made_for"], int(metadata["step"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{state} is not the state of a training run ({why})") from None
    merged = parse_args(argv, stored)
    may_change = MAY_CHANGE | (MAY_MOVE if "data_fingerprint" in metadata else {"llm"})
    changed = [key for key, value in vars(merged).items() if key not in may_change and value != stored.get(key)]
    if changed:
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--resume: this run has --{flag} {stored.get(changed[0])}; another value needs a new run (--out)")
    return merged, metadata, tensors


def refuse_overwriting(out: str) -> None:
    if (Path(out) / STATE).exists():
        raise ValueError(f"{out} already holds a run: --resume goes on with it, --out NAME starts another")
    for name in ("model.safetensors", "config.json"):  # of an LLM, say, or of a run that was downloaded
        if (Path(out) / name).exists():
            raise ValueError(
                f"{out} already holds a {name}, which a run would overwrite; "
                "--out NAME names another folder"
            )


def build_expert(args: argparse.Namespace, llm: FrozenLLM, source) -> Tower:
    made_for = {"llm": args.llm, "llm_revision": llm.revision, **llm.identity,
                "random_llm": args.seed if args.random_llm else None, "template": llm.template, "expose": llm.expose,
                "thinking": llm.thinking, "data": args.data}  # fmt: skip
    if args.one_object:
        made_for["one_object"] = True
    if args.data == "emoji":
        made_for["emoji"] = {"font": args.emoji_font, "variants": args.emoji_variants}
    shared = {"patch": args.patch, "image_size": args.image_size, "prediction": args.prediction, "made_for": made_for}
    torch.manual_seed(args.seed)
    if args.expert == "mirror":
        return MirrorTower.beside(llm, args.init, checkpointing=args.checkpointing, **shared)
    expert = build_bridge(args.bridge, llm, args.width, args.depth, args.heads, args.layers, args.hidden_state, args.stride,
                          not args.no_refiner, args.per_layer, args.queries, **shared)  # fmt: skip
    if expert.states:
        expert.measure(llm, [source.example(i, 1)[0] for i in range(LOOK_AHEAD)])
    return expert


def batches(source, llm: FrozenLLM, batch_size: int, draws: int, start: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Captions and pictures (B, size, size, 3) uint8 of each step from `start`: a function of the seed and the step alone."""
    per_step, step = batch_size // draws, start
    ahead = max(1, min(LOOK_AHEAD, int(LOOK_AHEAD_BYTES / (3 * batch_size * source.image_size**2))))
    while True:
        end = (step // ahead + 1) * ahead
        examples = [source.example(i, draws) for i in range(step * per_step, end * per_step)]
        llm.lookup([caption for caption, _ in examples])  # one pass of the LLM over all captions that it has not read yet
        for i in range(0, len(examples), per_step):
            captions, pictures = zip(*examples[i : i + per_step])
            yield [caption for caption in captions for _ in range(draws)], np.concatenate(pictures)
        step = end


def build_optimizers(expert: Tower, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the tiny expert's blocks and of its bridge's (Jordan et al. 2024), AdamW for all else. Every
    parameter, once.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both (Liu et al. 2025, section 2.2). A
    copy of the LLM trains with AdamW alone, as in the papers: its large matrices make Muon's orthogonalization too dear.
    """
    blocks = [block for block in expert.modules() if isinstance(block, ExpertBlock)]
    matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in expert.parameters() if id(p) not in taken]
    fused = others[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)
    muon = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return [*muon, adamw]


@dataclass
class Run:
    """Everything that a training run holds while it goes on."""

    args: argparse.Namespace
    source: Shapes | Emoji | Folder
    llm: FrozenLLM
    expert: Tower
    ema: Tower
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    data: dict[str, str]  # what the data is (`about`) and, unless it comes from the seed, its fingerprint
    step: int = 0  # steps done


def prepare(args: argparse.Namespace, metadata: dict, tensors: dict) -> Run:
    """Load or build all parts, and print what they are. metadata and tensors: the stored run to go on with, or empty."""
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    print(f"device {device} ({why_device}); {dtype} ({why_dtype}); seed {args.seed}", flush=True)
    before = json.loads(metadata["config"])["made_for"] if metadata else {}
    revision = before.get("llm_revision") if args.llm == before.get("llm") else None
    with it_may_have_moved(args.data, "--resume --data") if metadata else nullcontext():
        source = open_source(args.data, args.image_size, args.seed, args.one_object, args.emoji_font, args.emoji_variants)
    data = data_of(source)
    check_data(args.data, metadata, data)
    with it_may_have_moved(args.llm, "--resume --llm") if metadata else nullcontext():
        llm = load_llm(args.llm, device, dtype, args.context_cache_mb, args.trust_remote_code,
                       args.seed if args.random_llm else None, revision, args.bridge in ON_HIDDEN_STATES)  # fmt: skip
    llm.read(before.get("template") or (llm.chat(args.template) if args.chat else args.template), args.expose)
    llm.think(*before.get("thinking") or thinking_of(llm, args) or [None])
    expert = build_expert(args, llm, source).to(device)
    expert.attach(llm)
    make_folder(args.out)  # nothing is written before everything is there
    ema = type(expert)(**expert.config).to(device).requires_grad_(False)
    ema.load_state_dict(expert.state_dict())
    ema.attach(llm)
    run = Run(args, source, llm, expert, ema, build_optimizers(expert, args.lr, args.weight_decay), device, dtype, data)
    if metadata:
        load_run(run, metadata, tensors)
    side, weights = args.image_size // args.patch, "fresh from the seed and frozen" if args.random_llm else "all frozen"
    x = llm.layers[0] if llm.layers else None
    keys = f"{len(llm.layers)} attention layers with {x.kv_heads} key/value heads of width {x.key_width}" if x else "an encoder"
    print(f"LLM {args.llm}: {sum(p.numel() for p in llm.model.parameters()) / 1e6:.0f} M parameters, {weights}; "
          f"{keys}")  # fmt: skip
    print(f"expert: {sum(p.numel() for p in expert.parameters()) / 1e6:.1f} M parameters, all trained; "
          f"{len(expert.blocks)} layers of width {expert.width}, {side}x{side} image tokens")  # fmt: skip
    print(f"data {args.data}: {data['data_about']}; run {args.out}"
          + (f", resumed at step {run.step}" if run.step else ""), flush=True)  # fmt: skip
    return run


def data_of(source) -> dict[str, str]:
    """What is kept of the data, to know them again on resuming; of shapes, drawn from the seed, no fingerprint."""
    data = {"data_about": source.about()}
    fingerprint = source.fingerprint()
    if fingerprint:
        data["data_fingerprint"] = fingerprint
    return data


def check_data(name: str, stored: dict[str, str], now: dict[str, str]) -> None:
    """ValueError if a run goes on with other data than it was trained on (older runs have not stored what that was)."""
    before = stored.get("data_fingerprint")
    if before and before != now.get("data_fingerprint"):
        raise ValueError(
            f"--resume: --data {name} has changed (then: {stored['data_about']}; now: {now['data_about']}; names, captions or "
            "contents differ); put it back as it was, or start another run (--out)"
        )


def save_run(run: Run) -> None:
    """Each file is written beside and then renamed: a kill at any moment leaves whole files, the old or the new."""
    out = Path(run.args.out)
    tensors = {f"ema.{name}": p for name, p in run.ema.named_parameters()}
    moments = {p: state for optimizer in run.optimizers for p, state in optimizer.state.items()}
    for name, p in run.expert.named_parameters():
        tensors |= {f"expert.{name}": p} | {f"{key}.{name}": value for key, value in moments[p].items()}
    metadata = {"step": str(run.step), "args": json.dumps(vars(run.args)), "config": json.dumps(run.expert.config)}
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(tensors, folder / STATE, metadata=metadata | run.data)
        run.ema.save_pretrained(folder)
        if (out / "README.md").exists():  # the user's own
            (folder / "README.md").unlink()

    write_whole(out / STATE, write)


def load_run(run: Run, metadata: dict, tensors: dict) -> None:
    """The inverse of save_run, in place. ValueError if the run was made with another LLM, or another expert."""
    was = json.loads(metadata["config"])
    check_same_llm(was["made_for"], run.expert.made_for)
    for key, value in run.expert.config.items():
        if key != "made_for" and was.get(key, value) != value:  # the rest of made_for comes from the run's own flags
            raise ValueError(
                f"--resume: the run's expert has {key} {was[key]}, and would now have {value}; "
                "go on with the LLM and the code that it was made with, or start another run (--out)"
            )
    run.step = int(metadata["step"])
    parts = {}  # name of a parameter -> {"expert", "ema", and the optimizer's moments of it}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(name, {})[part] = value.to(run.device)
    optimizer_of = {p: o for o in run.optimizers for group in o.param_groups for p in group["params"]}
    with torch.no_grad():
        for (name, p), average in zip(run.expert.named_parameters(), run.ema.parameters()):
            p.copy_(parts[name].pop("expert"))
            average.copy_(parts[name].pop("ema"))
            optimizer_of[p].state[p] = parts[name]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The chance of one step of one run. On a CPU torch keeps the low 32 bits of a seed: both are mixed into those."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def train_step(run: Run, predict: Callable, captions: list[str], pictures: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on a batch. Returns the loss and the time of each picture, both (B,), and the gradient's norm."""
    args = run.args
    generator = step_generator(args.seed, run.step)  # all chance of this step: nothing to store
    data = to_tensor(pictures, run.device)
    noise = torch.randn(data.shape, generator=generator).to(run.device)
    t = sample_time(len(data), args.time_mean, 1.0, generator).to(run.device)
    dropped = (torch.rand(len(data), generator=generator) < args.caption_dropout).tolist()
    context = run.llm.context(["" if drop else caption for caption, drop in zip(captions, dropped)])
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        losses = flow_loss(predict, data, noise, t, context)  # (B,)
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(run.expert.parameters(), 1.0)
    if not torch.isfinite(losses.detach().mean() + norm):
        raise FloatingPointError(
            f"the loss is not finite at step {run.step + 1} (loss {losses.mean():.3g}, gradient norm {norm:.3g}); "
            f"what {args.out} holds is from before: resume it, or start another with a lower --lr"
        )
    warm_up, decay = (run.step + 1) / args.warmup, (args.steps - run.step) / max(1, args.steps - args.warmup)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(warm_up, decay, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    rate = 1 - min(args.ema, (run.step + 1) / (run.step + 10))  # a short memory at first, when the weights move fast
    with torch.no_grad():  # else the average's graph would grow with every step
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.expert.parameters()), rate)
    run.step += 1
    return losses.detach(), t, norm


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; of one that a full disk or a power loss has cut, no step of any run."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Metrics:
    """metrics.jsonl: the loss per bin of t, and the speed, of every interval. A resumed run drops what it will do again."""

    def __init__(self, run: Run):
        self.run, self.path = run, Path(run.args.out) / "metrics.jsonl"
        lines = self.path.read_text("utf-8", "replace").split("\n") if self.path.exists() else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if step_of(line) <= run.step))
        self.first, self.started, self.llm_before = run.step, time.perf_counter(), run.llm.seconds
        self.sum, self.count = torch.zeros(TIME_BINS), torch.zeros(TIME_BINS)

    def add(self, losses: Tensor, t: Tensor) -> None:
        bins = (t.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        self.sum.index_add_(0, bins, losses.cpu())
        self.count.index_add_(0, bins, torch.ones(len(bins)))

    def pause(self, seconds: float, llm_seconds: float) -> None:
        """Leave out what was not training."""
        self.started, self.llm_before = self.started + seconds, self.llm_before + llm_seconds

    def speed(self) -> tuple[float, float]:
        """Images per second, and the LLM's share of the time."""
        seconds = time.perf_counter() - self.started
        images = (self.run.step - self.first) * self.run.args.batch_size
        return images / seconds, (self.run.llm.seconds - self.llm_before) / seconds

    def write(self, norm: Tensor) -> str:
        images_per_second, llm_share = self.speed()
        loss = (self.sum.sum() / self.count.sum()).item()
        line = {
            "step": self.run.step,
            "loss": loss,
            "loss_by_t": (self.sum / self.count.clamp(min=1)).tolist(),
            "grad_norm": norm.item(),
            "lr": self.run.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images_per_second,
            "llm_share": llm_share,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error}") from error
        self.sum.zero_(), self.count.zero_()
        return f"loss {loss:.4f}, {images_per_second:.0f} images/s"


def train(run: Run, until: int | None = None) -> None:
    """Train to the end, or to step `until`, and save; no other process may train in the run's folder meanwhile."""
    args = run.args
    if run.step >= args.steps:
        raise ValueError(f"{args.out} stands at step {run.step} of {args.steps}: nothing left to do; --steps N goes further")
    with Locked(args.out):
        if not run.step:
            refuse_overwriting(args.out)  # another process may have been there while this one loaded its LLM
        bar = tqdm(total=args.steps, initial=run.step, unit="step", mininterval=1, dynamic_ncols=True)
        with bar:  # closed whatever happens, so that an error's line stands below it
            _train(run, until or args.steps, bar)


def _train(run: Run, until: int, progress: tqdm) -> None:
    started, args = time.perf_counter(), run.args
    predict = torch.compile(run.expert) if args.compile else run.expert
    metrics = Metrics(run)
    for captions, pictures in batches(run.source, run.llm, args.batch_size, args.draws, run.step):
        losses, t, norm = train_step(run, predict, captions, pictures)
        metrics.add(losses, t)
        progress.update()
        last = run.step == until
        saves = run.step % args.save_every == 0 or last
        if run.step % LOG_EVERY == 0 or saves:
            progress.set_postfix_str(metrics.write(norm))
        if saves:
            save_run(run)
        if run.step % args.sample_every == 0 or last:
            before, llm_before = time.perf_counter(), run.llm.seconds
            prompts, grid = list(run.source.prompts), Path(args.out) / f"samples-{run.step:06d}.png"
            pictures = draw(run.ema, run.llm, prompts, [args.seed] * len(prompts))
            write_whole(grid, captioned_grid(pictures[:, None], prompts).save)
            metrics.pause(time.perf_counter() - before, run.llm.seconds - llm_before)
        if last:
            break
    progress.close()  # what is printed now stands below it
    if skipped := getattr(run.source, "skipped", None):
        print(f"pictures that did not decode and were skipped: {len(skipped)}")
    images_per_second, llm_share = metrics.speed()
    print(f"{images_per_second:.0f} images/s, the LLM took {llm_share:.0%} of the training time; "
          f"{(time.perf_counter() - started) / 60:.1f} minutes, peak memory {peak_memory_gb(run.device)}")  # fmt: skip
    print(f'{grid} shows what it learned. Now: python sample.py --ckpt {args.out} --prompt "{run.source.prompts[0]}"')


def peak_memory_gb(device: torch.device) -> str:
    try:
        import resource
    except ImportError:
        return "unknown"  # Windows
    gb = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6):.1f} GB"
    return gb + (f" ({torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU)" if device.type == "cuda" else "")


def main(argv: list[str] | None = None) -> None:
    train(prepare(*settings(argv)))


if __name__ == "__main__":
    one_line_errors(main)
