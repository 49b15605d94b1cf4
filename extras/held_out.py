"""The loss on pictures that training never saw, by the time t: for a run on any data.

    python evaluate.py --ckpt runs/mine --suite held-out
    python evaluate.py --ckpt runs/mine --versus runs/mine-random-llm --suite held-out

Of one's own pictures the tenth that extras/captioned.py has set aside, of emoji theirs; of what is
drawn on the fly examples far beyond those of any training; of a mix each one's share. Every picture
is asked at the same times, from a noise of its own that is the same for both runs. Intervals are of
95 %, over the pictures.
"""

import argparse
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from checkpoint import STATE
from data import SOURCES, Shapes, kind_of_source, open_source
from evaluate import LoadedRun
from extras.mixed import Mixed
from flags import data_form
from flow import flow_loss
from metrics import TIME_BINS
from model import ImageExpert
from sample import AT_ONCE, data_of
from train import step_generator

PICTURES = 256  # that are asked, at most
TIMES = 2  # for each bin of t
BEYOND = 2**40  # the first index of what is drawn on the fly; no training comes so far
RESAMPLES = 2000

Example = tuple[str, np.ndarray]  # a caption, and its picture or latents


def check_held_out(expert: ImageExpert, name: str) -> None:
    """ValueError if the loss of an expert is not of pictures and captions alone."""
    if expert.made_for.get("pairs"):
        raise ValueError(f"--suite held-out: {name} learned edits; expected --suite edits")


def evaluate_held_out(args: argparse.Namespace, runs: list[LoadedRun]) -> dict[str, dict]:
    """Score and print one run, or two side by side. -> run -> its losses"""
    asked = {}
    for run in runs:
        asked[run.name] = held_out_examples(source_of(run, args.seed), args.limit or PICTURES)
    if len({digest_of(examples) for examples in asked.values()}) > 1:
        raise ValueError(
            f"--versus: {runs[0].name} and {runs[1].name} hold out different pictures or captions; "
            "expected runs of the same data and size"
        )
    losses = {run.name: losses_of(run, asked[run.name], args.seed) for run in runs}
    results = {name: summary(found) for name, found in losses.items()}
    if len(runs) > 1:
        ours, theirs = losses.values()  # (pictures, bins) each
        results[runs[0].name]["difference"] = summary(ours - theirs)
    print_losses(results)
    return results


@torch.no_grad()
def losses_of(run: LoadedRun, examples: list[Example], seed: int) -> np.ndarray:
    """(pictures, TIME_BINS): the loss of each, a mean over the times of a bin."""
    expert, llm = run.expert, run.llm
    loss = flow_loss
    if expert.prediction == "noise":
        from extras.ddpm import ddpm_loss as loss
    times = (torch.arange(TIME_BINS * TIMES) + 0.5) / (TIME_BINS * TIMES)
    found = []
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
        data = data_of(expert, np.stack([picture for _, picture in some]), llm.device)
        noise = torch.stack([noise_of_picture(seed, start + i, data[0]) for i in range(len(some))])
        context = llm.context([caption for caption, _ in some])
        at_times = []
        for now in times.tolist():
            t = torch.full((len(some),), now, device=llm.device)
            with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
                at_times.append(loss(expert, data, noise.to(llm.device), t, context).float().cpu())
        found.append(torch.stack(at_times, dim=1).unflatten(1, (TIME_BINS, TIMES)).mean(dim=2))
    return torch.cat(found).numpy()


def noise_of_picture(seed: int, number: int, like: torch.Tensor) -> torch.Tensor:
    """Of a picture's own generator, as large as `like`."""
    return torch.randn(like.shape, generator=step_generator(seed, number))


def source_of(run: LoadedRun, seed: int):
    """The data that a run was trained on, where they lay then; what is drawn on the fly, of this
    seed. ValueError if they are gone, or if nothing tells their shares."""
    made_for = run.expert.made_for
    image_size = run.expert.image_size
    for folder in (Path(run.name), Path(run.name).parent):  # a step's weights lie in the run's
        try:
            with safe_open(folder / STATE, "pt") as file:
                name, options = data_form(json.loads(file.metadata()["args"])["data"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue
        if name == made_for["data"]:
            return open_source(name, image_size, seed, **options)
    if "mixed" in made_for:
        shares = f"the shares of {made_for['data']} stand in a run's {STATE}"
        raise ValueError(f"--suite held-out: {shares}, and {run.name} has none; expected the run")
    name, options = data_form(made_for["data"])
    told = {**made_for, **made_for.get("emoji", {})}
    options |= {key: told[key] for key in SOURCES[kind_of_source(name)] if told.get(key)}
    return open_source(name, image_size, seed, **options)


def held_out_examples(source, most: int) -> list[Example]:
    """Captions and pictures that training never saw: of several sources each one's share, by its
    weight. ValueError if a source holds none out."""
    if isinstance(source, Mixed):
        examples = []
        for part, weight in zip(source.sources, source.weights):
            share = most * weight / sum(source.weights)
            examples += held_out_examples(part, max(1, round(share)))
        return examples
    if isinstance(source, Shapes):
        drawn = [source.example(BEYOND + i, 1) for i in range(most)]
        return [(caption, pictures[0]) for caption, pictures in drawn]
    examples = list(islice(source.unseen(), most)) if hasattr(source, "unseen") else []
    if not examples:
        raise ValueError(f"--suite held-out: none is held out of {source.about()}")
    return examples


def digest_of(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for caption, picture in examples:
        digest.update(repr((caption, picture.shape)).encode())
        digest.update(np.ascontiguousarray(picture))
    return digest.hexdigest()


def summary(losses: np.ndarray) -> dict:
    """(pictures, bins) -> means with their intervals. -> JSON"""
    rng = np.random.default_rng(0)
    every = np.column_stack([losses, losses.mean(axis=1)])
    chosen = rng.integers(0, len(every), (RESAMPLES, len(every)))
    means = every[chosen].mean(axis=1)  # (RESAMPLES, bins + 1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    lines = []
    for k, mean in enumerate(every.mean(axis=0)):
        lines.append({"loss": float(mean), "interval": [float(low[k]), float(high[k])]})
    return {"pictures": len(losses), "by_t": lines[:-1], "all": lines[-1]}


def print_losses(results: dict[str, dict]) -> None:
    for name, found in results.items():
        print(f"{name}: loss on {found['pictures']} pictures that training never saw")
        columns = {"loss": found}
        if "difference" in found:
            columns["difference"] = found["difference"]
        print("         t  " + "".join(f"{column:>32}" for column in columns))
        for k in range(TIME_BINS + 1):
            where = "all" if k == TIME_BINS else f"{k / TIME_BINS:.1f} to {(k + 1) / TIME_BINS:.1f}"
            cells = ""
            for scores in columns.values():
                line = scores["all"] if k == TIME_BINS else scores["by_t"][k]
                low, high = line["interval"]
                cells += f"{line['loss']:12.4f} ({low:.4f} to {high:.4f})"
            print(f"{where:>12}{cells}")
