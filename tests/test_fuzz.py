"""Whatever lies in a user's files: it works, or one line says what is wrong.

500 inputs in all, always the same. More, and other ones:

    FUZZ_TIMES=10 pytest tests/test_fuzz.py

Another exception than a plain ValueError or an OSError is a fault, and so is a wait, a message of
many lines, and a picture that is not what its file holds.
"""

import codecs
import copy
import io
import json
import os
import shutil
import signal
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import train
from assemble import llm_of
from cli import TRACEBACK, captioned_grid, file_words, one_line
from conftest import CPU, TINY_RUN
from extras.files import read_picture
from extras.folders import open_folder
from extras.prompts import LAYOUTS, check_layout, read_prompts
from loading import load_llm
from sample import draw

TIMES = int(os.environ.get("FUZZ_TIMES", 1))
LONGEST = 20  # seconds, after which it hangs; more than 5 fail too


def fuzzed(examples: int):
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=5000,
        
        suppress_health_check=list(HealthCheck),
    )


def works_or_says(action, name: str):
    """What an action gives, or None if one line, which has this name in it, says why it fails."""
    try:
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    except (ValueError, OSError) as error:
        assert type(error) is ValueError or isinstance(error, OSError), repr(error)
        line = one_line(error)
        assert line == " ".join(str(error).split())[:600] or line.endswith("…"), line
        assert name in line and TRACEBACK not in line, line
        return None


@contextmanager
def no_hang():
    """A wait that no deadline ends: after so long it is an error (where the system has SIGALRM)."""

    def stop(number, frame):
        raise AssertionError(f"it hangs: {LONGEST} seconds")

    if hasattr(signal, "SIGALRM"):
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(LONGEST)
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -------------------------------------------------------------------------------------------------
# what comes in

letters = st.characters(exclude_categories=())  # halves of surrogate pairs and NUL too
words = st.text(letters, max_size=40)
long_texts = st.builds(lambda text, n: (text * n)[:100_000], words, st.integers(1, 20_000))
texts = words | st.sampled_from(["a red circle", "\0", "\ud83d", "\u2028", "a\nb"])
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2, 3, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, True, 0.5, 1e9])
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def cut(raw: bytes):
    return st.integers(0, max(0, len(raw) - 1)).map(lambda end: raw[:end])


@st.composite
def hurt(draw, raw: bytes, head: int | None = None) -> bytes:
    """Some bytes overwritten, put in or taken out, often near the beginning, or the end cut off."""
    hurt = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        ends = [min(len(hurt), 60), len(hurt)] + ([min(len(hurt), head)] if head else [])
        at = draw(st.integers(0, max(0, draw(st.sampled_from(ends)) - 1)))
        some = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 4, b"\xff" * 4]))
        kind = draw(st.sampled_from(["over", "in", "out", "cut"]))
        if kind == "over":
            hurt[at : at + len(some)] = some
        elif kind == "in":
            hurt[at:at] = some
        elif kind == "out":
            del hurt[at : at + len(some)]
        elif len(hurt) > 1:
            del hurt[at:]
    return bytes(hurt)


