"""Input from a stranger: nothing outside of a folder is read, nothing is unpickled, no absurd size
takes memory, and once all is there no socket is opened. (tests/test_fuzz.py: whatever else.)"""

import ast
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import train
from cli import one_line, report
from conftest import CPU, TINY_RUN, random_expert
from data import open_source
from extras.folders import EditFolder, Folder
from extras.prompts import read_prompts
from loading import gemma_270m, load_llm
from weights import WHAT_TO_DO, read_safetensors

ROOT = Path(__file__).parent.parent


def refusal(action) -> str:
    """The line that a command would print."""
    with pytest.raises(ValueError) as error:
        action()
    line = one_line(error.value)
    assert line == str(error.value), "it is one line already"
    return line


# -------------------------------------------------------------------------------------------------
# out of the folder


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """A folder with a picture that has a caption, and what is outside of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        (folder / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(folder.name)
    return root, outside


def link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("Windows lets not everybody make links")


def list_pictures(root: Path, *records: dict) -> None:
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))


OUTSIDE = [
    "../outside/a.png",
    r"..\outside\a.png",
    "sub/../../outside/a.png",
    "..",
    "../nowhere.png",
    "{outside}/a.png",
    "/nowhere.png",
]


@pytest.mark.parametrize("key", ["file_name", "before"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(key, name, places):
    root, outside = places
    name = name.format(outside=outside)
    good = {"file_name": "a.png", "before": "sub/b.png", "text": "a"}
    list_pictures(root, good, good | {key: name})
    line = refusal(lambda: open_source(str(root), 8))
    assert f"{root / 'metadata.jsonl'}, line 2: {key} " in line
    assert name.replace("\\", "/") in line and "expected the name of a picture in that" in line
    if os.name == "nt":
        list_pictures(root, good | {key: r"C:\windows\a.png"})
        assert "leads out of" in refusal(lambda: open_source(str(root), 8))


LINKS = {  # what is a link, and to what; with and without metadata.jsonl
    "a picture": ("c.png", "a.png", ""),
    "a text": ("a.txt", "a.txt", ""),
    "a folder": ("more", "sub", ""),
    "by a relative way": ("c.png", None, ""),
    "a listed picture": ("c.png", "a.png", "c.png"),
    "a listed picture in a folder": ("more", "sub", "more/b.png"),
    "what is not listed": ("c.png", "a.png", "a.png"),
    "metadata.jsonl": ("metadata.jsonl", "metadata.jsonl", ""),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_that_lead_out_of_the_folder(kind, places):
    root, outside = places
    name, target, listed = LINKS[kind]
    list_pictures(outside, {"file_name": "a.png", "text": "secret"})
    place = outside / target if target else Path("../outside/a.png")
    link(root / name, place)
    if listed:
        list_pictures(root, {"file_name": listed, "text": "x"})
    line = refusal(lambda: open_source(str(root), 8))
    assert line.startswith(f"{root / name}") and f"leads out of {root}, to {outside}" in line
    assert "expected what lies in that folder: copy it there" in line
    if kind == "a listed picture":
        list_pictures(root, {"file_name": "a.png", "before": name, "text": "x"})
        assert f"{root / name} leads out of" in refusal(lambda: open_source(str(root), 8))


def test_a_way_through_a_link_and_back(places):
    """link/.. is where the link leads, and not where its name stands."""
    root, outside = places
    link(root / "way", root / "sub")
    list_pictures(root, {"file_name": "way/../a.png", "text": "x"})
    assert len(Folder(root, 8).pairs) == 1
    link(root / "way", outside / "sub")
    list_pictures(root, {"file_name": "way/../a.png", "text": "x"})
    assert f"to {outside};" in refusal(lambda: Folder(root, 8))


def test_links_that_stay_in_the_folder(places, tmp_path):
    """The root may be one itself; hidden ones, and those to other files, are not looked at."""
    root, outside = places
    link(root / "c.png", "a.png")
    link(root / "c.txt", "sub/b.txt")
    link(root / "again", root / "sub")
    link(root / "loop", root)
    link(root / "README.md", outside / "a.txt")
    link(root / ".git", outside)
    link(tmp_path / "way", root)
    for place in (root, tmp_path / "way", tmp_path / "way" / "loop"):
        source = open_source(str(place), 8)
        names = {path.name for path, _ in source.pairs}
        assert names == {"a.png", "b.png", "c.png"} and len(source.pairs) == 3
        assert source.example(0, 1)[1].shape == (1, 8, 8, 3)
        assert source.fingerprint() == Folder(place, 8).fingerprint()
    list_pictures(root, {"file_name": "again/b.png", "before": "c.png", "text": "x"})
    assert isinstance(open_source(str(tmp_path / "way"), 8), EditFolder)


def test_prompts_of_another_folder(places):
    """A folder of prompts: what its links lead to would stand in the names of files and in grids."""
    root, outside = places
    assert read_prompts(root) == [("a", "root", {})]
    link(root / "c.txt", "sub/b.txt")
    link(root / "more", outside)  # folders in it are not read
    assert [text for _, text, _ in read_prompts(root)] == ["root", "root"]
    link(root / "c.txt", outside / "a.txt")
    assert f"{root / 'c.txt'} leads out of {root}" in refusal(lambda: read_prompts(root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_file(places):
    """Reading it would wait for ever."""
    root, _ = places
    for name in ("a.txt", "a.png", "c.png", "c.txt"):
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
    link(root / "d.txt", "c.txt")
    assert [path.name for path, _ in Folder(root, 8).pairs] == ["b.png"]
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(root)


# -------------------------------------------------------------------------------------------------
# pickles


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickled(mark: Path, zipped: bool) -> bytes:
    weights = {"model.norm.weight": torch.ones(32), "evil": Evil(mark)}
    if not zipped:
        return pickle.dumps(weights)
    torch.save(weights, mark.with_suffix(".tmp"))
    return mark.with_suffix(".tmp").read_bytes()


def index_of(name: str) -> dict:
    return {"metadata": {}, "weight_map": {"model.norm.weight": name}}


PICKLES = {  # the file of weights -> what points to it: a file, and its JSON
    "pytorch_model.bin": None,
    "model.pt": None,
    "consolidated.00.pth": None,
    "weights.bin": ("model.safetensors.index.json", index_of("weights.bin")),
    "a.bin": ("pytorch_model.bin.index.json", index_of("a.bin")),
    "adapter_model.bin": ("config.json", {"transformers_weights": "adapter_model.bin"}),
    "model.safetensors": None,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
@pytest.mark.parametrize("name", PICKLES)
def test_an_llm_of_pickled_weights_is_refused(name, zipped, llm_folder, tmp_path):
    mark = tmp_path / "unpickled"
    raw = pickled(mark, zipped)
    torch.load(tmp_path / "unpickled.tmp", weights_only=False) if zipped else pickle.loads(raw)
    assert mark.exists(), "it does harm where it is unpickled"
    mark.unlink()
    folder = shutil.copytree(llm_folder("qwen2"), tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(raw)
    if PICKLES[name]:
        pointer, content = PICKLES[name]
        if (folder / pointer).exists():
            content = json.loads((folder / pointer).read_text()) | content
        (folder / pointer).write_text(json.dumps(content))
    line = refusal(lambda: load_llm(str(folder), CPU, torch.float32))
    assert line.startswith(f"--llm {folder} does not load: {name}")
    assert WHAT_TO_DO in line or name == "model.safetensors" and "is cut or damaged" in line
    assert not mark.exists()


def test_an_llm_that_has_safetensors_too_is_read(llm_folder, tmp_path):
    """Pickles beside them are no reason to refuse it, nor to open them."""
    folder = shutil.copytree(llm_folder("qwen2"), tmp_path / "llm")
    for name in ("pytorch_model.bin", ".metadata", "training_args.bin"):
        (folder / name).write_bytes(pickled(tmp_path / "unpickled", zipped=False))
    load_llm(str(folder), CPU, torch.float32)
    assert not (tmp_path / "unpickled").exists()


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path, tiny_run):
    mark = tmp_path / "unpickled"
    train.main([*tiny_run, "--steps", "1"])
    for zipped in (True, False):
        for name in ("model.safetensors", checkpoint.STATE):
            (tmp_path / "run" / name).write_bytes(pickled(mark, zipped))
        refused = [
            refusal(lambda: checkpoint.load_expert(str(tmp_path / "run"), CPU)),
            refusal(lambda: train.main(["--resume", "--out", str(tmp_path / "run")])),
        ]
        assert all("does not read as safetensors" in line for line in refused)
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "run" / "pytorch_model.bin")
    line = refusal(lambda: checkpoint.load_expert(str(tmp_path / "run"), CPU))
    assert "expected the folder of a run, with model.safetensors in it" in line
    assert not mark.exists()


def test_the_code_opens_no_pickles():
    """Nor numpy's files, which may hold some, nor YAML."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not {"pickle", "dill", "joblib", "shelve", "marshal", "yaml"} & set(names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "numpy.load"), path
                assert called not in ("pd.read_pickle", "torch.hub.load"), path


