"""Teach an image expert to draw what a frozen LLM reads.

    python train.py                                    # shapes, gemma-3-270m: about 20 minutes on two CPU cores
    python train.py --llm Qwen/Qwen2.5-0.5B            # any Hugging Face decoder
    python train.py --data FOLDER --image-size 64      # your own captioned pictures
    python train.py --resume --out runs/shapes         # go on where a run stopped, bit for bit

Writes into --out: model.safetensors (the expert's EMA weights, config inside), train_state.safetensors (all that --resume
needs), metrics.jsonl, and samples as PNG.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data import open_source
from flow import flow_loss, sample_time
from model import FrozenLLM, ImageExpert, load_llm, pick_device, pick_dtype, read_safetensors, text_layers
from sample import OneLineParser, captioned_grid, draw, one_line_errors, positive, to_tensor

LOOK_AHEAD = 16  # steps whose captions go to the LLM together
LOG_EVERY = 50  # steps a line of metrics.jsonl
TIME_BINS = 5  # of equal width in t
MAY_CHANGE = {"resume", "out", "steps", "device", "compile", "sample_every", "save_every", "context_cache_mb"}  # on resuming


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Train an image expert on a frozen LLM.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    add("--data", default="shapes", help="shapes, or a folder of captioned pictures")
    add("--out", help="folder of the run (default: runs/ and the name of the data)")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--steps", type=positive(int), default=4000, help="optimizer steps")
    add("--batch-size", type=positive(int), default=64, help="pictures a step")
    add("--draws", type=positive(int), default=4, help="pictures (or noise draws) of each caption in a batch: divides the LLM's cost")
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate of AdamW")
    add("--warmup", type=positive(int), default=200, help="steps of linear warm-up; then linear decay to zero")
    add("--ema", type=float, default=0.999, help="decay of the weights' moving average")
    add("--caption-dropout", type=float, default=0.1, help="share of pictures trained on the empty prompt, for guidance")
    add("--time-mean", type=float, default=-0.4, help="mean of the logit-normal time; below zero leans to the noise")
    add("--prediction", default="clean", choices=["clean", "velocity"], help="what the network's head gives")
    add("--width", type=positive(int), default=256, help="width of the expert")
    add("--heads", type=positive(int), help="query heads (default: as many as make twice the width)")
    add("--depth", type=positive(int), help="layers, spread over the LLM's (default: 9, or all if there are fewer)")
    add("--patch", type=positive(int), default=8, help="side of a patch in pixels")
    add("--image-size", type=positive(int), default=32, help="side of the pictures in pixels")
    add("--context-cache-mb", type=positive(float), default=512, help="most memory for captions' keys and values, in MB")
    add("--seed", type=int, default=0, help="of the weights, the data and the noise")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and of autocast")
    add("--compile", action="store_true", help="torch.compile the expert: faster steps after a minute or two")
    add("--sample-every", type=positive(int), default=1000, help="steps between grids of samples")
    add("--save-every", type=positive(int), default=500, help="steps between checkpoints")
    add("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    parser.set_defaults(**(stored or {}))
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{Path(args.data).name}"
    if args.batch_size % args.draws:
        raise ValueError(f"--batch-size {args.batch_size} does not divide by --draws {args.draws}")
    for name, value, top in (("ema", args.ema, 1), ("caption-dropout", args.caption_dropout, 1)):
        if not 0 <= value < top:
            raise ValueError(f"--{name} {value}: expected a number from 0 to below {top}")
    return args


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict]:
    """The command line, and for --resume the stored run: (args, metadata, tensors). The stored settings win."""
    args = parse_args(argv)
    state = Path(args.out) / "train_state.safetensors"
    if not args.resume:
        if state.exists():
            raise ValueError(f"{args.out} already holds a run: --resume goes on with it, --out NAME starts another")
        return args, {}, {}
    if not state.exists():
        raise ValueError(f"--resume: there is no run in {args.out} (no train_state.safetensors); --out names the run")
    metadata, tensors = read_safetensors(state)
    try:
        stored = json.loads(metadata["args"])
    except KeyError:
        raise ValueError(f"{state} is not the state of a training run") from None
    merged = parse_args(argv, stored)
    changed = [key for key, value in vars(merged).items() if key not in MAY_CHANGE and value != stored.get(key)]
    if changed:
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--resume: this run has --{flag} {stored.get(changed[0])}; another value needs a new run (--out)")
    return merged, metadata, tensors


def build_expert(args: argparse.Namespace, llm: FrozenLLM) -> ImageExpert:
    layers = text_layers(llm, args.depth or min(9, len(llm.layers)))
    per_group = round(2 * args.width / (layers[0]["key_width"] * layers[0]["kv_heads"]))
    heads = args.heads or layers[0]["kv_heads"] * max(1, per_group)
    made_for = {"llm": args.llm, "llm_fingerprint": llm.fingerprint, "data": args.data}
    torch.manual_seed(args.seed)
    return ImageExpert(layers, args.width, heads, args.patch, args.image_size, prediction=args.prediction, made_for=made_for)


def batches(source, llm: FrozenLLM, batch_size: int, draws: int, start: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Captions and pictures (B, size, size, 3) uint8 of each step from `start`: a function of the seed and the step alone."""
    per_step, step = batch_size // draws, start
    while True:
        end = (step // LOOK_AHEAD + 1) * LOOK_AHEAD
        examples = [source.example(i, draws) for i in range(step * per_step, end * per_step)]
        llm.lookup([caption for caption, _ in examples])  # one pass of the LLM over all captions that it has not read yet
        for i in range(0, len(examples), per_step):
            captions, pictures = zip(*examples[i : i + per_step])
            yield [caption for caption in captions for _ in range(draws)], np.concatenate(pictures)
        step = end


def save_run(out: Path, expert: ImageExpert, ema: ImageExpert, optimizer: torch.optim.Optimizer, step: int, args) -> None:
    """Each file is written beside and then renamed: a kill at any moment leaves whole files, the old or the new."""
    tensors = {f"expert.{name}": p for name, p in expert.named_parameters()} | {f"ema.{n}": p for n, p in ema.named_parameters()}
    for name, p in expert.named_parameters():
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
    metadata = {"step": str(step), "args": json.dumps(vars(args)), "config": json.dumps(expert.config)}
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, out / "train_state.tmp", metadata=metadata)
    os.replace(out / "train_state.tmp", out / "train_state.safetensors")
    ema.save_pretrained(out / "model.tmp")
    for path in (out / "model.tmp").iterdir():
        os.replace(path, out / path.name)
    (out / "model.tmp").rmdir()


