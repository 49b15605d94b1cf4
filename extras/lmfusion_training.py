"""What LMFusion adds to a training step: pictures that are described, and pairs that are edits.

python train.py --describe 0.2
python train.py --from runs/shapes --data edits
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import Shapes
from extras.caption_grammar import names_colors
from extras.lmfusion import Sequence, caption_loss, draw_edits, edit_contexts
from llm import Context, FrozenLLM
from sample import data_of


def tasks_of(args: argparse.Namespace, source, llm: FrozenLLM) -> "Tasks":
    """What a run that describes or edits has to do. ValueError for both at once, or for an LLM that
    cannot read on after a picture."""
    check_plain_attention(llm)
    pairs = getattr(source, "before_and_after", False)
    if pairs and args.describe:
        raise ValueError(
            f"--describe: --data {args.data} has instructions, which describe no picture; leave "
            "one out"
        )
    return Tasks(args.describe, pairs, names_colors if isinstance(source, Shapes) else None)


@torch.no_grad()
def check_plain_attention(llm: FrozenLLM) -> None:
    """ValueError for an LLM whose attention is more than the softmax that Sequence gives it (capped
    scores, sinks, biases): text alone must read there as it always does."""
    sequence = Sequence(llm, None, 1)
    ids = sequence.tokens("a red circle left of a blue square")
    off = float("inf")
    try:
        ours = sequence.read_tokens([ids])[0].float()
        every = torch.tensor([sequence.before + ids], device=llm.device)
        theirs = llm.model.base_model(input_ids=every, use_cache=False).last_hidden_state
        theirs = theirs[0, -len(ids) :].float()
        off = ((ours - theirs).norm() / theirs.norm()).item()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        pass  # of an architecture without such an attention
    if not off < 0.05:  # bfloat16: 0.01
        raise ValueError(
            f"{llm.name} ({type(llm.model).__name__}) cannot read on after a picture: its "
            "attention is no plain softmax; expected a Llama, Qwen, Gemma 3 or the like"
        )


class Tasks:
    """The further tasks of a train.Run: `describe`, the share of each batch that is described, or
    `pairs`, whether its pictures are pairs, before and after an edit. tells_all: whether a caption
    says of its picture all that it should (default: any does)."""

    def __init__(self, describe: float, pairs: bool, tells_all: Callable | None = None):
        self.describe = describe
        self.pairs = pairs
        self.tells_all = tells_all
        self.described: tuple[list[str], np.ndarray] | None = None
        self.before: np.ndarray | None = None

    def take(self, captions: list[str], pictures: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Captions and pictures of a batch -> those that are drawn. The others are kept: pictures
        to be described, evenly from all whose caption tells all, or those before the edit."""
        if self.pairs:
            self.before = pictures[:, 0]  # (B, height, width, 3)
            return captions, pictures[:, 1]
        B = len(captions)
        fit = range(B)
        if self.tells_all:
            fit = [i for i in fit if self.tells_all(captions[i])]
        count = min(round(self.describe * B), B - 1, len(fit))  # one at least is drawn
        chosen = [fit[(2 * k + 1) * len(fit) // (2 * count)] for k in range(count)]
        rest = sorted(set(range(B)) - set(chosen))
        self.described = ([captions[i] for i in chosen], pictures[chosen])
        return [captions[i] for i in rest], pictures[rest]

    def context(
        self, run, captions: list[str], uniform: Tensor, some: slice = slice(None)
    ) -> Context:
        """What is read before `some` edited pictures of the batch are drawn.

        Where uniform (B,) is below the run's share of dropped captions, the instruction is left
        out; in half of these the picture too (InstructPix2Pix, Brooks et al. 2023, section 3.2.1).
        One reading of a picture and its instruction serves all draws of that pair.
        """
        draws = run.args.draws
        captions = captions[some]
        uniform = uniform[some]
        pictures = data_of(run.expert, self.before[some][::draws], run.device)
        contexts = edit_contexts(run.llm, run.expert, pictures, captions[::draws])
        every = contexts[0].concat(contexts[1]).concat(contexts[2])
        share = run.args.caption_dropout
        branch = (uniform >= share / 2).long() + (uniform >= share).long()  # 0, 1, 2
        pair = torch.arange(len(captions)) // draws
        row = (branch * len(pictures) + pair).to(run.device)
        keys = [x[row] for x in every.keys]
        values = [x[row] for x in every.values]
        return Context(keys, values, every.lengths[row])

    def loss(self, run, part: int, parts: int) -> Tensor | float:
        """The LLM's loss on one part of what is described, weighted, as a share of the mean over
        all of it; the run keeps it for its log."""
        captions, pictures = self.described or ([], [])
        some = slice(len(captions) * part // parts, len(captions) * (part + 1) // parts)
        if not captions[some]:
            return 0.0
        shown = data_of(run.expert, pictures[some], run.device)
        losses = caption_loss(run.llm, run.expert, shown, captions[some])
        run.lm_losses.append(losses.detach())
        return run.args.lm_weight * losses.sum() / len(captions)

    def samples(self, run, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """(prompts, 2, height, width, 3) uint8: pictures before and after an edit."""
        before = run.source.shown()
        after = draw_edits(run.ema, run.ema_llm, before, prompts, seeds)
        return np.stack([before, after], axis=1)
