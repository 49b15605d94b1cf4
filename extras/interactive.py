"""Prompts at the terminal, with the LLM and the expert kept loaded.

    python sample.py --interactive
    python sample.py --interactive --ckpt runs/shapes --seed 7 --maps

Each line is drawn, and shown in the terminal where that has colours; a line that begins with / is a
command.
"""

import argparse
import signal
import sys
from pathlib import Path
from shutil import get_terminal_size

import numpy as np
from PIL import Image

from cli import guidance_form, one_line, positive, seed_number, words
from extras.readers import reader_from, with_reading
from extras.windows import check_windows
from extras.word_maps import check_expert
from llm import FrozenLLM
from model import ImageExpert
from sample import draw_into, file_words

HELP = """\
a line of text is drawn; a command begins with /
/steps N       Euler steps
/guidance G    scale, as --guidance takes it
/seed N        of the noise
/think [SPEC]  the LLM writes first, or no longer: think:40, or another SPEC as --read takes it
/maps [WORD]   which word each patch looks at, into files, or no longer
/help, /quit"""
THINK = "think:40"


def converse(args: argparse.Namespace, expert: ImageExpert, llm: FrozenLLM) -> None:
    """Draw what is typed until /quit or the end of the input. args: of sample.py; what is set here
    is set there."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        try:
            import readline  # noqa: F401  arrow keys, and the lines before
        except ImportError:
            pass  # Windows
        print("a prompt is drawn; /help says what else there is", flush=True)
    while True:
        try:
            line = words(input("> " if at_terminal else "")).strip()
        except EOFError:
            if at_terminal:
                print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(obey(line, args, expert, llm), flush=True)
            elif line:
                draw_line(line, args, expert, llm)
        except KeyboardInterrupt as stop:
            if signal.SIGTERM in stop.args:
                raise
            print("stopped; /quit ends", flush=True)
        except Exception as error:  # the session goes on, whatever is wrong with one line
            print(f"sample.py: {one_line(error)}", file=sys.stderr, flush=True)


def draw_line(prompt: str, args: argparse.Namespace, expert: ImageExpert, llm: FrozenLLM) -> None:
    """Draw a prompt into files of its own, and show it."""
    out = Path(args.out)
    number = next_number(out)
    seeds = [args.seed + k for k in range(args.n)]
    paths = [out / f"{number:03d}-{file_words(prompt)}-seed{seed}.png" for seed in seeds]
    pictures = draw_into(paths, args, expert, llm, [prompt] * args.n, seeds)
    if sys.stdout.isatty():
        print(half_blocks(np.concatenate(pictures, axis=1)), flush=True)


def next_number(folder: Path) -> int:
    """One more than the largest that a picture there begins with: none is overwritten."""
    largest = -1
    for path in folder.glob("[0-9][0-9][0-9]*-*"):
        number = path.name.partition("-")[0]
        if number.isdecimal():
            largest = max(largest, int(number))
    return largest + 1


def half_blocks(picture: np.ndarray) -> str:
    """A picture (height, width, 3) uint8 as lines of text: U+2580, the upper half of a letter's
    place, in the colour of one pixel on that of the pixel below it. As wide as the terminal at
    most."""
    height, width = picture.shape[:2]
    room = get_terminal_size()
    factor = min(1, room.columns / width, 2 * max(8, room.lines - 4) / height)
    width = max(1, round(factor * width))
    height = max(2, round(factor * height) // 2 * 2)
    pixels = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
    lines = []
    for y in range(0, height, 2):
        line = ""
        for upper, lower in zip(pixels[y].tolist(), pixels[y + 1].tolist()):
            line += "\x1b[38;2;{};{};{}m".format(*upper)
            line += "\x1b[48;2;{};{};{}m\u2580".format(*lower)
        lines.append(line + "\x1b[0m")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# commands


def obey(line: str, args: argparse.Namespace, expert: ImageExpert, llm: FrozenLLM) -> str:
    """Do what a command says -> what is so now. ValueError, and nothing is changed, if that cannot
    be."""
    command, _, value = line.partition(" ")
    value = value.strip()
    if command == "/help":
        return HELP
    if command == "/think":
        set_reading(value, args, expert, llm)
        return f"/think {args.read or 'off'}"
    if command == "/maps":
        set_maps(value, args, expert)
        return f"/maps {'off' if args.maps is None else args.maps or 'on'}"
    kinds = {"/steps": positive(int), "/guidance": guidance_form, "/seed": seed_number}
    if command not in kinds:
        raise ValueError(f"{command}: expected one of {', '.join(kinds)}, /think, /maps, /help")
    if not value:
        raise ValueError(f"{command}: expected a value, as in {command} 4")
    try:
        setattr(args, command[1:], kinds[command](value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{command} {error}") from None
    return f"{command} {value}"


def set_reading(spec: str, args: argparse.Namespace, expert: ImageExpert, llm: FrozenLLM) -> None:
    """Another --read, or none if there was one; around what the checkpoint itself reads."""
    if not spec and not args.read:
        spec = THINK
    wanted = argparse.Namespace(**vars(args) | {"read": spec})
    check_windows(wanted, None, args.n)
    before = llm.reader
    llm.reader = reader_from(llm, expert.made_for)
    if spec:
        try:
            llm.reader = with_reading(llm, spec)
        except Exception:
            llm.reader = before
            raise
    args.read = spec or None


def set_maps(word: str, args: argparse.Namespace, expert: ImageExpert) -> None:
    """The maps of sample.py --maps: on, with this word, or off if they were on."""
    wanted = word
    if not word and args.maps is not None:
        wanted = None
    if wanted is not None:
        check_expert(expert)
        check_windows(argparse.Namespace(**vars(args) | {"maps": wanted}), None, args.n)
    args.maps = wanted
