"""Several sources in one run: a batch has examples of each, and one expert learns them all.

    python train.py --data shapes,emoji
    python train.py --data shapes:2,my-pictures             # of each three examples, two are shapes
    python train.py --data shapes:0.3,emoji:0.7

Emoji beside shapes are named without what shapes are called (emoji:no-shapes), so that "a red
heart" means one picture.
"""

import hashlib
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from data import open_source

PROMPTS = 8  # in a grid of samples
MOST_TURNS = 10_000


class Mixed:
    """Sources that take turns, each as often as its weight: example i is one of source i modulo the
    sum of the weights. What data.py asks of a source holds of them together.

    parts: name and options of each, as flags.data_form gives them, a weight among these: a number
    alone, or weight=2 (default: 1). ValueError for a part that is not there or is there twice, and
    for a weight that is none.
    """

    def __init__(self, parts: list[tuple[str, dict]], image_size: int, seed: int = 0):
        self.image_size = image_size
        self.names = [name for name, _ in parts]
        together = ",".join(self.names)
        if "" in self.names:
            raise ValueError(f"--data {together}: expected a source on each side of a comma")
        self.sources = []
        asked = []
        for i, (name, options) in enumerate(parts):
            if name in self.names[:i]:
                raise ValueError(f"--data {together}: expected {name} once, not twice")
            options = dict(options)
            asked.append(weight_in(name, options))
            if name == "emoji" and "shapes" in self.names:
                options["no_shapes"] = True
            source = open_source(name, image_size, seed, **options)
            if hasattr(source, "before_and_after") or hasattr(source, "vae"):
                what = "pairs for edits" if hasattr(source, "before_and_after") else "latents"
                raise ValueError(f"--data {together}: {name} has {what}, and stands alone")
            self.sources.append(source)
        self.weights = whole_weights(together, asked)
        self.turns: list[tuple[int, int]] = []  # whose it is, and which of its own in this round
        for i, weight in enumerate(self.weights):
            self.turns += [(i, k) for k in range(weight)]
        # evenly: whoever has a third of the turns has one of every three
        self.turns.sort(key=lambda turn: (turn[1] + 0.5) / self.weights[turn[0]])
        self.in_order = any(getattr(source, "in_order", False) for source in self.sources)
        self.made_for = {"mixed": self.names}
        for source in self.sources:
            self.made_for |= source.made_for

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        rounds, turn = divmod(index, len(self.turns))
        i, k = self.turns[turn]
        return self.sources[i].example(rounds * self.weights[i] + k, draws)

    @property
    def prompts(self) -> tuple[str, ...]:
        """As many of each source."""
        each = max(1, PROMPTS // len(self.sources))
        prompts = []
        for source in self.sources:
            prompts += source.prompts[:each]
        return tuple(prompts)

    @property
    def skipped(self) -> set:
        """Pictures that did not decode, of all folders."""
        skipped = set()
        for source in self.sources:
            skipped |= getattr(source, "skipped", set())
        return skipped

    def about(self) -> str:
        said = []
        for name, source, weight in zip(self.names, self.sources, self.weights):
            share = f"{weight / sum(self.weights):.0%}"
            said.append(f"{share} {name} ({source.about()})")
        return ", ".join(said)

    def fingerprint(self) -> str:
        """Changes with what each source holds, with their order and their weights."""
        held = []
        for source, weight in zip(self.sources, self.weights):
            held.append((weight, source.fingerprint() or source.made_for))
        if max(self.weights) > 1:
            held.append("evenly")  # older runs had all turns of a source in a row
        return hashlib.sha256(repr(held).encode()).hexdigest()


def weight_in(name: str, options: dict) -> Fraction:
    """The weight among a source's options, taken out of them. ValueError if it is no number above
    zero."""
    said = [option for option in options if option == "weight" or option[:1].isdigit()]
    if not said:
        return Fraction(1)
    value = options.pop(said[0])
    text = said[0] if value is True else value
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if len(said) > 1 or weight <= 0:
        expected = "one weight, a number above zero, as in 2, 0.5 or weight=2"
        raise ValueError(f"--data {name}:{text}: expected {expected}")
    return weight


def whole_weights(together: str, weights: list[Fraction]) -> list[int]:
    """The smallest whole numbers in the same ratio. ValueError if they are large."""
    common = lcm(*[weight.denominator for weight in weights])
    whole = [int(weight * common) for weight in weights]
    turns = sum(whole) // gcd(*whole)
    if turns > MOST_TURNS:
        raise ValueError(
            f"--data {together}: the weights make {turns} turns; expected rounder numbers, whose "
            f"ratio takes {MOST_TURNS} at most"
        )
    return [weight // gcd(*whole) for weight in whole]