class PickledRepository(http.server.BaseHTTPRequestHandler):
    """What the Hub says of a model that has nothing but pickled weights."""

    def do_GET(self) -> None:
        files = ["config.json", "pytorch_model.bin", "tokenizer.json"]
        siblings = [{"rfilename": name} for name in files]
        answer = json.dumps({"id": "a/pickled", "modelId": "a/pickled", "siblings": siblings})
        self.server.asked.append(self.path)
        self.send_response(200 if self.path == "/api/models/a/pickled" else 404)
        self.end_headers()
        self.wfile.write(answer.encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *said) -> None:
        pass


@pytest.mark.slow
def test_pickled_weights_of_the_hub_are_not_fetched(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), PickledRepository)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "loading.py", "--llm", "a/pickled"],
        env=os.environ | here | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"--llm a/pickled: it has no weights that are opened here: {WHAT_TO_DO}" in done.stderr
    assert server.asked and not any("pytorch_model" in path for path in server.asked)


@pytest.mark.skipif(os.name == "nt", reason="a program of another kind there")
def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    """PostScript by the name of a picture: Pillow would hand it to Ghostscript, by a process of its
    own, that the one of this test may not find before."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    (tmp_path / "gs").chmod(0o755)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", "EPS")
    code = "import sys; from PIL import Image; from extras.files import read_picture; "
    for read, is_run in (("read_picture", False), ("lambda path: Image.open(path).load()", True)):
        words = [sys.executable, "-c", f"{code}({read})(sys.argv[1])", str(tmp_path / "a.png")]
        paths = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode and (tmp_path / "run").exists() == is_run, done.stderr


# -------------------------------------------------------------------------------------------------
# absurd sizes

HUGE = """
import json, resource, shutil, sys, time
import torch
from checkpoint import load_expert
from cli import one_line, report
from loading import load_llm

