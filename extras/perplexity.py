"""How well an LLM reads plain text: its perplexity on the five texts of assets/perplexity.

    python -m extras.perplexity --llm gemma-3-270m
    python -m extras.perplexity --ckpt runs/shapes-mirror      # before and after this run

A frozen LLM has the same before and after a run, to the bit; one that a run trains
(extras/separation.py) has not: then also how far its weights have moved.
"""

import math
from pathlib import Path

import torch
from torch.nn import functional as F

from checkpoint import load_expert
from cli import OneLineParser, one_line_errors, pick_device, pick_dtype
from llm import FrozenLLM
from loading import load_llm

TEXTS = Path(__file__).parent.parent / "assets" / "perplexity"


@torch.no_grad()
def perplexity(llm: FrozenLLM) -> dict[str, tuple[float, int]]:
    """Each text's name -> exp of the mean loss in nats a token, and the number of tokens that were
    asked for: all but the first. A paragraph at a time, after what the tokenizer puts first."""
    results = {}
    for path in sorted(TEXTS.glob("*.txt")):
        nats = 0.0
        count = 0
        for paragraph in path.read_text("utf-8").strip().split("\n\n"):
            ids = torch.tensor([llm.cut(llm.open_ids(paragraph))], device=llm.device)
            logits = llm.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        results[path.stem] = (math.exp(nats / count), count)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m extras.perplexity", description="Perplexity of an LLM.")
    parser.add_argument("--llm", default="gemma-3-270m", help="as train.py takes it")
    parser.add_argument("--ckpt", help="of the LLM of this run, before and after it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    dtypes = ["auto", "float32", "bfloat16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="arithmetic of the LLM")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.ckpt:
        compare(args.ckpt, device, dtype)
        return
    report(perplexity(load_llm(args.llm, device, dtype)))


def report(results: dict[str, tuple[float, int]]) -> None:
    for name, (value, count) in results.items():
        print(f"{name:10}{value:8.2f}  ({count} tokens)")


def compare(ckpt: str, device: torch.device, dtype: torch.dtype) -> None:
    """Print the perplexity of a run's LLM before the run and after, and what of it has moved."""
    expert = load_expert(ckpt, device)
    made_for = expert.made_for
    seed = made_for.get("random_llm")
    if not expert.llm_parameters():
        print("its LLM is frozen: after the run it is what it was before")
        report(perplexity(load_llm(made_for["llm"], device, dtype, random_seed=seed)))
        return
    # in float32, in which it was trained
    llm = load_llm(made_for["llm"], device, torch.float32, random_seed=seed)
    model = llm.model
    print("before the run:")
    report(perplexity(llm))
    expert.attach(llm)  # its own LLM takes the place of that one
    print("after it:")
    report(perplexity(llm))
    from extras.separation import moved

    print("its weights have moved, each kind by this share of its length:")
    for kind, distance in moved(model, llm.model).items():
        print(f"{kind:22}{distance:.4f}")


if __name__ == "__main__":
    one_line_errors(main)
