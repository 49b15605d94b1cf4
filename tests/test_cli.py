"""No command ends in a traceback, writes half a file, or goes on with something else than it began
with; what its flags say is checked."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from PIL import Image

import batches
import checkpoint
import cli
import evaluate
import flags
import metrics
import sample
import train
from conftest import save_tiny_llm
from data import Shapes
from extras import race
from extras.renamed import RENAMED
from weights import read_safetensors

ROOT = Path(__file__).parent.parent


def ending(capsys, main) -> tuple[int, str]:
    """Exit status and stderr of a command that does not end well."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.one_line_errors(main)
    return stop.value.code, capsys.readouterr().err


def refusal(capsys, command, *flags) -> str:
    """The one line that a command refuses these flags with."""
    status, told = ending(capsys, lambda: command([str(flag) for flag in flags]))
    lines = told.strip().splitlines()
    assert status == 2 and len(lines) == 1, told
    return lines[0]


@pytest.fixture
def a_run(tiny_run, tmp_path) -> Path:
    """A finished run of one step."""
    train.main([*tiny_run, "--steps", "1"])
    return tmp_path / "run"


def fail_inductor():
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler()


def fail_in_a_worker():
    trace = "Traceback (most recent call last):\n  File x\nOSError: no room"
    raise RuntimeError(f"a worker died:\n{trace}")


def fail_with(error):
    raise error


BROKEN_PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
LIBRARIES = [  # what their errors are, and what must be said
    (lambda: Image.open(io.BytesIO(BROKEN_PNG)).load(), "broken PNG|cannot identify"),
    (
        lambda: safetensors.torch.save_file({"x": torch.zeros(1)}, "/no/such/folder/x"),
        "SafetensorError: .*No such file",
    ),
    (lambda: pickle.loads(b"not a pickle"), "UnpicklingError"),
    (lambda: jinja2.Template("{% for %}"), "TemplateSyntaxError: "),
    (lambda: tokenizers.Tokenizer.from_str("{"), "Exception: "),
    (lambda: {}["x"], "KeyError: 'x'"),
    (lambda: [][0], "IndexError: "),
    (
        lambda: fail_with(AssertionError()),
        "AssertionError [(]FROZEN_LLM_TRACEBACK=1 shows where[)]$",
    ),
    (lambda: fail_with(BaseException("a panic in Rust is no Exception")), "panic"),
    (lambda: fail_with(ValueError("x" * 10**6)), "x…$"),
    (lambda: fail_with(RuntimeError("Traceback (most recent call last)")), "RuntimeError"),
    (fail_inductor, "--compile needs a compiler"),
    (fail_in_a_worker, "RuntimeError: a worker died: OSError: no room"),
    (
        lambda: torch.empty(2**55),
        "not enough memory; make --batch-size, --image-size or --width smaller",
    ),
    (lambda: torch.empty(2**62, 2**62), "not enough memory; make --batch-size"),
    (lambda: np.empty(2**55), "not enough memory; make --batch-size"),
    (
        lambda: fail_with(torch.OutOfMemoryError("CUDA out of memory.")),
        "not enough memory; make --batch-size",
    ),
    (
        lambda: fail_with(ModuleNotFoundError("No module named 'gguf'")),
        "'gguf': pip install -r requirements.txt",
    ),
    (
        lambda: fail_with(ModuleNotFoundError("No module named 'extras'", name="extras")),
        "'extras': what was asked for needs the repository's folder extras/",
    ),
]


@pytest.mark.parametrize("fail, message", LIBRARIES)
def test_an_error_of_any_library_is_one_line(fail, message, capsys):
    status, told = ending(capsys, fail)
    assert status == 2 and len(told.splitlines()) == 1 and len(told) < 1000, told
    assert re.search(message, told.strip()) and "Traceback" not in told, told


def test_a_developer_gets_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK, "1")
    status, told = ending(capsys, lambda: {}["x"])
    assert status == 2 and "Traceback" in told and "test_cli.py" in told