cpu = torch.device("cpu")
folders = json.loads(sys.argv[1])
load = {
    "config.json": lambda: load_llm(folders[0], cpu, torch.float32),
    "model.safetensors": lambda: load_expert(folders[1], cpu),
}
for one in load.values():
    one()  # as it is; what the library imports and keeps is no part of what is measured
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
for line in sys.stdin:
    place, changed = json.loads(line)
    shutil.copy(changed, place)
    began = time.perf_counter()
    try:
        load[place.rpartition("/")[2]]()
        said = "loaded"
    except ValueError as error:
        said = one_line(error)
    print(json.dumps([said, time.perf_counter() - began]))
"""
LLM_SIZES = [
    {"hidden_size": 10**9},
    {"hidden_size": 10**5},
    {"hidden_size": 10**30},
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": 9_999, "layer_types": ["full_attention"] * 9_999},
    {"vocab_size": 10**12},
    {"vocab_size": 10**8},
    {"intermediate_size": 10**9},
    {"num_attention_heads": 10**9},
    {"num_attention_heads": 10**5},
    {"num_key_value_heads": 10**5},
    {"head_dim": 10**8},
]


def expert_sizes(layers: list[dict]) -> list[dict]:
    return [
        {"width": 10**8},
        {"width": 4096},
        {"heads": 4096},
        {"heads": 10**9},
        {"intermediate": 10**8},
        {"image_size": 10**6},
        {"channels": 10**8},
        {"patch": 10**6, "image_size": 10**6},
        {"text_layers": layers * 3000},
        {"text_layers": layers * 50_000},
        {"text_layers": [layer | {"key_width": 10**8} for layer in layers]},
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone limits memory so")
def test_absurd_sizes_take_no_memory(tiny_llm, llm_folder, tmp_path):
    """A configuration says them, and the weights do not have them: refused by a process that gets
    no more than 0.5 GB beside what it takes to load the right ones."""
    llm = shutil.copytree(llm_folder("qwen2"), tmp_path / "llm")
    expert = random_expert(tiny_llm("qwen2"), made_for={"llm": "x", "llm_fingerprint": "x"})
    expert.save_pretrained(tmp_path / "expert")

    # the changed files, and what is to be said of them
    asked = []
    config = json.loads((llm / "config.json").read_text())
    for i, sizes in enumerate(LLM_SIZES):
        (tmp_path / f"{i}.json").write_text(json.dumps(config | sizes))
        words = f"--llm {llm} does not load: its configuration "
        asked.append((llm / "config.json", tmp_path / f"{i}.json", words, sizes))
    whole = tmp_path / "expert" / "model.safetensors"
    metadata, tensors = read_safetensors(whole)
    for i, sizes in enumerate(expert_sizes(expert.config["text_layers"])):
        config = json.dumps(expert.config | sizes)
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors, file, metadata=metadata | {"config": config})
        words = f"{whole} is not an image expert of this project (its "
        asked.append((whole, file, words, sizes))

    lines = [json.dumps([str(place), str(file)]) for place, file, _, _ in asked]
    done = subprocess.run(
        [sys.executable, "-c", HUGE, json.dumps([str(llm), str(tmp_path / "expert")])],
        input="\n".join(lines),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (said, seconds), (_, _, words, sizes) in zip(answers, asked, strict=True):
        assert words in said and "expected" in said, (str(sizes)[:60], said)
        assert seconds < 20, (str(sizes)[:60], seconds)


def test_an_llm_of_nearly_the_right_sizes_is_refused_too(llm_folder, tmp_path):
    """Below what is absurd the shapes decide, as before."""
    folder = shutil.copytree(llm_folder("qwen2"), tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    line = refusal(lambda: load_llm(str(folder), CPU, torch.float32))
    assert "has the shape (300, 32), and its config.json means (400, 32)" in line


# -------------------------------------------------------------------------------------------------
# sockets

WITHOUT_SOCKETS = """
import json, socket, sys
from pathlib import Path

