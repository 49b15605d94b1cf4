"""What does the LLM know of a prompt in another language? Its own words, and what a probe reads.

    python -m extras.answers --llm gemma-3-270m

Its words, with nothing trained: it reads each prompt of one object in a frame that ends where an
English colour would come (assets/frames/english.txt). Its answer is the likeliest of the ten
colours, and after that the likeliest of the eight shapes. A small LLM has habits: asked for a brown
star, it says red. So also calibrated: each answer's mean logit over prompts of the other half is
taken away first, which needs no label (after Batch Calibration, Zhou et al. 2024).

What stands in its values, linearly: extras/probe.py's ridge, fitted on English training captions
alone, as the expert is trained; and with prompts of twenty of the languages, the tested left out.
"""

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.answers")
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
from data import CANONICAL_COLORS, COLORS, SHAPES
from evaluate import write_json
from extras.files import read_text
from extras.intervals import mean_of_rows
from extras.probe import answer_of, hear, llm_and_control, ridge, target_of, training_captions
from extras.readers import FRAMES
from extras.suites import Prompt, read_suite
from llm import FrozenLLM

SUITE = "languages"
ROWS = 32  # texts that go through the LLM together
CAPTIONS = 2000  # that the probes are fitted on


def answers(llm: FrozenLLM, frame: str, asked: list[Prompt], others: list[Prompt]) -> dict:
    """The LLM's answers to prompts of one object, as it gives them and calibrated on others.

    -> {"as it is" or "calibrated": {"color", "shape" or "both": {"score", "interval", "rows"}}}.
    The shape is asked for after the colour that was answered.
    """
    color_scores = choices(llm, [ask(frame, prompt) for prompt in asked], CANONICAL_COLORS)
    of_others = choices(llm, [ask(frame, prompt) for prompt in others], CANONICAL_COLORS)
    results = {}
    for way in ("as it is", "calibrated"):
        color_habit = of_others.mean(0) if way == "calibrated" else torch.zeros(1)
        colors = likeliest(CANONICAL_COLORS, color_scores - color_habit)
        shape_scores = choices(llm, ask_on(frame, asked, colors), SHAPES)
        shape_habit = torch.zeros(1)
        if way == "calibrated":
            said = likeliest(CANONICAL_COLORS, of_others - color_habit)
            shape_habit = choices(llm, ask_on(frame, others, said), SHAPES).mean(0)
        shapes = likeliest(SHAPES, shape_scores - shape_habit)
        results[way] = verdicts(asked, colors, shapes)
    return results


def ask(frame: str, prompt: Prompt) -> str:
    return frame.replace("{}", prompt.text)


def ask_on(frame: str, prompts: list[Prompt], colors: list[str]) -> list[str]:
    """The same, with the colour that was answered."""
    return [f"{ask(frame, prompt)} {color}" for prompt, color in zip(prompts, colors)]


def likeliest(words: tuple[str, ...], scores: Tensor) -> list[str]:
    return [words[i] for i in scores.argmax(1)]


@torch.no_grad()
def choices(llm: FrozenLLM, texts: list[str], words: tuple[str, ...]) -> Tensor:
    """texts (B of them), words (n) -> the logit of each word's first token after each text, (B, n).

    Log-probabilities but for a constant of each text, which moves no choice. ValueError if two
    words begin with the same token, or the LLM cannot write.
    """
    head = llm.model.get_output_embeddings()
    if not llm.writes or head is None:
        raise ValueError(f"{llm.name} has no language-model head: it answers nothing")
    firsts = [llm.tokenizer(" " + word, add_special_tokens=False).input_ids[0] for word in words]
    if len(set(firsts)) < len(words):
        raise ValueError(f"in {llm.name}'s vocabulary two of {', '.join(words)} begin alike")
    # of a vocabulary of hundreds of thousands these rows alone
    weight = head.weight[firsts].float()

    # texts of one length at a time: nothing is padded
    of_length: dict[int, list[int]] = {}
    tokens = [llm.cut(llm.open_ids(text)) for text in texts]
    for i, ids in enumerate(tokens):
        of_length.setdefault(len(ids), []).append(i)
    found = torch.zeros(len(texts), len(words))
    for places in of_length.values():
        for start in range(0, len(places), ROWS):
            rows = places[start : start + ROWS]
            ids = torch.tensor([tokens[i] for i in rows], device=llm.device)
            states = llm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found[rows] = (states[:, -1].float() @ weight.T).cpu()
    return found