def paths_in(value, path=()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = []
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    found = [path] if path else []
    for key, member in inner:
        found += paths_in(member, (*path, key))
    return found


@st.composite
def changed(draw, value):
    """A JSON value with one to three of its members exchanged for any other, left out or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = paths_in(value)
        if not places:
            break
        *way, key = draw(st.sampled_from(places))
        holder = value
        for step in way:
            holder = holder[step]
        kind = draw(st.sampled_from(["number", "any", "out", "in"]))
        if kind == "out":
            del holder[key]
        elif kind == "in" and isinstance(holder, dict):
            holder[draw(words)] = draw(json_values)
        elif kind == "number":
            holder[key] = draw(numbers)
        else:
            holder[key] = draw(json_values)
    return value


# -------------------------------------------------------------------------------------------------
# folders of pictures, captions, prompts

RED = io.BytesIO()
Image.new("RGB", (12, 10), "red").save(RED, "PNG")
NAMES = ["a.png", "sub/b.png", r"sub\b.png", "a.txt", "sub", ".", "..", "../a.png", "/etc/passwd"]
names = st.sampled_from(NAMES) | texts


@st.composite
def lines(draw) -> bytes:
    """A line of metadata.jsonl: right, nearly right, any JSON, any bytes."""
    record = {"file_name": draw(names), "text": draw(texts)}
    if draw(st.booleans()):
        record["before"] = draw(names)
    kind = draw(st.sampled_from(["record", "record", "changed", "json", "cut", "bytes"]))
    if kind == "changed":
        record = draw(changed(record))
    if kind == "json":
        record = draw(json_values)
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(cut(line)) if kind == "cut" else line


def encoded(text: str, encoding: str) -> bytes:
    """As some editor saves it, or as none should."""
    if encoding == "latin-1":
        return text.encode(encoding, "replace")
    mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
    return mark + text.encode(encoding, "surrogatepass")


encodings = st.sampled_from(["utf-8", "utf-8", "utf-16-le", "utf-16-be", "latin-1"])


@fuzzed(100)
@given(st.lists(lines(), min_size=1, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\n\n", b""]))
def test_metadata(rows, end):
    with folder() as root:
        (root / "sub").mkdir()
        for name in ("a.png", "sub/b.png"):
            (root / name).write_bytes(RED.getvalue())
        (root / "metadata.jsonl").write_bytes(end.join(rows))
        source = works_or_says(lambda: open_folder(root, 8), str(root))
        if source is None:
            return
        assert "picture" in source.about() and len(source.fingerprint()) == 64
        for path, caption in source.pairs:
            assert path.resolve().is_relative_to(root.resolve()) and caption.strip()
        seen = works_or_says(lambda: source.example(0, 2), str(root))
        if seen is None:
            assert source.skipped
            return
        assert seen[1].dtype == np.uint8 and seen[1].shape[-3:] == (8, 8, 3)
        assert (seen[1] == [255, 0, 0]).all()


@pytest.fixture(scope="module")
def llm(llm_folder):
    return load_llm(str(llm_folder("qwen2")), CPU, torch.float32)


@fuzzed(60)
@given(text=long_texts | texts, encoding=encodings, listed=st.booleans())
def test_captions(llm, text, encoding, listed):
    """From its file, through the LLM, to the sheet below its picture."""
    with folder() as root:
        (root / "a.png").write_bytes(RED.getvalue())
        if listed:
            row = json.dumps({"file_name": "a.png", "text": text})
            (root / "metadata.jsonl").write_text(row)
        else:
            (root / "a.txt").write_bytes(encoded(text, encoding))
        source = works_or_says(lambda: open_folder(root, 8), str(root))
        if source is None:
            return
        caption, pictures = source.example(0, 1)
        llm.forget()
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is cut
            row = llm.lookup([caption])[caption]
            sheet = captioned_grid(pictures[None], [caption])
        assert row.isfinite().all() and 0 < len(row) <= 63
        assert sheet.width < 1000 and sheet.height < 1000
        (root / f"{file_words(caption)}.png").write_bytes(RED.getvalue())


@fuzzed(60)
@given(st.data())
def test_prompts(data):
    suffix = data.draw(st.sampled_from([".txt", ".jsonl", ".json", ""]))
    if suffix.startswith(".j") and data.draw(st.booleans()):
        records = [{"prompt": data.draw(texts), "prompt_id": data.draw(texts | numbers)}]
        records += data.draw(st.lists(json_values, max_size=2))
        records = data.draw(changed(records))
        if suffix == ".jsonl":
            raw = "\n".join(json.dumps(record) for record in records).encode()
        else:
            raw = json.dumps(records).encode()
    else:
        raw = encoded(data.draw(texts), data.draw(encodings)) + data.draw(st.binary(max_size=20))
    with folder() as root:
        path = root / f"prompts{suffix}"
        file = path
        if not suffix:
            path.mkdir()
            file = path / "a.txt"
        file.write_bytes(raw)
        found = works_or_says(lambda: read_prompts(path), str(root))
        for name, text, record in found or []:
            assert isinstance(text, str) and isinstance(record, dict)
            text.encode()  # no half characters are left
            (root / f"{name}.png").touch()
        if found:
            layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
            works_or_says(lambda: check_layout(layout, found, LAYOUTS[layout]), "")


# -------------------------------------------------------------------------------------------------
# pictures


def pictures() -> dict[str, bytes]:
    """One of each mode that Pillow has, in each format that holds it."""
    ramp = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    color = Image.fromarray(ramp)
    saved = {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"):
        image = Image.fromarray(ramp[..., 0].astype(np.uint16) * 257)
        if mode == "LAB":
            image = Image.new("LAB", (20, 24), (120, 130, 140))
        elif mode != "I;16":
            image = color.convert("L" if mode in ("I", "F") else "RGB").convert(mode)
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
            raw = io.BytesIO()
            options = {"exif": orientation()} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
            if kind == "JPEG":
                options["progressive"] = mode == "L"
            try:
                image.save(raw, kind, **options)
            except (OSError, ValueError, KeyError):
                continue
            saved[f"{mode} {kind}"] = raw.getvalue()
    for kind in ("packbits", "tiff_lzw", "tiff_deflate"):
        raw = io.BytesIO()
        color.save(raw, "TIFF", compression=kind)
        saved[kind] = raw.getvalue()
    return saved


def orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = pictures()


def seen(raw: bytes, root: Path, side: int | None = 8) -> np.ndarray | None:
    path = root / "x.png"
    path.write_bytes(raw)
    image = works_or_says(lambda: read_picture(path, side and (side, side)), "x.png does not decode")
    if image is None:
        return None
    assert image.mode == "RGB" and (side is None or image.size == (side, side))
    pixels = np.asarray(image)
    assert pixels.dtype == np.uint8 and pixels.shape == (*image.size[::-1], 3)
    return pixels


@fuzzed(110)
@given(st.data())
def test_pictures(data):
    """Mutated and random ones: a picture in uint8, or said not to be one."""
    kind = data.draw(st.sampled_from(["random", *sorted(PICTURES)]))
    raw = data.draw(st.binary(max_size=200) if kind == "random" else hurt(PICTURES[kind]))
    with folder() as root:
        seen(raw, root, data.draw(st.sampled_from([8, None])))


@fuzzed(60)
@given(st.data())
def test_a_picture_that_is_cut_is_not_guessed(data):
    """It does not decode, or nothing that shows was cut off."""
    raw = PICTURES[data.draw(st.sampled_from(sorted(PICTURES)))]
    with folder() as root:
        cut_off = seen(data.draw(cut(raw)), root, None)
        if cut_off is not None:
            assert np.array_equal(cut_off, seen(raw, root, None))


# -------------------------------------------------------------------------------------------------
# checkpoints and LLMs


@pytest.fixture(scope="module")
def run(llm_folder, tmp_path_factory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    train.main(["--llm", str(llm_folder("qwen2")), "--out", str(out), *TINY_RUN, "--steps", "1"])
    return out


def rewritten(file: Path, metadata: dict) -> None:
    save_file(load_file(file), file, metadata=metadata)


def metadata_of(file: Path) -> dict:
    return checkpoint.read_safetensors(file)[0]


@fuzzed(50)
@given(st.data())
def test_checkpoints(run, llm_folder, data):
    """Bytes of the file, or what its config says: it draws, or one line says why not."""
    whole = (run / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    with folder() as root:
        file = root / "model.safetensors"
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(hurt(whole, head)))
        else:
            file.write_bytes(whole)
            metadata = metadata_of(file)
            config = data.draw(changed(json.loads(metadata["config"])))
            rewritten(file, metadata | {"config": json.dumps(config)})
        expert = works_or_says(lambda: checkpoint.load_expert(str(root), CPU), str(root))
        if expert is None:
            return

        def drawn():
            its_llm = llm_of(expert, str(llm_folder("qwen2")), CPU, torch.float32)
            return draw(expert, its_llm, ["a red circle"], [0], steps=1)

        if expert.image_size <= 256:
            picture = works_or_says(drawn, "")
            assert picture is None or picture.dtype == np.uint8


@fuzzed(20)
@given(st.data())
def test_states_of_runs(run, data):
    """--resume goes on, or says why not, and the state that was there is untouched."""
    with folder() as root:
        shutil.copytree(run, root / "run")
        file = root / "run" / "train_state.safetensors"
        kind = data.draw(st.sampled_from(["bytes", "tensors", "args", "args", "config", "step"]))
        metadata = metadata_of(file)
        if kind == "bytes":
            whole = file.read_bytes()
            file.write_bytes(data.draw(hurt(whole, 8 + int.from_bytes(whole[:8], "little"))))
        elif kind == "tensors":
            tensors = load_file(file)
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensor = tensors.pop(name)
            other = data.draw(st.sampled_from([None, tensor[None], tensor.long(), torch.ones(3)]))
            if other is not None:
                tensors[data.draw(st.sampled_from([name, "x", f"ema.{name}"]))] = other
            save_file(tensors, file, metadata=metadata)
        else:
            value = data.draw(changed(json.loads(metadata[kind])))
            if kind == "args" and isinstance(value.get("batch_size"), int):
                assume(value["batch_size"] < 100)  # as many as one likes would be drawn
            rewritten(file, metadata | {kind: json.dumps(value)})
        before = file.read_bytes()

        def resumed():
            args, metadata, tensors = train.settings(
                ["--resume", "--out", str(root / "run"), "--steps", "3"]
            )
            run = train.prepare(args, metadata, tensors)
            assert file.read_bytes() == before
            train.train(run, run.step + 1)
            return run

        try:
            run = works_or_says(resumed, "")
        except SystemExit as stop:
            assert stop.code == 2
            run = None
        if run is None:
            assert file.read_bytes() == before


@fuzzed(40)
@given(st.data())
def test_llms(llm_folder, data):
    """A folder with a file that is mutated, or JSON that says something else."""
    with folder() as root:
        shutil.copytree(llm_folder("qwen2"), root / "llm")
        name = data.draw(
            st.sampled_from(
                ["config.json"] * 4 + ["tokenizer_config.json", "tokenizer.json"]
                + ["generation_config.json", "model.safetensors"]
            )
        )
        file = root / "llm" / name
        raw = file.read_bytes()
        if name.endswith(".json") and data.draw(st.integers(0, 3)):
            file.write_text(json.dumps(data.draw(changed(json.loads(raw)))))
        else:
            file.write_bytes(data.draw(hurt(raw, 2000)))

        def read():
            llm = load_llm(str(root / "llm"), CPU, torch.float32)
            return llm.context(["a red circle", ""])

        context = works_or_says(read, str(root))
        assert context is None or context.keys[0].isfinite().all()