commands, log = json.loads(sys.argv[1]), Path(sys.argv[2])

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with log.open("a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
        raise ConnectionRefusedError("no sockets in this test")

sys.addaudithook(refuse)  # every socket of Python's asks it, whoever opens it, by whatever name
log.touch()
for name, *flags in commands:
    sys.argv = [name]
    __import__(name).main(flags)
opened = log.read_text()

# would it be seen? an LLM that is nowhere is looked for
import torch
from loading import load_llm
try:
    load_llm("a/nowhere", torch.device("cpu"), torch.float32)
except ValueError as error:
    assert "the Hub cannot be reached" in str(error) and "socket." in log.read_text()
    log.write_text(opened)
"""
CHECK = ["--device", "cpu", "--dtype", "float32"]


def sockets(commands: list[list], folder: Path) -> str:
    """What these commands, one process for all, try to open. Offline mode is not asked for."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    words = json.dumps([[str(word) for word in command] for command in commands])
    log = folder / "sockets"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SOCKETS, words, str(log)],
        env=kept | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return log.read_text()


@pytest.mark.slow
def test_no_socket_is_opened_once_the_files_are_there(llm_folder, tmp_path):
    """An LLM in a folder, and one of the Hub's in the local cache."""
    cached = tmp_path / "hub" / "models--a--tiny"
    shutil.copytree(llm_folder("qwen2"), cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    train_it = ["train", *TINY_RUN, "--steps", "2"]
    draw = ["sample", "--prompt", "x", "--steps", "1", *CHECK]
    commands = [
        [*train_it, "--llm", llm_folder("qwen2"), "--out", "run"],
        ["train", "--resume", "--out", "run", "--steps", "3"],
        [*draw, "--ckpt", "run", "--out", "drawn"],
        ["evaluate", "--ckpt", "run", "--suite", "unseen", "--limit", "1", "--steps", "1", *CHECK],
        [*train_it, "--llm", "a/tiny", "--out", "of-the-hub"],
        [*draw, "--ckpt", "of-the-hub", "--out", "drawn-too"],
    ]
    assert sockets(commands, tmp_path) == ""
    assert checkpoint.step_of_run(str(tmp_path / "run")) == 3
    assert (tmp_path / "drawn" / "grid.png").exists()
    assert (tmp_path / "drawn-too" / "grid.png").exists()
    assert (tmp_path / "run" / "partial" / "evaluate.json").exists()


@pytest.mark.slow
def test_the_shipped_expert_draws_without_a_socket(tmp_path):
    """With the built-in LLM; it is converted here if it never was."""
    gemma_270m()
    draw = ["sample", "--ckpt", checkpoint.SHIPPED, "--prompt", "a red circle", "--steps", "1"]
    assert sockets([[*draw, "--out", "drawn"]], tmp_path) == ""
    assert (tmp_path / "drawn" / "grid.png").exists()


# -------------------------------------------------------------------------------------------------
# what is told of it


def test_words_of_a_file_do_not_steer_the_terminal(capsys):
    """Colours, the cursor and the direction of writing; whole emoji and every script stay."""
    said = "\x1b[2J\x9b31m\u202egnp.exe\r\n\0👩\u200d🚀 αβ"
    with pytest.raises(ValueError) as error:
        raise ValueError(f"{said}: expected words")
    report(error.value)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "gnp.exe" in told and "👩\u200d🚀 αβ" in told
    assert not {"\x1b", "\x9b", "\u202e", "\0", "\r"} & set(told)