def probed(
    llm: FrozenLLM, asked: list[Prompt], others: list[Prompt], seed: int, n: int = CAPTIONS
) -> dict:
    """Linear probes of one layer, the one that reads most of the others.

    -> "layer": its number; "English captions": the verdicts, if fitted on n of them; "and other
    languages": if fitted also on the others, in all languages but the one that is asked.
    """
    captions, targets = training_captions(seed, n)
    llm.keep(range(len(llm.layers)))
    english = hear(llm, captions)
    heard = hear(llm, [prompt.text for prompt in asked])
    heard_of_others = hear(llm, [prompt.text for prompt in others])

    # which layer?
    scores = []
    for X, new in zip(english, heard_of_others):
        scores.append(verdicts(others, *said_of(ridge(X, targets)(new)))["both"]["score"])
    layer = int(np.argmax(scores))

    # each language by a probe that knows the others
    X, new, known = english[layer], heard[layer], heard_of_others[layer]
    groups = [prompt.scene.groups[0] for prompt in others]
    known_targets = torch.stack([target_of(group.shape, COLORS[group.color]) for group in groups])
    out = torch.zeros(len(asked), targets.shape[1])
    for row in dict.fromkeys(prompt.row for prompt in asked):
        theirs = torch.tensor([prompt.row == row for prompt in asked])
        fit = torch.tensor([prompt.row != row for prompt in others])
        predict = ridge(torch.cat([X, known[fit]]), torch.cat([targets, known_targets[fit]]))
        out[theirs] = predict(new[theirs])
    return {
        "layer": llm.layers[layer].index,
        "English captions": verdicts(asked, *said_of(ridge(X, targets)(new))),
        "and other languages": verdicts(asked, *said_of(out)),
    }


def said_of(out: Tensor) -> tuple[list[str], list[str]]:
    """What a probe says of each prompt: colours, shapes."""
    said = [answer_of(row) for row in out]
    return [term for term, _, _ in said], [shape for _, _, shape in said]


def verdicts(asked: list[Prompt], colors: list[str], shapes: list[str]) -> dict:
    """Whether colour, shape and both are right -> scores, as evaluate.py's, a row a language."""
    right: dict[str, dict[str, list[bool]]] = {"color": {}, "shape": {}, "both": {}}
    scenes: dict[str, list[str]] = {}
    for prompt, color, shape in zip(asked, colors, shapes):
        group = prompt.scene.groups[0]
        scenes.setdefault(prompt.row, []).append(prompt.scene_id)
        right["color"].setdefault(prompt.row, []).append(color == group.color)
        right["shape"].setdefault(prompt.row, []).append(shape == group.shape)
        both = color == group.color and shape == group.shape
        right["both"].setdefault(prompt.row, []).append(both)
    results = {}
    for what, by_row in right.items():
        rows = {}
        for row, its_right in by_row.items():
            verdict = "".join(str(int(one)) for one in its_right)
            score = sum(its_right) / len(its_right)
            rows[row] = {"score": score, "n": len(its_right), "right": verdict, "wrong": {}}
            rows[row]["scenes"] = " ".join(scenes[row])
        foreign = {row: tally for row, tally in rows.items() if row != "English"}
        results[what] = mean_of_rows({0: foreign}, rows_are_drawn=True) | {"rows": rows}
    return results


def prompts_of(half: str, limit: int | None) -> list[Prompt]:
    return [prompt for prompt in read_suite(SUITE, limit, half=half) if prompt.is_of_one_thing]


def print_scores(name: str, found: dict) -> None:
    print(f"{name}: its words, and a probe of layer {found['probe']['layer']}")
    for scores in (found["words"], found["probe"]):
        for way, entries in scores.items():
            if way != "layer":
                cells = []
                for what, entry in entries.items():
                    low, high = entry["interval"]
                    cells.append(f"{what} {entry['score']:.2f} ({low:.2f} to {high:.2f})")
                print(f"  {way:20}" + "  ".join(cells))


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="What the LLM knows of prompts in other languages.")
    add = parser.add_argument
    add("--llm", default="gemma-3-270m", help="as train.py's")
    add("--frame", type=Path, default=FRAMES / "english.txt", help="a text with one {}")
    add("--half", choices=("choose", "report"), default="report", help="of the prompts")
    add("--out", type=Path, default=Path("evaluation"), help="where answers.json goes")
    add("--limit", type=positive(int), help="only the first so many prompts of each row")
    add("--seed", type=seed_number, default=0, help="of the probes' captions")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the LLM")
    args = parser.parse_args(argv)
    frame = read_text(args.frame).rstrip("\n")
    if frame.count("{}") != 1:
        raise ValueError(f"--frame {args.frame}: expected a text with one {{}}, for the prompt")
    path = make_folder(args.out) / "answers.json"

    other = {"choose": "report", "report": "choose"}[args.half]
    asked = prompts_of(args.half, args.limit)
    others = [prompt for prompt in prompts_of(other, args.limit) if prompt.row != "English"]
    captions = min(CAPTIONS, 200 * (args.limit or 10))
    content = {"llm": args.llm, "half": args.half, "frame": frame}
    for name, llm in llm_and_control(args):
        content[name] = {
            "words": answers(llm, frame, asked, others),
            "probe": probed(llm, asked, others, args.seed, captions),
        }
        print_scores(name, content[name])
    write_json(path, content)
    print(path)


if __name__ == "__main__":
    one_line_errors(main)
