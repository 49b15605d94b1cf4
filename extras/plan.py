"""What a run would take, before it starts: memory, and floating-point operations a step.

    python train.py --image-size 256 --plan        # on this machine
    python train.py --image-size 256 --plan 8      # on each of 8 GPUs, which need not be here
    python train.py --image-size 256 --plan 8 --shard

Nothing is trained or written, and of the LLM only its configuration and its tokenizer are loaded:
it stands on the meta device. A step of the expert is counted on fake tensors (counting.py). On a
CPU that is a tenth less than what is measured; what CUDA itself takes, about a GB, is left out.
"""

import argparse
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer

import inspection
from assemble import build_expert, build_optimizers, set_reader
from batches import LOOK_AHEAD, LOOK_AHEAD_BYTES
from cli import colon_form, pick_device, pick_dtype
from data import open_source
from extras.checkpointing import checkpoint_layers
from extras.counting import Counted, Live, count_step, fused_attention, norms_in_float32
from extras.ddpm import ddpm_loss
from extras.mirror import MirrorTower, layers_of
from extras.parallel import check_parts
from flags import data_form, is_encoded
from flow import flow_loss
from llm import BUCKET, Context, FrozenLLM, TextLayer, round_up
from loading import cannot_load, check_tokenizer, decoder_class, from_here_first, place_of
from model import ImageExpert

Rows = dict[str, tuple[float, str]]  # what -> bytes, and how they come about


@dataclass
class Plan:
    """What each process of a run takes: in the memory of its device, `step` being what one of these
    rows is made of, though not all at once; in the machine's memory, where that is another; and
    operations of a step, and of the LLM for its captions, if they are new."""

    about: str
    device: Rows
    step: Rows
    host: Rows
    flops: int
    flops_of_llm: int


def print_plan(args: argparse.Namespace) -> None:
    """Print what the run of these flags would take. ValueError for one that cannot be planned."""
    plan = plan_of(args)
    print(plan.about)
    print_rows(plan.device)
    print_rows(plan.step, indent="  ")
    print_rows({"in all": (total(plan.device), "without what is set in")})
    if plan.host:
        print("in the machine's memory, for each process")
        print_rows(plan.host)
    flops, of_llm = plan.flops / 1e12, plan.flops_of_llm / 1e12
    print(f"a step is {flops:.3g} TFLOP, and {of_llm:.3g} where the LLM has to read its captions")


def print_rows(rows: Rows, indent: str = "") -> None:
    for what, (size, how) in rows.items():
        print(f"{indent + what:<28}{size / 1e9:8.3f} GB   {how}")


def total(rows: Rows) -> float:
    return sum(size for size, _ in rows.values())


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of a run of these flags (train.parse_args)."""
    check_can_be_planned(args)
    ranks = args.plan or 1
    check_parts(args, ranks)
    device, dtype = where(args)
    llm = read_llm(args, dtype)
    set_reader(args, llm, {})
    name, options = data_form(args.data)
    source = open_source(name, args.image_size, args.seed, **options)
    if hasattr(source, "before_and_after"):
        raise ValueError("--plan: a run that describes or edits cannot be planned yet")
    tokens = caption_lengths(llm, source)
    held = process_memory()

    # a step
    batch = args.batch_size // ranks
    length = round_up(max(tokens), BUCKET)
    loss = ddpm_loss if args.objective == "ddpm" else flow_loss
    on_gpu = device != "cpu"
    with FakeTensorMode(), fused_attention() if on_gpu else nullcontext():
        tower = build_tower(args, llm, source)
        if on_gpu:
            norms_in_float32(tower)
        llm.keep(tower.reads)
        optimizers = build_optimizers(tower, args.lr, args.weight_decay)
        shape = (batch, *tower.shape())
        contexts = lambda n: context_of(llm, n, length)
        counted = count_step(
            tower, optimizers, contexts, loss, shape, dtype, args.accumulate, ranks
        )

    # its rows
    rows = of_weights(llm, tower, optimizers, counted)
    if args.shard:
        rows |= in_parts(rows, llm, ranks)
    rows["cache of captions"] = of_cache(args, llm, tokens, batch)
    most = counted.most - counted.state
    rows["a step, at its most"] = (most, "what follows, never all at once, and what is computed")
    host = of_host(args, batch, held)
    if not on_gpu:
        rows |= host
        host = {}
    step = of_step(args, llm, tower, counted, batch, length)
    many = f"each of {args.plan} x " if args.plan else ""
    about = f"{many}{device}, {dtype}: {batch} pictures a step"
    flops_of_llm = reading_flops(llm, batch // args.draws, length)
    return Plan(about, rows, step, host, counted.flops, flops_of_llm)


def check_can_be_planned(args: argparse.Namespace) -> None:
    """ValueError for what needs the LLM's own answers."""
    bridge, options = colon_form(args.bridge)
    if bridge not in ("mot", "mirror") or options.keys() - {"init"}:
        raise ValueError(
            f"--plan: expected --bridge mot or mirror, without further options, not {args.bridge}"
        )
    if args.describe:
        raise ValueError("--plan: a run that describes or edits cannot be planned yet")
    if args.shard and (args.plan or 1) == 1:
        raise ValueError("--shard --plan: expected the number of GPUs, --plan 8")
    if (args.read or "").startswith(("think", "rewrite")):
        raise ValueError(f"--plan: how long the captions are is not known with --read {args.read}")


