"""Draw.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --prompts FILE --ckpt runs/shapes --n 4 --seed 7 --out samples

    python sample.py --prompts evaluation_metadata.jsonl --layout geneval --out for-geneval

Writes every picture at its own size, and grid.png: the first of them enlarged, with their prompts; or, with --layout, the
folders that the official evaluators of GenEval, DPG-Bench and WISE read. A single picture may go to --out FILE.png.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import unicodedata
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageDraw, ImageFont

import bridges  # noqa: F401 - its towers can be loaded too
from cli import (
    OneLineParser,
    between,
    it_may_have_moved,
    make_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
    words,
    write_text,
    write_whole,
)
from data import (
    PICTURE_SUFFIXES,
    files_in,
    read_lines,
    read_picture,
    read_records,
    read_text,
    text_in,
)
from flow import euler_sample
from loading import check_same_llm
from model import FrozenLLM, Tower, ask_hub, load_llm


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """(..., C, height, width) in [-1, 1] -> (..., height, width, C) uint8. ValueError if a number is not finite."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "what was drawn is not finite, so no picture; expected a --guidance nearer to 1, or a "
            "checkpoint whose weights are finite"
        )
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_tensor(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """The inverse: (B, height, width, C) uint8 -> (B, C, height, width) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).movedim(-1, -3).float() / 127.5 - 1


@torch.no_grad()
def draw(
    expert: Tower, llm: FrozenLLM, prompts: list[str], seeds: list[int], steps: int = 24, guidance: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0), renorm: bool = False, batch_size: int = 64,
) -> np.ndarray:  # fmt: skip
    """A picture of each prompt, from the noise of its seed -> (prompts, height, width, C) uint8.

    A prompt and a seed give the same picture whatever else is drawn beside it: to rounding. In float32 that is at most one
    level of 255; in bfloat16 matrix kernels sum in another order for another batch size; up to 7 levels were seen.
    """
    shape, pictures = (expert.channels, expert.image_size, expert.image_size), []
    for start in range(0, len(prompts), batch_size):
        captions, noises = prompts[start : start + batch_size], seeds[start : start + batch_size]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in noises])
        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            context, empty = (expert.prepare(llm.context(texts)) for texts in (captions, [""] * len(captions)))
            x = euler_sample(expert, noise.to(llm.device), context, steps, empty, guidance, interval, renorm)
        pictures.append(to_pixels(x))
    return np.concatenate(pictures)


@lru_cache(maxsize=64)
def _font(size: int, unusual: str) -> ImageFont.FreeTypeFont:
    names = ["DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"]
    if unusual:  # ask fontconfig, where there is one, for a font that has these letters
        try:
            wanted = "sans:charset=" + " ".join(f"{ord(letter):x}" for letter in unusual)
            found = subprocess.run(["fc-match", "-f", "%{file}", wanted], capture_output=True)
            names.insert(0, os.fsdecode(found.stdout))
        except OSError:
            pass
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def caption_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A system font that has the letters of a text, if there is one."""
    letters = sorted({letter for letter in text if ord(letter) > 0x24F and letter.isprintable()})
    return _font(size, "".join(letters[:4]))


GRID_PROMPTS = 64  # that a grid shows, of each the first so many pictures, enlarged or reduced to such a side, and
GRID_PICTURES = 8  # so many lines of the prompt: any number of any prompts gives a grid that viewers open
GRID_SIDE = (128, 512)  # least and most pixels
GRID_LINES = 6


def captioned_grid(pictures: np.ndarray, captions: list[str], columns: int = 4) -> Image.Image:
    """pictures (prompts, n, height, width, 3) -> one image: a cell per prompt, its n pictures side by side, text below."""
    pictures = pictures[:GRID_PROMPTS, :GRID_PICTURES]
    captions = captions[:GRID_PROMPTS]
    n, height, width = pictures.shape[1:4]
    least, most = GRID_SIDE
    enlarge = max(1, least // height)
    scale = enlarge if height * enlarge <= most else most / height
    height, width = round(height * scale), round(width * scale)
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    cell_width, cell_height, gap = n * (width + 4) - 4, height, 8
    lines = []
    for caption in captions:
        line_length = max(12, cell_width // 7)
        wrapped = textwrap.wrap(caption, line_length, max_lines=GRID_LINES, placeholder=" …")
        lines.append(wrapped or ["(no prompt)"])
    text_height = 15 * max(map(len, lines)) + 4
    columns = max(1, min(columns if n == 1 else columns // 2, len(captions)))
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell_width + gap), gap + rows * (cell_height + text_height + gap)), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (row, text, caption) in enumerate(zip(pictures, lines, captions)):
        x, y = gap + i % columns * (cell_width + gap), gap + i // columns * (cell_height + text_height + gap)
        for k, picture in enumerate(row):
            enlarged = Image.fromarray(picture).resize((width, height), resample)
            sheet.paste(enlarged, (x + k * (width + 4), y))
        ink.multiline_text((x, y + cell_height + 2), "\n".join(text), fill="black", font=caption_font(caption, 12), spacing=3)
    return sheet


def picture_table(blocks: list[tuple[str, dict[str, list[tuple[np.ndarray, str, bool | None]]]]]) -> Image.Image:
    """Lines of small pictures with a title each, in blocks side by side. blocks: name, title -> [(picture (height, width, 3),
    text below, whether it is right)]; a frame is green where it is, red where it is not, none for None."""
    side, width, text_height, title_height, gap = 72, 116, 36, 20, 6
    height = title_height + gap + side + text_height
    columns = max(len(line) for _, lines in blocks for line in lines.values())
    block_width, rows = columns * width + 16, max(len(lines) for _, lines in blocks)
    image = Image.new("RGB", (gap + block_width * len(blocks), title_height + rows * height), "white")
    ink = ImageDraw.Draw(image)
    for k, (name, lines) in enumerate(blocks):
        left = gap + k * block_width
        ink.text((left, 2), name, fill="black", font=caption_font(name, 13))
        for r, (title, line) in enumerate(lines.items()):
            top = title_height + r * height
            ink.text((left, top), title, fill=(90, 90, 90), font=caption_font(title, 12))
            for c, (picture, text, right) in enumerate(line):
                x, y = left + c * width, top + title_height
                if right is not None:
                    ink.rectangle((x, y, x + side + 3, y + side + 3), fill=(40, 150, 60) if right else (200, 50, 50))
                enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                image.paste(enlarged, (x + 2, y + 2))
                write_small(ink, (x, y + side + 5), text, width - 6, lines=3)
    return image


def spread(n: int, k: int) -> list[int]:
    """k of n places, evenly spread, the first among them."""
    return [i * n // min(n, k) for i in range(min(n, k))]


def write_small(ink: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, lines: int) -> None:
    """A prompt, broken into lines between words, or inside a word that is too long."""
    emoji = (c for c in text if ord(c) >= 0x1F000 or 0x2B00 <= ord(c) < 0x2C00)  # few fonts have them beside letters
    for c in dict.fromkeys(emoji):
        text = text.replace(c, f"[{unicodedata.name(c, f'U+{ord(c):X}').lower()}]")
    font = caption_font(text, 10)
    done, now = [], ""
    for character in text:
        if character == "\n" or ink.textlength(now + character, font) > width:
            head, space, tail = ("", "", now) if character == "\n" else now.rpartition(" ")
            done, now = ([*done, head], tail) if space else ([*done, now], "")
        now += character.strip("\n")
    ink.multiline_text(place, "\n".join([*done, now][:lines]), fill="black", font=font, spacing=1)


def newest_run(folder: Path = Path("runs")) -> Path:
    runs = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(f"no checkpoint under {folder}/: train one first (python train.py), or name one with --ckpt")
    return runs[-1].parent


def load_expert(ckpt: str, device: torch.device) -> Tower:
    """A run's folder or a Hub id -> the expert. ValueError, in one line, if that cannot be."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it misses a config.json that stands in the weights' file
    if (Path(ckpt) / "model.safetensors").is_file():
        # not from_pretrained, which reads the copy of the configuration in config.json too
        return Tower._from_pretrained(model_id=ckpt).to(device)
    if Path(ckpt).exists() or len(Path(ckpt).parts) != 2:
        expected = "the folder of a run, with model.safetensors in it, or a Hub id"
        raise ValueError(f"--ckpt {ckpt}: expected {expected}")
    try:
        return Tower.from_pretrained(ckpt, local_files_only=True).to(device)
    except (OSError, HFValidationError):
        if why := ask_hub(ckpt):
            raise ValueError(f"--ckpt {ckpt}: no such folder, and as a Hub id: {why}") from None
    return Tower.from_pretrained(ckpt).to(device)


def llm_of(expert: Tower, name: str | None, device, dtype, trust_remote_code: bool = False) -> FrozenLLM:
    """The LLM that an expert was trained with; another one, or another revision of it, is refused."""
    made_for = expert.made_for
    if not {"llm", "llm_fingerprint"} <= made_for.keys():
        raise ValueError("this checkpoint does not say which LLM it was trained with; expected one that train.py wrote")
    llm = load_llm(name or made_for["llm"], device, dtype, trust_remote_code=trust_remote_code,
                   random_seed=made_for.get("random_llm"), revision=None if name else made_for.get("llm_revision"),
                   encoders=not expert.reads)  # fmt: skip
    check_same_llm(made_for, {"llm": llm.name, **llm.identity})
    expert.attach(llm)
    llm.read(made_for.get("template", "{}"), made_for.get("expose", "all"))
    llm.think(*made_for.get("thinking") or [None])
    return llm


FRAMES = Path(__file__).parent / "assets" / "frames"  # what --think and --rewrite ask the LLM, to be read and edited


def add_thinking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--think", type=positive(int), metavar="N", help="the LLM first writes up to N tokens about the prompt")
    add("--rewrite", nargs="?", const="context", choices=["context", "reencode"],
        help="it rewrites the prompt, and the image sees only that: in its context, or read again alone")  # fmt: skip
    add("--frame", metavar="FILE", help="what it is asked, with {} for the prompt (default: assets/frames/)")


def thinking_of(llm: FrozenLLM, args: argparse.Namespace) -> list | None:
    """What --think, --rewrite and --frame say, as the arguments of FrozenLLM.think; None if they say nothing."""
    if not (args.think or args.rewrite):
        if args.frame:
            raise ValueError(f"--frame {args.frame} is for --think or --rewrite: add one, or leave it out")
        return None
    path = Path(args.frame or FRAMES / ("rewrite.txt" if args.rewrite else "think.txt"))
    try:
        frame = read_text(path).removesuffix("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--frame {path} cannot be read: {error}") from None
    shown = {None: "all", "context": "written", "reencode": "reencode"}[args.rewrite]
    return [llm.chat(frame) if llm.tokenizer.chat_template else frame, args.think or 48, shown]


def open_picture(path: str) -> Image.Image:
    """The picture of --image, whole, as viewers show it. ValueError if it does not decode."""
    try:
        return read_picture(path)
    except ValueError as error:
        raise ValueError(f"--image {error}; expected a whole PNG, JPEG, or other picture") from None


def names_a_file(name) -> bool:
    """Whether every system can have a file of that name, with a suffix."""
    if isinstance(name, bool) or not isinstance(name, int | str):
        return False
    letters = re.fullmatch(r'[^\0-\x1f/\\:*?"<>|\ud800-\udfff]+', str(name))
    return letters is not None and len(str(name).encode()) <= 240


def read_prompts(path: Path) -> list[tuple[str, str, dict]]:
    """Name, text and record of each prompt: a file with a prompt a line (blank lines are none); .jsonl or .json with objects
    that have "prompt" (GenEval, WISE); a folder of .txt files with a prompt each (DPG-Bench).

    ValueError if it is none of these, or holds no prompt.
    """
    prompts = []
    if not path.exists() or path.suffix.lower() in (".csv", ".tsv"):
        what = "is a table" if path.exists() else "is not there"
        raise ValueError(f"--prompts {path} {what}; expected a prompt a line, JSON objects, or a folder of .txt")
    if path.is_dir():
        for file in files_in(path, {".txt"}, below=False):
            text = read_text(file).strip()
            if not text:
                raise ValueError(f"--prompts {file} is empty; expected a prompt")
            prompts.append((file.stem, text, {}))
    elif path.suffix.lower() not in (".json", ".jsonl"):
        for _, line in read_lines(path):
            prompts.append((f"{len(prompts):05d}", line, {}))
    else:
        for where, record in read_records(path):
            lower = {key.lower(): value for key, value in record.items()}
            prompt = text_in(lower, "prompt", where)
            name = lower.get("prompt_id", f"{len(prompts):05d}")
            if prompt is None:
                raise ValueError(f'{where}: {json.dumps(record)[:60]}; expected JSON objects that have a "prompt"')
            if not names_a_file(name):
                raise ValueError(f"{where}: prompt_id is {json.dumps(name)[:60]}; expected what a file can be named after")
            prompts.append((str(name), prompt, record))
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt; expected a prompt a line, JSON objects, or a folder of .txt")
    return prompts


LAYOUTS = {"geneval": 4, "dpg": 4, "wise": 1}  # pictures of each prompt that the evaluator expects


def check_layout(layout: str, prompts: list[tuple[str, str, dict]], n: int) -> None:
    """ValueError if a benchmark's evaluator could not read what would be written: before the work, not after it."""
    if not prompts:
        raise ValueError(f"--layout {layout} needs the benchmark's own prompts: give --prompts, and no --prompt")
    if layout in ("dpg", "wise") and n != LAYOUTS[layout]:
        raise ValueError(f"--n {n}: the evaluator of {layout} expects {LAYOUTS[layout]} of each prompt")
    seen = set()
    for name, _, record in prompts:
        if layout == "geneval" and "prompt" not in record:
            raise ValueError("--layout geneval needs GenEval's evaluation_metadata.jsonl as --prompts")
        if name.lower() in seen:  # on Windows and on Macs A.png is a.png
            raise ValueError(f"prompt_id {name!r} stands there twice: one picture would overwrite the other")
        seen.add(name.lower())


def save_layout(layout: str, out: Path, prompts: list[tuple[str, str, dict]], pictures: np.ndarray) -> None:
    """pictures (prompts, n, height, width, 3) as a benchmark's own evaluator reads them."""
    for i, ((name, _, record), row) in enumerate(zip(prompts, pictures)):
        if layout == "geneval":  # 00000/metadata.jsonl, 00000/samples/00000.png
            samples = out / f"{i:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            write_text(samples.parent / "metadata.jsonl", json.dumps(record) + "\n")
            for k, picture in enumerate(row):
                save_picture(picture, samples / f"{k:05d}.png")
        elif layout == "dpg":  # NAME.png: two by two
            save_picture(np.vstack([np.hstack(row[:2]), np.hstack(row[2:])]), out / f"{name}.png")
        else:  # ID.png
            save_picture(row[0], out / f"{name}.png")


def save_picture(picture: np.ndarray, path: Path) -> None:
    write_whole(path, Image.fromarray(picture).save)


def file_words(prompt: str) -> str:
    """A prompt as a part of a file's name: in letters that the system's names can have, and short in bytes too."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
    encoding = sys.getfilesystemencoding()
    return words.encode(encoding, "ignore")[:100].decode(encoding, "ignore")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Draw pictures of prompts.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", action="append", type=words, default=[], help="what to draw; may be given many times")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, .json, .jsonl, or a folder of .txt files")
    parser.add_argument("--layout", choices=LAYOUTS, help="write --prompts as this benchmark's evaluator reads them")
    parser.add_argument("--ckpt", help="a run's folder or a Hub id (default: the newest run under runs/)")
    parser.add_argument("--llm", help="where the checkpoint's LLM lies now, if it has moved; its weights must be the same")
    parser.add_argument("--n", type=positive(int), help="pictures of each prompt (default: 1, or what --layout asks for)")
    parser.add_argument("--steps", type=positive(int), default=24, help="Euler steps")
    parser.add_argument("--guidance", type=between(-1000, 1000), default=3.0, help="guidance scale; 1 is none")
    parser.add_argument("--guidance-interval", type=between(0, 1), nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                        help="guide only while t is between these (0 is noise, 1 is the picture)")  # fmt: skip
    parser.add_argument("--renorm", action="store_true", help="keep a guided velocity no longer than the unguided one")
    parser.add_argument("--seed", type=seed_number, default=0, help="picture k of a prompt starts from the noise of seed + k")
    parser.add_argument("--batch-size", type=positive(int), default=64, help="pictures drawn at once")
    parser.add_argument("--out", default="samples", help="folder for the pictures, or the file of a single one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and the expert"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    parser.add_argument(
        "--image", metavar="FILE", help="a picture to start from: a vision-language model sees it before the prompt"
    )
    add_thinking(parser)
    args = parser.parse_args(argv)

    if args.image and (args.think or args.rewrite):
        raise ValueError("--image does not go with --think or --rewrite: leave one out")
    listed = read_prompts(Path(args.prompts)) if args.prompts else []
    prompts = args.prompt + [text for _, text, _ in listed]
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "a red circle" (many times if you like) or --prompts FILE')
    args.n = args.n or LAYOUTS.get(args.layout, 1)
    if args.guidance_interval[0] > args.guidance_interval[1]:
        raise ValueError(f"--guidance-interval {args.guidance_interval}: expected FROM to be at most TO")
    if args.layout:
        check_layout(args.layout, [] if args.prompt else listed, args.n)
    out = Path(args.out)
    into_file = out.suffix.lower() in PICTURE_SUFFIXES and not out.is_dir()
    if into_file and (args.layout or len(prompts) * args.n > 1):
        raise ValueError(f"--out {out} is a file, for one picture; expected a folder for {len(prompts) * args.n}")
    ckpt = args.ckpt or str(newest_run())
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    print(f"device {device} ({why_device}), {dtype} ({why_dtype}); checkpoint {ckpt}; seed {args.seed}")
    expert = load_expert(ckpt, device)
    make_folder(out.parent if into_file else out)
    own = it_may_have_moved(expert.made_for.get("llm", ""), "--llm")
    with nullcontext() if args.llm else own:
        llm = llm_of(expert, args.llm, device, dtype, args.trust_remote_code)
    seeds = [args.seed + k for k in range(args.n)]
    if thinking := thinking_of(llm, args):
        llm.think(*thinking)
    if args.image:
        llm.look(open_picture(args.image))
    texts = [prompt for prompt in prompts for _ in seeds]
    pictures = draw(expert, llm, texts, seeds * len(prompts), args.steps, args.guidance,
                    tuple(args.guidance_interval), args.renorm, args.batch_size)  # fmt: skip
    for prompt, written in llm.written.items():
        print(f"{prompt} -> {written}")
    pictures = pictures.reshape(len(prompts), args.n, *pictures.shape[1:])
    if args.layout:
        save_layout(args.layout, out, listed, pictures)
        print(f"{out}: {len(prompts)} prompts as {args.layout} reads them")
        return
    if into_file:
        save_picture(pictures[0, 0], out)
        print(out)
        return
    for i, (prompt, row) in enumerate(zip(prompts, pictures)):
        for seed, picture in zip(seeds, row):
            path = out / f"{i:03d}-{file_words(prompt)}-seed{seed}.png"
            save_picture(picture, path)
            print(path)
    write_whole(out / "grid.png", captioned_grid(pictures, prompts).save)
    print(out / "grid.png")


if __name__ == "__main__":
    one_line_errors(main)
