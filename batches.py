"""The batches of a training run, made beside it: while some steps train, threads draw, or read and
decode, the pictures of the next ones.

A batch depends on the seed and the step alone, and has a part for each process of a run.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

LOOK_AHEAD = 32  # steps whose captions go to the LLM together
LOOK_AHEAD_BYTES = (
    250e6  # the most that the pictures of so many steps take; twice, beside each other
)
THREADS = min(8, os.cpu_count() or 1)  # Pillow and NumPy let others run while they work


class Batches:
    """An iterator: captions and pictures, (B, height, width, 3) uint8, of each step from `start`.

    source: of examples, see data.py. The LLM runs over the captions of many steps at once.
    batch_size: pictures of all processes, of which this is number `rank` of `ranks`. waited:
    seconds that training has waited for its data.
    """

    def __init__(
        self, source, llm, batch_size: int, draws: int, start: int, rank: int = 0, ranks: int = 1
    ):
        self.source = source
        self.llm = llm
        self.draws = draws
        self.of_all = batch_size // draws  # captions a step
        self.own = self.of_all // ranks
        self.rank = rank
        step_bytes = 3 * batch_size * source.image_size**2
        self.ahead = max(1, min(LOOK_AHEAD, int(LOOK_AHEAD_BYTES / step_bytes)))
        in_order = getattr(source, "in_order", False)  # a stream: one after the other
        self.pool = ThreadPoolExecutor(1 if in_order else THREADS)
        self.waited = 0.0
        self.ready: list[tuple[list[str], np.ndarray]] = []  # the next steps, the last one first
        self.step = start  # from which on they are being made
        self.making = self._begin()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[list[str], np.ndarray]:
        if not self.ready:
            self._finish()
        return self.ready.pop()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> list[Future]:
        """Have the examples of the next steps made."""
        end = (self.step // self.ahead + 1) * self.ahead  # a resumed run cuts the same windows
        making = []
        for step in range(self.step, end):
            first = step * self.of_all + self.rank * self.own
            for i in range(first, first + self.own):
                making.append(self.pool.submit(self.source.example, i, self.draws))
        self.step = end
        return making

    def _finish(self) -> None:
        """Wait for them, have the LLM read their captions, and begin with the ones after."""
        started = time.perf_counter()
        examples = [future.result() for future in self.making]
        self.waited += time.perf_counter() - started
        self.making = self._begin()
        if self.llm.frozen and not getattr(self.source, "before_and_after", False):
            self.llm.lookup([caption for caption, _ in examples])
        for i in reversed(range(0, len(examples), self.own)):
            captions = []
            pictures = []
            for caption, drawn in examples[i : i + self.own]:
                captions += [caption] * self.draws
                pictures.append(drawn)  # (draws, height, width, 3)
            self.ready.append((captions, np.concatenate(pictures)))
