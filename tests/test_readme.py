"""Every command of README.md and RESULTS.md runs: with the real LLM where it names none (what comes
often, the race and the runs of older results, with a tiny one), with fewer steps and a smaller
expert."""

import copy
import importlib
import inspect
import io
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from test_pictures import save_tiny_vlm

import assemble
import loading
import model
import train
from checkpoint import load_expert
from conftest import CPU, save_tiny_instruct_llm, save_tiny_llm
from extras import emoji_suites, race, rivals
from model import ImageExpert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README + RESULTS, re.DOTALL)
SCRIPT = "\n".join(BLOCKS).replace("\\\n", "")
LINES = [line.split("  #")[0].strip() for line in SCRIPT.splitlines()]
COMMANDS = [" ".join(line.split()) for line in LINES if line.startswith("python ")]
TINY = "Qwen/Qwen2.5-0.5B"  # under this name, see `workplace`
SHORT = {  # flags that make a command short; given last, they win
    "train.py": "--steps 2 --batch-size 8 --width 32 --depth 2",
    "train.py --patcher": f"--steps 2 --batch-size 8 --width 32 --depth 2 --llm {TINY}",
    "train.py --resume": "--steps 3",
    "train.py --bridge": f"--steps 1 --batch-size 4 --llm {TINY}",
    "sample.py": "--steps 2",
    "sample.py --describe": "",
    "evaluate.py": "--steps 1 --limit 1",
    "extras.emoji": "--steps 1 --limit 1",
    "extras.probe": "--steps 1 --limit 1 --suite knowledge,colors",
    "extras.probe --llm": f"--llm {TINY} --limit 1",
    "extras.race": f"--llm {TINY} --seeds 0 --minutes 0.001 --suite geneval --steps 1 --limit 1 "
    "--batch-size 8 --width 64 --depth 3",
    "extras.answers": "--limit 1 --frame frame.txt",
    "extras.agreement": "--n 2",
    "extras.shapes_folder --codes": "--codes 1",
    "extras.shapes_folder --captions": "--captions 16",
    "extras.kinds": f"--llm {TINY} --limit 3",
    "extras.bench": f"--llm {TINY} --seconds 0.001 --batch-size=8 --width=32 --depth=2 "
    "--image-size=16",
}
RACER = "kv"  # runs alone, in place of all those that are named


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with captioned pictures and prompts, and tiny LLMs where the Hub's client keeps its
    downloads."""
    place = tmp_path_factory.mktemp("readme")
    (place / "my-pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(place / "my-pictures" / "a.png")
    (place / "my-pictures" / "a.txt").write_text("a red field")
    (place / "prompts.txt").write_text("a red circle\n")
    (place / "frame.txt").write_text("{} => a\n")  # a short one
    record = '{"tag": "colors", "prompt": "a photo of a red star"}\n'
    (place / "evaluation_metadata.jsonl").write_text(record)
    Image.new("RGB", (40, 40), "blue").save(place / "photo.png")
    downloads = {
        "Qwen--Qwen2.5-0.5B": partial(save_tiny_llm, "long"),
        "Qwen--Qwen2.5-0.5B-Instruct": save_tiny_instruct_llm,
        "llava-hf--llava-interleave-qwen-0.5b-hf": partial(save_tiny_vlm, "llava"),
    }
    for name, save in downloads.items():
        cached = place / "hub" / f"models--{name}"
        save(cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    return place


def run(words: list[str]) -> tuple[int, str, str]:
    """A command as Python would run it: exit status, stdout, stderr. What it imports stays for the
    next one."""
    status = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def share_what_is_slow(folder: Path) -> None:
    """For the process of the commands: the real LLM is read once (and once with random weights), not
    fifty times, and the judge of emoji is trained once. A tower that trains its LLM, or reads hidden
    states, gets its own."""
    os.chdir(folder)
    rivals.HEADS = {"tiny": (4, 2, 16)}  # the real ones take a core 20 seconds
    read = loading.load_llm
    known = {}

    def load_llm(name, device, dtype, random_seed=None, **options):
        if name not in loading.BUILT_IN or "frozen" in options:
            return read(name, device, dtype, random_seed=random_seed, **options)
        key = (name, device, dtype, random_seed)
        if key not in known:
            known[key] = read(name, device, dtype, random_seed=random_seed, **options)
        llm = copy.copy(known[key])
        llm._cached = OrderedDict()
        return llm

    for module in list(sys.modules.values()):  # those that are imported already, too
        if getattr(module, "load_llm", None) is read:
            module.load_llm = load_llm
    assert assemble.load_llm is load_llm

    train_judge = emoji_suites.learned_features
    judges = {}

    def learned_features(glyphs):
        key = glyphs.tobytes()
        if key not in judges:
            judges[key] = train_judge(glyphs)
        return judges[key]

    emoji_suites.learned_features = learned_features


@pytest.fixture(scope="module")
def terminal(workplace):
    """words -> what `run` says of them, in one process for all: importing torch takes longer than
    most commands do."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, spawn) as pool:
        # before the process starts: the library reads them once
        patch.setenv("HF_HUB_CACHE", str(workplace / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        pool.submit(share_what_is_slow, workplace).result()
        yield lambda words: pool.submit(run, words).result(timeout=300)


def shortened(command: str) -> list[str]:
    """What follows `python`, so that it takes seconds."""
    words = shlex.split(command)[1:]
    name = words[1] if words[0] == "-m" else words[0]
    key = name
    flags = "--patcher --resume --bridge --llm --codes --captions --describe"
    for flag in flags.split():
        if flag in words and f"{name} {flag}" in SHORT:
            key = f"{name} {flag}"
    if key == "train.py --patcher":
        args = train.parse_args(words[1:])
        words += ["--out", args.out]  # where the commands after it look for it
    if name == "extras.race":
        words[2] = RACER
    if "describe,describe-languages" in words:
        words += ["--suite", "describe"]  # the other is as long as that, for each language
    return words + SHORT.get(key, "").split()


def test_the_readme_has_the_commands_that_were_asked_for():
    for wanted in (
        "python train.py",
        "python train.py --llm Qwen/Qwen2.5-0.5B",
        'python sample.py --prompt "a red circle left of a blue square"',
    ):
        found = any(command.startswith(wanted) for command in COMMANDS)
        assert found, f"{wanted} is missing from README.md"
    assert "pip install -r requirements.txt" in README
    assert re.search(r"^pytest\b", "\n".join(BLOCKS), re.MULTILINE)


def test_the_eleven_lines_are_the_code():
    """README's code of the one idea is ImageExpert.forward as it stands, but for the indent."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    source = inspect.getsource(ImageExpert.forward)
    lines = [line.removeprefix("    ") for line in source.splitlines()]
    assert code.splitlines() == lines
    assert len(lines) == 11


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_command(command, workplace, terminal):
    """In the order of the documents: a later command may use what an earlier one has made."""
    words = shortened(command)
    status, out, err = terminal(words)
    assert status == 0, f"{command}\n{out}\n{err}"
    assert "Traceback" not in err
    if "--plan" in words:
        assert "in all" in out
    elif words[0] == "train.py":
        made = Path(re.search(r"^data .*; run (\S+?),?( |$)", out, re.MULTILINE).group(1))
        made_for = load_expert(str(workplace / made), CPU).made_for
        assert made_for["llm"]
        assert made_for["llm_revision"] == ("0" * 40 if "--llm" in words else None)
        assert list((workplace / made).glob("samples-*.png"))
    if "--describe" in words and words[0] == "sample.py":
        assert "photo.png: " in out.splitlines()[-1]
    elif words[0] == "sample.py" and ":geneval" not in command:
        if re.search("--read (think|rewrite)", command):
            assert " -> " in out  # what the LLM has written, anything
        files = [line for line in out.splitlines()[1:] if line.endswith(".png")]
        assert files or "--interactive" in words
        for line in files:
            assert Image.open(workplace / line).size[0] > 0


def test_the_places_to_change_are_there():
    """Each exercise ends with the place to change: a file, or a name of a module or of model.py."""
    exercises = README.split("## Exercises")[1].split("## Sources")[0]
    ends = re.findall(r"\((`[^)]+)\)$", exercises, re.MULTILINE)
    assert len(ends) == len(re.findall(r"^\d\. ", exercises, re.MULTILINE))
    for place in re.findall(r"`([^`]+)`", " ".join(ends)):
        if place.endswith(".py"):
            assert (ROOT / place).exists(), place
            continue
        owner, name = place.split(".")
        holder = getattr(model, owner, None) or importlib.import_module(owner)
        assert hasattr(holder, name), place


def test_every_racer_is_one():
    """The race is run with one bridge alone (RACER); the others are read as it reads them."""
    for command in COMMANDS:
        words = shlex.split(command)
        if words[2:3] == ["extras.race"] and words[1] == "-m":
            for racer in words[3].split(","):
                args = train.parse_args(race.flags_of(racer))
                assert racer.startswith(args.bridge.split(":")[0])
