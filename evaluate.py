"""Score a run exactly: draw prompts whose scene is known, and let judge.py read the pictures back.

    python evaluate.py --ckpt runs/shapes
    python evaluate.py --ckpt runs/shapes --suite two --prompts 400 --guidance 2

Suites: `one` asks for one object ("a red circle"), `two` for two and how they stand ("a red circle left of a blue square"),
in GenEval's ten colours, without the colour-shape pairs and the relations that training holds out; `unseen` asks for
those alone. Prompts are drawn from a fixed seed; the share that is right comes with its 95 % Wilson interval.
"""

import argparse
from collections import Counter
from math import sqrt
from pathlib import Path

import numpy as np

from data import CANONICAL_COLORS, RELATIONS, SHAPES, Group, Scene
from judge import judge
from sample import (
    OneLineParser,
    captioned_grid,
    draw,
    llm_of,
    load_expert,
    newest_run,
    one_line_errors,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
)


def make_suite(name: str, n: int) -> list[tuple[str, Scene]]:
    """n prompts and the scenes they ask for, always the same ones."""
    rng, suite = np.random.default_rng(2026), []
    while len(suite) < n:
        groups = tuple(Group(1, str(rng.choice(CANONICAL_COLORS)), str(rng.choice(SHAPES))) for _ in range(2))
        relation = str(rng.choice(list(RELATIONS)))
        scene = Scene(groups[:1]) if name == "one" else Scene(groups, relation)
        if scene.is_held_out() != (name == "unseen") or groups[0] == groups[1]:
            continue
        a, b = (("an " if g.color[0] in "aeio" else "a ") + f"{g.color} {g.shape}" for g in groups)
        suite.append((a if name == "one" else f"{a} {relation} {b}", scene))
    return suite


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    middle, half = right + z * z / 2, z * sqrt(right * (n - right) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def main() -> None:
    parser = OneLineParser(description="Score a run's pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", help="a run's folder or a Hub id (default: the newest run under runs/)")
    parser.add_argument("--suite", default="one,two,unseen", help="which suites, with commas")
    parser.add_argument("--prompts", type=positive(int), default=100, help="prompts of each suite, one picture each")
    parser.add_argument("--steps", type=positive(int), default=24, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 is none")
    parser.add_argument("--renorm", action="store_true", help="keep a guided velocity no longer than the unguided one")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic of the LLM and the expert"
    )
    args = parser.parse_args()
    ckpt = args.ckpt or str(newest_run())
    names = args.suite.split(",")
    if unknown := set(names) - {"one", "two", "unseen"}:
        raise ValueError(f"--suite {unknown.pop()}: expected some of one,two,unseen")
    device, _ = pick_device(args.device)
    expert = load_expert(ckpt, device)
    if expert.made_for.get("data") != "shapes":
        raise ValueError(f"{ckpt} was trained on {expert.made_for.get('data')}: the suites need one trained on shapes")
    llm = llm_of(expert, None, device, pick_dtype(args.dtype, device)[0])
    for name in names:
        prompts, scenes = zip(*make_suite(name, args.prompts))
        seeds = [args.seed + i for i in range(len(prompts))]  # a noise of its own for each prompt
        pictures = draw(expert, llm, list(prompts), seeds, args.steps, args.guidance, renorm=args.renorm)
        verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes)]
        right = sum(verdict.ok for verdict in verdicts)
        low, high = wilson(right, len(verdicts))
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(v.reason for v in verdicts if not v.ok).most_common())
        print(
            f"{name:7} {right / len(verdicts):.2f}  [{low:.2f}, {high:.2f}] of {len(verdicts)}"
            + (f"; wrong: {why}" if why else "")
        )
        marked = [prompt + ("" if verdict.ok else f" ({verdict.reason})") for prompt, verdict in zip(prompts, verdicts)]
        captioned_grid(pictures[:32, None], marked[:32], columns=8).save(Path(ckpt) / f"evaluate-{name}.png")


if __name__ == "__main__":
    one_line_errors(main)
