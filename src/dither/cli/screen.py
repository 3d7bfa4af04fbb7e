"""How the command line speaks: results on stdout, everything else on stderr.

Names that come from a model file are printed as plain text: no markup, no control characters.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from dither.cli.reported import Reported
from dither.errors import DitherError
from dither.system.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
err.soft_wrap = not err.is_terminal  # one message, one line of a log

_INTERRUPTED, _TERMINATED = 130, 143  # 128 + the signal's number, as shells have it


def plain(text: object) -> str:
    """Text of unknown origin, safe to print: control characters replaced, markup escaped."""
    return escape(printable(text))


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout; NaN is refused, as JSON has none."""
    out.file.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")
    out.file.flush()


def copyable(*words: object) -> str:
    """A command of words and file names, no options, as a shell takes it, whatever is in the names.

    >>> copyable("dither", "chat", "my model.gguf"), copyable("dither", "chat", "-x.gguf")
    ("dither chat 'my model.gguf'", 'dither chat ./-x.gguf')
    """
    import shlex

    first, *rest = map(str, words)
    return plain(shlex.join([first, *(f"./{word}" if word.startswith("-") else word for word in rest)]))


class stop_on_error:  # noqa: N801 — reads as a statement: `with stop_on_error(as_json):`
    """Turns what stops a command into its message, its JSON document and its exit code.

    A DitherError has its own code; Ctrl-C is 130 and SIGTERM 143, both after everything below has
    put its work in order, and with a word on whether it can be resumed.
    """

    def __init__(self, as_json: bool = False, resumable: bool = False) -> None:
        self.as_json, self.resumable = as_json, resumable

    def __enter__(self) -> None:
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGTERM, _terminate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BrokenPipeError):
            _let_go_of_stdout()
            raise typer.Exit(1)
        if isinstance(error, DitherError):
            self._tell(error)
            raise typer.Exit(error.exit_code)
        if isinstance(error, OSError):
            _tell_of_system(error)
            raise typer.Exit(1)
        terminated = isinstance(error, SystemExit) and error.code == _TERMINATED
        if terminated or isinstance(error, KeyboardInterrupt):
            self._tell_interrupted("terminated" if terminated else "interrupted")
            raise typer.Exit(_TERMINATED if terminated else _INTERRUPTED)

    def _tell(self, error: DitherError) -> None:
        if self.as_json:
            print_json({"error": {"thing": error.thing, "reason": error.reason, "way_out": error.way_out}})
        err.print(f"[bold red]error:[/] {plain(error)}")

    def _tell_interrupted(self, how: str) -> None:
        way_out = "the same command continues where this stopped" if self.resumable else ""
        if self.as_json:
            print_json({"error": {"thing": "the run", "reason": f"was {how}", "way_out": way_out}})
        err.print(f"\n{how}" + (f"; {way_out}" if way_out else ""))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _tell_of_system(error: OSError) -> None:
    """What the system refused outside the work itself: a full disk behind stdout, most often."""
    _let_go_of_stdout()
    name = error.filename if error.filename is not None else "standard output"
    err.print(f"[bold red]error:[/] {plain(DitherError(str(name), str(error.strerror or error)))}")


def _let_go_of_stdout() -> None:
    """What is still buffered can go nowhere; Python would try once more on leaving, and say so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


class Meter:
    """`dither.progress.Progress` on a terminal: a bar with an ETA; in a log, a line every ten seconds.

    Who looks on from another process reads the same from a file (`dither.cli.reported`).
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._reported = Reported()
        self._total, self._done, self._before = 0, 0, 0
        self._started = self._spoke = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        if not self.quiet:
            err.print(f"[yellow]note:[/] {plain(text)}")

    def start(self, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._started = self._spoke = time.monotonic()
        self._reported.tell(done, total, "", None)
        if self._bar is not None:  # one piece of work after another: writing text, then running it
            self._bar.stop()
        if err.is_terminal and not self.quiet:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=err,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, amount: int, what: str) -> None:
        self._done += amount
        self._reported.tell(self._done, self._total, what, self._left())
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, description=plain(what))
        elif not self.quiet and time.monotonic() - self._spoke >= 10:
            self._spoke = time.monotonic()
            share = f"{100 * self._done / max(1, self._total):.0f} %"
            left = self._left()
            if left is not None:
                share += f", about {left:.0f} s left"
            err.print(f"{share} ({plain(what)})")

    def _left(self) -> float | None:
        """Seconds, if the rest goes as fast as what this run has done."""
        done = self._done - self._before
        if done <= 0:
            return None
        return max(0, self._total - self._done) * (time.monotonic() - self._started) / done