@pytest.fixture
def from_a_terminal():
    """Ctrl-C counts, also where these tests run in the background, in which shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_while_working(capsys, from_a_terminal):
    status, told = ending(capsys, lambda: signal.raise_signal(signal.SIGINT))
    assert status == 130 and told.endswith(": stopped\n") and len(told.splitlines()) == 1


def test_a_stop_waits_for_the_end_of_a_block(from_a_terminal):
    """One that is ignored, as in the background of a shell, stays so."""
    done = []
    with pytest.raises(KeyboardInterrupt) as stop, cli.stops_wait():
        signal.raise_signal(signal.SIGTERM)
        done.append("the block")
    assert done == ["the block"] and stop.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with cli.stops_wait():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("number", cli.STOPS)
def test_stopped_while_torch_is_imported(number, tmp_path, from_a_terminal):
    """The real process, stopped at a moment that Python itself tells: as it is importing torch's
    parts."""
    words = [sys.executable, "-X", "importtime", str(ROOT / "train.py")]
    words += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "torch._" in line:
            process.send_signal(number)
            break
    told = process.communicate(timeout=60)[1]
    lines = [line for line in told.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 128 + number and lines == ["train.py: stopped"], told


def test_importing_a_command_changes_nothing_of_the_interpreter():
    """A notebook that imports sample.py keeps its own handlers."""
    assert sys.excepthook.__module__ != "cli"
    assert signal.getsignal(signal.SIGINT) is not cli._stop_now


def test_nobody_reads_the_output(capsys, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(SystemExit) as stop:
            cli.one_line_errors(lambda: print("a picture"))
        monkeypatch.undo()
    assert stop.value.code == 141 and len(capsys.readouterr().err.splitlines()) == 1


def test_there_is_no_output(monkeypatch):
    """So is a command that a Windows shortcut starts, or a daemon."""
    monkeypatch.setattr(sys, "stdout", None)
    cli.one_line_errors(lambda: None)


def test_nobody_reads_the_help():
    """The real process: else Python says so at its very end, in two lines of its own."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "import cli; cli.one_line_errors(lambda: cli.OneLineParser().parse_args(['-h']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    os.close(write_end)
    assert done.returncode == 141 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_without_the_letters_of_a_prompt(encoding, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    cli.one_line_errors(lambda: print("→ 猫 \ud83d"))
    assert shown.getvalue()


def test_words_of_any_terminal():
    assert cli.words("→ 猫 \U0001f431") == "→ 猫 \U0001f431"
    in_ascii = "猫".encode().decode("ascii", "surrogateescape")
    assert cli.words(in_ascii) == "猫", "UTF-8 where the locale says ASCII"
    assert cli.words("caf\udce9") == "caf\ufffd"
    cli.words("\ud83d").encode("utf-8")  # has no half characters


# --------------------------------------------------------------------------------------------------
# numbers


COMMANDS = {
    "train": train.parse_args,
    "sample": sample.main,
    "evaluate": evaluate.main,
    "race": lambda flags: race.main(["mot", *flags]),
}
NUMBERS = {
    "train": ["--lr", "--weight-decay", "--caption-dropout", "--steps", "--batch-size", "--seed"],
    "sample": ["--guidance", "--steps", "--n", "--seed"],
    "evaluate": ["--guidance", "--n", "--limit", "--seed"],
    "race": ["--minutes", "--seeds", "--n", "--limit"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_number_is_refused(command, capsys):
    for flag in NUMBERS[command]:
        for value in ("nan", "inf", "-inf", "1e39", "-1e39", "many", "9" * 5000):
            told = refusal(capsys, COMMANDS[command], f"{flag}={value}")
            assert flag in told and len(told) < 1000, told


def test_every_numeric_flag_is_checked():
    """float("nan") is a float: a flag of type float or int takes what no computation can."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")):
        assert not re.search(r"type=(float|int)\b", path.read_text("utf-8")), path.name


@pytest.mark.parametrize("command", [train.main, sample.main, evaluate.main])
def test_an_unset_variable_is_no_value(command, capsys):
    """--out "$RUN": not the working directory, not the newest run."""
    for flag in ("--out", "--data" if command == train.main else "--ckpt"):
        assert f"argument {flag}: expected a value, not ''" in refusal(capsys, command, flag, "")


def test_home_where_the_shell_leaves_it(monkeypatch):
    """A shell does not expand --out=~/run."""
    home = str(Path("somewhere").absolute())
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)
    args = train.parse_args(["--out=~/run", "--template=~/{}"])
    assert Path(args.out) == Path(home, "run") and args.template == "~/{}"


def test_layers_beyond_all_numbers(tiny_run, capsys):
    told = refusal(capsys, train.main, *tiny_run, "--layers", "0-99999999999")
    assert "--layers 0-99999999999: expected" in told


def test_guidance_and_what_belongs_to_it(capsys):
    assert cli.guidance_form("3") == (3, (0, 1), False)
    assert cli.guidance_form("3:from=0.2") == (3, (0.2, 1), False)
    assert cli.guidance_form("3:to=0.05") == (3, (0, 0.05), False)
    assert cli.guidance_form("-1.5:from=0.2:to=0.8:renorm") == (-1.5, (0.2, 0.8), True)
    for options in ("from=nan:to=1", "from=0:to=inf", "from=0.8:to=0.2", "from", "to=", "renorm=1"):
        told = refusal(capsys, sample.main, "--prompt", "x", "--guidance", f"3:{options}")
        assert "--guidance" in told and "expected" in told, told
    told = refusal(capsys, sample.main, "--prompt", "x", "--guidance", "3:until=1")
    assert "3 has no option 'until'; it has from=, to=, renorm" in told


def test_what_is_drawn_must_be_finite():
    for value in (torch.nan, torch.inf):
        x = torch.zeros(1, 3, 4, 4)
        x[0, 1, 2, 3] = value
        with pytest.raises(ValueError, match="not finite.*--guidance"):
            sample.to_pixels(x)


# --------------------------------------------------------------------------------------------------
# choices with what belongs to them, and flags of older versions

KNOWN = {"lap": ("stride=", "per-layer"), "think": ("", "frame="), "mot": ()}
FORMS = {
    "mot": ("mot", {}),
    "lap:stride=2:per-layer": ("lap", {"stride": "2", "per_layer": True}),
    "think:40:frame=a=b": ("think", {"": "40", "frame": "a=b"}),
    r"think:frame=C:\x\y.txt:8": ("think", {"": "8", "frame": r"C:\x\y.txt"}),
    "think:frame=https://x/y": ("think", {"frame": "https://x/y"}),
}


@pytest.mark.parametrize("text", FORMS)
def test_the_colon_form(text):
    assert cli.colon_form(text, KNOWN) == FORMS[text]


NO_FORMS = {
    "lab:stride=1": "--bridge lab:stride=1: expected one of lap, think, mot",
    "lap:strid=1": "--bridge lap:strid=1: lap has no option 'strid'; it has stride=, per-layer",
    "mot:stride=1": "mot has no option 'stride'; it has none",
    "lap:stride=": "expected a value, as in stride=VALUE",
    "lap::per-layer": "lap has no option ''",
    "think:": "expected a value, as in think:VALUE",
    "think:4:5": "think has no option '5'; it has frame=",
    "think:4:aloud": "think has no option 'aloud'; it has frame=",
    "think:frame": "expected frame=VALUE",
    "lap:stride": "expected stride=VALUE",
    "lap:per-layer=no": "expected per-layer without a value",
    "lap:stride=1:stride=2": "expected stride once, not twice",
    "": "expected one of",
}


@pytest.mark.parametrize("text", NO_FORMS)
def test_what_is_no_colon_form(text):
    with pytest.raises(ValueError) as refused:
        cli.colon_form(text, KNOWN, "--bridge")
    assert NO_FORMS[text] in str(refused.value)


def test_a_folder_may_have_a_colon(tmp_path, monkeypatch):
    assert flags.data_form("shapes:one-object") == ("shapes", {"one_object": True})
    assert flags.data_form(r"C:\pictures") == (r"C:\pictures", {})
    assert flags.data_form(str(tmp_path)) == (str(tmp_path), {})
    if os.name != "nt":
        monkeypatch.chdir(tmp_path)
        Path("shapes:one-object").mkdir()
        assert flags.data_form("shapes:one-object") == ("shapes:one-object", {})


STILL_THERE = {  # the race hands to train.py what is not its own; --image is short for --image-size
    "train": ("--batch-size", "--image"),
    "sample": ("--image",),
    "race": ("--batch-size", "--image", "--minutes", "--seeds"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_of_an_older_version_answers_with_its_new_form(command, capsys):
    for flag, form in RENAMED.items():
        if flag in STILL_THERE.get(command, ()) or not flag.startswith("--"):
            continue
        told = refusal(capsys, COMMANDS[command], flag, "1")
        assert f": {flag} is now {form} (--help" in told, told


# --------------------------------------------------------------------------------------------------
# folders and files


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "x.png"

    def half(file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="x.png could not be written: .*No space left"):
        cli.write_whole(path, half)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"whole")
    untouched = "x.png could not be written; what it held before is untouched: "
    with pytest.raises(OSError, match=untouched):
        cli.write_whole(path, half)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"whole"]
    cli.write_whole(path, Image.new("RGB", (2, 2)).save)
    assert Image.open(path).size == (2, 2)


def test_a_checkpoint_is_for_everybody_that_the_user_lets_read(a_run):
    """safetensors' own files are private: nobody else could draw with the run."""
    modes = {path.name: path.stat().st_mode for path in a_run.iterdir()}
    assert modes["model.safetensors"] == modes[checkpoint.STATE] == modes["metrics.jsonl"]


def test_a_place_where_nothing_can_be_written(a_run, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.touch()
    draw = ["--ckpt", a_run, "--prompt", "x", "--steps", "1", "--device", "cpu"]
    told = refusal(capsys, sample.main, *draw, "--out", taken)
    assert "taken: nothing can be written there" in told
    told = refusal(capsys, sample.main, *draw, "--out", taken / "x")
    assert "x: nothing can be written there" in told
    score = ["--ckpt", a_run, "--suite", "parrot", "--limit", 1, "--out", taken, "--device", "cpu"]
    assert "taken: nothing can be written there" in refusal(capsys, evaluate.main, *score)


def test_what_a_run_would_overwrite_is_kept(a_run, tiny_run, llm_folder, capsys):
    """The LLM's own folder as --out; a run that was downloaded without its state; the user's
    notes."""
    weights = llm_folder("qwen2") / "model.safetensors"
    before = weights.read_bytes()
    told = refusal(capsys, train.main, *tiny_run, "--out", weights.parent, "--steps", "1")
    assert "already holds a model.safetensors, which a run would overwrite" in told
    assert weights.read_bytes() == before
    (a_run / "README.md").write_text("my notes")
    train.main(["--resume", "--out", str(a_run), "--steps", "2"])
    assert (a_run / "README.md").read_text() == "my notes"
    (a_run / checkpoint.STATE).unlink()
    told = refusal(capsys, train.main, *tiny_run, "--steps", "1")
    assert "already holds a model.safetensors" in told


def test_large_pictures_are_not_drawn_many_steps_ahead(tiny_llm, monkeypatch):
    """The captions of 32 steps go to the LLM together; their pictures, at 512 pixels, would be
    gigabytes."""
    llm = tiny_llm("qwen2")

    def first_steps() -> list:
        source = Shapes(16)
        asked = []
        example = source.example
        source.example = lambda *given: asked.append(given) or example(*given)
        made = train.Batches(source, llm, 8, 4, 0)
        steps = [next_step for _, next_step in zip(range(3), made)]
        made.pool.shutdown(wait=True)
        return [len(asked), steps]

    many, expected = first_steps()
    monkeypatch.setattr(batches, "LOOK_AHEAD_BYTES", 2 * 8 * 3 * 16**2)
    few, steps = first_steps()
    assert (many, few) == (2 * 2 * batches.LOOK_AHEAD, 2 * 6)  # these steps, and the next
    for (captions, pictures), (others, same) in zip(steps, expected):
        assert captions == others and np.array_equal(pictures, same)


def test_what_is_no_evaluation_is_refused_before_the_work(a_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", None)
    score = ["--ckpt", a_run, "--suite", "parrot", "--limit", 1, "--device", "cpu", "--out", a_run]
    for content in ("{", "[]"):
        (a_run / "evaluate.json").write_text(content)
        told = refusal(capsys, evaluate.main, *score)
        assert "evaluate.json is cut, or no evaluation; move it away" in told
    assert (a_run / "evaluate.json").read_text() == "[]"


def test_one_picture_into_its_file(a_run, tmp_path, capsys):
    draw = ["--ckpt", a_run, "--prompt", "a red circle", "--steps", "1", "--device", "cpu"]
    draw += ["--out", tmp_path / "new" / "cat.png"]
    sample.main([str(word) for word in draw])
    assert Image.open(tmp_path / "new" / "cat.png").size == (16, 16)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat.png"]
    told = refusal(capsys, sample.main, *draw, "--n", 2)
    assert "cat.png is a file, for one picture; expected a folder for 2" in told


def test_prompts_that_are_no_file_names(a_run, tmp_path):
    prompts = ["猫" * 300, "🐱", "CON", "a/b\\c:d?", "\udce9", ""]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    place = ["--ckpt", str(a_run), "--steps", "1", "--device", "cpu"]
    place += ["--out", str(tmp_path / "out")]
    sample.main([*place, *flags])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == len(prompts) + 1
    for name in names:
        assert len(name.encode()) < 143 and not re.search(r'[<>:"/\\|?*]', name), name


def test_layouts_keep_to_their_folder(tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    faults = [(["../x"], "what a file can be named after"), ([3, 3], "stands there twice")]
    for ids, message in faults:
        prompts.write_text(json.dumps([{"prompt_id": name, "prompt": "x"} for name in ids]))
        assert message in refusal(capsys, sample.main, "--prompts", f"{prompts}:wise")


@pytest.mark.parametrize(
    "prompts, n, side, caption",
    [(300, 50, 32, "x"), (2, 1, 32, "word " * 30000), (2, 1, 32, "猫" * 90000), (9, 1, 1500, "x")],
)
def test_a_grid_is_of_a_size_that_opens(prompts, n, side, caption):
    pictures = np.zeros((prompts, n, side, side, 3), np.uint8)
    width, height = cli.captioned_grid(pictures, [caption] * prompts).size
    assert 100 < width < 3000 and 100 < height < 6000, (width, height)


def test_windows_has_no_module_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert metrics.peak_memory(torch.device("cpu")) == "unknown"


# --------------------------------------------------------------------------------------------------
# a run that goes on


def test_two_processes_do_not_train_in_one_folder(a_run, capsys):
    """And a process that is killed leaves no lock behind."""
    resume = ["--resume", "--out", str(a_run), "--steps", "2"]
    hold = f"import cli, time; lock = cli.Locked({str(a_run)!r}).__enter__(); "
    hold += "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    assert "run: another process trains there" in refusal(capsys, train.main, *resume)
    process.kill()
    process.wait()
    train.main(resume)


def test_a_run_that_was_faster_is_not_overwritten(tiny_run, tmp_path):
    slow = train.prepare(*train.settings([*tiny_run, "--steps", "2"]))
    train.main([*tiny_run, "--steps", "1"])
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(slow)


def test_a_cut_line_of_metrics(a_run):
    path = a_run / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": NaN}\n{"step": "1"}\n[1]\n\xff\x00\n{"step": 1, "loss": 0.')
    train.main(["--resume", "--out", str(a_run), "--steps", "2"])
    assert [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()] == [1, 2]


def test_a_checkpoint_that_is_none(a_run, tmp_path, capsys):
    draw = ["--prompt", "x", "--steps", "1", "--device", "cpu", "--out", tmp_path / "drawn"]
    for place in (a_run / "model.safetensors", a_run / checkpoint.STATE, "no:name/x"):
        told = refusal(capsys, sample.main, *draw, "--ckpt", place)
        assert f"--ckpt {place}: " in told and "Hub" in told
    (a_run / "config.json").write_text("{")  # a copy for the Hub's pages
    sample.main([str(flag) for flag in [*draw, "--ckpt", a_run]])
    weights = a_run / "model.safetensors"
    metadata, tensors = read_safetensors(weights)
    config = json.loads(metadata["config"]) | {"patch": 0}
    metadata = metadata | {"config": json.dumps(config)}
    safetensors.torch.save_file(tensors, weights, metadata=metadata)
    assert "is not an image expert" in refusal(capsys, sample.main, *draw, "--ckpt", a_run)
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    told = refusal(capsys, sample.main, *draw, "--ckpt", a_run)
    assert "model.safetensors does not read as" in told


def test_an_llm_that_has_moved(tiny_run, llm_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llm_folder("qwen2"), "llm")
    train.main([*tiny_run, "--llm", "llm", "--steps", "1"])
    Path("elsewhere").mkdir()
    shutil.move("llm", "elsewhere/moved")
    resume = ["--resume", "--out", "run", "--steps"]
    told = refusal(capsys, train.main, *resume, "2")
    assert f"the run has llm, seen from {tmp_path}" in told and "--resume --llm NEW_PLACE" in told
    draw = ["--ckpt", "run", "--prompt", "x", "--steps", "1", "--device", "cpu"]
    assert "if it has moved: --llm NEW_PLACE" in refusal(capsys, sample.main, *draw)
    score = ["--ckpt", "run", "--suite", "parrot", "--limit", "1", "--steps", "1"]
    assert "if it has moved: --llm NEW_PLACE" in refusal(capsys, evaluate.main, *score)
    evaluate.main([*score, "--llm", "elsewhere/moved", "--device", "cpu"])
    train.main([*resume, "2", "--llm", "elsewhere/moved"])
    train.main([*resume, "3"])  # the new place is kept
    save_tiny_llm("qwen2", tmp_path / "other", seed=1)
    told = refusal(capsys, train.main, *resume, "4", "--llm", "other")
    assert "elsewhere/moved (weights" in told and "other (weights" in told


def picture_folder(place: Path) -> Path:
    place.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (16, 16), "red").save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"{name}, a red field")
    return place


def test_data_that_has_moved_or_changed(tiny_run, tmp_path, capsys):
    pictures = picture_folder(tmp_path / "pictures")
    train.main([*tiny_run, "--data", str(pictures), "--steps", "1"])
    assert "3 pictures with captions; run" in capsys.readouterr().out
    resume = ["--resume", "--out", tmp_path / "run", "--steps"]
    moved = pictures.rename(tmp_path / "moved")
    assert "--resume --data NEW_PLACE" in refusal(capsys, train.main, *resume, 2)
    train.main([str(word) for word in (*resume, 2, "--data", moved)])
    (moved / "a.txt").write_text("another caption")
    told = refusal(capsys, train.main, *resume, 3)
    assert f"--data {moved} has changed (then: 3 pictures with captions; now: 3 " in told
    assert "(--out)" in told
    assert "has changed" in refusal(capsys, train.main, *resume, 3, "--data", "shapes")


def test_older_runs_go_on(tiny_run, tmp_path, capsys):
    """Their state says nothing of the data; then another place of it cannot be proved the same."""
    pictures = picture_folder(tmp_path / "pictures")
    train.main([*tiny_run, "--data", str(pictures), "--steps", "1"])
    state = tmp_path / "run" / checkpoint.STATE
    metadata, tensors = read_safetensors(state)
    older = {key: value for key, value in metadata.items() if not key.startswith("data_")}
    safetensors.torch.save_file(tensors, state, metadata=older)
    resume = ["--resume", "--out", str(tmp_path / "run"), "--steps", "2"]
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert "this run has --data" in refusal(capsys, train.main, *resume, "--data", moved)
    args = json.loads(older.pop("args"))
    del args["draws"]  # a flag that came later
    safetensors.torch.save_file(tensors, state, metadata=older | {"args": json.dumps(args)})
    train.main(resume)
    for name in ("args", "config", "step"):
        safetensors.torch.save_file(tensors, state, metadata=metadata | {name: "x"})
        assert "is not the state of a training run" in refusal(capsys, train.main, *resume)


def test_another_expert_is_named(a_run, capsys):
    state = a_run / checkpoint.STATE
    metadata, tensors = read_safetensors(state)
    config = json.loads(metadata["config"]) | {"prediction": "velocity"}
    safetensors.torch.save_file(tensors, state, metadata=metadata | {"config": json.dumps(config)})
    told = refusal(capsys, train.main, "--resume", "--out", a_run, "--steps", "2")
    assert "the run's expert has prediction velocity, and would now have clean" in told


@pytest.mark.parametrize("separator", ["\r", "\x1c", "\x85", "\u2029", "\u2028", "\x0b", "\n"])
def test_what_ends_a_line_or_a_paragraph_has_its_place_in_a_picture(separator):
    """Libraqm lays nothing out behind one."""
    from extras.grids import picture_table
    from extras.sheets import sheet

    text = f"a red{separator}circle{separator}"
    picture = np.zeros((64, 64, 3), np.uint8)
    assert cli.captioned_grid(picture[None, None], [text]).size[0] > 64
    assert picture_table([("run", {"row": [(picture, text, True)]})]).size[0] > 64
    assert sheet([[(picture, text)]], text).size[0] > 64
