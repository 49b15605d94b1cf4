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
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import metrics
import train
from assemble import llm_of
from cli import TRACEBACK, captioned_grid, file_words, one_line
from conftest import CPU, TINY_RUN
from evaluate import read_results
from extras.export import about_run
from extras.files import read_picture
from extras.folders import open_folder
from extras.prompts import LAYOUTS, check_layout, read_prompts
from extras.run_logs import read_run
from loading import file_sha256, load_llm
from sample import draw

pytestmark = pytest.mark.slow  # a quarter of a minute

TIMES = int(os.environ.get("FUZZ_TIMES", 1))
LONGEST = 20  # seconds, after which it hangs


def fuzzed(examples: int):
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=10_000,  # milliseconds; an idle core needs at most a tenth of it
        phases=[Phase.generate],  # to make a fault's input smaller takes longer than all of them
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
        assert len(line.splitlines()) == 1 and len(line) <= 600 and name in line, line
        assert TRACEBACK not in line, "which is said of errors that nobody has written for a user"
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


places = st.integers(0, 60) | st.floats(0, 1, exclude_max=True)  # in the head, or a share of all
some_bytes = st.binary(min_size=1, max_size=4) | st.sampled_from([b"\0", b"\xff\xff"])
kinds_of_edit = st.sampled_from(["over", "over", "in", "out", "cut"])
edits = st.lists(st.tuples(kinds_of_edit, places, some_bytes), min_size=1, max_size=2)


def hurt(raw: bytes, edits: list[tuple]) -> bytes:
    """Bytes overwritten, put in or taken out, or the end cut off."""
    hurt = bytearray(raw)
    for kind, place, some in edits:
        at = min(place, len(hurt) - 1) if isinstance(place, int) else int(place * len(hurt))
        if kind == "over":
            hurt[at : at + len(some)] = some
        elif kind == "in":
            hurt[at:at] = some
        elif kind == "out" and len(hurt) > len(some):
            del hurt[at : at + len(some)]
        elif kind == "cut":
            del hurt[max(1, at) :]
    return bytes(hurt)


