"""train.py's flags: their defaults, what changes these, and which flags do not go together."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from cli import OneLineParser, between, colon_form, positive, seed_number, share, words
from patches import LARGEST_SIDE, PATCHERS

EMA_DECAY = 0.999  # of the weights' moving average, which is what is saved to draw with
TIME_MEAN = -0.4  # of the logit-normal time at 32 pixels: below zero it leans to the noise

SIZES = {  # --size -> width and depth; there are as many heads as make twice the width
    "tiny": {"width": 256, "depth": 6},
    "small": {"width": 384, "depth": 9},
    "base": {"width": 512, "depth": 12},
}
RECIPES = {  # what a source or a tower changes in the defaults
    "emoji": {  # of a name, the LLM knows most once it is asked to translate it
        "template": '"{}" in English: "',
        "read": "after",
        "layers": "0.85",
        "weight_decay": 1.0,
        "steps": 4500,
    },
    "mirror": {"lr": 3e-4},
}
NOT_FOR_MIRROR = ("size", "width", "heads", "depth", "layers")  # it has the LLM's


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> argparse.Namespace:
    """The command line, parsed twice: --data, --bridge, --from and --resume of the first pass
    decide what the defaults of the second are (RECIPES, the expert's own, the stored settings)."""
    parser = make_parser()
    plain = parser.parse_args(argv)
    source = data_form(plain.data)[0]
    origin = {}
    if plain.start:
        from extras.starting import check_flags, flags_of

        origin = flags_of(plain)
    bridge = colon_form(origin.get("bridge", plain.bridge), flag="--bridge")[0]
    if not plain.resume:  # then the stored ones count
        check_belongings(parser, plain, bridge)
    check_forms(plain)
    parser.set_defaults(**RECIPES.get(source, {}) | RECIPES.get(bridge, {}))
    in_latents = plain.vae or origin.get("vae") or is_encoded(source)
    if in_latents:
        from extras.latents import PATCH, encoded_at, latent_side

        parser.set_defaults(patch=PATCH, **encoded_at(source))
    parser.set_defaults(**origin)
    if stored:
        check_stored(parser, stored)
        parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    if origin:
        check_flags(args, origin)
    if args.objective == "ddpm":
        args.prediction = "noise"
    args.patch = args.patch or min(16, max(1, args.image_size // 4))
    if args.time_mean is None:
        side = latent_side(args.vae, source, args.image_size) if in_latents else args.image_size
        args.time_mean = time_mean(side)
    if not args.out:
        args.out = default_out(args, parser, bridge)
    if args.batch_size % args.draws:
        raise ValueError(f"--batch-size {args.batch_size} does not divide by --draws {args.draws}")
    if args.batch_size // args.draws % args.accumulate:
        raise ValueError(
            f"--batch-size {args.batch_size}: expected a multiple of --draws {args.draws} times "
            f"--accumulate {args.accumulate}"
        )
    if args.compile and args.shard:
        raise ValueError("--shard does not go with --compile, nobody has tried: leave one out")
    if args.compile and args.checkpointing:
        raise ValueError(
            "--checkpointing does not go with --compile, whose compiler fails on it: leave one out "
            "(--no-checkpointing, --no-compile)"
        )
    return args


def check_stored(parser: OneLineParser, stored: dict) -> None:
    """ValueError for a stored setting that its flag would not take: a run's folder may be a
    stranger's, and defaults are not checked."""
    for action in parser._actions:
        value = stored.get(action.dest, action.default)
        if value == action.default or (action.dest, value) == ("prediction", "noise"):  # of ddpm
            continue
        if value is None and stored.get("start") and action.dest in ("size", "layers"):
            continue  # the expert's own, see extras/starting.py
        if action.nargs == 0:  # a switch
            takes = isinstance(value, bool)
        elif action.type:
            takes = not isinstance(value, bool) and action.type(str(value)) == value
        else:
            takes = isinstance(value, str) and value in (action.choices or [value])
        if not takes:
            raise ValueError(f"its --{action.dest} is {json.dumps(value)[:60]}")
    no_flags = {"ema": share, "time_mean": between(-100, 100)}  # see make_parser
    for name in stored.keys() & no_flags.keys():
        value = stored[name]
        if value is not None and no_flags[name](str(value)) != value:
            raise ValueError(f"its {name} is {json.dumps(value)[:60]}")


def time_mean(image_size: int) -> float:
    """Twice the side is four times the pixels, whose average shows through twice the noise: the
    odds t / (1 - t) at which a picture is decided are halved (Esser et al. 2024, eq. 23)."""
    return TIME_MEAN - math.log(image_size / 32)


def is_encoded(source: str) -> bool:
    """Whether it is a folder of latents (extras/latents.py)."""
    return (Path(source) / "latents.json").is_file()


def data_form(text: str) -> tuple[str, dict]:
    """--data -> a source's name and its options; of several with commas, their names with commas
    and the option "parts": name and options of each. A folder's or a file's name may have colons
    and commas."""
    if Path(text).is_dir():
        return text, {}
    sources = split_at_commas(text, is_one_source)
    if len(sources) == 1 and text.startswith("hf:"):
        name, options = colon_form(text.removeprefix("hf:"), flag="--data")
        return f"hf:{name}", options
    if len(sources) == 1:
        return colon_form(text, flag="--data")
    parts = [data_form(source) for source in sources]
    names = [name for name, _ in parts]
    return ",".join(names), {"parts": parts}


def split_at_commas(text: str, is_one: Callable[[str], bool]) -> list[str]:
    """At the commas, but for those within a part that is one: the longest such part counts."""
    parts = []
    pieces = text.split(",")
    while pieces:
        count = len(pieces)
        while count > 1 and not is_one(",".join(pieces[:count])):
            count -= 1
        parts.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return parts


def is_one_source(text: str) -> bool:
    """Whether its commas stand in the name of a folder or of an option's file that is there."""
    name, _, options = text.partition(":")
    a_name = "," not in name or Path(name).is_dir()
    an_option = "," not in options or Path(options.partition("=")[2]).is_file()
    return a_name and an_option


def check_belongings(parser: OneLineParser, args: argparse.Namespace, bridge: str) -> None:
    """ValueError for a flag that means nothing to the tower that is asked for."""
    unused = {"mot": (), "mirror": NOT_FOR_MIRROR}.get(bridge, ("layers",))
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is not for --bridge {bridge}: leave it out")


WRITES_KEYS = ("mot", "mirror")  # towers whose own keys the LLM can read


def check_writes_keys(bridge: str, asked: str) -> None:
    """ValueError for a tower that cannot read pictures to the LLM. asked: what needs it to."""
    if bridge not in WRITES_KEYS:
        raise ValueError(
            f"{asked}: --bridge {bridge} has no image keys that the LLM could read; expected one "
            f"of {', '.join(WRITES_KEYS)}"
        )


def check_forms(args: argparse.Namespace) -> None:
    """ValueError for what is wrong in --bridge and --read, before anything is loaded."""
    if args.bridge != "mot":
        from extras.bridges import OPTIONS

        name = colon_form(args.bridge, OPTIONS, "--bridge")[0]
        if args.describe:
            check_writes_keys(name, "--describe")
    if args.read:
        from extras.readers import READ

        colon_form(args.read, READ, "--read")


def default_out(args: argparse.Namespace, parser: OneLineParser, bridge: str) -> str:
    """runs/, the name of the data and, if another is asked for, of the LLM and the bridge."""
    name, options = data_form(args.data)
    names = [name]
    if "parts" in options:
        names = name.split(",")
    parts = [short_name(name) for name in names]
    if args.llm != parser.get_default("llm"):
        parts.append(Path(args.llm).name)
    if args.random_llm:
        parts.append("random-llm")
    if bridge != "mot":
        parts.append(bridge)
    if args.start:
        parts.append("from-" + Path(args.start).resolve().name)
    return "runs/" + "-".join(parts)


def short_name(source: str) -> str:
    """The last part of a path or of a data set's name; of many shards their folder's."""
    path = Path(source.removeprefix("hf:"))
    if path.suffix == ".tar":
        path = path.parent if re.search(r"[*?{\[]", path.name) else path.with_suffix("")
    return path.resolve().name


def add_what_is_learned(parser: OneLineParser) -> None:
    add = parser.add_argument_group("what is learned").add_argument
    data = "shapes, shapes:one-object, emoji, a folder, 'DIR/*.tar', hf:NAME; several with commas"
    add("--data", default="shapes", help=data)
    add("--image-size", type=between(1, LARGEST_SIDE, int), default=64, help="side in pixels")
    buckets = "pictures keep their shape, nearly: a batch has one of a few (extras/captioned.py)"
    add("--buckets", action="store_true", help=buckets)
    vae = "draw latents of this autoencoder, a Hub id or a folder (extras/latents.py)"
    add("--vae", help=vae)
    tokens = "side of an image token in pixels (default: 16, or a quarter of a small picture)"
    add("--patch", type=positive(int), help=tokens)
    add("--patcher", default="unet", choices=PATCHERS, help="from pixels to tokens and back")
    add("--prediction", default="clean", choices=["clean", "velocity"], help="the head's output")
    objective = "what is learned: a rectified flow, or LMFusion's DDPM (extras/ddpm.py)"
    add("--objective", default="flow", choices=["flow", "ddpm"], help=objective)
    add("--bridge", default="mot", help="mot, shared attention, or one of extras/bridges.py")
    described = "share of each batch that is described, the picture first (extras/lmfusion.py)"
    add("--describe", type=share, default=0.0, help=described)
    weight = "of the LLM's loss on these captions, in nats a token, beside the flow's"
    add("--lm-weight", type=positive(float), default=0.05, help=weight)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        description="Train an image expert on a frozen LLM.",
    )
    add_what_is_learned(parser)
    add = parser.add_argument_group("how long").add_argument
    add("--steps", type=positive(int), default=2400, help="optimizer steps")
    add("--batch-size", type=positive(int), default=64, help="pictures a step")
    add("--draws", type=positive(int), default=4, help="of these, pictures of each caption")
    parts = "parts of a batch, one after the other: the same step in less memory"
    add("--accumulate", type=positive(int), default=1, help=parts)
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate")
    add("--warmup", type=positive(int), default=200, help="steps in which it rises")
    add("--weight-decay", type=between(0, 1000), default=0.01, help="of all weights")
    add("--caption-dropout", type=share, default=0.1, help="share trained on the empty prompt")

    add = parser.add_argument_group("size of the expert").add_argument
    add("--size", default="tiny", choices=SIZES, help="one dial for width, depth and heads")
    add("--width", type=positive(int), help="(default: the size's)")
    add("--depth", type=positive(int), help="(default: the size's, or the LLM's if that is less)")
    add("--heads", type=positive(int), help="(default: as many as make twice the width)")

    add = parser.add_argument_group("LLM").add_argument
    add("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file, or gemma-3-270m")
    add("--random-llm", action="store_true", help="the control: fresh weights from the seed")
    layers = "that the expert reads: all, lower, middle, upper, 13,15,17, 6-11, or a share, 0.85"
    add("--layers", default="middle", help=layers)
    add("--template", type=words, default="{}", help="what it reads; {} is the caption")
    add("--read", help="after, chat, think:40, rewrite, ...: see extras/readers.py")
    add("--trust-remote-code", action="store_true", help="let a Hub model run its own code")

    add_run_flags(parser)
    # no flags, and yet a run keeps them: it goes on with what it began with
    parser.set_defaults(ema=EMA_DECAY, time_mean=None)
    return parser


def add_run_flags(parser: OneLineParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--out", help="its folder (default: runs/ and the name of the data)")
    start = "a new run from this expert's weights and architecture: a run's folder or a Hub id"
    add("--from", dest="start", metavar="CKPT", help=start)
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--seed", type=seed_number, default=0, help="of the weights, the data and the noise")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    dtypes = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=dtypes, help="of the LLM and of autocast")
    on_or_off = argparse.BooleanOptionalAction
    add("--compile", action=on_or_off, default=False, help="torch.compile the expert")
    twice = "compute layers twice instead of keeping them: less memory (extras/checkpointing.py)"
    add("--checkpointing", action=on_or_off, default=False, help=twice)
    add("--shard", action="store_true", help="each GPU keeps a part of all (extras/shard.py)")
    planned = "start nothing: print what it takes, here or on N GPUs (extras/plan.py)"
    add("--plan", nargs="?", type=positive(int), const=0, metavar="N", help=planned)
    add("--sample-every", type=positive(int), default=500, help="steps between grids of samples")
    add("--save-every", type=positive(int), default=250, help="steps between checkpoints")
    kept = "checkpoints that stay beside the newest: step-000250/ (extras/keeping.py)"
    add("--keep", type=between(0, 10**6, int), default=0, help=kept)
