"""Draw.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --prompts FILE --ckpt runs/shapes --n 4 --seed 7 --out samples
    python sample.py --prompts evaluation_metadata.jsonl:geneval --out for-geneval
    python sample.py --prompt "a red circle" --maps --trajectory --out circle.png
    python sample.py --interactive

Writes every picture at its own size, and grid.png: the first of them enlarged, with their prompts.
A single picture may go to --out FILE.png. FILE:geneval, dpg or wise writes the folders that the
official evaluators of these benchmarks read. --maps shows which word each patch looks at,
--trajectory how the picture came out of the noise: in files beside it.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from assemble import open_towers
from cli import (
    OneLineParser,
    between,
    captioned_grid,
    file_words,
    guidance_form,
    one_line_errors,
    positive,
    save_picture,
    seed_number,
    size_form,
    words,
    write_whole,
)
from flow import euler_sample
from llm import Context, FrozenLLM
from model import ImageExpert

AT_ONCE = 64  # pictures that are drawn as one batch
RENOISE = 0.6  # up to this t noise is drawn anew at each step (see euler_sample), and then
RENOISE_HELP = "up to this t each step draws its noise anew; 0: even steps, the first noise alone"
GUIDANCE = 1.5  # scale; with fresh noise more does harm (RESULTS.md)
SHIFT = 2.0  # more of the steps are near the noise
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # files of --out


@torch.no_grad()
def draw(
    expert: ImageExpert,
    llm: FrozenLLM,
    prompts: list[str],
    seeds: list[int],
    steps: int = 24,
    guidance: float = GUIDANCE,
    interval: tuple[float, float] = (0.0, 1.0),
    renorm: bool = False,
    batch_size: int = AT_ONCE,
    watch: Callable | None = None,
    renoise: float = RENOISE,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A picture of each prompt, from the noise of its seed -> (prompts, height, width, 3) uint8.

    A prompt and a seed give the same picture whatever else is drawn beside it: to rounding. In
    float32 that is at most one level of 255; in bfloat16 matrix kernels sum in another order for
    another batch size; up to 7 levels were seen.
    watch: see euler_sample; it is called for each batch in turn. renoise: see there too; with 0 the
    steps are even, and all chance is in the first noise. size: height and width in pixels, if they
    are not the expert's own; ValueError if it cannot have them.
    """
    shape = expert.shape(size)
    pictures = []
    for start in range(0, len(prompts), batch_size):
        captions = prompts[start : start + batch_size]
        noise = noise_of(seeds[start : start + batch_size], shape, llm.device)
        context = llm.context(captions)  # outside of autocast, as in training
        empty = llm.context([""] * len(captions))
        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            guiding = (empty, guidance, interval, renorm)
            x = integrate(expert, expert, noise, context, steps, renoise, guiding, watch)
        pictures.append(pixels_of(expert, x))
    return np.concatenate(pictures)


def integrate(
    expert: ImageExpert,
    predict: Callable,
    noise: Callable,
    context: Context,
    steps: int,
    renoise: float,
    guiding: tuple = (None, 1.0, (0.0, 1.0), False),
    watch: Callable | None = None,
) -> torch.Tensor:
    """From noise() to pictures, (B, C, height, width), by the sampler of what the expert predicts.

    predict: the expert, or what is made of its answers. guiding: of euler_sample, the context of
    the empty prompt, the scale, its interval and renorm.
    """
    if expert.prediction == "noise":
        from extras.ddpm import ddim_sample, guided

        if guiding[1] != 1:
            predict = guided(predict, context, *guiding)
        eta = 1.0 if renoise else 0.0
        return ddim_sample(predict, noise(), context, steps, eta, noise, watch=watch)
    chance = (SHIFT if renoise else 1.0, renoise, noise)
    return euler_sample(predict, noise(), context, steps, *guiding, *chance, watch)