def like(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        small = st.integers(-1, 9) | st.sampled_from([16, 64, 1000, 10**6])
        return small | st.sampled_from([10**9, 10**12, 2**31, 2**63, 10**30])
    if isinstance(value, float):
        return st.floats() | st.sampled_from([0.0, 1.0, -1.0, 1e30])
    if isinstance(value, str):
        return texts | st.sampled_from(["", "linear", "default", value * 2, value[:-1]])
    if isinstance(value, list):
        return st.sampled_from([[], value[:-1], value * 2, value[::-1]])
    return json_values


@st.composite
def changed(draw, value):
    """A JSON object with one or two of its members, or of theirs, exchanged for others of the same
    kind or of any, left out or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        holder = value
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        while len(keys):
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                break
            holder = inner
            keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        if not len(keys):
            return value
        kind = draw(st.sampled_from(["like", "like", "like", "like", "any", "out", "in"]))
        if kind == "out":
            del holder[key]
        elif kind == "in" and isinstance(holder, dict):
            holder[draw(words)] = draw(json_values)
        else:
            holder[key] = draw(json_values if kind == "any" else like(holder[key]))
    return value


# -------------------------------------------------------------------------------------------------
# folders of pictures, captions, prompts

RED = io.BytesIO()
Image.new("RGB", (12, 10), "red").save(RED, "PNG")
THERE = ["a.png", "sub/b.png", r"sub\b.png", "a.txt"]
ELSEWHERE = ["sub", ".", "..", "../a.png", "/etc/passwd", "nowhere.png"]
names = st.sampled_from(THERE) | st.sampled_from(THERE) | st.sampled_from(ELSEWHERE) | texts


@st.composite
def lines(draw, before: bool) -> bytes:
    """A line of metadata.jsonl: mostly right, or nearly right, any JSON, any bytes."""
    record = {"file_name": draw(st.sampled_from(THERE)), "text": draw(texts)}
    if before:
        record["before"] = draw(st.sampled_from(THERE))
    kinds = ["right", "right", "right", "name", "changed", "json", "cut", "bytes"]
    kind = draw(st.sampled_from(kinds))
    if kind == "name":
        record[draw(st.sampled_from(sorted(record)))] = draw(names)
    if kind == "changed":
        record = draw(changed(record))
    if kind == "json":
        record = draw(json_values)
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return line[: draw(st.integers(0, len(line)))] if kind == "cut" else line


def encoded(text: str, encoding: str) -> bytes:
    """As some editor saves it, or as none should."""
    if encoding == "latin-1":
        return text.encode(encoding, "replace")
    mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
    return mark + text.encode(encoding, "surrogatepass")


encodings = st.sampled_from(["utf-8", "utf-8", "utf-16-le", "utf-16-be", "latin-1"])


@fuzzed(100)
@given(st.data())
def test_metadata(data):
    before = data.draw(st.booleans())
    rows = data.draw(st.lists(lines(before), min_size=1, max_size=3))
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
    with folder() as root:
        (root / "sub").mkdir()
        for name in ("a.png", "sub/b.png"):
            (root / name).write_bytes(RED.getvalue())
        (root / "metadata.jsonl").write_bytes(end.join(rows))
        source = works_or_says(lambda: open_folder(root, 8), str(root))
        if source is None:
            return
        assert "picture" in source.about() and len(source.fingerprint()) == 64
        assert all(prompt.strip() for prompt in source.prompts)
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


@fuzzed(50)
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
    if suffix.startswith(".j"):
        ids = st.integers(0, 99) | texts
        record = st.fixed_dictionaries({"prompt": texts}, optional={"prompt_id": ids, "tag": texts})
        records = data.draw(st.lists(record, min_size=1, max_size=3))
        if data.draw(st.booleans()):
            records = data.draw(changed(records))
        if suffix == ".jsonl":
            raw = "\n".join(json.dumps(record) for record in records).encode()
        else:
            raw = json.dumps(records).encode()
    else:
        raw = encoded("\n".join(data.draw(st.lists(texts, max_size=3))), data.draw(encodings))
        raw += data.draw(st.just(b"") | st.binary(max_size=20))
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


def with_right_sums(raw: bytes) -> bytes:
    """A PNG whose chunks say nothing of the damage in them."""
    at = 8
    raw = bytearray(raw)
    while at + 8 <= len(raw):
        end = at + 8 + int.from_bytes(raw[at : at + 4])
        if end + 4 > len(raw):
            break
        raw[end : end + 4] = zlib.crc32(raw[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(raw)


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
    kind = data.draw(st.sampled_from([*sorted(PICTURES), "random"]))
    if kind == "random":
        raw = data.draw(st.binary(max_size=200))
    else:
        raw = hurt(PICTURES[kind], data.draw(edits))
    if kind.endswith("PNG") and data.draw(st.booleans()):
        raw = with_right_sums(raw)
    with folder() as root:
        seen(raw, root, data.draw(st.sampled_from([8, None])))


@fuzzed(60)
@given(st.data())
def test_a_picture_that_is_cut_is_not_guessed(data):
    """It does not decode, or nothing that shows was cut off."""
    raw = PICTURES[data.draw(st.sampled_from(sorted(PICTURES)))]
    # anywhere, or of its last bytes: as a cut download, and as a program that counts wrongly
    end = data.draw(st.integers(0, len(raw) - 1) | st.integers(max(0, len(raw) - 40), len(raw) - 1))
    with folder() as root:
        cut_off = seen(raw[:end], root, None)
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


def other_head(raw: bytes, data) -> bytes:
    """A .safetensors file whose head says something else of what stands in it."""
    end = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:end])
    name = data.draw(st.sampled_from(sorted(head)))
    member = data.draw(changed({name: head.pop(name)}))
    text = json.dumps(member | head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[end:]


@fuzzed(50)
@given(st.data())
def test_checkpoints(run, llm_folder, data):
    """Bytes of the file, or what its config says: it draws, or one line says why not."""
    whole = (run / "model.safetensors").read_bytes()
    with folder() as root:
        file = root / "model.safetensors"
        kind = data.draw(st.sampled_from(["config", "config", "config", "head", "bytes"]))
        if kind == "bytes":
            file.write_bytes(hurt(whole, data.draw(edits)))
        elif kind == "head":
            file.write_bytes(other_head(whole, data))
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


@fuzzed(15)
@given(st.data())
def test_states_of_runs(run, data):
    """--resume goes on, or says why not, and the state that was there is untouched."""
    with folder() as root:
        shutil.copytree(run, root / "run")
        file = root / "run" / "train_state.safetensors"
        kinds = ["args", "args", "config", "step", "tensors", "head", "bytes"]
        kind = data.draw(st.sampled_from(kinds))
        metadata = metadata_of(file)
        if kind == "bytes":
            file.write_bytes(hurt(file.read_bytes(), data.draw(edits)))
        elif kind == "head":
            file.write_bytes(other_head(file.read_bytes(), data))
        elif kind == "tensors":
            tensors = load_file(file)
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensor = tensors.pop(name)
            others = {"wider": tensor[None], "whole": tensor.long(), "other": torch.ones(3)}
            other = data.draw(st.sampled_from(["none", *others]))
            if other != "none":
                tensors[data.draw(st.sampled_from([name, "x", f"ema.{name}"]))] = others[other]
            save_file(tensors, file, metadata=metadata)
        else:
            stored = json.loads(metadata[kind])
            value = data.draw(numbers | texts if kind == "step" else changed(stored))
            if kind == "args" and isinstance(value.get("batch_size"), int):
                assume(value["batch_size"] < 100)  # as many as one likes would be drawn
            if kind == "args":
                assume(not value.get("compile"))  # a compiler takes its time
            rewritten(file, metadata | {kind: json.dumps(value)})
        before = file_sha256(file)

        def resumed():
            args, metadata, tensors = train.settings(
                ["--resume", "--out", str(root / "run"), "--steps", "3"]
            )
            run = train.prepare(args, metadata, tensors)
            assert file_sha256(file) == before
            train.train(run, run.step + 1)

        try:
            works_or_says(resumed, "")
        except SystemExit as stop:
            assert stop.code == 2
        checkpoint.find_checkpoint(str(root / "run"))
        assert not list((root / "run").glob("tmp-*")), "nothing half-written"


@fuzzed(35)
@given(st.data())
def test_llms(llm_folder, data):
    """A folder with a file that is mutated, or JSON that says something else."""
    with folder() as root:
        shutil.copytree(llm_folder("qwen2"), root / "llm")
        name = data.draw(
            st.sampled_from(
                ["config.json"] * 4
                + ["tokenizer_config.json", "tokenizer.json"]
                + ["generation_config.json", "model.safetensors"]
            )
        )
        file = root / "llm" / name
        raw = file.read_bytes()
        kind = data.draw(st.sampled_from(["json", "json", "json", "bytes"]))
        if name == "model.safetensors":
            whole = data.draw(st.booleans())
            file.write_bytes(other_head(raw, data) if whole else hurt(raw, data.draw(edits)))
        elif kind == "bytes":
            file.write_bytes(hurt(raw, data.draw(edits)))
        else:
            file.write_text(json.dumps(data.draw(changed(json.loads(raw)))))

        def read():
            llm = load_llm(str(root / "llm"), CPU, torch.float32)
            return llm.context(["a red circle", ""])

        context = works_or_says(read, str(root))
        assert context is None or context.keys[0].isfinite().all()


LOGS = {  # what a run's folder says of it
    "metrics.jsonl": {"step": 50, "loss": 0.5, "loss_by_t": [0.1, 0.2], "images": 400,
                      "images_per_second": 10.0, "resumed_at": 0, "llm_share": 0.1},
    "scores.jsonl": {"step": 50, "suite": "geneval", "score": 0.5, "settings": {"n": 1}},
    "evaluate.json": {"run": "x", "geneval": {"mean": {"score": 0.5}, "rows": {"a": {}}}},
    "race.json": {"curve": [{"images": 100, "geneval": 0.5}]},
}  # fmt: skip


@fuzzed(20)
@given(st.data())
def test_logs_of_runs(data):
    with folder() as root:
        for name, right in LOGS.items():
            rows = data.draw(st.lists(st.just(right) | changed(right), min_size=1, max_size=2))
            text = "\n".join(map(json.dumps, rows))
            if data.draw(st.sampled_from(["right"] * 9 + ["deep"])) == "deep":
                text = "[" * 100_000
            (root / name).write_text(text)
        works_or_says(lambda: read_run(root, "x"), str(root))
        works_or_says(lambda: read_results(root / "evaluate.json"), str(root))
        about_run(root)
        for line in (root / "metrics.jsonl").read_text().split("\n"):
            metrics.step_of(line)