def where(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Kind of device and dtype of the run: of GPUs that need not be here, where so many are asked
    for, else as train.py finds them."""
    if args.plan and args.device == "auto":
        return "cuda", torch.float32 if args.dtype == "float32" else torch.bfloat16
    device, _ = pick_device(args.device)
    return device.type, pick_dtype(args.dtype, device)[0]


# -------------------------------------------------------------------------------------------------
# the two towers, without their weights


class PlannedLLM(FrozenLLM):
    """An LLM on the meta device: its tokenizer is real, its keys have shapes alone.

    How large they are is not known: that none need gains of their own is assumed (text_gains)."""

    def identify(self) -> None:
        self.identity = {}

    def inspect_model(self) -> None:
        ids = torch.zeros(1, inspection.TOKENS, dtype=torch.long, device="meta")
        states = inspection.kept_states(self.model.config.get_text_config(), self.run(ids))
        self.layers = []
        for n, (keys, values) in enumerate(states.values()):
            widths = (keys.shape[1], keys.shape[3], values.shape[3])
            self.layers.append(TextLayer(n, *widths))
        self.cache_index = list(states)
        self.key_sizes = [[1.0] * layer.kv_heads for layer in self.layers]


def read_llm(args: argparse.Namespace, dtype: torch.dtype) -> PlannedLLM:
    """The LLM of --llm, by its configuration. ValueError, in one line, if that cannot be."""
    name = args.llm
    place = place_of(name)
    trust = {"trust_remote_code": args.trust_remote_code}

    def read(here: bool) -> tuple:
        at = {"local_files_only": here} | trust
        config = AutoConfig.from_pretrained(place, **at)
        tokenizer = AutoTokenizer.from_pretrained(place, **at)
        check_tokenizer(tokenizer, config.get_text_config().vocab_size)
        return config, tokenizer

    try:
        config, tokenizer = from_here_first(name, place, read)
        with torch.device("meta"):
            model = decoder_class(type(config)).from_config(config, dtype=dtype, **trust)
        llm = PlannedLLM(model, tokenizer, name)
    except Exception as error:  # an architecture may fail in any way: each becomes one clear line
        raise cannot_load(name, error) from None
    if not llm.layers:
        raise ValueError(f"--llm {name} keeps no key-value cache; expected a decoder LLM")
    return llm


def caption_lengths(llm: FrozenLLM, source) -> list[int]:
    """Tokens that the image looks at, of some captions."""
    lengths = []
    for i in range(LOOK_AHEAD):
        reading = llm.read(source.example(i, 1)[0])
        lengths.append(len(reading.ids) - reading.start)
    return lengths


def build_tower(args: argparse.Namespace, llm: PlannedLLM, source) -> ImageExpert:
    """Of latents, if there is a VAE, which is taken to have encoded all pictures before."""
    made_for = {}
    if args.vae or is_encoded(args.data):
        from extras.latents import sizes_of

        made_for["vae"] = sizes_of(args.vae, args.data)
    if args.bridge == "mot":
        tower = build_expert(args, llm, source, made_for, False)
    else:
        config = json.loads(llm.model.config.get_text_config().to_json_string())
        shared = {"made_for": made_for}
        for name in ("patch", "patcher", "image_size", "prediction"):
            shared[name] = getattr(args, name)
        if made_for:
            shared["channels"] = made_for["vae"]["channels"]
        tower = MirrorTower(config, **shared)
    if args.checkpointing:
        checkpoint_layers(tower)
    return tower


# -------------------------------------------------------------------------------------------------
# the rows


def of_weights(llm: PlannedLLM, tower: ImageExpert, optimizers: list, counted: Counted) -> Rows:
    kept = []
    for optimizer in optimizers:
        numbers = 0
        for group in optimizer.param_groups:
            numbers += sum(p.numel() for p in group["params"])
        each = "2 x 4" if isinstance(optimizer, torch.optim.AdamW) else "4"
        kept.append(f"{type(optimizer).__name__} {each} bytes x {numbers / 1e6:.1f} M")
    frozen = sum(p.numel() for p in llm.model.parameters())
    trained = sum(p.numel() for p in tower.parameters())
    size = llm.dtype.itemsize
    return {
        "LLM, frozen": (size * frozen, f"{size} bytes x {frozen / 1e6:.1f} M parameters"),
        "expert": (4 * trained, f"4 bytes x {trained / 1e6:.1f} M parameters"),
        "its moving average": (4 * trained, f"4 bytes x {trained / 1e6:.1f} M"),
        "optimizers": (counted.state, ", ".join(kept)),
    }


def in_parts(rows: Rows, llm: PlannedLLM, ranks: int) -> Rows:
    """What each keeps of it with --shard. (A step is left as it is without: it has less of the
    gradients, and a block that is put together.)"""
    shared = {}
    for what in ("expert", "its moving average", "optimizers"):
        size, how = rows[what]
        shared[what] = (size / ranks, f"({how}) / {ranks}")
    count = llm.model.config.get_text_config().num_hidden_layers
    layers = layers_of(llm.model.base_model, count)
    of_layers = llm.dtype.itemsize * sum(p.numel() for p in layers.parameters())
    size, how = rows["LLM, frozen"]
    how += f", those of its layers / {ranks}; at the start whole, {size / 1e9:.3f} GB"
    return shared | {"LLM, frozen": (size - of_layers * (1 - 1 / ranks), how)}


def of_cache(args: argparse.Namespace, llm: PlannedLLM, tokens: list[int], batch: int) -> tuple:
    """What all captions of the run take, if they are distinct, or as much as the cache keeps."""
    mean = sum(tokens) / len(tokens)
    numbers = sum(llm.widths)
    size = llm.dtype.itemsize
    captions = max(args.steps, look_ahead(args)) * (batch // args.draws)
    most = min(captions * mean * numbers * size, llm._cache_limit)
    how = f"{size} bytes x {mean:.1f} tokens x {numbers:,} a caption; all of the run, or 512 MB"
    return most, how


def of_step(
    args: argparse.Namespace,
    llm: PlannedLLM,
    tower: ImageExpert,
    counted: Counted,
    batch: int,
    length: int,
) -> Rows:
    part = batch // args.accumulate
    channels, height, width = tower.shape()
    pictures = f"2 x 4 bytes x {batch} x {channels} x {height} x {width}"
    numbers = f"{part} x {length} tokens x {sum(llm.widths):,}"
    trained = sum(p.numel() for p in tower.parameters())
    twice = ", without what is computed twice" if args.checkpointing else ""
    return {
        "pictures and noise": (counted.batch, pictures),
        "context": (counted.context, f"{llm.dtype.itemsize} bytes x {numbers}"),
        "activations": (counted.activations, f"of {part} pictures, counted{twice}"),
        "gradients": (4 * trained, f"4 bytes x {trained / 1e6:.1f} M"),
    }


def of_host(args: argparse.Namespace, batch: int, held: int) -> Rows:
    ahead = look_ahead(args)
    pictures = 2 * ahead * batch * 3 * args.image_size**2
    how = f"these {ahead} steps and the next {ahead}, x {batch} x 3 x {args.image_size}^2"
    return {
        "pictures": (pictures, how),
        "Python, its libraries": (held, "and the tokenizer: what this process has now"),
    }


def look_ahead(args: argparse.Namespace) -> int:
    """Steps whose pictures are made together: batches.py."""
    step_bytes = 3 * args.batch_size * args.image_size**2
    return max(1, min(LOOK_AHEAD, int(LOOK_AHEAD_BYTES / step_bytes)))


def process_memory() -> int:
    """Bytes that this process has in memory; 0 where the system does not say so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def context_of(llm: PlannedLLM, n: int, length: int) -> Context:
    """Of n captions of this length."""
    keys = []
    values = []
    for layer in llm.kept:
        shape = (n, layer.kv_heads, length)
        keys.append(torch.empty(*shape, layer.key_width, dtype=llm.dtype))
        values.append(torch.empty(*shape, layer.value_width, dtype=llm.dtype))
    return Context(keys, values, torch.empty(n, dtype=torch.long))


def reading_flops(llm: PlannedLLM, captions: int, length: int) -> int:
    """Of the LLM over so many captions, up to the last layer that the tower reads."""
    ids = torch.zeros(captions, length, dtype=torch.long, device="meta")
    with Live() as live:
        llm.run_kept(ids, torch.zeros(captions, dtype=torch.long))
    return live.flops
