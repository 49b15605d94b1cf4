"""Shapes as a folder of captioned pictures, as --data takes it.

    python -m extras.shapes_folder --out my-pictures        # 1,000, with plain English captions
    python -m extras.shapes_folder --codes 10 --out runs/codes-10
    python train.py --data shapes:0.9,runs/codes-10:0.1
    python -m extras.shapes_folder --codes 10 --pairs --out runs/pairs-10

--codes: instead, single shapes whose captions say their colour by its hex code; each code comes
with each shape. None is asked for in a suite: its codes were never shown. --pairs: and once more
with each shape, beside a thing whose colour is a word; no caption has two codes.
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.shapes_folder")
    import cli

    cli.start()

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cli import (
    OneLineParser,
    make_folder,
    one_line_errors,
    positive,
    save_picture,
    seed_number,
    write_text,
)
from data import (
    CANONICAL_COLORS,
    SHAPES,
    Group,
    Scene,
    Shapes,
    draw_things,
    lay_out,
    with_article,
)
from extras.suites import read_suite

Example = tuple[str, str, np.ndarray]  # the file's name, the caption, (side, side, 3) uint8


def codes(n: int, seed: int) -> list[tuple[int, int, int]]:
    """n different colours that no suite asks for; of one seed the first ones stay the same."""
    asked = set()
    for prompt in read_suite("colors") + read_suite("palettes"):
        asked.update(prompt.palette)
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, int, int], None] = {}
    while len(found) < n:
        rgb = tuple(rng.integers(0, 256, 3).tolist())
        if rgb not in asked:
            found[rgb] = None
    return list(found)


def captioned(n: int, image_size: int, seed: int, one_object: bool) -> Iterator[Example]:
    """The first n pictures that train.py would draw, and their captions."""
    source = Shapes(image_size, seed, one_object)
    for i in range(n):
        caption, pictures = source.example(i, 1)
        yield f"{i:06d}", caption, pictures[0]


def coded(n: int, image_size: int, seed: int, pairs: bool = False) -> Iterator[Example]:
    """Each of n codes with each shape; with pairs, once more beside a thing in another colour."""
    rng = np.random.default_rng([seed, 1])
    rng_of_pairs = np.random.default_rng([seed, 2])
    for rgb in codes(n, seed):
        name = bytes(rgb).hex()
        for shape in SHAPES:
            group = Group(1, CANONICAL_COLORS[0], shape)  # placed as one of any colour would be
            words = f"a {shape} in the color #{name}"
            things = [replace(thing, rgb=rgb) for thing in lay_out(Scene((group,)), rng)]
            yield f"{name}-{shape}", words, draw_things(things, image_size)
            if pairs:
                scene, caption = beside_another(group, words, rng_of_pairs)
                things = lay_out(scene, rng_of_pairs)
                things = [replace(t, rgb=rgb) if t.shape == shape else t for t in things]
                yield f"{name}-{shape}-and", caption, draw_things(things, image_size)


def beside_another(group: Group, words: str, rng: np.random.Generator) -> tuple[Scene, str]:
    """The group and one of another shape, whose colour is a word; which is named first is open."""
    while True:
        other = Group(1, str(rng.choice(CANONICAL_COLORS)), str(rng.choice(SHAPES)))
        if other.shape != group.shape and not Scene((other,)).is_held_out():
            break
    named = [(group, words), (other, with_article(f"{other.color} {other.shape}"))]
    if rng.random() < 0.5:
        named.reverse()
    groups, captions = zip(*named)
    return Scene(groups), " and ".join(captions)


def write_folder(folder: Path, examples: Iterable[Example]) -> int:
    """The pictures, and metadata.jsonl last -> how many."""
    lines = []
    for name, caption, picture in examples:
        save_picture(picture, folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")
    write_text(folder / "metadata.jsonl", "".join(lines))
    return len(lines)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Shapes as a folder of captioned pictures.")
    add = parser.add_argument
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--captions", type=positive(int), default=1000, help="how many pictures")
    kinds.add_argument("--codes", type=positive(int), help="so many hex codes in their place")
    add("--pairs", action="store_true", help="with --codes: and pairs with one code")
    add("--one-object", action="store_true", help="a single shape in each picture")
    add("--image-size", type=positive(int), default=64, help="pixels")
    add("--seed", type=seed_number, default=0, help="of what is drawn")
    add("--out", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there; expected a new folder")
    if args.codes and args.one_object:
        raise ValueError("--codes draws single objects: leave out --one-object")
    if args.pairs and not args.codes:
        raise ValueError("--pairs are pairs of a code and a word: give --codes N")
    if args.codes:
        examples = coded(args.codes, args.image_size, args.seed, args.pairs)
    else:
        examples = captioned(args.captions, args.image_size, args.seed, args.one_object)
    count = write_folder(make_folder(args.out), examples)
    print(f"{args.out}: {count} pictures")


if __name__ == "__main__":
    one_line_errors(main)
