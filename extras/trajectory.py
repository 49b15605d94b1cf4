"""How a picture comes out of the noise: what the sampler stands at, and what it is heading for.

    python sample.py --prompt "a red circle" --trajectory

Beside NAME.png lie NAME-trajectory.png, a column a step, and NAME-trajectory.webp, the same as a
film: x_t above, below it the clean picture that the expert predicts there,

    x_t = (1 - t) noise + t data  and  v = data - noise,  so  data = x_t + (1 - t) v.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from cli import write_whole
from extras.grids import spread
from extras.sheets import enlarge, sheet
from model import ImageExpert
from sample import pixels_of

COLUMNS = 12  # of a strip; the last is the finished picture
STRIP_SIDE = 96  # pixels that a picture has at least, in a strip and in a film
FILM_SIDE = 192
FRAME_MS = 120
LAST_MS = 2000


class State(NamedTuple):
    """Where one picture stands at one step: t, x and its velocity v, (C, height, width)."""

    t: float
    x: Tensor
    v: Tensor
    expert: ImageExpert

    def picture(self) -> np.ndarray:
        """x, as one sees it: (height, width, 3) uint8."""
        return pixels_of(self.expert, self.x)

    def clean(self) -> np.ndarray:
        """The picture that the velocity leads to."""
        return pixels_of(self.expert, self.x + (1 - self.t) * self.v)


def save_trajectory(
    path: Path, prompt: str, picture: np.ndarray, states: list[State]
) -> list[Path]:
    """The strip and the film of a picture (height, width, 3) uint8, beside its file `path`."""
    strip = path.with_name(f"{path.stem}-trajectory.png")
    film = path.with_name(f"{path.stem}-trajectory.webp")
    frames = film_of(picture, states)
    times = [FRAME_MS] * len(states) + [LAST_MS]
    write_whole(strip, strip_of(prompt, picture, states).save)
    write_whole(
        film,
        lambda file: frames[0].save(
            file, save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True
        ),
    )
    return [strip, film]


def strip_of(prompt: str, picture: np.ndarray, states: list[State]) -> Image.Image:
    """A column a step, x_t above and the predicted picture below; the finished one is the last."""
    above = []
    below = []
    for i in spread(len(states), COLUMNS - 1):
        state = states[i]
        label = f"t = {state.t:.2f}"
        above.append((enlarge(state.picture(), STRIP_SIDE), label))
        below.append((enlarge(state.clean(), STRIP_SIDE), ""))
    finished = enlarge(picture, STRIP_SIDE)
    above.append((finished, "t = 1"))
    below.append((finished, ""))
    return sheet([above, below], prompt or "(no prompt)", ["x_t", "predicted"])


def film_of(picture: np.ndarray, states: list[State]) -> list[Image.Image]:
    """A frame a step, and last the finished picture."""
    finished = enlarge(picture, FILM_SIDE)
    frames = []
    for state in states:
        x = enlarge(state.picture(), FILM_SIDE)
        clean = enlarge(state.clean(), FILM_SIDE)
        frames.append(frame(x, clean, f"x_t, t = {state.t:.2f}"))
    frames.append(frame(finished, finished, "x_t, t = 1"))
    return frames


def frame(above: np.ndarray, below: np.ndarray, label: str) -> Image.Image:
    return sheet([[(above, label)], [(below, "predicted")]], "")
