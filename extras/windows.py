"""Windows into a drawing: what --trajectory and --maps of sample.py show of each picture.

    python sample.py --prompt "a red circle left of a blue square" --trajectory --maps

Windows watches the sampler while it draws; then trajectory.py shows where the picture came along,
and word_maps.py which word each patch looked at.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import features
from torch import Tensor

from extras.grids import spread
from extras.trajectory import State, save_trajectory
from extras.word_maps import check_maps, save_maps, word_maps
from llm import FrozenLLM
from model import ImageExpert

MOST_STEPS = 48  # that are kept of a drawing, evenly spread
MOST_PICTURES = 64  # whose steps are held in memory


class Windows:
    """The `watch` of euler_sample, for the pictures of these prompts: keeps of each its State at up
    to MOST_STEPS of the steps. ValueError if --maps cannot show what is asked for."""

    def __init__(
        self, args: argparse.Namespace, expert: ImageExpert, llm: FrozenLLM, prompts: list[str]
    ):
        self.args = args
        self.expert = expert
        self.llm = llm
        self.prompts = prompts
        if args.maps is not None:
            check_maps(expert, llm, prompts, args.maps)
        self.kept = set(spread(args.steps, MOST_STEPS))
        self.pictures: list[list[State]] = []
        self.first = 0  # picture of the batch that is being drawn
        self.step = 0
        self.last_t = 2.0

    def __call__(self, t: float, x: Tensor, v: Tensor) -> None:
        if t <= self.last_t:  # time does not go on: the next batch has begun
            self.first = len(self.pictures)
            self.step = 0
            self.pictures += [[] for _ in x]
        if self.step in self.kept:
            for i in range(len(x)):
                state = State(t, x[i].float().cpu(), v[i].float().cpu(), self.expert)
                self.pictures[self.first + i].append(state)
        self.last_t = t
        self.step += 1

    def save(self, i: int, path: Path, picture: np.ndarray) -> list[Path]:
        """What is asked for of picture i (height, width, 3) uint8, beside its file: the files."""
        prompt = self.prompts[i]
        states = self.pictures[i]
        files = []
        if self.args.trajectory:
            files += save_trajectory(path, prompt, picture, states)
        if self.args.maps is not None:
            found = word_maps(self.expert, self.llm, prompt, states)
            files += save_maps(path, picture, states, found, self.args.maps, self.expert.reads)
        return files


def check_windows(args: argparse.Namespace, layout: str | None, count: int) -> None:
    """ValueError, before anything is loaded, for flags that do not go with --maps or --trajectory.

    layout: of a benchmark; count: pictures.
    """
    if args.maps is None and not args.trajectory:
        return
    if layout:
        raise ValueError(
            f"--maps and --trajectory have no place in the folders of {layout}: leave them out"
        )
    if count > MOST_PICTURES:
        raise ValueError(
            f"--maps and --trajectory are for {MOST_PICTURES} pictures at most, not {count}"
        )
    if args.maps is not None and (args.read or "").startswith("image"):
        raise ValueError("--maps shows words, and --read image a picture too: leave one out")
    if args.trajectory and not features.check("webp"):
        raise ValueError(
            "--trajectory: Pillow has no WebP here; pip install --upgrade pillow brings it"
        )
