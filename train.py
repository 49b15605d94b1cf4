"""Teach an image expert to draw what a frozen LLM reads.

    python train.py                                    # shapes, gemma-3-270m: half an hour, 2 cores
    python train.py --llm Qwen/Qwen2.5-0.5B            # any Hugging Face decoder
    python train.py --data FOLDER --image-size 64      # your own captioned pictures
    python train.py --resume --out runs/shapes         # go on where a run stopped, bit for bit
    python train.py --from runs/shapes --data FOLDER   # a new run, from that one's weights

Writes into --out: model.safetensors (the expert's EMA weights, config inside),
train_state.safetensors (all that --resume needs), metrics.jsonl, and samples as PNG.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from cli import (
    Locked,
    captioned_grid,
    colon_form,
    it_may_have_moved,
    make_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    write_whole,
)
from data import open_source
from flags import SIZES, data_form, parse_args
from flow import flow_loss, sample_time
from llm import FrozenLLM
from loading import load_llm
from model import ExpertBlock, ImageExpert
from patches import Conv
from sample import draw, to_tensor

TIME_STD = 1.0
LARGEST_GRADIENT = 1.0  # a gradient's norm is clipped to this
LOOK_AHEAD = 32  # steps whose captions go to the LLM together
LOOK_AHEAD_BYTES = 500e6  # or fewer: the most that their pictures take
LOG_EVERY = 50  # steps a line of metrics.jsonl


def train_step(
    run: "Run", predict: Callable, captions: list[str], pictures: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on B captions and pictures (B, height, width, 3) uint8.

    predict: the expert, or its compiled twin. -> the loss and the time t of each picture, both
    (B,), and the gradient's norm. FloatingPointError if one of these is not finite.
    """
    args = run.args
    if run.tasks:
        captions, pictures = run.tasks.take(captions, pictures)

    # The step's own randomness: it depends on the seed and the step alone, so that a run that was
    # killed goes on with the numbers it would have had. (On the CPU: the same on every device.)
    generator = step_generator(args.seed, run.step)
    data = to_tensor(pictures, run.device)  # (B, C, height, width) in [-1, 1]
    noise = torch.randn(data.shape, generator=generator).to(run.device)
    t = run.law(len(data), args.time_mean, TIME_STD, generator).to(run.device)  # (B,)
    uniform = torch.rand(len(data), generator=generator)

    # The caption's context: keys and values that the frozen LLM has for it, from its cache. Some
    # pictures get the empty prompt instead; guidance will need to know what that draws.
    dropped = (uniform < args.caption_dropout).tolist()
    prompts = ["" if drop else caption for caption, drop in zip(captions, dropped)]
    if run.tasks and run.tasks.pairs:
        context = run.tasks.context(run, captions, uniform)
    else:
        context = run.llm.context(prompts)

    # The loss. x_t = (1 - t) noise + t data lies between the two; the expert sees x_t, t and the
    # caption, and answers a velocity. The right one is data - noise, the way from noise to picture:
    # who starts at noise and follows it arrives at a picture, and that is drawing.
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        losses = run.loss(predict, data, noise, t, context)  # (B,)
    loss = losses.mean()
    if run.tasks:
        loss = loss + run.tasks.loss(run)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.expert.parameters(), LARGEST_GRADIENT)
    check_finite(run, loss.detach(), norm)

    # The update: the learning rate warms up, then decays linearly to zero.
    warm_up = (run.step + 1) / args.warmup
    decay = (args.steps - run.step) / max(1, args.steps - args.warmup)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(warm_up, decay, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The average of the weights draws better than the last ones. Its memory is short at first, when
    # they move fast. (Without no_grad its graph would grow with every step.)
    rate = 1 - min(args.ema, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.expert.parameters()), rate)
    run.step += 1
    return losses.detach(), t, norm


def check_finite(run: "Run", loss: Tensor, norm: Tensor) -> None:
    """FloatingPointError if one of the two is not."""
    if not torch.isfinite(loss + norm):
        raise FloatingPointError(
            f"the loss is not finite at step {run.step + 1} (loss {loss:.3g}, gradient norm "
            f"{norm:.3g}); what {run.args.out} holds is from before: resume it, or start another "
            "with a lower --lr"
        )


