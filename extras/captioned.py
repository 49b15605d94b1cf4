"""Captioned pictures of one's own, however they are stored: in which order training sees them, at
which size, and which of them it never sees.

A tenth is held out, by a hash of the picture, so that a copy under another name is on the same
side: evaluate.py --suite held-out says how well a run does there.
"""

import hashlib
import warnings
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock

import numpy as np

from extras.files import read_picture, size_as_seen

CACHE_BYTES = 256e6  # of decoded pictures: what fits is decoded once, not every epoch
HELD_OUT_FROM = 100  # pictures; of fewer all are trained on
HASHED_BYTES = 2**16  # of a picture's file, from its beginning
WIDEST = 2.0  # the largest ratio of sides among the buckets


class Captioned:
    """Pictures with captions; a subclass says where they are.

    pairs: what names a picture, and its caption; of these a tenth becomes `held_out`, if there are
    HELD_OUT_FROM pictures. An epoch is a permutation of the rest. A picture that does not decode is
    skipped, the next one takes its place, and `skipped` counts it.
    """

    made_for = {}  # no options

    def __init__(self, pairs: list[tuple], image_size: int, seed: int):
        self.image_size = image_size
        self.seed = seed
        self.every = pairs
        self.pairs, self.held_out = self._split(pairs)
        self.set_aside = set(self.held_out)
        self.prompts = tuple(dict.fromkeys(caption for _, caption in self.pairs))[:8]
        self.skipped: set = set()
        self.lock = Lock()
        self.shapes: dict = {}  # of each picture (height, width), with buckets
        self.block = 1  # so many examples in a row have one shape
        self.order = lru_cache(maxsize=2)(self._order)
        in_cache = int(CACHE_BYTES / (3 * image_size**2))
        self.picture = lru_cache(maxsize=in_cache)(self._picture)

    # -- what a subclass may have in another form

    def open(self, picture):
        """-> a path, or an open file, that Pillow reads. OSError if it is gone."""
        return picture

    def place_of(self, picture) -> str:
        """Where it is, in words."""
        return str(picture)

    def name_of(self, picture) -> str:
        """That stays when all of them are moved."""
        return str(picture)

    def bytes_of(self, picture) -> int:
        """The length of its file."""
        return picture.stat().st_size

    def pictures_of(self, pair: tuple, draws: int) -> np.ndarray:
        """(draws, height, width, 3): a picture needs no variety beside the noise's."""
        return np.stack([self.picture(pair[0])] * draws)

    # -- what training asks for

    def example(self, index: int, draws: int) -> tuple[str, np.ndarray]:
        epoch, place = divmod(index, len(self.order(0)))
        order = self.order(epoch)
        wanted = self.shape_of(self.pairs[order[place]][0])
        for k in range(len(order)):  # the next one in place of one that does not decode
            pair = self.pairs[order[(place + k) % len(order)]]
            if self.shape_of(pair[0]) != wanted:
                continue
            try:
                return pair[1], self.pictures_of(pair, draws)
            except ValueError as error:
                with self.lock:  # examples are made by several threads
                    if not self.skipped:
                        said = f"{error} and is skipped; later ones are counted silently"
                        warnings.warn(said, stacklevel=2)
                    self.skipped.add(pair[0])
        raise ValueError(f"none of the {len(self.pairs)} pictures of {self.about()} decodes")

    def unseen(self) -> Iterator[tuple[str, np.ndarray]]:
        """The captions and pictures that are held out, those that decode."""
        for picture, caption in self.held_out:
            try:
                yield caption, self.picture(picture)
            except ValueError:
                continue

    def about(self) -> str:
        said = f"{len({picture for picture, _ in self.every})} pictures with captions"
        if self.held_out:
            said += f", {len(self.held_out)} of them held out"
        return said

    def fingerprint(self) -> str:
        """Changes with the pictures' names, captions and sizes of files; not with their times."""
        digest = hashlib.sha256()
        for picture, caption in self.every:
            named = (self.name_of(picture), self.bytes_of(picture), caption)
            digest.update(repr(named).encode())
        return digest.hexdigest()

    def shape_of(self, picture) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.shapes.get(picture, (self.image_size, self.image_size))

    # -- orders and sizes

    def use_buckets(self, unit: int, block: int) -> None:
        """From now on each picture keeps its shape, nearly: it goes to the bucket whose shape, of
        about image_size**2 pixels with sides that `unit` divides, is nearest to its own. `block`
        examples in a row, a step's, are of one bucket; in each epoch some are left out that make no
        whole block, others in each. Buckets of fewer pictures than a block are dissolved."""
        buckets = bucket_shapes(self.image_size, unit)
        ratios = {}
        for picture, _ in self.pairs:
            height, width = self._size_of_file(picture)
            ratios[picture] = width / height
        self.block = block
        while True:
            members: dict[tuple, int] = dict.fromkeys(buckets, 0)
            for picture, _ in self.pairs:
                self.shapes[picture] = nearest(buckets, ratios[picture])
                members[self.shapes[picture]] += 1
            smallest = min(buckets, key=members.get)
            if members[smallest] >= block or len(buckets) == 1:
                break
            buckets.remove(smallest)
        self.order.cache_clear()

    def _order(self, epoch: int) -> np.ndarray:
        """Indices into pairs."""
        rng = np.random.default_rng([self.seed, epoch])
        order = self._shuffled(rng)
        of_shape: dict[tuple, list[int]] = {}
        for i in order:
            of_shape.setdefault(self.shape_of(self.pairs[i][0]), []).append(i)
        if len(of_shape) < 2:
            return order
        blocks = []
        for indices in of_shape.values():
            whole = len(indices) // self.block * self.block
            blocks += np.reshape(indices[:whole], (-1, self.block)).tolist()
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.pairs))

    def _split(self, pairs: list[tuple]) -> tuple[list[tuple], list[tuple]]:
        """Those to train on, and those held out."""
        pictures = dict.fromkeys(picture for picture, _ in pairs)
        if len(pictures) < HELD_OUT_FROM:
            return pairs, []
        out = {picture for picture in pictures if self._is_held_out(picture)}
        trained = [pair for pair in pairs if pair[0] not in out]
        return trained, [pair for pair in pairs if pair[0] in out]

    def _is_held_out(self, picture) -> bool:
        file = self.open(picture)
        if not hasattr(file, "read"):
            file = open(file, "rb")
        with file:
            digest = hashlib.sha256(file.read(HASHED_BYTES))
        digest.update(str(self.bytes_of(picture)).encode())
        return int(digest.hexdigest()[:8], 16) % 10 == 0

    def _size_of_file(self, picture) -> tuple[int, int]:
        """(height, width) as it is seen, from its beginning alone; square if that does not decode:
        it will be skipped."""
        try:
            return size_as_seen(self.open(picture))
        except MemoryError:
            raise
        except Exception:  # on damaged bytes Pillow raises anything
            return 1, 1

    def _picture(self, picture) -> np.ndarray:
        shape = self.shape_of(picture)
        return np.asarray(read_picture(self.open(picture), shape, self.place_of(picture)))


def bucket_shapes(image_size: int, unit: int) -> list[tuple[int, int]]:
    """(height, width) of all buckets: of each width the height that comes nearest to image_size**2
    pixels, both multiples of unit, neither above WIDEST times the other."""
    shapes = {(image_size, image_size)}
    for width in range(unit, 2 * image_size + 1, unit):
        height = max(unit, round(image_size**2 / width / unit) * unit)
        if max(width, height) <= WIDEST * min(width, height):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes)


def nearest(shapes: list[tuple[int, int]], ratio: float) -> tuple[int, int]:
    """The shape whose width over height is nearest to a ratio, in its logarithm."""
    return min(shapes, key=lambda shape: abs(np.log(shape[1] / shape[0] / ratio)))
