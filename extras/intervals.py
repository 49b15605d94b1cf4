"""How sure a score is: 95 % intervals over what was drawn anew, not over pictures that share it.

Twenty scenes in 21 languages from two seeds are 840 pictures, but no 840 independent draws: an easy
scene is easy in every language. So scenes, languages and seeds are drawn anew, each as a whole, and
a picture counts as often as its scene, its language and its seed were drawn: the pigeonhole
bootstrap (Owen 2007, Annals of Applied Statistics 1), after Efron & Tibshirani 1993. It errs on the
wide side, since pure noise counts once for each factor.
Of two seeds nobody can tell how far a third lies (of such intervals 0.88 hold the truth where seeds
differ much): print the seeds themselves beside the interval.
"""

from collections import Counter
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

RESAMPLES = 2000
Z = 1.96  # 95 % of a normal distribution lies within so many standard deviations


@dataclass(frozen=True)
class Sample:
    """One value of each picture, and what it shares with others: each (n,), in the same order."""

    values: np.ndarray  # 0 or 1, or the difference of two such, -1 to 1
    rows: np.ndarray  # the score is the mean of the rows' means
    scenes: np.ndarray
    seeds: np.ndarray
    rows_are_drawn: bool = False  # rows are a sample, as languages are, not all that is meant

    def score(self) -> float:
        means = [self.values[self.rows == row].mean() for row in np.unique(self.rows)]
        return float(np.mean(means))

    def levels(self) -> int:
        """How many things there are at least that are independent of each other."""
        scenes = len(np.unique(self.scenes))
        return max(scenes, len(np.unique(self.rows))) if self.rows_are_drawn else scenes


