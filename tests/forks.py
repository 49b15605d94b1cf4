"""Commands as real processes, without the seconds of importing: one process imports all, and each
command is a fork of it, with its own streams, signals, exit status and limits.

    python tests/forks.py                  # is what Forks starts, and talks to in lines of JSON
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 120  # the longest that a command of these tests may take


class Forks:
    """`with Forks() as forks: child = forks.start("train.py", "--steps", 2)`"""

    def __enter__(self) -> "Forks":
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | quiet,
        )
        self.ask({})  # until it has imported all
        return self

    def __exit__(self, *error) -> None:
        self.parent.stdin.close()
        self.parent.wait(timeout=SECONDS)

    def ask(self, request: dict) -> object:
        print(json.dumps(request), file=self.parent.stdin, flush=True)
        return json.loads(self.parent.stdout.readline())

    def start(self, *words, place: Path, typed: str = "", **fate) -> "Child":
        """A command with its flags, which runs in `place`, reads what is typed, and speaks into
        files there: from the moment at which a stop is one line.

        fate: what meets it, if anything. full=BYTES: no file of it may grow beyond, as on a full
        disk; weights_full=BYTES: from when it begins to write the weights to draw with.
        killed_at=[EVENT, PART, COUNT]: SIGKILL before its COUNT-th change of files (CHANGES) whose
        event begins with EVENT and whose path has PART in it.
        """
        number = len(list(place.glob("said-*")))
        said = place / f"said-{number}"
        errors = place / f"errors-{number}"
        heard = place / f"typed-{number}"
        heard.write_text(typed, "utf-8")
        said.touch()
        errors.touch()
        request = {
            "words": [str(word) for word in words],
            "files": [str(heard), str(said), str(errors)],
            "place": str(place),
            "fate": fate,
        }
        return Child(self, self.ask(request), said, errors)

    def run(self, *words, **options) -> "Child":
        child = self.start(*words, **options)
        child.wait()
        return child


class Child:
    """pid; status once it has ended, below zero for the signal that killed it."""

    def __init__(self, forks: Forks, pid: int, said: Path, errors: Path):
        self.forks = forks
        self.pid = pid
        self.files = (said, errors)
        self.status = None

    def send(self, number: int) -> None:
        assert self.status is None, f"it has ended, with {self.status}: {self.errors}"
        os.kill(self.pid, number)

    def ended(self, seconds: float = 0) -> bool:
        """Wait so long at most, and say whether it has ended."""
        if self.status is None:
            self.status = self.forks.ask({"wait": self.pid, "seconds": seconds})
        return self.status is not None

    def wait(self) -> int:
        if not self.ended(SECONDS):
            self.send(signal.SIGKILL)
            raise TimeoutError(f"{self.pid} went on for {SECONDS} s: {self.errors}")
        return self.status

    @property
    def said(self) -> str:
        return self.files[0].read_text("utf-8")

    @property
    def errors(self) -> str:
        return self.files[1].read_text("utf-8")


# -------------------------------------------------------------------------------------------------
# in the other process


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  what commands load late
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import evaluate
    import extras.bridges  # noqa: F401
    import sample
    import train

    living = set()
    mains = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main}
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "words" in request:
            here, there = os.pipe()
            answer = os.fork()
            if not answer:
                become(request, mains[request["words"][0]], there)
            os.close(there)
            os.read(here, 1)  # it listens to signals
            os.close(here)
            living.add(answer)
        elif "wait" in request:
            answer = status_of(request["wait"], request["seconds"])
            if answer is not None:
                living.remove(request["wait"])
        print(json.dumps(answer), file=replies, flush=True)
    for pid in living:  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def status_of(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def become(request: dict, main, ready: int) -> None:
    """What a shell does to start a command, and what its last lines do. Does not return."""
    import cli

    status = 1
    try:
        for stream, name in enumerate(request["files"]):
            os.dup2(os.open(name, os.O_RDWR), stream)
        os.chdir(request["place"])
        sys.argv = request["words"]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may have it ignored
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        meet(request["place"], **request["fate"])
        cli.start()
        os.close(ready)
        status = 0
        cli.one_line_errors(lambda: main(request["words"][1:]))
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


CHANGES = ("os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "open")


def meet(place: str, full=None, weights_full=None, killed_at=None) -> None:
    """The fate of a child: see Forks.start."""
    import resource

    from model import ImageExpert

    def fill(size: int) -> None:
        # SIGXFSZ, which would kill, is ignored by Python itself
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    if full is not None:
        fill(full)
    if weights_full is not None:
        save = ImageExpert._save_pretrained

        def fill_and_save(expert, folder) -> None:
            fill(weights_full)
            save(expert, folder)

        ImageExpert._save_pretrained = fill_and_save
    if killed_at:
        kind, part, count = killed_at
        seen = []

        def kill_at_the_last(event: str, args: tuple) -> None:
            if not event.startswith(kind) or event not in CHANGES:
                return
            if event == "open" and (not isinstance(args[1], str) or args[1][0] == "r"):
                return
            if part in str(args[0]):
                seen.append(event)
                if len(seen) == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_the_last)


if __name__ == "__main__":
    serve()
