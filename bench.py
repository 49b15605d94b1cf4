"""What is fast, and what the cache saves: medians of interleaved repeats on this machine.

    python bench.py                                    # all sections that this machine can run: tables and bench.json
    python bench.py attention train                    # attention | train | sample | llm

A ratio holds within one run only. The LLM's weights do not matter for speed: --llm takes any, --random-llm makes fresh ones.
Flags that are not bench.py's own are train.py's, with "=": --width=128 --batch-size=16.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import train
from attention import hybrid_mask, joint_attention_definition, matrix_products
from cli import OneLineParser, make_folder, one_line_errors, pick_device, pick_dtype, positive, write_text
from extras.rivals import attention_ways, backend_of
from flow import euler_sample
from model import Context, Enough, FrozenLLM, ImageExpert

SECTIONS = ("attention", "train", "sample", "llm")


# ---------------------------------------------------------------------------------------------------------------------
# the plain joint forward: what the cache saves us from, and what it is proved equal to


def joint_fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """joint_attention_definition as one would train with it: in the run's own dtype, by SDPA, or where
    joint_attention does without it by the same products. Grouped queries are more rows that ask the
    same keys."""
    B, H, R, Dk = q.shape
    G = k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    rows = q.reshape(B, G, H // G * R, Dk)
    if q.requires_grad and q.device.type == "cpu":  # image rows, which all see the same
        out = matrix_products(rows * Dk**0.5, k, v, mask[:, :, :1])
    else:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, 1, H // G, 1), scale=1.0)
    return out.reshape(B, H, R, -1)


def joint_forward(
    llm: FrozenLLM, expert: ImageExpert, x_t: Tensor, t: Tensor, captions: list[str], attention: Callable | None = None
) -> Tensor:
    """Mixture-of-Transformers as it is defined: both towers in lockstep, one softmax a layer over [text; image].

    The LLM runs over the captions with its attention replaced by the joint one; whenever it reaches a
    layer that the expert reads, the image tower takes its step of that layer too; after the last of
    them it stops. For LLMs whose attention is a plain softmax. Gradients reach the image tower alone:
    the LLM's weights ask for none. attention: joint_attention_definition (the default) or joint_fast.
    """
    attention = attention or joint_attention_definition
    ids = [torch.tensor(llm.tokenize(caption), dtype=torch.long) for caption in captions]
    txt_ids = pad_sequence(ids, batch_first=True).to(llm.device)  # (B, T)
    lengths = torch.tensor([len(row) for row in ids], device=llm.device)
    img, modulations, last = expert.begin(x_t, t)
    T, N = txt_ids.shape[1], img.shape[1]
    mask = hybrid_mask(lengths, T, N)
    hidden = torch.tensor([llm.hidden(len(row)) for row in ids], device=llm.device)
    img_mask = mask[:, :, T:] & (torch.arange(T + N, device=llm.device) >= hidden[:, None, None, None])
    tower = {}  # layer of the LLM -> the blocks that read it
    for block, m in zip(expert.blocks, modulations):
        tower.setdefault(llm.cache_index[block.layer.index], []).append((block, m))

    def attend(module, txt_q, txt_k, txt_v, attention_mask, scaling=None, **_):
        nonlocal img
        txt_q = txt_q * (scaling if scaling is not None else txt_q.shape[-1] ** -0.5)
        joint_k, joint_v = txt_k, txt_v
        for block, m in tower.get(module.layer_idx, []):
            img_q, img_k, img_v = block.project(img, m)
            rotary = llm.rotary[block.layer.index]
            img_q, img_k = rotary(img_q * img_q.shape[-1] ** -0.5, lengths), rotary(img_k, lengths)  # the place after the text
            joint_k = torch.cat([txt_k, img_k], dim=2)  # (B, G, T+N, Dk)
            joint_v = torch.cat([txt_v, img_v], dim=2)  # (B, G, T+N, Dv)
            seen_k = torch.cat([block.scale_keys(txt_k), img_k], dim=2)
            img = block.finish(img, attention(img_q, seen_k, joint_v, img_mask), m)
        if module.layer_idx == max(tower):
            raise Enough
        # the text's rows of the same softmax; a call of its own because the towers may differ in their number of query heads
        S = T if attention is joint_fast else joint_k.shape[2]  # they see no image, so it need not be asked
        joint_k, joint_v = joint_k[:, :, :S].detach(), joint_v[:, :, :S].detach()  # nor does a gradient pass
        txt_out = attention(txt_q, joint_k, joint_v, mask[:, :, :T, :S])
        return txt_out.transpose(1, 2), None

    before = llm.model.config._attn_implementation
    transformers.AttentionInterface.register("joint", attend)
    try:
        llm.model.set_attn_implementation("joint")
        with suppress(Enough):
            llm.model.base_model(input_ids=txt_ids, use_cache=False)
    finally:
        llm.model.set_attn_implementation(before)
    return expert.end(img, last, x_t, t)


# ---------------------------------------------------------------------------------------------------------------------
# timing


def timed(work: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, dict]:
    """name -> {"ms": median, "spread": half the distance of the quartiles, as a share of it}. Every round runs each once, so
    that a busy moment of the machine meets all; rounds until `seconds` each have passed, at least three."""

    def once(function: Callable) -> float:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started)

    spent = {name: once(function) + once(function) for name, function in work.items()}  # warm-up
    rounds = max(3, min(50, int(1000 * seconds * len(work) / sum(spent.values()))))
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            times[name].append(once(function))
    summary = {}
    for name, values in times.items():
        values = sorted(values)
        middle = median(values)
        quartiles = values[len(values) // 4], values[-1 - len(values) // 4]
        summary[name] = {"ms": middle, "spread": (quartiles[1] - quartiles[0]) / 2 / middle}
    return summary


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The machine's measured speed at a large square matrix product: what 100 % means here."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / timed({"matmul": lambda: a @ b}, device, 1.0)["matmul"]["ms"] / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# sections: each returns the rows of its table


HEADS = {"Qwen2.5-0.5B": (14, 2, 64), "gemma-3-270m": (4, 1, 256), "Llama-3-8B": (32, 8, 128)}  # H, G, Dk = Dv


def bench_attention(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    gpu = device.type == "cuda"
    grid = [(T, N, B) for B in ((1, 16, 64) if gpu else (4,)) for T in ((16, 64, 512) if gpu else (16, 64))
            for N in ((64, 256, 1024, 4096) if gpu else (16, 64, 256)) if N * B <= 65_536]  # fmt: skip
    rows = []
    told = set()
    for name, (H, G, D) in HEADS.items():
        for T, N, B in grid:
            torch.manual_seed(0)
            image = [torch.randn(B, N, h, D, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for h in (H, G, G)]
            text = [torch.randn(B, T, G, D, device=device, dtype=dtype).transpose(1, 2) for _ in range(2)]
            lengths = torch.randint(T // 2, T + 1, (B,), device=device)
            flops = 4 * H * N * D * (lengths.sum().item() + B * N)
            moved = dtype.itemsize * D * (2 * B * H * N + 2 * G * (lengths.sum().item() + B * N))  # read once, write once
            ways, left_out = attention_ways(*image, *text, lengths)
            for way, why in left_out.items():
                if (way, why) not in told:
                    told.add((way, why))
                    print(f"left out from heads {name}, T {T}, N {N}, B {B} on: {way} ({why})")
            grad = torch.randn(B, H, N, D, device=device, dtype=dtype)

            def backward(way: Callable, image=image, grad=grad) -> None:
                torch.autograd.grad(way(), image, grad)

            with torch.no_grad():
                backends = {way: backend_of(call) for way, call in ways.items()}
                forward = timed(ways, device, args.seconds)
            both = timed({k: lambda way=way: backward(way) for k, way in ways.items()}, device, args.seconds)
            for way in ways:
                rows.append({
                    "heads": name, "T": T, "N": N, "B": B, "way": way, "backend": backends[way],
                    "forward ms": forward[way]["ms"],
                    "forward+backward ms": both[way]["ms"], "spread": forward[way]["spread"],
                    "TFLOP/s": flops / forward[way]["ms"] / 1e9, "of peak": flops / forward[way]["ms"] / 1e9 / peak,
                    "least GB/s": moved / forward[way]["ms"] / 1e6,
                    "sdpa / this": forward["sdpa"]["ms"] / forward[way]["ms"],
                    "sdpa / this, both": both["sdpa"]["ms"] / both[way]["ms"],
                })  # fmt: skip
    return rows


def fresh_context(llm: FrozenLLM, captions: list[str]) -> Context:
    """What a trainer without a cache does: the LLM over the captions of the batch, each of them once."""
    distinct = list(dict.fromkeys(captions))
    rows = torch.tensor([distinct.index(caption) for caption in captions], device=llm.device)
    ids = [torch.tensor(llm.tokenize(caption), dtype=torch.long) for caption in distinct]
    lengths = torch.tensor([len(row) for row in ids], device=llm.device)
    with torch.no_grad():
        cache = llm._run(pad_sequence(ids, batch_first=True).to(llm.device), max(llm.cache_index[x.index] for x in llm.kept))
        return llm._unpack(llm._pack(cache, lengths)[rows], lengths[rows])


def training_run(args, *flags: str) -> train.Run:
    llm = ["--llm", args.llm, *(["--random-llm"] if args.random_llm else [])]
    given = [*llm, "--out", tempfile.mkdtemp(), "--device", args.device, *args.for_training, *flags]
    return train.prepare(train.parse_args(given), {}, {})


PRODUCTS = ("mm", "attention", "softmax", "gemm", "conv")  # in the names of operators


def bench_train(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Images per second of whole training steps, on the same stream of captions."""
    run, rows = training_run(args), []
    stream = train.batches(run.source, run.llm, run.args.batch_size, run.args.draws, 0)

    def cached(predict: Callable = run.expert) -> None:
        train.train_step(run, predict, *next(stream))

    def each_step() -> None:
        captions, pictures = next(stream)
        train.train_step(run, lambda x, t, _: run.expert(x, t, fresh_context(run.llm, captions)), captions, pictures)

    def joint(attention: Callable) -> None:
        captions, pictures = next(stream)
        train.train_step(
            run, lambda x, t, _: joint_forward(run.llm, run.expert, x, t, captions, attention), captions, pictures
        )

    ways = {
        "joint forward, float32 definition": partial(joint, joint_attention_definition),
        "joint forward, fast attention": partial(joint, joint_fast),
        "LLM over the distinct captions of each step": each_step,
        "caption cache": cached,
    }
    if args.compile:
        ways["caption cache, compiled"] = partial(cached, torch.compile(run.expert))
    result = timed(ways, device, 30 * args.seconds)
    tokens = run.args.batch_size * (run.args.image_size // run.args.patch) ** 2
    flops = 6 * sum(p.numel() for p in run.expert.parameters() if p.dim() == 2) * tokens  # the expert's matrices, 3 products
    for name, time_ms in result.items():
        rows.append({"expert": "tiny", "way": name, "ms": time_ms["ms"], "spread": time_ms["spread"],
                     "images/s": 1000 * run.args.batch_size / time_ms["ms"],
                     "this / cache": time_ms["ms"] / result["caption cache"]["ms"],
                     "of peak": flops / time_ms["ms"] / 1e9 / peak})  # fmt: skip
    for name in [name for name in ways if name.startswith("caption cache")]:
        with torch.profiler.profile() as profile:
            for _ in range(5):
                ways[name]()
        events = {event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
                  for event in profile.key_averages()}  # fmt: skip
        products = sum(us for key, us in events.items() if any(word in key for word in PRODUCTS))
        print(f"{name}: {products / sum(events.values()):.0%} of the time in matrix products and attention")
    if args.mirror:
        copy = training_run(args, "--expert", "mirror")
        captions = train.batches(copy.source, copy.llm, run.args.batch_size, run.args.draws, 0)
        result = timed({"mirror": lambda: train.train_step(copy, copy.expert, *next(captions))}, device, 10 * args.seconds)
        ms = result["mirror"]["ms"]
        rows.append({"expert": "mirror", "way": "caption cache", "ms": ms, "images/s": 1000 * run.args.batch_size / ms})
    return rows


def bench_sample(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Drawing with guidance, 24 Euler steps: pictures per second, at 1 and 16 prompts."""
    run, rows = training_run(args), []
    llm, expert, compiled = run.llm, run.ema.eval(), torch.compile(run.ema, dynamic=False)
    for n in (1, 16):
        captions = [f"a {color} circle left of a blue square" for color in ("red", "green", "white", "pink")] * 4
        captions = captions[:n]
        noise = torch.randn(n, 3, expert.image_size, expert.image_size, device=device)
        context, empty = llm.context(captions), llm.context([""] * n)

        def draw(predict: Callable, noise=noise, context=context, empty=empty) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                euler_sample(predict, noise, context, 24, empty, 3.0)

        def joint(x: Tensor, t: Tensor, _, captions=captions) -> Tensor:
            return joint_forward(llm, expert, x, t, [*captions, *[""] * len(captions)], joint_fast)

        def twice(x: Tensor, t: Tensor, both: Context) -> Tensor:
            B = len(x) // 2
            halves = (Context([k[s] for k in both.keys], [v[s] for v in both.values], both.lengths[s])
                      for s in (slice(0, B), slice(B, None)))  # fmt: skip
            return torch.cat([expert(*xt, half) for *xt, half in zip(x.chunk(2), t.chunk(2), halves)])

        predicts = {"joint forward, fast attention": joint, "cached, two passes": twice, "cached, one batch": expert}
        if args.compile:
            predicts["cached, one batch, compiled"] = compiled
        result = timed({k: lambda p=p: draw(p) for k, p in predicts.items()}, device, 4 * args.seconds)
        for name, time_ms in result.items():
            rows.append({"prompts": n, "way": name, "ms": time_ms["ms"], "spread": time_ms["spread"],
                         "pictures/s": 1000 * n / time_ms["ms"],
                         "joint / this": result["joint forward, fast attention"]["ms"] / time_ms["ms"]})  # fmt: skip
    return rows


def bench_llm(args, device: torch.device, dtype: torch.dtype, peak: float) -> list[dict]:
    """Reading captions, up to the last layer that the default expert reads, and writing."""
    llm, rows = training_run(args).llm, []
    for words in (4, 16, 64):
        captions = [f"{i} " + "red " * words for i in range(64)]
        tokens = sum(len(llm.tokenize(caption)) for caption in captions)

        def read(captions=captions) -> None:
            llm._forget()
            llm.lookup(captions)

        ms = timed({"read": read}, device, 2 * args.seconds)["read"]
        rows.append(
            {
                "way": f"read 64 captions of {tokens // 64} tokens",
                "ms": ms["ms"],
                "spread": ms["spread"],
                "tokens/s": 1000 * tokens / ms["ms"],
            }
        )
    prompt = torch.tensor([llm.tokenize("a red circle")], device=device)

    def write() -> None:
        llm.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=32,
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        )

    ms = timed({"write": write}, device, 2 * args.seconds)["write"]
    rows.append({"way": "write 32 tokens", "ms": ms["ms"], "spread": ms["spread"], "tokens/s": 32000 / ms["ms"]})
    return rows


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [
        [f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells)


def version_of(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def main() -> None:
    parser = OneLineParser(description="Time what this project does.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    parser.add_argument("--random-llm", action="store_true", help="fresh weights in place of the LLM's own")
    parser.add_argument("--mirror", action="store_true", help="time the mirrored tower too")
    parser.add_argument("--compile", action="store_true", help="time the compiled expert too")
    parser.add_argument("--seconds", type=positive(float), default=0.5, help="time for each thing measured")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", default="bench.json")
    args, args.for_training = parser.parse_known_args()
    make_folder(Path(args.out).parent)
    train.parse_args(args.for_training)  # a wrong flag is named before anything is timed
    if wrong := [name for name in args.sections if name not in SECTIONS]:
        raise ValueError(f"{wrong[0]}: expected some of {', '.join(SECTIONS)}")
    device, why = pick_device(args.device)
    dtype, _ = pick_dtype("auto", device)
    machine = {"device": f"{device} ({why})", "cpu": platform.processor() or platform.machine(),
               "threads": torch.get_num_threads(),
               "dtype": str(dtype), "torch": torch.__version__, "transformers": transformers.__version__,
               "triton": version_of("triton")}  # fmt: skip
    machine["matmul peak TFLOP/s"] = peak = peak_tflops(device, dtype)
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    results = {"machine": machine}
    for name in args.sections or SECTIONS:
        results[name] = {"attention": bench_attention, "train": bench_train, "sample": bench_sample, "llm": bench_llm}[name](
            args, device, dtype, peak
        )
        print(f"\n{name}\n{table(results[name])}", flush=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    one_line_errors(main)
