"""What a linear probe finds if it has seen some of the kind itself: emoji, facts, colour words.

    python -m extras.kinds --llm gemma-3-270m

extras/probe.py's ridge, fitted on English training captions alone, as the expert is trained; and on
those and other prompts of the kind that is asked (five folds: no scene is in two of them). What the
second finds and the first does not is in the LLM, but not where English leads. The layer is the one
that is best on the half `choose`; the other half is reported. Hex codes: extras/probe.py.
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.kinds")
    import cli

    cli.start()

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cli import (
    OneLineParser,
    make_folder,
    one_line_errors,
    positive,
    seed_number,
)
from data import COLORS
from evaluate import write_json
from extras.colors import basic_color
from extras.intervals import difference, mean_of_rows
from extras.probe import answer_of, hear, llm_and_control, ridge, target_of, training_captions
from extras.suites import Prompt, is_in, read_suite
from extras.tables import signed
from llm import FrozenLLM

KINDS = {  # a kind of prompt -> its suite and rows
    "emoji": ("emoji", ["single"]),
    "knowledge": ("knowledge", None),
    "new color words": ("colors", ["new color words"]),
}
WAYS = ("English captions", "and the kind")  # what a probe is fitted on
CAPTIONS = 2000
FOLDS = 5

Said = list[tuple[bool | None, bool]]  # is the colour right (None: not asked), and the shape?


def rgb_of(prompt: Prompt) -> tuple[int, int, int] | None:
    """The colour that a prompt of one thing asks for."""
    color = prompt.scene.groups[0].color
    return prompt.rgb or (COLORS[color] if color else None)


def targets_of(prompts: list[Prompt]) -> Tensor:
    return torch.stack([target_of(p.scene.groups[0].shape, rgb_of(p)) for p in prompts])


def judge(prompts: list[Prompt], out: Tensor) -> Said:
    """What a probe says of each prompt, (B, terms + shapes + 3), beside what is asked for."""
    said = []
    for prompt, row in zip(prompts, out):
        term, _, shape = answer_of(row)
        rgb = rgb_of(prompt)
        color = term == basic_color(rgb) if rgb else None
        said.append((color, shape == prompt.scene.groups[0].shape))
    return said


def probe_kind(prompts: list[Prompt], heard: list[Tensor], english: list[Tensor], targets) -> dict:
    """Probes of each layer, and of each way the one that is best on the half `choose`.

    heard, english: what each layer hands over of the prompts and of the captions; targets: of the
    captions. -> way -> {"layer": its place, "color" and "shape": scores of the other half}
    """
    known = targets_of(prompts)
    scenes = sorted({prompt.scene_id for prompt in prompts})
    fold_of = torch.tensor([scenes.index(prompt.scene_id) % FOLDS for prompt in prompts])
    said: dict[str, list[Said]] = {way: [] for way in WAYS}  # of each layer
    for X, new in zip(english, heard):
        said[WAYS[0]].append(judge(prompts, ridge(X, targets)(new)))
        out = torch.zeros_like(known)
        for fold in range(FOLDS):
            fit = fold_of != fold
            predict = ridge(torch.cat([X, new[fit]]), torch.cat([targets, known[fit]]))
            out[~fit] = predict(new[~fit])
        said[WAYS[1]].append(judge(prompts, out))

    chosen = [is_in("choose", prompt.scene_id) for prompt in prompts]
    table = {}
    for way, layers in said.items():
        scores = []
        for verdicts in layers:
            of_half = [verdict for verdict, is_chosen in zip(verdicts, chosen) if is_chosen]
            scores.append(share(of_half, 0) + share(of_half, 1))
        best = int(np.argmax(scores))
        table[way] = {"layer": best} | tallies(prompts, layers[best], chosen)
    return table


def share(said: Said, place: int) -> float:
    asked = [verdict[place] for verdict in said if verdict[place] is not None]
    return sum(asked) / len(asked) if asked else 0.0


def tallies(prompts: list[Prompt], said: Said, left_out: list[bool]) -> dict:
    """The scores of colours and of shapes, as evaluate.py has them, of what is not left out."""
    found = {}
    for place, what in enumerate(("color", "shape")):
        right = ""
        scenes = []
        for prompt, verdict, is_out in zip(prompts, said, left_out):
            if verdict[place] is not None and not is_out:
                right += str(int(verdict[place]))
                scenes.append(prompt.scene_id)
        tally = {"score": right.count("1") / max(1, len(right)), "n": len(right), "wrong": {}}
        tally |= {"right": right, "scenes": " ".join(scenes)}
        found[what] = tally | mean_of_rows({0: {what: tally}})
    return found


def read_kinds(limit: int | None) -> dict[str, list[Prompt]]:
    """kind -> its prompts of one thing. ValueError if a half of them has none with a colour."""
    kinds = {}
    for kind, (suite, rows) in KINDS.items():
        prompts = [prompt for prompt in read_suite(suite, limit, rows) if prompt.is_of_one_thing]
        for half in ("choose", "report"):
            if not any(rgb_of(prompt) for prompt in prompts if is_in(half, prompt.scene_id)):
                none = f"no prompt of {kind} is in the half {half}"
                raise ValueError(f"--limit {limit}: {none}; expected a larger one")
        kinds[kind] = prompts
    return kinds


def probe_llm(llm: FrozenLLM, kinds: dict[str, list[Prompt]], seed: int, limit: int | None) -> dict:
    """kinds: as read_kinds has them. -> kind -> way -> scores"""
    llm.keep(range(len(llm.layers)))
    captions, targets = training_captions(seed, min(CAPTIONS, 200 * (limit or 10)))
    english = hear(llm, captions)
    table = {}
    for kind, prompts in kinds.items():
        heard = hear(llm, [prompt.text for prompt in prompts])
        table[kind] = probe_kind(prompts, heard, english, targets)
        for scores in table[kind].values():
            scores["layer"] = llm.layers[scores["layer"]].index
    return table


def gained(ways: dict) -> dict[str, dict]:
    """What the second way reads and the first does not, paired. "color" and "shape" -> difference,
    as extras/intervals.py has it."""
    found = {}
    for what in ("color", "shape"):
        first, second = ({0: {what: ways[way][what]}} for way in WAYS)
        found[what] = difference(second, first)
    return found


def print_table(name: str, table: dict) -> None:
    print(f"{name}: right of the half report, 95 %")
    for kind, ways in table.items():
        for way, scores in ways.items():
            cells = []
            for what in ("color", "shape"):
                low, high = scores[what]["interval"]
                cells.append(f"{what} {scores[what]['score']:.2f} ({low:.2f} to {high:.2f})")
            print(f"  {kind:16} {way:17} layer {scores['layer']:2}  {'  '.join(cells)}")
        cells = [f"{what} {signed(entry)}" for what, entry in gained(ways).items()]
        print(f"  {'':16} gained: {'  '.join(cells)}")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Probes fitted on the kind of prompt that is asked.")
    add = parser.add_argument
    add("--llm", default="gemma-3-270m", help="as train.py's")
    add("--out", type=Path, default=Path("evaluation"), help="where probe-kinds.json goes")
    add("--limit", type=positive(int), help="only the first so many prompts of each row")
    add("--seed", type=seed_number, default=0, help="of the captions")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the LLM")
    args = parser.parse_args(argv)
    kinds = read_kinds(args.limit)  # refused before anything is loaded
    path = make_folder(args.out) / "probe-kinds.json"
    content = {"llm": args.llm, "seed": args.seed}
    for name, llm in llm_and_control(args):
        content[name] = probe_llm(llm, kinds, args.seed, args.limit)
        print_table(f"{args.llm}, {name}", content[name])
    write_json(path, content)
    print(path)


if __name__ == "__main__":
    one_line_errors(main)
