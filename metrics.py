"""metrics.jsonl, a line per interval of a run's steps: the loss by t, and the speed."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from batches import Batches
from cli import parse_json, write_text

TIME_BINS = 5  # of equal width in t


class Metrics:
    """Of a run (assemble.Run), what its steps say until the next line. A resumed run drops the
    lines of what it will do again. One that was stopped within an interval has a line of its part;
    it goes on with that interval, and the line of the whole takes the part's place."""

    def __init__(self, run, batches: Batches):
        self.run = run
        self.batches = batches
        self.path = Path(run.args.out) / "metrics.jsonl"
        self.drop_after(run.step)
        self.has_part = run.logged < run.step
        self.first = run.step
        self.started = time.perf_counter()
        self.llm_before = run.llm.seconds
        if run.rank:  # the first process has the sums of all
            run.losses.zero_()

    def drop_after(self, step: int) -> None:
        if self.run.rank:
            return
        lines = []
        if self.path.exists():
            lines = self.path.read_text("utf-8", "replace").split("\n")
        kept = [f"{line}\n" for line in lines if step_of(line) <= step]
        write_text(self.path, "".join(kept))

    def add(self, losses: Tensor, t: Tensor, norm: Tensor) -> None:
        self.norm = norm
        bins = (t.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        sums = torch.stack([losses.cpu(), torch.ones(len(bins))])
        self.run.losses.index_add_(1, bins, sums)

    def sum_up(self) -> None:
        """Of several processes, the first gets the sums of all."""
        if self.run.ranks > 1:
            from extras.parallel import sum_over_ranks

            sum_over_ranks(self.run.losses)
        if self.run.rank:
            self.run.losses.zero_()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is not training."""
        before = time.perf_counter()
        llm_before = self.run.llm.seconds
        try:
            yield
        finally:
            self.started += time.perf_counter() - before
            self.llm_before += self.run.llm.seconds - llm_before

    def speed(self) -> tuple[float, float, float]:
        """Images per second; of the time the shares of the LLM, and of waiting for data."""
        seconds = time.perf_counter() - self.started
        images = (self.run.step - self.first) * self.run.args.batch_size
        llm_seconds = self.run.llm.seconds - self.llm_before
        return images / seconds, llm_seconds / seconds, self.batches.waited / seconds

    def write(self) -> str:
        """The line of the steps since the last one, and what the progress bar says of them."""
        self.sum_up()
        total, count = self.run.losses
        images_per_second, llm_share, data_share = self.speed()
        loss = (total.sum() / count.sum()).item()
        line = {
            "step": self.run.step,
            "loss": loss,
            "loss_by_t": (total / count.clamp(min=1)).tolist(),
            "grad_norm": self.norm.item(),
            "lr": self.run.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images_per_second,
            "llm_share": llm_share,
            "data_share": data_share,
            "images": self.run.step * self.run.args.batch_size,
            "resumed_at": self.first,  # step; images_per_second is the mean since then
        }
        if self.run.lm_losses:
            line["lm_loss"] = torch.cat(self.run.lm_losses).mean().item()
            self.run.lm_losses.clear()
        if self.has_part:
            self.drop_after(self.run.logged)
            self.has_part = False
        if self.run.rank == 0:
            self.append(line)
        self.run.losses.zero_()
        self.run.logged = self.run.step
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
        step = parse_json(line)["step"]
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
