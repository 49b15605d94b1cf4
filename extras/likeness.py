"""Pictures that are no scenes of shapes: which of many candidates is each nearest to?

features = learned_features(candidates)                      # or pixel_features
places = ranks(features(pictures), features(candidates), truth)
rank_scores(places, len(candidates))                         # top 1, top 5, median rank
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.intervals import draw_anew, weighted_median, wilson

WIDTH = 128  # of the learned features
SHARPNESS = 16  # of the softmax over cosines


def ranks(pictures: Tensor, candidates: Tensor, truth: list[int]) -> np.ndarray:
    """The place of each picture's true candidate among all by distance, 1 the nearest.

    Features (P, D) and (M, D) -> (P,).
    """
    distances = torch.cdist(pictures.double(), candidates.double())
    true = distances.gather(1, torch.tensor(truth)[:, None])
    return 1 + (distances < true).sum(1).numpy()


def rank_scores(places: np.ndarray, candidates: int, *shared: list[str]) -> dict:
    """Shares of the first and the first five places and the median, each with a 95 % interval.

    A bootstrap over the prompts, or over what they share (emoji, languages): see intervals.py. A
    share that does not vary has Wilson's interval, as score_interval has it there.
    """
    rng = np.random.default_rng(0)
    weights = 1.0
    shared = shared or (range(len(places)),)
    levels = max(len(set(labels)) for labels in shared)
    for labels in shared:
        weights = weights * draw_anew(np.array(labels), rng)
    weights = weights[weights.sum(1) > 0]  # (resamples, prompts)
    total = weights.sum(1)
    top_1 = places == 1
    top_5 = places <= 5
    measures = {
        "top 1": (np.mean(top_1), weights @ top_1 / total),
        "top 5": (np.mean(top_5), weights @ top_5 / total),
        "median rank": (np.median(places), weighted_median(places, weights)),
    }
    result = {"n": len(places), "candidates": candidates}
    for name, (score, resampled) in measures.items():
        low, high = np.quantile(resampled, (0.025, 0.975))
        if name != "median rank" and np.ptp(resampled) == 0:
            low, high = wilson(score * levels, levels)
        result[name] = {"score": float(score), "interval": (float(low), float(high))}
    return result


def pixel_features(pictures: np.ndarray) -> Tensor:
    """uint8 (B, height, width, 3) -> (B, height width 3): distances are those of the pixels."""
    return torch.from_numpy(pictures).float().flatten(1) / 255


def learned_features(
    candidates: np.ndarray, seed: int = 0, steps: int = 300
) -> Callable[[np.ndarray], Tensor]:
    """A small network that has learned to tell these pictures, uint8 (M, S, S, 3), apart.

    It sees them shifted, tilted, soft or recoloured, and never a generated one. -> a function from
    pictures (B, S, S, 3) to unit vectors (B, 128).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _network()
        names = nn.Parameter(torch.randn(len(candidates), WIDTH))

    def to_input(pictures: np.ndarray) -> Tensor:
        return torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1  # (B, 3, S, S)

    # each candidate's own vector is learned beside the network: classification by cosine
    glyphs = to_input(candidates)
    optimizer = torch.optim.AdamW([*net.parameters(), names], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(glyphs), (128,), generator=generator)
        seen = F.normalize(net(_augment(glyphs[chosen], generator)), dim=-1)
        scores = SHARPNESS * seen @ F.normalize(names, dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(scores, chosen).backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def features(pictures: np.ndarray) -> Tensor:
        return F.normalize(net(to_input(pictures)), dim=-1)

    return features


def _network() -> nn.Sequential:
    widths = (3, 32, 64, 128)
    layers = []
    for width_in, width_out in pairwise(widths):
        layers.append(nn.Conv2d(width_in, width_out, 3, 2, 1))
        layers.append(nn.GroupNorm(8, width_out))
        layers.append(nn.GELU())
    head = nn.Linear(widths[-1] * 16, WIDTH)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), head)


def _augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, tilt, soften and recolour each picture of (B, 3, S, S) a little, in its way."""

    def some(*shape: int) -> Tensor:
        """Uniform in -1 to 1, one of this shape for each picture."""
        return 2 * torch.rand(len(pictures), *shape, generator=generator) - 1

    scale = 1 + 0.15 * some(1)
    tilt = 0.15 * some(1)
    shift = 0.12 * some(2)
    first_row = torch.cat([scale, -tilt, shift[:, :1]], 1)
    second_row = torch.cat([tilt, scale, shift[:, 1:]], 1)
    matrix = torch.stack([first_row, second_row], 1)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    softness = (some(1, 1, 1) + 1) / 2
    moved = torch.lerp(moved, F.avg_pool2d(moved, 3, 1, 1), softness)
    moved = moved * (1 + 0.15 * some(3, 1, 1)) + 0.1 * some(3, 1, 1)
    return moved + 0.03 * torch.randn(moved.shape, generator=generator)
