"""Every command of the README runs: with the real LLM where it names none (the race, often loaded, with a tiny one), with fewer
steps and a smaller expert."""

import io
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from test_pictures import save_tiny_vlm

from conftest import CPU, save_tiny_instruct_llm, save_tiny_llm
from sample import load_expert

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")]
SHORT = {  # flags that make a command short; given last, they win
    "train.py": "--steps 2 --batch-size 8 --width 32 --depth 2",
    "train.py --resume": "--steps 3",
    "train.py --expert": "--steps 1 --batch-size 4",
    "train.py --bridge": "--steps 1 --batch-size 4",
    "sample.py": "--steps 2",
    "evaluate.py": "--steps 1 --limit 1",
    "evaluate.py --probe-llm": "--probe-llm Qwen/Qwen2.5-0.5B --limit 1",
    "evaluate.py --race": "--llm Qwen/Qwen2.5-0.5B --race kv --seeds 0 --minutes 0.001 --suite geneval --steps 1 --limit 1 "
    "--batch-size 8 --width 64",
    "bench.py": "attention --seconds 0.001",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with captioned pictures and prompts, and a tiny Qwen2 where the Hub's client keeps its downloads."""
    place = tmp_path_factory.mktemp("readme")
    (place / "my-pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(place / "my-pictures" / "a.png")
    (place / "my-pictures" / "a.txt").write_text("a red field")
    (place / "prompts.txt").write_text("a red circle\n")
    (place / "evaluation_metadata.jsonl").write_text('{"tag": "colors", "prompt": "a photo of a red star"}\n')
    Image.new("RGB", (40, 40), "blue").save(place / "photo.png")
    downloads = {
        "Qwen--Qwen2.5-0.5B": partial(save_tiny_llm, "qwen2"),
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
    """A command as Python would run it: exit status, stdout, stderr. What it imports stays for the next one."""
    sys.argv, status = words, 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def terminal(workplace):
    """words -> what `run` says of them, in one process for all: importing torch takes longer than most commands do."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("HF_HUB_CACHE", str(workplace / "hub"))  # before the process starts: the library reads it once
        patch.setenv("HF_HUB_OFFLINE", "1")
        pool.submit(os.chdir, workplace).result()
        yield lambda words: pool.submit(run, words).result(timeout=300)


def test_the_readme_has_the_commands_that_were_asked_for():
    for wanted in (
        "python train.py",
        "python train.py --llm Qwen/Qwen2.5-0.5B",
        'python sample.py --prompt "a red circle left of a blue square"',
    ):
        assert any(command.startswith(wanted) for command in COMMANDS), f"{wanted} is missing from README.md"
    text = "\n".join(BLOCKS)
    assert "pip install -r requirements.txt" in text and re.search(r"^pytest\b|&& pytest\b", text, re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_command(command, workplace, terminal):
    """In the order of the README: a later command may use what an earlier one has made."""
    words = shlex.split(command)
    kind = next((flag for flag in ("--resume", "--expert", "--bridge", "--race", "--probe-llm") if flag in words), "")
    short = SHORT.get(f"{words[1]} {kind}".strip(), "")
    status, out, err = terminal([*words[1:], *short.split()])
    assert status == 0, f"{command}\n{out}\n{err}"
    assert "Traceback" not in err
    if words[1] == "train.py":
        made = Path(re.search(r"^data .*; run (\S+?),?( |$)", out, re.MULTILINE).group(1))
        made_for = load_expert(str(workplace / made), CPU).made_for
        assert made_for["llm"] and made_for["llm_revision"] == ("0" * 40 if "--llm" in words else None)
        assert list((workplace / made).glob("samples-*.png"))
    if words[1] == "sample.py" and "--layout" not in words:
        files = [line for line in out.splitlines()[1:] if " -> " not in line]  # what the LLM wrote has an arrow
        assert len(out.splitlines()) > len(files) + 1 or not {"--think", "--rewrite"} & set(words)
        for line in files:
            assert Image.open(workplace / line).size[0] > 0
