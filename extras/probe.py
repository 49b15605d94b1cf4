"""Does the LLM not know it, or does the expert not hear it? Linear probes of what is handed over.

    python -m extras.probe --ckpt runs/shapes        # evaluate.py's flags; beside its scores
    python -m extras.probe --llm gemma-3-270m        # hex codes alone, and its control; no run

A probe is a ridge regression from each layer's values to colour and shape. It is fitted on training
captions and tested on the suites' prompts, beside the same measure of the pictures.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.probe")
    import cli

    cli.start()

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import evaluate
from cli import OneLineParser, make_folder, one_line_errors, pick_device, pick_dtype
from data import COLORS, SHAPES, Shapes
from evaluate import LoadedRun, write_json
from extras.colors import BASIC_COLORS, basic_color, lab
from extras.grades import NEAR, Grade, Graded
from extras.intervals import wilson
from extras.judge import NOTHING, Found
from extras.suites import Prompt, check_suites, read_suite
from llm import FrozenLLM
from loading import load_llm

TERMS = list(BASIC_COLORS)
CAPTIONS = 256  # that go through the LLM together

Answer = tuple[str, np.ndarray, str | None]  # basic colour term, L*a*b*, shape


def probe(llm: FrozenLLM, graded: Graded, seed: int, captions: int = 2000) -> dict:
    """Linear probes from each layer of the LLM to colour and shape, fitted on training captions of
    one thing, tested on the prompts of one thing; and the same measure of the pictures.

    -> {"layer 3" or "picture": {column: (share of colours right, share of shapes right)}}. A colour
    is right if its basic term is; where the prompt gives numbers, if it is less than NEAR away.
    """
    # what the probes are fitted on, and a column of prompts for each row of a suite
    examples, targets = training_captions(seed, captions)
    columns: dict[str, list[tuple[Prompt, Grade]]] = {}
    for suite, prompt, its_grade in graded:
        if prompt.is_of_one_thing:
            column = suite if suite == "knowledge" else f"{suite} {prompt.row}"
            columns.setdefault(column, []).append((prompt, its_grade))

    # every layer's answers
    heard = hear(llm, examples)
    tests = {}
    for column, pairs in columns.items():
        tests[column] = hear(llm, [prompt.text for prompt, _ in pairs])
    table = {}
    for k, layer in enumerate(llm.kept):
        predict = ridge(heard[k], targets)
        row = {}
        for column, pairs in columns.items():
            answers = [answer_of(out) for out in predict(tests[column][k])]
            row[column] = shares([prompt for prompt, _ in pairs], answers)
        table[f"layer {layer.index}"] = row

    # the pictures'
    row = {}
    for column, pairs in columns.items():
        answers = []
        for _, its_grade in pairs:
            thing = largest(its_grade)
            answers.append((thing.color, lab(thing.rgb), thing.shape))
        row[column] = shares([prompt for prompt, _ in pairs], answers)
    table["picture"] = row
    return table


def training_captions(seed: int, n: int) -> tuple[list[str], Tensor]:
    """n captions of one thing of a named colour, and what they mean, (n, terms + shapes + 3): its
    basic term and shape, one-hot, and its L*a*b*."""
    source = Shapes(8, seed)
    captions = []
    targets = torch.zeros(n, len(TERMS) + len(SHAPES) + 3)
    for i in range(20 * n):
        if len(captions) == n:
            break
        caption, scene, _ = source.caption(i)
        group = scene.groups[0]
        is_one = len(scene.groups) == 1 and group.count == 1
        if is_one and group.color:
            targets[len(captions)] = target_of(group.shape, COLORS[group.color])
            captions.append(caption)
    return captions, targets


def target_of(shape: str, rgb: tuple[int, int, int] | None) -> Tensor:
    """What a thing of this shape and colour is, (terms + shapes + 3,); no term without a colour."""
    target = torch.zeros(len(TERMS) + len(SHAPES) + 3)
    if rgb:
        target[TERMS.index(basic_color(rgb))] = 1
        target[-3:] = torch.from_numpy(lab(rgb))
    target[len(TERMS) + SHAPES.index(shape)] = 1
    return target


def answer_of(out: Tensor) -> Answer:
    """What a probe says, (terms + shapes + 3,)."""
    term = TERMS[out[: len(TERMS)].argmax()]
    shape = SHAPES[out[len(TERMS) : -3].argmax()]
    return term, out[-3:].numpy(), shape


def shares(prompts: list[Prompt], answers: list[Answer]) -> tuple[float | None, float]:
    """The shares of colours and of shapes that are right; None where no colour is asked for."""
    colors = []
    shapes = []
    for prompt, (term, color, shape) in zip(prompts, answers):
        group = prompt.scene.groups[0]
        shapes.append(shape == group.shape)
        if prompt.rgb:
            colors.append(np.linalg.norm(color - lab(prompt.rgb)) < NEAR)
        elif group.color:
            colors.append(term == basic_color(COLORS[group.color]))
    return float(np.mean(colors)) if colors else None, float(np.mean(shapes))


def largest(its_grade: Grade) -> Found:
    """The largest thing of a picture; the background where there is none."""
    found = its_grade.verdict.found
    return max(found, key=lambda thing: thing.radius, default=NOTHING)


# --------------------------------------------------------------------------------------------------
# the regression, and what it is given


def ridge(X: Tensor, Y: Tensor, strength: float = 10.0) -> Callable[[Tensor], Tensor]:
    """Ridge regression on standardized features, in its dual form: there are more features than
    captions. X (captions, features), Y (captions, targets) -> a function from new features.

    The penalty is strong, ten times a caption's squared norm. A weak one finds directions that tell
    English captions apart and mean nothing in another language.
    """
    middle = X.mean(0)
    scale = (X.std(0) + 1e-3) * X.shape[1] ** 0.5
    Z = (X - middle) / scale
    penalized = Z @ Z.T + strength * torch.eye(len(Z))
    weights = Z.T @ torch.linalg.solve(penalized, Y - Y.mean(0))
    return lambda new: (new - middle) / scale @ weights + Y.mean(0)


def hear(llm: FrozenLLM, captions: list[str]) -> list[Tensor]:
    """What the LLM hands over of each caption, layer by layer: its values, their mean over the text
    tokens beside those of the last token, which has read all of it. (B, 2 G Dv) each."""
    layers = [[] for _ in llm.kept]
    for start in range(0, len(captions), CAPTIONS):
        context = llm.context(captions[start : start + CAPTIONS])
        lengths = context.lengths.clamp_min(1)
        rows = torch.arange(len(lengths))
        for layer, values in zip(layers, context.values):  # values (B, G, T, Dv)
            mean = values.float().sum(2) / lengths[:, None, None]  # padding is zero
            last = values[rows, :, lengths - 1].float()
            layer.append(torch.cat([mean, last], -1).flatten(1).cpu())
    return [torch.cat(parts) for parts in layers]


def likeness(llm: FrozenLLM, captions: list[str]) -> list[float]:
    """How alike a caption's tokens are in each layer: the cosine of two tokens' values, the mean
    over all pairs and captions, the first token left out. At 1 all of them say the same."""
    cosines = [[] for _ in llm.kept]
    for caption in captions:
        context = llm.context([caption])
        for layer, values in zip(cosines, context.values):  # (1, G, T, Dv)
            tokens = values[0, :, 1 : context.lengths[0]].float().transpose(0, 1).flatten(1)
            tokens = tokens / tokens.norm(dim=1, keepdim=True).clamp_min(1e-12)
            n = len(tokens)
            if n > 1:
                others = (tokens @ tokens.T).sum() - tokens.square().sum()
                layer.append(float(others) / (n * (n - 1)))
    return [sum(layer) / len(layer) for layer in cosines]


def without_thinking(run: LoadedRun) -> None:
    """Let the LLM read as in training, but write nothing: what it reads is probed."""
    made_for = run.expert.made_for | {"thinking": None}
    reader = None
    if made_for.get("template", "{}") != "{}":
        from extras.readers import reader_from

        reader = reader_from(run.llm, made_for)
    run.llm.reader = reader


# --------------------------------------------------------------------------------------------------
# hex codes


def probe_hex(llm: FrozenLLM, seed: int, captions: int = 800) -> dict:
    """Does the LLM know a hex code? The probe fitted on the kind itself, captions with other codes.

    -> {"layer 3": {"right": share within NEAR of the colour, its "interval", "basic term": share,
    "R2": of L*, a*, b*, "alike": the tokens of plain captions}}. The penalty is weaker: there is no
    other language to carry over to.
    """
    # the suite's own codes, and others to fit on
    rng = np.random.default_rng(seed)
    asked = read_suite("colors", captions // 8, ["hex, random"])
    taken = {prompt.rgb for prompt in asked}
    texts = []
    colors = []
    while len(texts) < captions:
        rgb = tuple(rng.integers(0, 256, 3).tolist())
        if rgb not in taken:
            texts.append(f"a {rng.choice(SHAPES)} in the color #{bytes(rgb).hex()}")
            colors.append(rgb)
    targets = torch.tensor(lab(colors), dtype=torch.float32)
    truth = lab([prompt.rgb for prompt in asked])

    # layer by layer
    heard = hear(llm, texts)
    tests = hear(llm, [prompt.text for prompt in asked])
    alike = likeness(llm, training_captions(seed, 100)[0])
    table = {}
    for layer, X, new, cosine in zip(llm.kept, heard, tests, alike):
        guess = ridge(X, targets, 1.0)(new).numpy()
        right = np.linalg.norm(guess - truth, axis=1) < NEAR
        error = np.square(guess - truth).sum(0)
        spread = np.square(truth - truth.mean(0)).sum(0)
        same_term = nearest_term(guess) == nearest_term(truth)
        table[f"layer {layer.index}"] = {
            "right": float(right.mean()),
            "interval": wilson(right.sum(), len(right)),
            "basic term": float(same_term.mean()),
            "R2": (1 - error / spread).tolist(),
            "alike": cosine,
        }
    return table


def nearest_term(colors: np.ndarray) -> np.ndarray:
    """L*a*b* (B, 3) -> the number of the basic term that is nearest, (B,)."""
    terms = lab(list(BASIC_COLORS.values()))
    return np.square(colors[:, None] - terms).sum(-1).argmin(1)


# --------------------------------------------------------------------------------------------------
# what the reader sees


def print_probe(table: dict) -> None:
    names = list(table["picture"])
    for i, name in enumerate(names):
        print(f"  {i + 1:2} {name}")
    heads = [f"{i + 1:^11}" for i in range(len(names))]
    print(f"{'color/shape right':18}" + "".join(heads))
    for row, cells in table.items():
        line = f"{row:18}"
        for color, shape in cells.values():
            shown = "   -" if color is None else f"{color:4.2f}"
            line += f"{shown}/{shape:4.2f}  "
        print(line)


def print_probe_hex(name: str, table: dict) -> None:
    measures = f"within dE {NEAR:.0f}, 95 %, basic term, R2 of L, a, b, how alike the tokens are"
    print(f"{name}, fitted on other hex codes: {measures}")
    for layer, cells in table.items():
        low, high = cells["interval"]
        right = f"{cells['right']:.2f}  {low:.2f} to {high:.2f}"
        R2 = " ".join(f"{value:5.2f}" for value in cells["R2"])
        print(f"  {layer:10} {right}  {cells['basic term']:.2f}  {R2}  {cells['alike']:.2f}")


# --------------------------------------------------------------------------------------------------
# the command


def probe_run(args: argparse.Namespace) -> None:
    """Score a run, then probe its LLM on the same prompts."""
    args = evaluate.fill_in(args)
    runs = evaluate.open_runs(args, "shapes", evaluate.SUITES)
    make_folder(args.out)
    for file in evaluate.FILES:
        evaluate.read_results(args.out / file)  # refused before the work
    results, graded = evaluate.evaluate_suites(args, runs)
    first = runs[0]
    without_thinking(first)
    first.llm.keep(range(len(first.llm.layers)))
    scores = results[first.name]
    scores["probe"] = probe(first.llm, graded, args.seed, min(2000, 200 * (args.limit or 10)))
    print_probe(scores["probe"])
    if "colors" in args.suite:
        scores["probe-hex"] = probe_hex(first.llm, args.seed, hex_captions(args))
        print_probe_hex(first.name, scores["probe-hex"])
    evaluate.save_results(args, runs, results)


def probe_llm(args: argparse.Namespace) -> None:
    """The probe for hex codes of an LLM, and of its control, without any run."""
    path = make_folder(args.out or "evaluation") / "probe-hex.json"
    tables = {}
    for name, llm in llm_and_control(args):
        llm.keep(range(len(llm.layers)))
        tables[name] = probe_hex(llm, args.seed, hex_captions(args))
        print_probe_hex(f"{args.llm}, {name}", tables[name])
    write_json(path, {"llm": args.llm, "seed": args.seed} | tables)
    print(path)


def llm_and_control(args: argparse.Namespace) -> Iterator[tuple[str, FrozenLLM]]:
    """The LLM of --llm, "pretrained", and the same with random weights, "random"."""
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    for name, random_seed in (("pretrained", None), ("random", 0)):
        yield name, load_llm(args.llm, device, dtype, random_seed=random_seed)


def hex_captions(args: argparse.Namespace) -> int:
    return min(800, 80 * (args.limit or 10))


def main(argv: list[str] | None = None) -> None:
    without = "--llm without --ckpt: that LLM alone, and its control, for hex codes"
    parser = OneLineParser(description=f"Probe what the LLM's layers know. {without}.")
    evaluate.add_run_flags(parser)
    evaluate.add_score_flags(parser)
    args = parser.parse_args(argv)
    check_suites(args.suite, evaluate.SUITES)
    if args.llm and not args.ckpt:
        probe_llm(args)
    else:
        probe_run(args)


if __name__ == "__main__":
    one_line_errors(main)
