"""How the bench takes time, and shows what it took."""

import importlib.metadata
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median

import torch


def timed(work: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, dict]:
    """name -> {"ms": median, "spread": half the distance of the quartiles, as a share of it}.

    Every round runs each once, so that a busy moment of the machine meets all; rounds until
    `seconds` each have passed, at least three.
    """
    spent = 0.0
    for function in work.values():
        spent += once(function, device) + once(function, device)  # warm-up
    rounds = max(3, min(50, int(1000 * seconds * len(work) / spent)))
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            times[name].append(once(function, device))
    summary = {}
    for name, values in times.items():
        values = sorted(values)
        middle = median(values)
        low = values[len(values) // 4]
        high = values[-1 - len(values) // 4]
        summary[name] = {"ms": middle, "spread": (high - low) / 2 / middle}
    return summary


def once(function: Callable, device: torch.device) -> float:
    """How long one call takes, in milliseconds."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The machine's measured speed at a large square matrix product: what 100 % means here."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    ms = timed({"matmul": lambda: a @ b}, device, 1.0)["matmul"]["ms"]
    return 2 * n**3 / ms / 1e9


def table(rows: list[dict]) -> str:
    """The rows as text, a column a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns]
    for row in rows:
        line = []
        for column in columns:
            value = row.get(column, "")
            line.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        lines.append(line)
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    said = []
    for line in lines:
        said.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))
    return "\n".join(said)


def version_of(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
