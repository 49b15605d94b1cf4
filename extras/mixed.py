"""Several sources in one run: a batch has examples of each, and one expert learns them all.

    python train.py --data shapes,emoji
    python train.py --data shapes:weight=2,my-pictures      # of each three examples, two are shapes

Emoji beside shapes are named without what shapes are called (emoji:no-shapes), so that "a red
heart" means one picture.
"""

import hashlib

import numpy as np

from data import open_source

PROMPTS = 8  # in a grid of samples


class Mixed:
    """Sources that take turns, each as often as its weight: example i is one of source i modulo the
    sum of the weights. What data.py asks of a source holds of them together.

    parts: name and options of each, as flags.data_form gives them. ValueError for a part that is
    not there, is there twice, or has no whole weight.
    """

    def __init__(self, parts: list[tuple[str, dict]], image_size: int, seed: int = 0):
        self.image_size = image_size
        self.names = [name for name, _ in parts]
        together = ",".join(self.names)
        if "" in self.names:
            raise ValueError(f"--data {together}: expected a source on each side of a comma")
        self.sources = []
        self.turns: list[tuple[int, int]] = []  # whose it is, and which of its own in this round
        self.weights = []
        for i, (name, options) in enumerate(parts):
            if name in self.names[:i]:
                raise ValueError(f"--data {together}: expected {name} once, not twice")
            if name == "edits":
                raise ValueError(f"--data {together}: edits are pairs, and stand alone")
            options = dict(options)
            weight = whole_weight(name, options.pop("weight", "1"))
            if name == "emoji" and "shapes" in self.names:
                options["no_shapes"] = True
            self.sources.append(open_source(name, image_size, seed, **options))
            self.weights.append(weight)
            self.turns += [(i, k) for k in range(weight)]
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
        return hashlib.sha256(repr(held).encode()).hexdigest()


def whole_weight(name: str, weight: str | bool) -> int:
    """ValueError if it is not a whole number from 1 to 100."""
    number = int(weight) if str(weight).isdecimal() else 0
    if not 1 <= number <= 100:
        expected = "a whole number from 1 to 100, as in weight=2"
        raise ValueError(f"--data {name}:weight={weight}: expected {expected}")
    return number
