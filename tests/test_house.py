"""The house: which file may know which, that the core stands without extras/, and how code reads.

The limits of length and density are what the reading order in README promises.
"""

import ast
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import sample
import train
from conftest import TINY_RUN

ROOT = Path(__file__).parent.parent
KNOWS = {  # the core, and what each of its files may import at its top
    "attention": "",
    "flow": "",
    "data": "",
    "batches": "",
    "metrics": "batches cli",
    "cli": "",
    "patches": "",
    "weights": "patches",
    "inspection": "attention",
    "llm": "attention inspection",
    "loading": "inspection llm weights",
    "model": "attention flow inspection llm patches weights",
    "checkpoint": "cli inspection llm loading model weights",
    "sample": "assemble cli flow llm model",
    "flags": "cli patches",
    "assemble": "batches checkpoint cli data flags flow inspection llm loading metrics model patches",
    "train": "assemble batches checkpoint cli flags metrics sample",
    "evaluate": "assemble checkpoint cli llm model sample extras.grades extras.suites",
}
LINES = {  # at most; what DESIGN calls the core, then its helpers
    "attention": 195,
    "flow": 130,
    "llm": 433,
    "model": 387,
    "patches": 180,
    "weights": 250,
    "data": 520,
    "train": 310,
    "batches": 85,
    "metrics": 140,
    "flags": 300,
    "assemble": 400,
    "sample": 338,
    "evaluate": 345,
    "checkpoint": 352,
    "inspection": 350,
    "loading": 445,
    "cli": 616,
}
EXTRA_LINES = 385
FUNCTION_LINES = 60
LONGER_FUNCTIONS: set[str] = set()
CORE = sorted(KNOWS)
EXTRAS = sorted(f"extras.{path.stem}" for path in (ROOT / "extras").glob("[!_]*.py"))


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text("utf-8"))


def imported(module: str) -> set[str]:
    """The files of this project that a file imports at its top, but for cli in the preamble."""
    found = set()
    for line in tree_of(module).body:
        if isinstance(line, ast.Import):
            found |= {alias.name for alias in line.names}
        elif isinstance(line, ast.ImportFrom) and line.module == "extras":
            found |= {f"extras.{alias.name}" for alias in line.names}
        elif isinstance(line, ast.ImportFrom):
            found.add(line.module)
    return found & {*CORE, *EXTRAS}


# -------------------------------------------------------------------------------------------------
# who knows whom


def test_the_core_is_what_lies_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == CORE


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_only_what_it_may(module):
    assert imported(module) <= set(KNOWS[module].split())


def test_no_circle_among_imports_at_the_top():
    arrows = {module: imported(module) for module in [*CORE, *EXTRAS]}
    while arrows:
        free = [module for module, known in arrows.items() if not known & arrows.keys()]
        assert free, f"a circle among {sorted(arrows)}"
        for module in free:
            del arrows[module]


OTHER_SUBJECTS = re.compile("bridge|emoji|race|think|template|gguf|mirror", re.IGNORECASE)


@pytest.mark.parametrize("module", ["attention", "flow", "llm", "model"])
def test_the_heart_knows_one_subject(module):
    """No bridge, no emoji, no race, no thinking, no GGUF."""
    assert not OTHER_SUBJECTS.findall(path_of(module).read_text("utf-8"))


@pytest.mark.parametrize("function", [train.train_step, sample.draw])
def test_a_step_and_a_drawing_know_one_subject(function):
    assert not OTHER_SUBJECTS.findall(inspect.getsource(function))


ALONE = """
import importlib.util, json, sys
sys.path.insert(0, ".")
import loading, sample, train
assert importlib.util.find_spec("extras") is None
for command, flags in json.loads(sys.argv[1]):
    sys.argv = [command, *flags]
    {"train": train.main, "sample": sample.main, "loading": loading.main}[command]()
"""


@pytest.mark.slow
def test_the_core_trains_and_draws_without_extras(llm_folder, tmp_path):
    """Its files alone, in a folder of their own."""
    for module in CORE:
        shutil.copy(path_of(module), tmp_path)
    llm = ["--llm", str(llm_folder("qwen2"))]
    drawing = ["--prompt", "a red circle", "--steps", "2", "--out", "drawn.png"]
    commands = [
        ("train", [*llm, *TINY_RUN, "--steps", "2", "--out", "run"]),
        ("train", ["--resume", "--steps", "3", "--out", "run"]),
        ("sample", ["--ckpt", "run", "--device", "cpu", "--dtype", "float32", *drawing]),
        ("loading", llm),
    ]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(commands)],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "keep keys and values" in done.stdout
    assert (tmp_path / "drawn.png").stat().st_size > 0


# -------------------------------------------------------------------------------------------------
# how code reads


@pytest.mark.parametrize("module", [*CORE, *EXTRAS])
def test_lines_are_short_and_formatted(module):
    lines = path_of(module).read_text("utf-8").split("\n")
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not [number for number, line in enumerate(lines, 1) if "fmt: skip" in line]


@pytest.mark.parametrize("module", [*CORE, *EXTRAS])
def test_files_and_functions_are_of_a_length_to_read(module):
    length = len(path_of(module).read_text("utf-8").splitlines())
    assert length <= LINES.get(module, EXTRA_LINES)
    long = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef) and f"{module}.{node.name}" not in LONGER_FUNCTIONS:
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                long.append(node.name)
    assert not long, f"above {FUNCTION_LINES} lines"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_nested(node: ast.AST) -> bool:
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
    return len(inner) > 1 or len(node.generators) > 1


def count(module: str) -> Counter:
    """What makes code dense, and the lines of code (no comments, docstrings, or empty ones)."""
    counts = Counter()
    documented = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            counts["tuple assignments"] += isinstance(node.targets[0], ast.Tuple)
        if isinstance(node, COMPREHENSIONS):
            counts["comprehensions"] += 1
            counts["nested comprehensions"] += is_nested(node)
        counts["walruses"] += isinstance(node, ast.NamedExpr)
        counts["conditional expressions"] += isinstance(node, ast.IfExp)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= set(range(node.lineno, node.end_lineno + 1))

    code = set()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    source = io.StringIO(path_of(module).read_text("utf-8"))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT:
            counts["comments"] += 1
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    counts["lines"] = len(code - documented)
    return counts


def test_the_core_is_as_plain_as_its_models():
    """Per 100 lines of code: what STYLE.md's table has of nanochat, nanoGPT, JiT and flux2."""
    counts = Counter()
    for module in CORE:
        counts.update(count(module))
    density = {what: 100 * number / counts["lines"] for what, number in counts.items()}
    assert density["tuple assignments"] <= 0.8
    assert density["comprehensions"] <= 3.4
    assert density["nested comprehensions"] <= 0.1
    assert density["walruses"] == 0
    assert density["conditional expressions"] <= 2.5
    assert density["comments"] >= 8
