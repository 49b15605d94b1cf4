"""Do four things of one unnamed colour agree on it, or does each decide from its own noise?

    python -m extras.agreement --ckpt runs/shapes

"four hearts": training shows them in one colour, any of ten. Near the noise a picture of such
hearts says a little about that colour in each of them, and four times as much in all together. What
the expert predicts there is held against two readers who know where the hearts are and compute the
mean of what is possible exactly: one looks at each heart alone, one at all four (Bayes' rule; the
noise is Gaussian).
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.agreement")
    import cli

    cli.start()

import numpy as np
import torch
from torch import Tensor

from assemble import llm_of
from checkpoint import load_expert, pick_checkpoint
from cli import OneLineParser, one_line_errors, pick_device, pick_dtype, positive, seed_number
from data import CANONICAL_COLORS, COLORS, Group, Scene, Thing, draw_things, lay_out
from flow import interpolate
from sample import data_of

TIMES = (0.05, 0.1, 0.15)
SHAPES = ("circle", "square", "heart")  # that have no hole and no thin arm


def four_alike(
    n: int, side: int, seed: int
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """n captions, pictures (n, side, side, 3) uint8, the colour of each (n, 3) in [-1, 1], and
    where its four things are, (n, 4, side, side), 1 inside."""
    rng = np.random.default_rng(seed)
    captions = []
    pictures = []
    colors = []
    places = []
    for _ in range(n):
        shape = str(rng.choice(SHAPES))
        things = lay_out(Scene((Group(4, None, shape),)), rng)
        captions.append(f"four {shape}s")
        pictures.append(draw_things(things, side))
        colors.append(np.array(things[0].rgb) / 127.5 - 1)
        inside = []
        for thing in things:
            alone = Thing(thing.shape, (255, 255, 255), thing.x, thing.y, thing.radius)
            inside.append(draw_things([alone], side)[..., 0] > 240)
        places.append(np.stack(inside))
    return captions, np.stack(pictures), np.stack(colors), np.stack(places)


def readers(x_t: Tensor, t: float, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The expected colour of each of four things (B, 4, 3): from its own pixels, from those of all.

    x_t (B, 3, side, side), inside (B, 4, side, side). Given colour c, the mean over the n pixels of
    a thing is t c and noise of the deviation (1 - t) / sqrt(n).
    """
    possible = torch.tensor([COLORS[name] for name in CANONICAL_COLORS]) / 127.5 - 1  # (10, 3)
    pixels = inside.sum((2, 3))  # (B, 4)
    seen = mean_inside(x_t, inside)[:, :, None]  # (B, 4, 1, 3)
    off = (seen - t * possible).square().sum(-1)  # (B, 4, 10)
    evidence = -off * pixels[..., None] / (2 * (1 - t) ** 2)
    alone = evidence.softmax(-1) @ possible
    together = evidence.sum(1, keepdim=True).softmax(-1) @ possible
    return alone, together.expand_as(alone)


def mean_inside(picture: Tensor, inside: Tensor) -> Tensor:
    """(B, 3, side, side), (B, 4, side, side) -> mean colours (B, 4, 3)."""
    total = torch.einsum("bchw,bkhw->bkc", picture, inside)
    return total / inside.sum((2, 3))[..., None]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Do things of one unnamed colour agree on it?")
    parser.add_argument("--ckpt", help="a run's folder or a Hub id, trained on shapes")
    parser.add_argument("--n", type=positive(int), default=60, help="pictures")
    parser.add_argument("--seed", type=seed_number, default=5, help="of the pictures and the noise")
    args = parser.parse_args(argv)
    ckpt, why = pick_checkpoint(args.ckpt)
    print(f"checkpoint {ckpt} ({why})")
    device, _ = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    expert = load_expert(ckpt, device)
    if "shapes" not in str(expert.made_for.get("data")):
        raise ValueError(f"{ckpt} was trained on {expert.made_for.get('data')}; expected shapes")
    if expert.prediction == "noise":
        raise ValueError(f"{ckpt} predicts the noise (ddpm); expected a run of --objective flow")
    llm = llm_of(expert, None, device, dtype)

    # the pictures, on their way from the noise
    captions, pictures, colors, places = four_alike(args.n, expert.image_size, args.seed)
    data = data_of(expert, pictures, device)
    true = torch.from_numpy(colors).float()[:, None]  # (B, 1, 3)
    inside = torch.from_numpy(places).float()
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    context = llm.context(captions)

    print(f"mean squared error of the colour, in [-1, 1], over {args.n} pictures of four things")
    print("   t  each alone  all four  expert")
    for now in TIMES:
        t = torch.full((len(data),), now, device=device)
        x_t = interpolate(data, noise, t)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            clean = x_t + (1 - now) * expert(x_t, t, context)
        predicted = mean_inside(clean.cpu(), inside)
        alone, together = readers(x_t.cpu(), now, inside)
        errors = []
        for colour in (alone, together, predicted):
            errors.append((colour - true).square().mean().item())
        print(f"{now:4} {errors[0]:11.2f} {errors[1]:9.2f} {errors[2]:7.2f}", flush=True)


if __name__ == "__main__":
    one_line_errors(main)