def load_run(metadata: dict, tensors: dict, expert: ImageExpert, ema: ImageExpert, optimizer: torch.optim.Optimizer) -> int:
    """The inverse: fills the three in place and returns the step."""
    if json.loads(metadata["config"]) != expert.config:
        raise ValueError("--resume: the run was made with another LLM, or another revision of it: "
                         f"{json.loads(metadata['config'])['made_for']} against {expert.made_for}")  # fmt: skip
    step = int(metadata["step"])
    with torch.no_grad():
        for (name, p), average in zip(expert.named_parameters(), ema.parameters()):
            p.copy_(tensors[f"expert.{name}"])
            average.copy_(tensors[f"ema.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device)} | moments
    return step


def train(args: argparse.Namespace, metadata: dict, tensors: dict) -> None:
    started = time.perf_counter()
    out = Path(args.out)
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    source = open_source(args.data, args.image_size, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    llm = load_llm(args.llm, device, dtype, args.context_cache_mb, args.trust_remote_code)
    expert = build_expert(args, llm).to(device)
    ema = ImageExpert(**expert.config).to(device).requires_grad_(False)
    ema.load_state_dict(expert.state_dict())
    llm.keep([block.layer.index for block in expert.blocks])
    optimizer = torch.optim.AdamW(expert.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type != "mps")
    first = load_run(metadata, tensors, expert, ema, optimizer) if metadata else 0
    predict = torch.compile(expert) if args.compile else expert

    print(f"device {device} ({why_device}); {dtype} ({why_dtype}); seed {args.seed}")
    print(f"LLM {args.llm}: {sum(p.numel() for p in llm.model.parameters()) / 1e6:.0f} M parameters, all frozen; "
          f"{len(llm.layers)} attention layers, {llm.layers[0].kv_heads} key/value heads of {llm.layers[0].key_width}")  # fmt: skip
    print(f"expert: {sum(p.numel() for p in expert.parameters()) / 1e6:.1f} M parameters, all trained; "
          f"{len(expert.blocks)} layers, width {args.width}, {args.image_size // args.patch}x{args.image_size // args.patch} tokens")  # fmt: skip
    print(f"data {args.data}; run {out}{f', resumed at step {first}' if first else ''}", flush=True)

    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first))
    bin_sum, bin_count, norm = torch.zeros(TIME_BINS), torch.zeros(TIME_BINS), 0.0
    progress = tqdm(total=args.steps, initial=first, unit="step", mininterval=1, dynamic_ncols=True)
    ready, sampling, llm_before = time.perf_counter(), 0.0, llm.seconds
    for step, (captions, pictures) in zip(range(first, args.steps), batches(source, llm, args.batch_size, args.draws, first)):
        generator = torch.Generator().manual_seed((args.seed << 32) + step)  # all of a step's chance: nothing to store
        data = to_tensor(pictures, device)
        noise = torch.randn(data.shape, generator=generator).to(device)
        t = sample_time(len(data), args.time_mean, 1.0, generator).to(device)
        dropped = torch.rand(len(data), generator=generator) < args.caption_dropout
        context = llm.context(["" if drop else caption for caption, drop in zip(captions, dropped.tolist())])

        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup), 1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = flow_loss(predict, data, noise, t, context)  # (B,)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
        if not torch.isfinite(losses.detach().mean() + norm):
            raise FloatingPointError(f"the loss is not finite at step {step + 1} (loss {losses.mean():.3g}, gradient norm "
                                     f"{norm:.3g}); the last checkpoint in {out} is good: resume with a lower --lr")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(expert.parameters()), 1 - decay)

        bins = (t.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        bin_sum.index_add_(0, bins, losses.detach().cpu())
        bin_count.index_add_(0, bins, torch.ones(len(bins)))
        done, last = step + 1, step + 1 == args.steps
        progress.update()
        if done % LOG_EVERY == 0 or done % args.save_every == 0 or last:
            seconds = time.perf_counter() - ready - sampling
            speed = (done - first) * args.batch_size / seconds
            loss = (bin_sum.sum() / bin_count.sum()).item()
            line = {"step": done, "loss": loss, "loss_by_t": (bin_sum / bin_count.clamp(min=1)).tolist(), "grad_norm": norm.item(),
                    "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed, "llm_share": (llm.seconds - llm_before) / seconds}  # fmt: skip
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
            bin_sum.zero_(), bin_count.zero_()
        if done % args.save_every == 0 or last:
            save_run(out, expert, ema, optimizer, done, args)
        if done % args.sample_every == 0 or last:
            before, llm_seconds = time.perf_counter(), llm.seconds
            grid = captioned_grid(draw(ema, llm, list(source.prompts), seed=args.seed), list(source.prompts))
            grid.save(out / f"samples-{done:06d}.png")
            llm.seconds = llm_seconds
            sampling += time.perf_counter() - before
    progress.close()
    if first >= args.steps:
        print(f"nothing to do: the run stands at step {first} of {args.steps}")
        return
    seconds = time.perf_counter() - ready - sampling
    if skipped := getattr(source, "skipped", None):
        print(f"{len(skipped)} pictures did not decode and were skipped")
    print(f"{(args.steps - first) * args.batch_size / seconds:.0f} images/s; the LLM took {(llm.seconds - llm_before) / seconds:.0%} of the "
          f"training time; {(time.perf_counter() - started) / 60:.1f} minutes in all, peak memory "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")  # fmt: skip
    print(f'{out / f"samples-{args.steps:06d}.png"} shows what it learned; now: python sample.py --ckpt {out} --prompt "a red circle"')


def main(argv: list[str] | None = None) -> None:
    train(*settings(argv))


if __name__ == "__main__":
    one_line_errors(main)
