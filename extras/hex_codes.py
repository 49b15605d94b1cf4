"""A folder of pictures whose captions say a colour by its hex code: how few make an expert hear it?

    python -m extras.hex_codes --codes 10 --out runs/hex-10
    python train.py --from runs/shapes --data shapes:0.9,runs/hex-10:0.1 --out runs/heard-10

Each code comes with each shape. No code of the suite `colors` is among them, so that its prompts
ask for colours that were never shown with their code.
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.hex_codes")
    import cli

    cli.start()

import json
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
from data import CANONICAL_COLORS, SHAPES, Group, Scene, draw_things, lay_out
from extras.suites import read_suite


def codes(n: int, seed: int) -> list[tuple[int, int, int]]:
    """n different colours, none of the suite `colors`; of one seed the first ones stay the same."""
    asked = {prompt.rgb for prompt in read_suite("colors")}
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, int, int], None] = {}
    while len(found) < n:
        rgb = tuple(rng.integers(0, 256, 3).tolist())
        if rgb not in asked:
            found[rgb] = None
    return list(found)


def write_pictures(folder: Path, n: int, image_size: int, seed: int) -> int:
    """Each code with each shape, and metadata.jsonl last -> how many pictures."""
    rng = np.random.default_rng([seed, 1])
    lines = []
    for rgb in codes(n, seed):
        name = bytes(rgb).hex()
        for shape in SHAPES:
            # placed as any thing of one colour is, whichever
            scene = Scene((Group(1, CANONICAL_COLORS[0], shape),))
            things = [replace(thing, rgb=rgb) for thing in lay_out(scene, rng)]
            file = f"{name}-{shape}.png"
            save_picture(draw_things(things, image_size), folder / file)
            lines.append({"file_name": file, "text": f"a {shape} in the color #{name}"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(folder / "metadata.jsonl", text)
    return len(lines)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Pictures whose captions say a colour by its hex code.")
    add = parser.add_argument
    add("--codes", type=positive(int), default=10, help="how many; each comes with eight shapes")
    add("--image-size", type=positive(int), default=64, help="pixels")
    add("--seed", type=seed_number, default=0, help="of the codes and of where the shapes stand")
    add("--out", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there; expected a new folder")
    make_folder(args.out)
    count = write_pictures(args.out, args.codes, args.image_size, args.seed)
    print(f"{args.out}: {count} pictures")


if __name__ == "__main__":
    one_line_errors(main)