def noise_of(seeds: list[int], shape: tuple, device: torch.device) -> Callable:
    """-> noise(): each call gives the next noise of each seed, (seeds, *shape); of a row, the same
    whatever its neighbours, and on every device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> torch.Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(device)

    return noise


def pixels_of(expert: ImageExpert, x: torch.Tensor) -> np.ndarray:
    """What the expert draws, (..., C, height, width) -> pictures (..., height, width, 3) uint8."""
    return to_pixels(expert.vae.decode(x) if expert.vae else x)


def data_of(expert: ImageExpert, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """The inverse: pictures (B, height, width, 3) uint8 -> (B, C, height, width) as it draws."""
    return expert.vae.encode(pictures) if expert.vae else to_tensor(pictures, device)


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """(..., C, height, width) in [-1, 1] -> (..., height, width, C) uint8. ValueError if a number
    is not finite."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "what was drawn is not finite, so no picture; expected a --guidance nearer to 1, or a "
            "checkpoint whose weights are finite"
        )
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_tensor(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """The inverse: (B, height, width, C) uint8 -> (B, C, height, width) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).movedim(-1, -3).float() / 127.5 - 1


# -------------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description="Draw pictures of prompts.",
    )
    add = parser.add_argument_group("what is drawn").add_argument
    add("--prompt", action="append", type=words, default=[], help="may be given many times")
    files = "a prompt a line, .json, .jsonl, or a folder of .txt; FILE:geneval, FILE:dpg, FILE:wise"
    add("--prompts", metavar="FILE", help=files)
    add("--interactive", action="store_true", help="ask for prompts, with all kept loaded")
    said = "say what these pictures show; --prompt is how it begins (extras/lmfusion.py)"
    add("--describe", nargs="+", metavar="PICTURE", help=said)
    add("--temperature", type=between(0, 100), default=0.0, help="of what --describe says")
    add("--image", metavar="PICTURE", help="edit it as --prompt says (extras/editing.py)")
    away = "from other pictures than --image, beside the --guidance of the prompt"
    add("--image-guidance", type=between(-1000, 1000), default=1.5, help=away)
    add("--n", type=positive(int), help="pictures of each prompt (default: 1, or the benchmark's)")
    add("--seed", type=seed_number, default=0, help="picture k starts from the noise of seed + k")
    add("--steps", type=positive(int), default=24, help="Euler steps")
    add("--renoise", type=between(0, 1), default=RENOISE, help=RENOISE_HELP)
    scale = "scale; 1 is none; 3:from=0.1:to=0.8 while t is between these; 3:renorm (flow.guide)"
    add("--guidance", type=guidance_form, default=str(GUIDANCE), help=scale)
    other = "of the pictures in pixels, height x width, as 64x96 (default: the expert's own)"
    add("--size", type=size_form, help=other)
    add("--out", default="samples", help="folder for the pictures, or the file of a single one")

    add = parser.add_argument_group("what is shown of it").add_argument
    maps = "which word each patch looks at; of one (WORD, or the most telling) by layer and step"
    add("--maps", nargs="?", const="", type=words, metavar="WORD", help=maps)
    add("--trajectory", action="store_true", help="from noise to picture: a strip and a film")

    add = parser.add_argument_group("with what").add_argument
    add("--ckpt", help="a run's folder or a Hub id (default: the newest under runs/, or ours)")
    add("--llm", help="where the checkpoint's LLM lies now, if it has moved")
    add("--vae", help="where its autoencoder lies now, if it has moved")
    add("--read", help="what the LLM does first: think:40, rewrite, rewrite:reencode, image:FILE")
    add("--trust-remote-code", action="store_true", help="let a Hub model run its own code")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    dtypes = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=dtypes, help="of the LLM and the expert")
    args = parser.parse_args(argv)
    plain = vars(parser.parse_args([]))
    args.given = {name for name in plain if getattr(args, name) != plain[name]}
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.describe:
        from extras.describing import describe_files

        describe_files(args)
        return

    # what cannot work is refused before anything is loaded
    prompts, listed, layout = asked_for(args)
    out = Path(args.out)
    into_file = check_out(args, out, layout, len(prompts) * args.n)
    if args.image:
        from extras.editing import edit_files

        edit_files(args, out, into_file)
        return
    if args.read:
        from extras.readers import drawing_form

        drawing_form(args.read)
    if args.maps is not None or args.trajectory:
        from extras.windows import check_windows

        check_windows(args, layout, len(prompts) * args.n)
    expert, llm = open_towers(args, out.parent if into_file else out)
    expert.shape(args.size)  # refused before anything is drawn
    if args.interactive:
        from extras.interactive import converse

        converse(args, expert, llm)
        return

    # the pictures, each into its file
    seeds = [args.seed + k for k in range(args.n)]
    texts = []
    paths = []
    for i, prompt in enumerate(prompts):
        for seed in seeds:
            texts.append(prompt)
            paths.append(out / f"{i:03d}-{file_words(prompt)}-seed{seed}.png")
    if into_file:
        paths = [out]
    elif layout:
        paths = []
    pictures = draw_into(paths, args, expert, llm, texts, seeds * len(prompts))

    # all together
    pictures = pictures.reshape(len(prompts), args.n, *pictures.shape[1:])
    if layout:
        from extras.prompts import save_layout

        save_layout(layout, out, listed, pictures)
        print(f"{out}: {len(prompts)} prompts as {layout} reads them")
    elif not into_file:
        write_whole(out / "grid.png", captioned_grid(pictures, prompts).save)
        print(out / "grid.png")


def asked_for(args: argparse.Namespace) -> tuple[list[str], list, str | None]:
    """The prompts; name, text and record of those of a file; the layout of a benchmark. args.n,
    where it is not given, becomes the layout's. ValueError for no prompt at all."""
    listed = []
    layout = None
    n = 1
    if args.prompts:
        from extras import prompts as of_files

        path, layout = of_files.split_layout(args.prompts)
        listed = of_files.read_prompts(path)
        n = args.n or of_files.LAYOUTS.get(layout, 1)
        if layout:
            of_files.check_layout(layout, [] if args.prompt else listed, n)
    args.n = args.n or n
    prompts = args.prompt + [text for _, text, _ in listed]
    if args.interactive and prompts:
        raise ValueError("--interactive asks for the prompts: leave out --prompt and --prompts")
    if not prompts and not args.interactive:
        raise ValueError(
            'nothing to draw: give --prompt "a red circle" (many times if you like) or '
            "--prompts FILE"
        )
    return prompts, listed, layout


def check_out(args: argparse.Namespace, out: Path, layout: str | None, count: int) -> bool:
    """Whether --out is the file of a single picture. ValueError if it cannot be what is asked."""
    into_file = out.suffix.lower() in PICTURES and not out.is_dir()
    if into_file and (layout or args.interactive or count > 1):
        number = "what is asked for one by one" if args.interactive else count
        raise ValueError(f"--out {out} is a file, for one picture; expected a folder for {number}")
    folder = out.parent if into_file else out
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"{out}: nothing can be written there ({place} is a file); --out names a folder, "
                "or a picture: x.png"
            )
    return into_file


def draw_into(
    paths: list[Path],
    args: argparse.Namespace,
    expert: ImageExpert,
    llm: FrozenLLM,
    prompts: list[str],
    seeds: list[int],
) -> np.ndarray:
    """Draw a picture of each prompt, as `draw` does, and save each in its file (if they have one),
    with what --maps and --trajectory show of it. Says what the LLM wrote, and the files."""
    windows = None
    if args.maps is not None or args.trajectory:
        from extras.windows import Windows

        windows = Windows(args, expert, llm, prompts)
    scale, interval, renorm = args.guidance
    options = {"interval": interval, "renorm": renorm, "watch": windows, "renoise": args.renoise}
    options["size"] = args.size
    pictures = draw(expert, llm, prompts, seeds, args.steps, scale, **options)
    written = getattr(llm.reader, "written", {})
    for prompt in dict.fromkeys(prompts):
        if prompt in written:
            print(f"{prompt} -> {written[prompt]}")
    for i, path in enumerate(paths):
        save_picture(pictures[i], path)
        print(path)
        if windows:
            print(*windows.save(i, path, pictures[i]), sep="\n")
    return pictures


if __name__ == "__main__":
    one_line_errors(main)
