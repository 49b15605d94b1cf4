"""Teach an image expert to draw what a frozen LLM reads.

    python train.py                                    # shapes, gemma-3-270m: half an hour, 2 cores
    python train.py --llm Qwen/Qwen2.5-0.5B            # any Hugging Face decoder
    python train.py --data FOLDER --image-size 64      # your own captioned pictures
    python train.py --resume --out runs/shapes         # go on where a run stopped, bit for bit
    python train.py --from runs/shapes --data FOLDER   # a new run, from that one's weights
    torchrun --nproc_per_node=8 train.py               # on eight GPUs (extras/parallel.py)
    torchrun --nproc_per_node=8 train.py --shard       # each with a part (extras/shard.py)

Writes into --out: model.safetensors (the expert's EMA weights, config inside),
train_state.safetensors (all that --resume needs), metrics.jsonl, and samples as PNG; with --keep,
the weights of older checkpoints in step-000250/.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import os
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from assemble import Run, prepare
from batches import Batches
from cli import Locked, captioned_grid, one_line_errors, stops_wait, write_whole
from flags import parse_args
from metrics import Metrics, peak_memory
from sample import data_of, draw

TIME_STD = 1.0
LARGEST_GRADIENT = 1.0  # a gradient's norm is clipped to this
LOG_EVERY = 50  # steps a line of metrics.jsonl


def train_step(
    run: Run, predict: Callable, captions: list[str], pictures: np.ndarray
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
    data = data_of(run.expert, pictures, run.device)  # (B, C, height, width), pixels in [-1, 1]
    count = len(data) * run.ranks  # of all processes, if there are several (extras/parallel.py)
    noise = own(run, torch.randn(count, *data.shape[1:], generator=generator)).to(run.device)
    t = own(run, run.law(count, args.time_mean, TIME_STD, generator)).to(run.device)  # (B,)
    uniform = own(run, torch.rand(count, generator=generator))

    # Losses and gradients: of the whole batch at once or, with --accumulate, of one part after the
    # other. What a part keeps for its way back is gone when the next one begins.
    parts = min(args.accumulate, len(data))
    losses = []
    loss = 0.0
    for part in range(parts):
        some = slice(len(data) * part // parts, len(data) * (part + 1) // parts)
        of_part = losses_of(run, predict, some, captions, data, noise, t, uniform)
        share = of_part.sum() / len(data)
        if run.tasks:
            share = share + run.tasks.loss(run, part, parts)
        share.backward()
        losses.append(of_part.detach())
        loss = loss + share.detach()
    norm = finish_gradients(run, loss)

    # The update: the learning rate warms up, then decays linearly to zero.
    warm_up = (run.step + 1) / args.warmup
    decay = (args.steps - run.step) / max(1, args.steps - args.warmup)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group.get("ratio", 1) * min(warm_up, decay, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The average of the weights draws better than the last ones. Its memory is short at first, when
    # they move fast. (Without no_grad its graph would grow with every step.)
    rate = 1 - min(args.ema, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.expert.parameters()), rate)
    run.step += 1
    return torch.cat(losses), t, norm


def losses_of(
    run: Run,
    predict: Callable,
    some: slice,
    captions: list[str],
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    uniform: Tensor,
) -> Tensor:
    """The loss of each of `some` pictures of a batch, (n,). uniform (B,): the chance of each."""
    # The caption's context: keys and values that the frozen LLM has for it, from its cache. Some
    # pictures get the empty prompt instead; guidance will need to know what that draws.
    dropped = (uniform[some] < run.args.caption_dropout).tolist()
    prompts = ["" if drop else caption for caption, drop in zip(captions[some], dropped)]
    if run.tasks and run.tasks.pairs:
        context = run.tasks.context(run, captions, uniform, some)
    else:
        context = run.llm.context(prompts)

    # The loss. x_t = (1 - t) noise + t data lies between the two; the expert sees x_t, t and the
    # caption, and answers a velocity. The right one is data - noise, the way from noise to picture:
    # who starts at noise and follows it arrives at a picture, and that is drawing.
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        return run.loss(predict, data[some], noise[some], t[some], context)


def finish_gradients(run: Run, loss: Tensor) -> Tensor:
    """Average them over the processes, if there are several, and clip them. -> their norm;
    FloatingPointError if it or the loss is not finite."""
    if run.ranks > 1:
        from extras.parallel import average_gradients

        run.stopping = average_gradients(run.expert)
    norm = torch.nn.utils.clip_grad_norm_(run.expert.parameters(), LARGEST_GRADIENT)
    if run.args.shard:
        norm = norm.full_tensor()  # of all parts
    if not torch.isfinite(loss + norm):
        raise FloatingPointError(
            f"the loss is not finite at step {run.step + 1} (loss {loss:.3g}, gradient norm "
            f"{norm:.3g}); what {run.args.out} holds is from before: resume it, or start another "
            "with a lower --lr"
        )
    return norm


def own(run: Run, x: Tensor) -> Tensor:
    """Of what all processes take together, (ranks B, ...), the part of this one, (B, ...)."""
    return x.unflatten(0, (run.ranks, -1))[run.rank]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step of one run. On a CPU torch keeps the low 32 bits of a seed:
    both are mixed into those."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


# -------------------------------------------------------------------------------------------------
# a run, from the first step to the last


def train(run: Run, until: int | None = None) -> None:
    """Train to the last step, or to step `until`, and save. The folder is locked meanwhile."""
    args = run.args
    with nullcontext() if run.rank else Locked(args.out):
        if not run.rank:
            checkpoint.put_in_order(run)
        if not run.rank or args.shard:
            finish_samples(run)
        if run.step >= args.steps:
            return
        bar = {"unit": "step", "mininterval": 1, "dynamic_ncols": True, "disable": run.rank > 0}
        progress = tqdm(total=args.steps, initial=run.step, **bar)
        size = (args.batch_size, args.draws)
        batches = Batches(run.source, run.llm, *size, run.step, run.rank, run.ranks)
        # both closed whatever happens; an error's line stands below the bar
        with progress, closing(batches):
            train_loop(run, batches, until or args.steps, progress)


def finish_samples(run: Run) -> None:
    """Draw what a run that goes on was to draw when it was killed or stopped. ValueError if all is
    done, that too."""
    args = run.args
    due = run.step % args.sample_every == 0 or run.step >= args.steps
    if run.step and due and not grid_of(run).exists():
        draw_samples(run)
        print(f"{grid_of(run)} was cut, and is there now")
    elif run.step >= args.steps and not run.rank:
        raise ValueError(
            f"{args.out} stands at step {run.step} of {args.steps}: nothing left to do; "
            "--steps N goes further"
        )


def train_loop(run: Run, batches: Batches, until: int, progress: tqdm) -> None:
    """Ctrl-C and SIGTERM are heard between two steps: what is done by then is saved. An OSError, of
    a full disk say, tells where the run goes on."""
    started = time.perf_counter()
    args = run.args
    predict = torch.compile(run.expert) if args.compile else run.expert
    metrics = Metrics(run, batches)
    saved = run.step
    first = run.rank == 0  # it writes for all
    try:
        for captions, pictures in batches:
            with stops_wait() if run.ranks == 1 else nullcontext():
                losses, t, norm = train_step(run, predict, captions, pictures)
                metrics.add(losses, t, norm)
                progress.update()
                finished = run.step == until
                saves = run.step % args.save_every == 0 or finished
                if run.step % LOG_EVERY == 0 or saves:
                    progress.set_postfix_str(metrics.write())
                if saves:
                    checkpoint.save_run(run)
                    saved = run.step
            if run.stopping:
                raise KeyboardInterrupt(run.stopping)
            draws = first or args.shard  # the average lies in parts: all must run it
            if (run.step % args.sample_every == 0 or finished) and draws:
                with metrics.paused():
                    draw_samples(run)
            if finished:
                break
    except KeyboardInterrupt:
        with stops_wait():
            progress.close()
            if run.step > saved:
                metrics.sum_up()
                checkpoint.save_run(run)
                if run.step > run.logged:
                    metrics.write()
            if run.step:
                said = f"--resume --out {args.out} goes on"
                print(f"saved at step {run.step} of {args.steps}: {said}")
        raise
    except OSError as error:
        if not saved or isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"{error}; --resume --out {args.out} goes on from step {saved}") from error
    progress.close()  # what is printed now stands below it
    if first:
        say_what_was_trained(run, metrics, time.perf_counter() - started)


def say_what_was_trained(run: Run, metrics: Metrics, seconds: float) -> None:
    skipped = getattr(run.source, "skipped", None)
    if skipped:
        print(f"pictures that did not decode and were skipped: {len(skipped)}")
    images_per_second, llm_share, data_share = metrics.speed()
    print(
        f"{images_per_second:.0f} images/s; of the training time the LLM took {llm_share:.0%}, "
        f"waiting for data {data_share:.0%}; {seconds / 60:.1f} minutes, peak memory "
        f"{peak_memory(run.device)}"
    )
    prompt = run.source.prompts[0]
    now = f'python sample.py --ckpt {run.args.out} --prompt "{prompt}"'
    print(f"{grid_of(run)} shows what it learned. Now: {now}")


def grid_of(run: Run) -> Path:
    return Path(run.args.out) / f"samples-{run.step:06d}.png"


def draw_samples(run: Run) -> None:
    """A grid of the source's own prompts, each from the noise of the run's seed."""
    prompts = list(run.source.prompts)
    seeds = [run.args.seed] * len(prompts)
    if run.tasks and run.tasks.pairs:
        pictures = run.tasks.samples(run, prompts, seeds)
    else:
        pictures = draw(run.ema, run.ema_llm, prompts, seeds)[:, None]
    if not run.rank:
        write_whole(grid_of(run), captioned_grid(pictures, prompts).save)


# -------------------------------------------------------------------------------------------------
# the command


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict]:
    """The command line and, for --resume, the stored run: what prepare takes."""
    return checkpoint.settings(argv, parse_args)


def main(argv: list[str] | None = None) -> None:
    args, metadata, tensors = settings(argv)
    if args.plan is not None:
        from extras.plan import print_plan

        print_plan(args)
        return
    rank, ranks = 0, 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or args.shard:  # torchrun has started several
        from extras.parallel import join

        rank, ranks = join(args)
    run = prepare(args, metadata, tensors)
    del tensors  # they are in the run
    run.rank = rank
    run.ranks = ranks
    train(run)


if __name__ == "__main__":
    one_line_errors(main)