def wilson(right: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n independent draws (Wilson 1927)."""
    middle = right + Z * Z / 2
    half = Z * sqrt(max(0.0, right * (n - right) / n) + Z * Z / 4)
    return max(0.0, (middle - half) / (n + Z * Z)), min(1.0, (middle + half) / (n + Z * Z))


def draw_anew(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often what a label names is drawn, in every resample: (n,) -> (RESAMPLES, n).

    Of k things k - 1 are drawn, with replacement: k would make the variance too small by
    (k - 1) / k, a half for two seeds (McCarthy & Snowden 1985). A single one stays as it is: how
    far others would lie from it cannot be known.
    """
    _, place = np.unique(labels, return_inverse=True)
    k = place.max() + 1
    if k == 1:
        return np.ones((RESAMPLES, len(place)))
    return rng.multinomial(k - 1, np.full(k, 1 / k), RESAMPLES)[:, place].astype(float)


def resampled_scores(sample: Sample) -> np.ndarray:
    """The score in every resample that has drawn anything: (at most RESAMPLES,)."""
    rng = np.random.default_rng(0)
    names, row = np.unique(sample.rows, return_inverse=True)
    member = np.eye(len(names))[row]  # (n, rows)
    weight = draw_anew(sample.scenes, rng) * draw_anew(sample.seeds, rng)
    row_weight = np.ones((RESAMPLES, len(names)))
    if sample.rows_are_drawn:
        row_weight = draw_anew(names, rng)
    drawn = weight @ member  # (RESAMPLES, rows)
    means = weight * sample.values @ member / np.maximum(drawn, 1)
    row_weight = row_weight * (drawn > 0)
    total = row_weight.sum(1)
    return (means * row_weight).sum(1)[total > 0] / total[total > 0]


def score_interval(sample: Sample) -> tuple[float, float]:
    """95 % interval of a score: Wilson's, for as many independent pictures as vary as much.

    So it stays within 0 and 1, and is plain Wilson where the pictures are independent. Where all
    are right, or none is, nothing varies: then as wide as if each scene (or language, if there are
    more) were right or wrong as a whole.
    """
    n = len(sample.values)
    score = sample.score()
    levels = sample.levels()
    if levels == n and len(np.unique(sample.rows)) == 1:
        return wilson(score * n, n)
    variance = float(resampled_scores(sample).var())
    effective = min(n, score * (1 - score) / variance) if variance > 0 else levels
    return wilson(score * effective, effective)


def difference_interval(sample: Sample) -> tuple[float, float]:
    """95 % interval of a mean of paired differences: the middle 95 % of the resamples.

    Where all are equal nothing varies: then as far to both sides as Wilson's interval of no right
    ones among as many scenes goes.
    """
    first = float(sample.values[0])
    if np.all(sample.values == first):
        room = wilson(0, sample.levels())[1]
        return max(-1.0, first - room), min(1.0, first + room)
    low, high = np.quantile(resampled_scores(sample), (0.025, 0.975))
    return float(low), float(high)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median in every resample: (n,), (RESAMPLES, n) -> (RESAMPLES,)."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], 1)
    place = (reached < reached[:, -1:] / 2).sum(1)
    return values[order][place]


# ------------------------------------------------------------------------------------------------
# tallies, as evaluate.py writes them: seed -> row -> {"n", "score", "right": "01", "scenes": "a b"}

Tallies = dict[int, dict[str, dict]]


def sample_of(runs: Tallies, rows_are_drawn: bool) -> Sample:
    """Runs of old kept no verdicts, only shares. Then the right ones are taken to come first, so
    that a picture's likeness to that of another seed is not underestimated; and where rows are
    drawn anew, scenes are not."""
    values, rows, scenes, seeds = [], [], [], []
    for seed, tallies in runs.items():
        for row, entry in tallies.items():
            n = entry["n"]
            right = entry.get("right", "1" * round(entry["score"] * n)).ljust(n, "0")
            if "scenes" in entry:
                scenes += entry["scenes"].split()
            else:
                scenes += ["unknown"] * n if rows_are_drawn else [f"{row} {k}" for k in range(n)]
            values += [float(letter) for letter in right]
            rows += [row] * n
            seeds += [seed] * n
    columns = [np.array(column) for column in (values, rows, scenes, seeds)]
    return Sample(*columns, rows_are_drawn)


def have_verdicts(runs: Tallies) -> bool:
    return all("right" in entry for tallies in runs.values() for entry in tallies.values())


def mean_of_rows(runs: Tallies, rows_are_drawn: bool = False) -> dict:
    """The mean of the rows' scores, as GenEval takes it, over runs of some seeds, its interval, and
    what that is over."""
    sample = sample_of(runs, rows_are_drawn)
    over = ["scenes"] if have_verdicts(runs) or not rows_are_drawn else []
    over += ["rows"] * rows_are_drawn + ["seeds"] * (len(runs) > 1)
    wrong = Counter()
    for tallies in runs.values():
        for entry in tallies.values():
            wrong.update(entry["wrong"])
    return {
        "score": sample.score(),
        "interval": score_interval(sample),
        "over": over,
        "n": len(sample.values),
        "wrong": dict(wrong),
    }


def difference(ours: Tallies, theirs: Tallies, rows_are_drawn: bool = False) -> dict | None:
    """How much better the first are, with the same scenes, rows and seeds. None where they share no
    seed, or it is not known which scenes were right."""
    seeds = [seed for seed in ours if seed in theirs]
    ours = {seed: ours[seed] for seed in seeds}
    theirs = {seed: theirs[seed] for seed in seeds}
    if not seeds or not (rows_are_drawn or have_verdicts(ours) and have_verdicts(theirs)):
        return None
    first = sample_of(ours, rows_are_drawn)
    second = sample_of(theirs, rows_are_drawn)
    same_scenes = np.array_equal(first.scenes, second.scenes)
    if not same_scenes or not np.array_equal(first.rows, second.rows):
        return None
    sample = replace(first, values=first.values - second.values)
    return {"score": sample.score(), "interval": difference_interval(sample)}
