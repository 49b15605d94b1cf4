"""What all commands share: errors in one line, checked flags, files never half written, grids.

Every command begins with `cli.start()`, before it imports torch, and ends with
`cli.one_line_errors(main)`. Between the two whatever goes wrong is one line on stderr and exit
status 2; Ctrl-C is one line and 130. FROZEN_LLM_TRACEBACK=1 in the environment brings the traceback
back.

Nothing heavy is imported here at the top: Ctrl-C must be caught while torch is imported, too.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

TRACEBACK = "FROZEN_LLM_TRACEBACK"  # the environment variable that brings the traceback back
STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a cluster sends before it kills
UNTOUCHED = (signal.default_int_handler, signal.SIG_DFL)
OPTIONAL = ("diffusers", "datasets")  # of --vae, and of --data hf:NAME
LONGEST = 600  # characters of an error's line: a compiler may say pages

# --------------------------------------------------------------------------------------------------
# errors: one line and an exit status


def start() -> None:
    """From here on, while a command still imports its libraries, Ctrl-C and errors are one line."""
    for number in STOPS:
        if signal.getsignal(number) in UNTOUCHED:
            # an exception would be lost in a library that catches all
            signal.signal(number, _stop_now)
    sys.excepthook = lambda kind, error, trace: sys.exit(report(error))
    threading.excepthook = lambda thread: report(thread.exc_value)
    warnings.formatwarning = lambda message, *where: f"{program()}: {flat(str(message))}\n"


def one_line_errors(main: Callable[[], None]) -> None:
    """Run a command. What goes wrong is one line on stderr and status 2, whoever raised it."""
    _change_stops(_stop_now, _stop_soon)  # from here on half-written files are put away first
    if hasattr(sys.stdout, "reconfigure"):
        # a terminal may not have the letters of a prompt
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:  # --help too: here a broken pipe can still be told
            if sys.stdout:  # a command that is started without one has none
                sys.stdout.flush()
            _change_stops(_stop_soon, _stop_now)  # no exception while the interpreter ends
    except SystemExit:
        raise
    except BaseException as error:  # not Exception alone: a panic in a library's Rust code is none
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Print an error's line; returns the exit status that goes with it."""
    status = 2
    if isinstance(error, KeyboardInterrupt):
        status = 128 + (error.args[0] if error.args else signal.SIGINT)
    elif isinstance(error, BrokenPipeError):
        status = 141
        _close_stdout()
    try:
        print(f"{program()}: {one_line(error)}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads stderr either
    if os.environ.get(TRACEBACK):
        sys.__excepthook__(type(error), error, error.__traceback__)
    return status


def program() -> str:
    return Path(sys.argv[0]).name


def one_line(error: BaseException) -> str:
    """What went wrong and, where it is known, what to do, in a line of bounded length."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, BrokenPipeError):
        return "stopped: nobody reads the output any more"
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] == "extras":
            return f"{error}: what was asked for needs the repository's folder extras/"
        if error.name in OPTIONAL:
            return f"{error}: what was asked for needs it: pip install {error.name}"
        return f"{error}: pip install -r requirements.txt"
    text = flat(str(error))
    kind = type(error).__name__
    named = f"{kind}: {text}" if text else kind
    if is_out_of_memory(error):
        return f"not enough memory; make --batch-size, --image-size or --width smaller ({named})"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        what_to_do = "--compile needs a compiler (C++ on a CPU); leave it out, or install one"
        return f"{what_to_do} ({named})"
    if text and isinstance(error, SAY_ENOUGH):
        return text
    return f"{named} ({TRACEBACK}=1 shows where)"


# Errors whose message is written for the user. Others, a KeyError: 'x' say, are named.
SAY_ENOUGH = (ValueError, OSError, FloatingPointError, argparse.ArgumentTypeError)


# What steers a terminal: moves its cursor, colours it, turns its writing round.
CONTROLS = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def flat(text: str) -> str:
    """A message of many lines as one, without the tracebacks that some libraries put into it, and
    without what would steer the terminal."""
    text = CONTROLS.sub("\ufffd", text)
    text, *inner = text.split("Traceback (most recent call last)")
    if inner:
        text += inner[-1].strip().rpartition("\n")[2]
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    return text


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "alloc_failed",
    "bad_alloc",
    "size calculation overflowed",
    "multiplication overflow",
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it with a RuntimeError, in words that depend on the device and the system."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


def _stop_now(number, frame) -> None:
    os.write(2, f"{program()}: stopped\n".encode())  # print may be what was interrupted
    os._exit(128 + number)


def _stop_soon(number, frame) -> None:
    raise KeyboardInterrupt(number)


def _change_stops(before: Callable, after: Callable) -> None:
    for number in STOPS:
        if signal.getsignal(number) is before:
            signal.signal(number, after)


@contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block."""
    waiting = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        raise KeyboardInterrupt(waiting[0])


def _close_stdout() -> None:
    """Let the interpreter's own last flush go nowhere (library/signal, "Note on SIGPIPE")."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


# --------------------------------------------------------------------------------------------------
# flags


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """The help, and the default where there is one."""
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options):
        # no abbreviations: --image, which is no flag here, is not meant as --image-size
        super().__init__(formatter_class=ShowDefaults, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """An empty value (of an unset variable, --out "$RUN") is refused where it is no text for an
        LLM; and ~/ is the home folder also where the shell leaves it, as in --out=~/run."""
        namespace, more = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if action.type is not None or not isinstance(value, str):
                continue
            if not value.strip():
                self.error(f"argument {action.option_strings[0]}: expected a value, not {value!r}")
            if value.startswith("~"):
                setattr(namespace, action.dest, os.path.expanduser(value))
        return namespace, more

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments"):
            message = _say_new_form(message)
        self.exit(2, f"{self.prog}: {flat(message)} (--help lists the flags)\n")


def _say_new_form(message: str) -> str:
    """A flag of an older version, or a choice's option, is answered with what it has become."""
    try:
        from extras.renamed import RENAMED
    except ImportError:  # a copy of the core alone
        return message
    for word in message.split():
        flag = word.partition("=")[0]
        if flag in RENAMED:
            return f"{flag} is now {RENAMED[flag]}"
    return message


def between(low: float, high: float, kind: type = float, expected: str = "") -> Callable:
    """argparse type: a number from low to high, both included; nan and inf are none.

    `expected` says the range in other words.
    """
    what = "a whole number" if kind is int else "a number"
    expected = expected or f"{what} from {low} to {high}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    return parse


def positive(kind: type) -> Callable:
    """argparse type: a number above zero, of a size that float32 and every counter hold."""
    if kind is int:
        return between(1, 2**31 - 1, int)
    return between(math.nextafter(0, 1), 1e9, expected="a number above zero, at most 1e9")


seed_number = between(0, 2**31 - 1, int)  # every generator takes it
share = between(0, math.nextafter(1, 0), expected="a number from 0 to below 1")


def words(text: str) -> str:
    """argparse type: text for an LLM.

    What the terminal's encoding could not read is read as UTF-8, or becomes U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half a character, as Windows can hand over
        return text.encode("utf-8", "replace").decode("utf-8")


def colon_form(text: str, known: dict[str, tuple] | None = None, flag: str = "") -> tuple:
    """A choice and its options: "lap:stride=1:per-layer".

    -> "lap", {"stride": "1", "per_layer": True}: values are strings, True where there is none;
    names have underscores, as argparse makes them. known: choice -> its options, as they are typed,
    with a "=" at the end of those that take a value; None for any. Where "" is among them, a part
    that is no option is a value: "think:40" -> "think", {"": "40"}. ValueError, which names the
    `flag`, for what is not known.
    """
    said = f"{flag} {text}".strip()
    name, *parts = re.split(r":(?![\\/])", text)  # not at the colon of C:\pictures
    if known is not None and name not in known:
        raise ValueError(f"{said}: expected one of {', '.join(known)}")
    own = () if known is None else known[name]
    takes_value = {option.removesuffix("="): option.endswith("=") for option in own}
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if known is not None and (option == "" or option not in takes_value):
            if equals or "" not in own or "" in options:
                owns = ", ".join(filter(None, own)) or "none"
                old = f"{name}:{option}"
                if _say_new_form(old) != old:
                    raise ValueError(f"{flag} {_say_new_form(old)}")
                raise ValueError(f"{said}: {name} has no option {option!r}; it has {owns}")
            value = option
            option = ""
        elif known is not None and takes_value[option] != bool(equals):
            expected = f"{option}=VALUE" if takes_value[option] else f"{option} without a value"
            raise ValueError(f"{said}: expected {expected}")
        elif not equals:
            value = True
        if value == "":
            example = f"{option}=VALUE" if option else f"{name}:VALUE"
            raise ValueError(f"{said}: expected a value, as in {example}")
        key = option.replace("-", "_")
        if key in options:
            raise ValueError(f"{said}: expected {option} once, not twice")
        options[key] = value
    return name, options


def guidance_form(text: str) -> tuple[float, tuple[float, float], bool]:
    """argparse type: "3:from=0.2:to=0.8:renorm" -> scale, interval of t, whether to renorm."""
    number = text.partition(":")[0]
    scale = between(-1000, 1000)(number)
    try:
        _, options = colon_form(text, {number: ("from=", "to=", "renorm")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    time = between(0, 1)
    end = time(str(options.get("to", 1)))
    start = time(str(options.get("from", 0)))
    if start > end:
        raise argparse.ArgumentTypeError(f"{text}: expected from= to be at most to=")
    return scale, (start, end), "renorm" in options


def size_form(text: str) -> tuple[int, int]:
    """argparse type: "64x96" -> (64, 96), height and width in pixels."""
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not sides or not 1 <= min(map(int, sides.groups())):
        raise argparse.ArgumentTypeError(f"{text}: expected height x width, as 64x96")
    return int(sides[1]), int(sides[2])


def pick_device(name: str):
    """ "auto" or a device's name -> the torch.device, and why."""
    import torch

    if name != "auto":
        try:
            return torch.empty(0, device=name).device, "asked for"
        except (RuntimeError, AssertionError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"--device {name} cannot be used here: {why}") from None
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"


def pick_dtype(name: str, device):
    """ "auto", "float32" or "bfloat16" -> the arithmetic of the matrix products, and why.

    Trained weights stay float32.
    """
    import torch

    if name != "auto":
        return getattr(torch, name), "asked for"
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it
    else:
        fast = device.type == "cpu" and cpu.get("avx512_bf16")
    if fast:
        return torch.bfloat16, "fast here"
    return torch.float32, "bfloat16 is not fast here"


# --------------------------------------------------------------------------------------------------
# folders and files


def make_folder(path: Path | str) -> Path:
    """A folder for --out, made if need be; ValueError, before any work, if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise ValueError(
            f"{path}: nothing can be written there ({why}); --out names another folder"
        ) from None
    return path


def write_whole(path: Path | str, write: Callable[[Path], object]) -> None:
    """`write` writes a file beside `path`, which then takes its name: `path` is always whole.

    If it makes a folder of that name, the files in it take their places beside `path`, one by one,
    `path` itself first. If one of them cannot, those that are left stay there, whole.
    """
    path = Path(path)
    beside = path.with_name(f"tmp-{path.name}")  # the suffix stays: it tells Pillow the format
    remove(beside)  # of a process that was killed
    files = []
    moved = 0
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as all files of this user: safetensors makes its own private
        beside.unlink()
        write(beside)
        files = list(beside.iterdir()) if beside.is_dir() else [beside]
        for file in sorted(files, key=lambda file: file.name != path.name):
            file.chmod(mode)
            os.replace(file, path if file == beside else path.with_name(file.name))
            moved += 1
    except Exception as error:
        old = "; what it held before is untouched" if path.exists() and not moved else ""
        raise OSError(f"{path} could not be written{old}: {flat(str(error))}") from error
    finally:
        if moved in (0, len(files)):
            remove(beside)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def it_may_have_moved(place: str, flag: str, stored: bool = True) -> Iterator[None]:
    """Around the loading of what a run names: if it is gone, say which flag gives its new place.
    stored: the run names it, and no flag of today."""
    try:
        yield
    except ValueError as error:
        if not stored or Path(place).exists():
            raise
        hint = f"the run has {place}, seen from {Path.cwd()}; if it has moved: {flag} NEW_PLACE"
        raise ValueError(f"{error} ({hint})") from None


def parse_json(text: str):
    """Of anybody's file. ValueError for what is no JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_text(path: Path | str, text: str) -> None:
    write_whole(path, lambda file: file.write_text(text, "utf-8"))


class Locked:
    """Hold a folder for one process: `with Locked(folder): ...`. ValueError if another holds it.

    The lock is the system's, on an open file, so a process that is killed leaves none behind.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def __enter__(self) -> "Locked":
        self.file = open(self.folder / ".lock", "a")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.close()
            raise ValueError(
                f"{self.folder}: another process trains there; wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


# --------------------------------------------------------------------------------------------------
# grids of captioned pictures

GRID_PROMPTS = 64  # that a grid shows, of each the first so many pictures, enlarged or reduced to
GRID_PICTURES = 8  # such a side, and so many lines of the prompt: any number of any prompts gives
GRID_SIDE = (128, 512)  # (least and most pixels) a grid that viewers open
GRID_LINES = 6
GRID_GAP = 8  # pixels between the cells; between the pictures of a cell half of it


def save_picture(picture, path: Path) -> None:
    """picture (height, width, 3) uint8, into a file that is always whole."""
    from PIL import Image

    write_whole(path, Image.fromarray(picture).save)


def captioned_grid(pictures, captions: list[str], columns: int = 4):
    """pictures (prompts, n, height, width, 3) uint8 -> a PIL image.

    A cell a prompt: its n pictures side by side, and the caption below them.
    """
    from PIL import Image, ImageDraw

    pictures = pictures[:GRID_PROMPTS, :GRID_PICTURES]
    captions = captions[:GRID_PROMPTS]
    n, height, width = pictures.shape[1:4]

    # small pictures are enlarged to whole multiples, large ones reduced
    least, most = GRID_SIDE
    scale = max(1, least // height)
    resample = Image.Resampling.NEAREST
    if height * scale > most:
        scale = most / height
    if scale < 1:
        resample = Image.Resampling.LANCZOS
    height = round(height * scale)
    width = round(width * scale)
    pitch = width + GRID_GAP // 2  # from one picture of a cell to the next
    cell_width = n * pitch - GRID_GAP // 2

    # the captions in lines of the cell's width, 7 pixels a letter, 15 a line
    texts = []
    line_length = max(12, cell_width // 7)
    for caption in captions:
        text = unbroken(caption)
        lines = textwrap.wrap(text, line_length, max_lines=GRID_LINES, placeholder=" …")
        texts.append(lines or ["(no prompt)"])
    cell_height = height + 15 * max(map(len, texts)) + 4

    # the sheet, and each cell on it
    if n > 1:
        columns = columns // 2
    columns = max(1, min(columns, len(captions)))
    rows = math.ceil(len(captions) / columns)
    sheet_width = GRID_GAP + columns * (cell_width + GRID_GAP)
    sheet_height = GRID_GAP + rows * (cell_height + GRID_GAP)
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    ink = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left = GRID_GAP + i % columns * (cell_width + GRID_GAP)
        top = GRID_GAP + i // columns * (cell_height + GRID_GAP)
        for k, picture in enumerate(pictures[i]):
            shown = Image.fromarray(picture).resize((width, height), resample)
            sheet.paste(shown, (left + k * pitch, top))
        text = "\n".join(texts[i])
        font = caption_font(caption, 12)
        ink.multiline_text((left, top + height + 2), text, fill="black", font=font, spacing=3)
    return sheet


def file_words(prompt: str) -> str:
    """A prompt as a part of a file's name: in letters that the system's names can have, and short
    in bytes too."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
    encoding = sys.getfilesystemencoding()
    return words.encode(encoding, "ignore")[:100].decode(encoding, "ignore")


def unbroken(text: str) -> str:
    """Without what begins a line or a paragraph, at which the layout of letters fails."""
    return " ".join(text.splitlines())


def caption_font(text: str, size: int):
    """A system font that has the letters of a text, if there is one (a PIL font)."""
    unusual = set()
    for letter in text:
        if ord(letter) > 0x24F and letter.isprintable():  # beyond Latin Extended-B
            unusual.add(letter)
    return _font(size, "".join(sorted(unusual)[:4]))


@lru_cache(maxsize=64)
def _font(size: int, unusual: str):
    from PIL import ImageFont

    names = ["DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"]
    if unusual:  # ask fontconfig, where there is one, for a font that has these letters
        codes = " ".join(f"{ord(letter):x}" for letter in unusual)
        command = ["fc-match", "-f", "%{file}", f"sans:charset={codes}"]
        try:
            found = subprocess.run(command, capture_output=True)
            names.insert(0, os.fsdecode(found.stdout))
        except OSError:
            pass
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
