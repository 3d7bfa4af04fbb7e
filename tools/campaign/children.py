"""A command of `dither` as a child that can be killed at a chosen moment.

Most children are forked from a parent that has everything imported and its kernels loaded, so that a run takes what
the work takes and not the seconds of a start; the child then runs the command line's own `main` in a session of
its own.  Nothing that computes has run in the parent, so that a child finds no thread pool of another process.
`Words.fresh` starts a process as a shell does.

Moments are of two kinds.  By the clock: so many seconds after the start.  By the step: just before the n-th change
of names on the disk (opening for writing, renaming, removing, making a folder, claiming space), as Python's audit
hooks tell them, which is where a file gets, changes or loses its name.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from frame import ROOT

STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_STEP_FILE = ".steps"
HUNG = -1000  # no exit code: not at its end when its time was over
LOGS = Path(tempfile.mkdtemp(prefix="campaign-logs-"))  # on no disk that is filled
atexit.register(shutil.rmtree, LOGS, ignore_errors=True)


@dataclass(frozen=True)
class Moment:
    """When, and by which signal; neither seconds nor a step: never."""

    seconds: float | None = None
    step: int | None = None
    signal: int = signal.SIGKILL
    fresh: bool = False  # a process of its own instead of a fork

    def __str__(self) -> str:
        at = f"step {self.step}" if self.step is not None else f"{self.seconds or 0:.3f} s"
        return f"{signal.Signals(self.signal).name} at {at}{' of a fresh process' if self.fresh else ''}"


@dataclass(frozen=True)
class Ended:
    """`code` is negative where a signal ended it; `steps` are counted where a fork came to its end."""

    code: int
    seconds: float
    said: str
    steps: int = 0

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said


def warm() -> None:
    """Imports what commands import, and loads the kernels; to be called once, before the first fork."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore Ctrl-C
    # A child that is somebody else may not read the library any more, nor keep kernels.
    import encodings.cp437
    import encodings.idna  # noqa: F401

    import sentencepiece  # noqa: F401
    import tomllib  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import dither.cli
    import dither.measuring.calibrate
    import dither.measuring.live
    import dither.planning.sensitivity  # noqa: F401
    from dither.codecs import all_codecs
    from dither.quantizing.tensor_pass import prepare

    for path in (ROOT / "src" / "dither").rglob("*.py"):
        if "@njit" in path.read_text():
            import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    prepare([name for name in all_codecs() if not name.startswith(("IQ1", "IQ2", "IQ3"))], with_importance=True)


@dataclass(frozen=True)
class Around:
    """What happens to a forked child from outside: `first` in it before it begins, `meanwhile` in the parent at
    the moment's second, instead of a signal."""

    first: Callable[[], None] | None = None
    meanwhile: Callable[[], object] | None = None


def run(
    words: Sequence[str], folder: Path, moment: Moment = Moment(), around: Around = Around(), limit: float = 300
) -> Ended:
    """`dither WORDS` in `folder`, ended at `moment` with its whole process group, or by itself."""
    log = LOGS / f"{folder.name}.log"
    log.write_bytes(b"")  # whoever is killed at once has said nothing
    started = time.monotonic()
    number = _fresh(words, folder, log) if moment.fresh else _fork(words, folder, log, moment, around, limit)
    code = _waited(number, started, moment, around, limit)
    said = log.read_text(errors="replace") + ("" if code != HUNG else f"\nnot at its end after {limit:.0f} s")
    steps = LOGS / f"{folder.name}{_STEP_FILE}"
    count = int(steps.read_text() or 0) if steps.exists() else 0
    return Ended(code, time.monotonic() - started, said, count)


def _fresh(words: Sequence[str], folder: Path, log: Path) -> int:
    with log.open("wb") as output:
        command = [sys.executable, "-m", "dither", *words]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    process.returncode = 0  # it is waited for by its number
    return process.pid


def _fork(words: Sequence[str], folder: Path, log: Path, moment: Moment, around: Around, limit: float) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if around.first is not None:
            around.first()
        faulthandler.dump_traceback_later(0.9 * limit, file=2)  # where it hangs is what one wants to know
        steps = _watch_steps(moment)
        code = _main(words)
        if around == Around():
            (LOGS / f"{folder.name}{_STEP_FILE}").write_text(str(steps[0]))
    finally:
        os._exit(code)


def _main(words: Sequence[str]) -> int:
    import traceback

    from dither.__main__ import main

    try:
        main(list(words))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _watch_steps(moment: Moment) -> list[int]:
    """Counts steps; where the moment is one of them, that is this process's last."""
    count, own = [0], os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in STEPS) and os.getpid() == own:
            count[0] += 1
            if count[0] == moment.step:
                os.killpg(0, moment.signal)

    sys.addaudithook(hook)
    return count


def _waited(number: int, started: float, moment: Moment, around: Around, limit: float) -> int:
    """The exit code, as `subprocess` gives it; HUNG where it had to be ended."""
    sent = moment.seconds is None
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic() - started
        if not sent and moment.seconds is not None and now >= moment.seconds:
            sent = True
            around.meanwhile() if around.meanwhile else _send(number, moment.signal)
        if now > limit:
            _send(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return HUNG
        time.sleep(0.001)


def _send(number: int, which: int) -> None:
    try:
        os.killpg(number, which)
    except ProcessLookupError:  # it ended, or has no session of its own yet
        os.kill(number, which)