@dataclass
class Run:
    """Everything that a training run holds while it goes on."""

    args: argparse.Namespace
    source: object  # of captions and pictures: see data.py
    llm: FrozenLLM
    expert: ImageExpert
    ema: ImageExpert  # the moving average of its weights
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    data_identity: dict[str, str]  # what the data is and, unless from the seed, its fingerprint
    step: int = 0  # steps done
    tasks: object = None  # beside drawing from captions: see extras/lmfusion_training.py
    lm_losses: list[Tensor] = field(default_factory=list)  # of what was described, until logged
    loss: Callable = flow_loss  # the objective,
    law: Callable = sample_time  # and of its times


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step of one run. On a CPU torch keeps the low 32 bits of a seed:
    both are mixed into those."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def batches(
    source, llm: FrozenLLM, batch_size: int, draws: int, start: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Captions and pictures (B, size, size, 3) uint8 of each step from `start`; a batch depends on
    the seed and the step alone. The LLM runs over the captions of many steps at once."""
    per_step = batch_size // draws
    step_bytes = 3 * batch_size * source.image_size**2
    ahead = max(1, min(LOOK_AHEAD, int(LOOK_AHEAD_BYTES / step_bytes)))
    step = start
    while True:
        end = (step // ahead + 1) * ahead  # a resumed run cuts the same windows
        examples = [source.example(i, draws) for i in range(step * per_step, end * per_step)]
        if not getattr(source, "before_and_after", False):
            llm.lookup([caption for caption, _ in examples])
        for i in range(0, len(examples), per_step):
            captions = []
            pictures = []
            for caption, drawn in examples[i : i + per_step]:
                captions += [caption] * draws
                pictures.append(drawn)  # (draws, size, size, 3)
            yield captions, np.concatenate(pictures)
        step = end


def build_optimizers(
    expert: ImageExpert, lr: float, weight_decay: float
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
    taken = {id(p) for p in matrices}
    others = [p for p in expert.parameters() if id(p) not in taken]
    options = {"lr": lr, "weight_decay": weight_decay}
    fused = others[0].device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), fused=fused, **options)]
    if matrices:
        optimizers.insert(0, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


# -------------------------------------------------------------------------------------------------
# a run: from its flags to the parts, and from the first step to the last


def prepare(args: argparse.Namespace, metadata: dict, tensors: dict) -> Run:
    """Load or build all parts, and print what they are. metadata and tensors: the stored run to go
    on with, or empty."""
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    print(f"device {device} ({why_device}); {dtype} ({why_dtype}); seed {args.seed}", flush=True)

    origin, before = beginning(args, metadata, device)

    # the data
    moved = it_may_have_moved if metadata else no_hint
    name, options = data_form(args.data)
    with moved(name, "--resume --data"):
        source = open_source(name, args.image_size, args.seed, **options)
    data_identity = checkpoint.data_of(source)
    checkpoint.check_data(args.data, metadata, data_identity)

    # the LLM: the revision, and the text around each caption, are what the weights began with
    revision = before.get("llm_revision") if args.llm == before.get("llm") else None
    random_seed = None
    if args.random_llm:
        random_seed = before.get("random_llm", args.seed)
    with moved(args.llm, "--resume --llm"):
        llm = open_llm(args, device, dtype, random_seed, revision)
    reading = set_reader(args, llm, before)

    # the expert, the average of its weights, and its optimizers
    made_for = {
        "llm": args.llm,
        "llm_revision": llm.revision,
        **llm.identity,
        "random_llm": random_seed,
        **reading,
        "data": name,
        **source.made_for,
    }
    tasks = further_tasks(args, source, llm, made_for)
    if args.start:
        from extras.starting import expert_like

        reads_pictures = tasks is not None
        expert = expert_like(args, origin, metadata, made_for, reads_pictures).to(device)
    else:
        expert = build_expert(args, llm, source, made_for, tasks is not None).to(device)
    expert.attach(llm)
    make_folder(args.out)  # nothing is written before everything is there
    ema = type(expert)(**expert.config).to(device).requires_grad_(False)
    ema.load_state_dict(expert.state_dict())
    ema.attach(llm)  # of use to a tower that holds on to the LLM
    optimizers = build_optimizers(expert, args.lr, args.weight_decay)
    run = Run(args, source, llm, expert, ema, optimizers, device, dtype, data_identity, tasks=tasks)
    set_objective(run)
    if metadata:
        checkpoint.load_run(run, metadata, tensors)
    print_run(run)
    return run


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
        origin = checkpoint.load_expert(args.start, device, "--from")
        return origin, origin.made_for
    return None, {}


def no_hint(place: str, flag: str):
    """In place of it_may_have_moved, for a run that begins."""
    return nullcontext()


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
    from extras.thinking import reader_from, reader_from_flags

    if before:
        llm.reader = reader_from(llm, before)
        return {key: before.get(key) for key in ("template", "expose", "thinking")}
    llm.reader, reading = reader_from_flags(llm, args.template, args.read)
    return reading


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
    weights = "fresh from the seed and frozen" if args.random_llm else "all frozen"
    kind = "an encoder"
    if run.llm.layers:
        layer = run.llm.layers[0]
        kind = f"{len(run.llm.layers)} attention layers with {layer.kv_heads} key/value heads"
        kind += f" of width {layer.key_width}"
    print(f"LLM {args.llm}: {frozen:.0f} M parameters, {weights}; {kind}")
    trained = sum(p.numel() for p in run.expert.parameters()) / 1e6
    side = args.image_size // args.patch
    print(
        f"expert: {trained:.1f} M parameters, all trained; {len(run.expert.blocks)} layers of "
        f"width {run.expert.width}, {side}x{side} image tokens"
    )
    began = ""
    if run.step:
        began = f", resumed at step {run.step}"
    elif args.start:
        began = f", started from {args.start}"
    about = run.data_identity["data_about"]
    print(f"data {args.data}: {about}; run {args.out}{began}", flush=True)


def train(run: Run, until: int | None = None) -> None:
    """Train to the last step, or to step `until`, and save. The folder is locked meanwhile."""
    args = run.args
    if run.step >= args.steps:
        raise ValueError(
            f"{args.out} stands at step {run.step} of {args.steps}: nothing left to do; "
            "--steps N goes further"
        )
    with Locked(args.out):
        if not run.step:
            checkpoint.refuse_overwriting(args.out)  # another process may have been there meanwhile
        progress = tqdm(
            total=args.steps, initial=run.step, unit="step", mininterval=1, dynamic_ncols=True
        )
        with progress:  # closed whatever happens, so that an error's line stands below it
            train_loop(run, until or args.steps, progress)


def train_loop(run: Run, until: int, progress: tqdm) -> None:
    started = time.perf_counter()
    args = run.args
    predict = torch.compile(run.expert) if args.compile else run.expert
    metrics = checkpoint.Metrics(run)
    for captions, pictures in batches(run.source, run.llm, args.batch_size, args.draws, run.step):
        losses, t, norm = train_step(run, predict, captions, pictures)
        metrics.add(losses, t)
        progress.update()
        finished = run.step == until
        saves = run.step % args.save_every == 0 or finished
        if run.step % LOG_EVERY == 0 or saves:
            progress.set_postfix_str(metrics.write(norm))
        if saves:
            checkpoint.save_run(run)
        if run.step % args.sample_every == 0 or finished:
            with metrics.paused():
                grid = draw_samples(run)
        if finished:
            break
    progress.close()  # what is printed now stands below it
    skipped = getattr(run.source, "skipped", None)
    if skipped:
        print(f"pictures that did not decode and were skipped: {len(skipped)}")
    images_per_second, llm_share = metrics.speed()
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{images_per_second:.0f} images/s, the LLM took {llm_share:.0%} of the training time; "
        f"{minutes:.1f} minutes, peak memory {checkpoint.peak_memory(run.device)}"
    )
    prompt = run.source.prompts[0]
    now = f'python sample.py --ckpt {args.out} --prompt "{prompt}"'
    print(f"{grid} shows what it learned. Now: {now}")


def draw_samples(run: Run) -> Path:
    """A grid of the source's own prompts, each from the noise of the run's seed."""
    prompts = list(run.source.prompts)
    seeds = [run.args.seed] * len(prompts)
    if run.tasks and run.tasks.pairs:
        pictures = run.tasks.samples(run, prompts, seeds)
    else:
        pictures = draw(run.ema, run.llm, prompts, seeds)[:, None]
    path = Path(run.args.out) / f"samples-{run.step:06d}.png"
    write_whole(path, captioned_grid(pictures, prompts).save)
    return path


# -------------------------------------------------------------------------------------------------
# the command


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict]:
    """The command line and, for --resume, the stored run: what prepare takes."""
    return checkpoint.settings(argv, parse_args)


def main(argv: list[str] | None = None) -> None:
    args, metadata, tensors = settings(argv)
    train(prepare(args, metadata, tensors))


if __name__ == "__main__":
    one_line_errors(main)
