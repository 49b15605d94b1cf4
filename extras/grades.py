"""Is a picture what its prompt asks for? The verdict of extras/judge.py, and of exact colours how
far they are."""

from dataclasses import dataclass

import numpy as np

from extras.colors import delta_e
from extras.judge import Verdict, judge
from extras.suites import Prompt, Rgb

NEAR = 15.0  # CIE76 delta E within which a colour is the one that was asked for by its numbers


@dataclass(frozen=True)
class Grade:
    """reason: why the picture is wrong (see judge.Verdict, and grade), None if it is right. off:
    how far its colours are, on average, from those asked for, where it has the shapes: in delta E
    where the prompt gives numbers, else in RGB, 0 to 441."""

    reason: str | None
    off: float | None
    verdict: Verdict


Graded = list[tuple[str, Prompt, Grade]]  # suite, what was asked for, and how it was drawn


def grade(prompt: Prompt, picture: np.ndarray) -> Grade:
    """The judge's verdict on a picture, uint8 (H, W, 3); of exact colours, by their distance too.

    Two of them that would fit better the other way round are "swapped colors".
    """
    verdict = judge(picture, prompt.scene)
    if not prompt.palette:
        return Grade(verdict.reason, verdict.rgb_distance, verdict)
    if not verdict.ok:
        return Grade(verdict.reason, None, verdict)

    shapes = [group.shape for group, rgb in zip(prompt.scene.groups, prompt.palette) if rgb]
    colors = [rgb for rgb in prompt.palette if rgb]

    def distances(colors: list[Rgb]) -> list[float]:
        wanted = dict(zip(shapes, colors))
        return [delta_e(t.rgb, wanted[t.shape]) for t in verdict.found if t.shape in wanted]

    offs = distances(colors)
    reason = None
    if max(offs) >= NEAR:
        swapped = sum(distances(colors[::-1])) < sum(offs)
        reason = "swapped colors" if swapped else "wrong color"
    return Grade(reason, float(np.mean(offs)), verdict)
