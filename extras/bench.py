"""What is fast, and what the cache saves: medians of interleaved repeats on this machine.

    python -m extras.bench                     # all that this machine can run: tables, bench.json
    python -m extras.bench attention train     # attention | train | sample | llm

A ratio holds within one run only. The LLM's weights do not matter for speed: --llm takes any,
--random-llm makes fresh ones. Flags that are not the bench's own are train.py's, with "=":
--width=128 --batch-size=16.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.bench")
    import cli

    cli.start()

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import train
from attention import joint_attention_definition
from cli import (
    OneLineParser,
    make_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    positive,
    write_text,
)
from extras.joint import joint_fast, joint_forward
from extras.rivals import bench_attention
from extras.timing import peak_tflops, table, timed, version_of
from flow import euler_sample
from llm import Context, FrozenLLM

# -------------------------------------------------------------------------------------------------
# whole training steps

PRODUCTS = ("mm", "attention", "softmax", "gemm", "conv")  # in the names of operators


def bench_train(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Images per second of whole training steps, on the same stream of captions."""
    run = training_run(args)
    stream = stream_of(run)

    def cached(predict: Callable = run.expert) -> None:
        train.train_step(run, predict, *next(stream))

    def each_step() -> None:
        captions, pictures = next(stream)

        def predict(x_t: Tensor, t: Tensor, _) -> Tensor:
            return run.expert(x_t, t, fresh_context(run.llm, captions))

        train.train_step(run, predict, captions, pictures)

    def joint(attention: Callable) -> None:
        captions, pictures = next(stream)

        def predict(x_t: Tensor, t: Tensor, _) -> Tensor:
            return joint_forward(run.llm, run.expert, x_t, t, captions, attention)

        train.train_step(run, predict, captions, pictures)

    ways = {
        "joint forward, float32 definition": partial(joint, joint_attention_definition),
        "joint forward, fast attention": partial(joint, joint_fast),
        "LLM over the distinct captions of each step": each_step,
        "caption cache": cached,
    }
    if args.compile:
        ways["caption cache, compiled"] = partial(cached, torch.compile(run.expert))
    result = timed(ways, device, 30 * args.seconds)

    # the expert's matrices, three products each: forward, and backward to inputs and weights
    images = run.args.batch_size
    tokens = images * (run.args.image_size // run.args.patch) ** 2
    matrices = sum(p.numel() for p in run.expert.parameters() if p.dim() == 2)
    flops = 6 * matrices * tokens
    rows = []
    for name, time_ms in result.items():
        ms = time_ms["ms"]
        rows.append(
            {
                "expert": "tiny",
                "way": name,
                "ms": ms,
                "spread": time_ms["spread"],
                "images/s": 1000 * images / ms,
                "this / cache": ms / result["caption cache"]["ms"],
                "of peak": flops / ms / 1e9 / peak,
            }
        )
    for name, way in ways.items():
        if name.startswith("caption cache"):
            spent = share_of_products(way, device)
            print(f"{name}: {spent:.0%} of the time in matrix products and attention")
    if args.mirror:
        rows.append(time_mirror(args, device))
    return rows


def time_mirror(args, device: torch.device) -> dict:
    """The same step of the tower that is a copy of the LLM."""
    run = training_run(args, "--bridge", "mirror")
    stream = stream_of(run)

    def step() -> None:
        train.train_step(run, run.expert, *next(stream))

    ms = timed({"mirror": step}, device, 10 * args.seconds)["mirror"]["ms"]
    speed = 1000 * run.args.batch_size / ms
    return {"expert": "mirror", "way": "caption cache", "ms": ms, "images/s": speed}


def share_of_products(way: Callable, device: torch.device) -> float:
    """How much of the time of five calls goes to matrix products and attention."""
    with torch.profiler.profile() as profile:
        for _ in range(5):
            way()
    total = 0
    products = 0
    for event in profile.key_averages():
        gpu = device.type == "cuda"
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        total += spent
        if any(word in event.key for word in PRODUCTS):
            products += spent
    return products / total


def training_run(args, *flags: str) -> train.Run:
    """A run as train.py would begin it, in a folder for temporary files."""
    given = ["--llm", args.llm, "--out", tempfile.mkdtemp(), "--device", args.device]
    if args.random_llm:
        given.append("--random-llm")
    given += [*args.for_training, *flags]
    return train.prepare(train.parse_args(given), {}, {})


def stream_of(run: train.Run):
    return train.Batches(run.source, run.llm, run.args.batch_size, run.args.draws, 0)


def fresh_context(llm: FrozenLLM, captions: list[str]) -> Context:
    """What a trainer without a cache does: the LLM over the captions of the batch, each once."""
    distinct = list(dict.fromkeys(captions))
    rows = torch.tensor([distinct.index(caption) for caption in captions], device=llm.device)
    ids = [torch.tensor(llm.read(caption).ids, dtype=torch.long) for caption in distinct]
    lengths = torch.tensor([len(row) for row in ids], device=llm.device)
    with torch.no_grad():
        cache = llm.run_kept(pad_sequence(ids, batch_first=True).to(llm.device), lengths)
        return llm.unpack(llm.pack(cache, lengths)[rows], lengths[rows])


# -------------------------------------------------------------------------------------------------
# drawing


def bench_sample(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Drawing with guidance, 24 Euler steps: pictures per second, at 1 and 16 prompts."""
    run = training_run(args)
    expert = run.ema.eval()
    compiled = torch.compile(run.ema, dynamic=False)
    colors = ("red", "green", "white", "pink")
    captions = [f"a {color} circle left of a blue square" for color in colors] * 4
    rows = []
    for n in (1, 16):
        asked = captions[:n]
        work = drawing_ways(run.llm, expert, asked, device, dtype)
        if args.compile:
            draw = work["cached, one batch"]
            work["cached, one batch, compiled"] = partial(draw.func, compiled)
        result = timed(work, device, 4 * args.seconds)
        joint_ms = result["joint forward, fast attention"]["ms"]
        for name, time_ms in result.items():
            rows.append(
                {
                    "prompts": n,
                    "way": name,
                    "ms": time_ms["ms"],
                    "spread": time_ms["spread"],
                    "pictures/s": 1000 * n / time_ms["ms"],
                    "joint / this": joint_ms / time_ms["ms"],
                }
            )
    return rows


def drawing_ways(
    llm: FrozenLLM, expert, captions: list[str], device: torch.device, dtype: torch.dtype
) -> dict[str, partial]:
    """name -> a call that draws the captions that way."""
    n = len(captions)
    noise = torch.randn(n, 3, expert.image_size, expert.image_size, device=device)
    context = llm.context(captions)
    empty = llm.context([""] * n)

    def draw(predict: Callable) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            euler_sample(predict, noise, context, 24, empty, 3.0)

    def joint(x_t: Tensor, t: Tensor, _) -> Tensor:
        return joint_forward(llm, expert, x_t, t, [*captions, *[""] * n], joint_fast)

    def two_passes(x_t: Tensor, t: Tensor, both: Context) -> Tensor:
        velocities = []
        for branch in (slice(0, n), slice(n, None)):
            keys = [k[branch] for k in both.keys]
            values = [v[branch] for v in both.values]
            half = Context(keys, values, both.lengths[branch])
            velocities.append(expert(x_t[branch], t[branch], half))
        return torch.cat(velocities)

    return {
        "joint forward, fast attention": partial(draw, joint),
        "cached, two passes": partial(draw, two_passes),
        "cached, one batch": partial(draw, expert),
    }


# -------------------------------------------------------------------------------------------------
# the LLM


def bench_llm(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Reading captions, up to the last layer that the default expert reads, and writing."""
    llm = training_run(args).llm
    rows = []

    def add(way: str, call: Callable, tokens: int) -> None:
        result = timed({way: call}, device, 2 * args.seconds)[way]
        rows.append({"way": way, **result, "tokens/s": 1000 * tokens / result["ms"]})

    for words in (4, 16, 64):
        captions = [f"{i} " + "red " * words for i in range(64)]
        tokens = sum(len(llm.tokenize(caption)) for caption in captions)

        def read(captions=captions) -> None:
            llm.forget()
            llm.lookup(captions)

        add(f"read 64 captions of {tokens // 64} tokens", read, tokens)

    prompt = torch.tensor([llm.tokenize("a red circle")], device=device)
    options = {"min_new_tokens": 32, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    def write() -> None:
        llm.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    add("write 32 tokens", write, 32)
    return rows


# -------------------------------------------------------------------------------------------------
# the command

SECTIONS = {
    "attention": bench_attention,
    "train": bench_train,
    "sample": bench_sample,
    "llm": bench_llm,
}


def main() -> None:
    args = parse_args()
    make_folder(Path(args.out).parent)
    device, why = pick_device(args.device)
    dtype, _ = pick_dtype("auto", device)
    peak = peak_tflops(device, dtype)
    machine = {
        "device": f"{device} ({why})",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": version_of("triton"),
        "matmul peak TFLOP/s": peak,
    }
    for key, value in machine.items():
        print(f"{key}: {value}")
    results = {"machine": machine}
    for name in args.sections or SECTIONS:
        results[name] = SECTIONS[name](args, device, dtype, peak)
        print(f"\n{name}\n{table(results[name])}", flush=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    print(args.out)


def parse_args() -> argparse.Namespace:
    """The bench's own flags; for_training: the others, which are train.py's."""
    parser = OneLineParser(
        description="Time what this project does.",
    )
    add = parser.add_argument
    add("sections", nargs="*", help=f"some of {', '.join(SECTIONS)} (default: all)")
    add("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    add("--random-llm", action="store_true", help="fresh weights in place of the LLM's own")
    add("--mirror", action="store_true", help="time the mirrored tower too")
    add("--compile", action="store_true", help="time the compiled expert too")
    add("--seconds", type=positive(float), default=0.5, help="time for each thing measured")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--out", default="bench.json", help="where the numbers go")
    args, args.for_training = parser.parse_known_args()
    train.parse_args(args.for_training)  # a wrong flag is named before anything is timed
    for name in args.sections:
        if name not in SECTIONS:
            raise ValueError(f"{name}: expected some of {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    one_line_errors(main)
