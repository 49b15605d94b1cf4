"""Draw.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --prompts FILE --ckpt runs/shapes --n 4 --seed 7 --out samples

Writes every picture at its own size, and grid.png: all of them enlarged, with their prompts.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flow import euler_sample
from model import FrozenLLM, ImageExpert, ask_hub, load_llm


def one_line_errors(main) -> None:
    """Run a command; what the user can mend is one line on stderr and exit status 2, not a traceback."""
    try:
        main()
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)


def positive(kind):
    """argparse type: a number above zero."""

    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above zero")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its own message
    return parse


def seed_number(text: str) -> int:
    """argparse type: a seed that every generator takes."""
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to {2**31 - 1}")
    return int(text)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def pick_device(name: str) -> tuple[torch.device, str]:
    """ "auto" or a device's name -> the device, and why."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device, "asked for"
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """ "auto", "float32" or "bfloat16" -> the arithmetic of the matrix products, and why. Trained weights stay float32."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu.get("avx512_bf16")
    return (torch.bfloat16, "fast here") if fast else (torch.float32, "bfloat16 is not fast here")


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """(..., C, height, width) in [-1, 1] -> (..., height, width, C) uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_tensor(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """The inverse: (B, height, width, C) uint8 -> (B, C, height, width) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).movedim(-1, -3).float() / 127.5 - 1


def draw(
    expert: ImageExpert, llm: FrozenLLM, prompts: list[str], seeds: list[int], steps: int = 24, guidance: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0), renorm: bool = False, batch_size: int = 64,
) -> np.ndarray:  # fmt: skip
    """A picture of each prompt, from the noise of its seed -> (prompts, height, width, C) uint8.

    A prompt and a seed give the same picture whatever else is drawn beside it.
    """
    shape, pictures = (expert.channels, expert.image_size, expert.image_size), []
    for start in range(0, len(prompts), batch_size):
        captions, noises = prompts[start : start + batch_size], seeds[start : start + batch_size]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in noises])
        context, empty = llm.context(captions), llm.context([""] * len(captions))
        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            x = euler_sample(expert, noise.to(llm.device), context, steps, empty, guidance, interval, renorm)
        pictures.append(to_pixels(x))
    return np.concatenate(pictures)


def _caption_font(size: int) -> ImageFont.FreeTypeFont:
    """A system font that knows more letters than Pillow's own, if there is one."""
    for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def captioned_grid(pictures: np.ndarray, captions: list[str], columns: int = 4) -> Image.Image:
    """pictures (prompts, n, height, width, 3) -> one image: a cell per prompt, its n pictures side by side, text below."""
    n, height, width = pictures.shape[1:4]
    scale = max(1, 128 // height)
    cell_width, cell_height, gap = n * (width * scale + 4) - 4, height * scale, 8
    font = _caption_font(12)
    lines = [textwrap.wrap(caption, max(12, cell_width // 7)) or ["(no prompt)"] for caption in captions]
    text_height = 15 * max(map(len, lines)) + 4
    columns = max(1, min(columns if n == 1 else columns // 2, len(captions)))
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell_width + gap), gap + rows * (cell_height + text_height + gap)), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(pictures, lines)):
        x, y = gap + i % columns * (cell_width + gap), gap + i // columns * (cell_height + text_height + gap)
        for k, picture in enumerate(row):
            enlarged = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x + k * (width * scale + 4), y))
        ink.multiline_text((x, y + cell_height + 2), "\n".join(caption), fill="black", font=font, spacing=3)
    return sheet


def newest_run(folder: Path = Path("runs")) -> Path:
    runs = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(f"no checkpoint under {folder}/: train one first (python train.py), or name one with --ckpt")
    return runs[-1].parent


def load_expert(ckpt: str, device: torch.device) -> ImageExpert:
    """A run's folder or a Hub id -> the expert. ValueError, in one line, if that cannot be."""
    if (Path(ckpt) / "model.safetensors").is_file():
        return ImageExpert.from_pretrained(ckpt).to(device)
    if Path(ckpt).exists() or len(Path(ckpt).parts) != 2:
        raise ValueError(f"--ckpt {ckpt}: no model.safetensors there; expected the folder of a run, or a Hub id")
    try:
        return ImageExpert.from_pretrained(ckpt, local_files_only=True).to(device)
    except OSError:
        if why := ask_hub(ckpt):
            raise ValueError(f"--ckpt {ckpt}: no such folder, and as a Hub id: {why}") from None
    return ImageExpert.from_pretrained(ckpt).to(device)


def llm_of(expert: ImageExpert, name: str | None, device, dtype, trust_remote_code: bool = False) -> FrozenLLM:
    """The LLM that an expert was trained with; another one, or another revision of it, is refused."""
    made_for = expert.made_for
    if not {"llm", "llm_fingerprint"} <= made_for.keys():
        raise ValueError("this checkpoint does not say which LLM it was trained with; expected one that train.py wrote")
    llm = load_llm(name or made_for["llm"], device, dtype, trust_remote_code=trust_remote_code)
    if llm.fingerprint != made_for["llm_fingerprint"]:
        raise ValueError(
            f"this checkpoint was trained with {made_for['llm']} (weights {made_for['llm_fingerprint'][:12]}), not with "
            f"{llm.name} (weights {llm.fingerprint[:12]}): its keys and values mean something else"
        )
    llm.keep([block.layer.index for block in expert.blocks])
    return llm


def main() -> None:
    parser = OneLineParser(description="Draw pictures of prompts.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given many times")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--ckpt", help="a run's folder or a Hub id (default: the newest run under runs/)")
    parser.add_argument("--llm", help="where the checkpoint's LLM lies now, if it has moved; its weights must be the same")
    parser.add_argument("--n", type=positive(int), default=1, help="pictures of each prompt")
    parser.add_argument("--steps", type=positive(int), default=24, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 is none")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                        help="guide only while t is between these (0 is noise, 1 is the picture)")  # fmt: skip
    parser.add_argument("--renorm", action="store_true", help="keep a guided velocity no longer than the unguided one")
    parser.add_argument("--seed", type=seed_number, default=0, help="picture k of a prompt starts from the noise of seed + k")
    parser.add_argument("--batch-size", type=positive(int), default=64, help="pictures drawn at once")
    parser.add_argument("--out", default="samples", help="folder for the pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and the expert"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    args = parser.parse_args()

    prompts = args.prompt + (Path(args.prompts).read_text("utf-8").splitlines() if args.prompts else [])
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "a red circle" (many times if you like) or --prompts FILE')
    ckpt = args.ckpt or str(newest_run())
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    print(f"device {device} ({why_device}), {dtype} ({why_dtype}); checkpoint {ckpt}; seed {args.seed}")
    expert = load_expert(ckpt, device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    llm = llm_of(expert, args.llm, device, dtype, args.trust_remote_code)
    seeds = [args.seed + k for k in range(args.n)]
    pictures = draw(expert, llm, [prompt for prompt in prompts for _ in seeds], seeds * len(prompts), args.steps, args.guidance,
                    tuple(args.guidance_interval), args.renorm, args.batch_size)  # fmt: skip
    pictures = pictures.reshape(len(prompts), args.n, *pictures.shape[1:])
    for i, (prompt, row) in enumerate(zip(prompts, pictures)):
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
        for seed, picture in zip(seeds, row):
            path = out / f"{i:03d}-{words}-seed{seed}.png"
            Image.fromarray(picture).save(path)
            print(path)
    captioned_grid(pictures, prompts).save(out / "grid.png")
    print(out / "grid.png")


if __name__ == "__main__":
    one_line_errors(main)
