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
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from dither.cli.reported import Reported
from dither.errors import DitherError
from dither.system.memory import is_refusal
from dither.system.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
err.soft_wrap = not err.is_terminal  # one message, one line of a log

INTERRUPTED, _TERMINATED = 130, 143  # 128 + the signal's number, as shells have it
CONTINUES = "what is finished is kept, and the same command continues from there"


def plain(text: object) -> str:
    """Text of unknown origin, safe to print: control characters replaced, markup escaped."""
    return escape(printable(text))


def table(*words: str, numbers: Iterable[str] = (), **options: Any) -> Table:
    """A table without lines, its headings bold: columns of words, then columns of numbers, aligned right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", **options)
    for heading in words:
        made.add_column(heading, overflow="fold")
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


class _Printed:
    """Whether this run has printed its one document."""

    yet = False


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout; NaN is refused, as JSON has none."""
    text = json.dumps(document, indent=2, allow_nan=False, default=str)
    _Printed.yet = True
    out.file.write(text + "\n")
    out.file.flush()


def print_failure(thing: str, reason: str, way_out: str = "") -> None:
    """The document of a run that failed, unless it has printed one."""
    if not _Printed.yet:
        print_json({"error": {"thing": thing, "reason": reason, "way_out": way_out}})


def begin() -> None:
    """A run begins, perhaps not the first of this process: it has printed nothing."""
    _Printed.yet = False


def copyable(*words: object) -> str:
    """A command of words and file names, no options, as a shell takes it, whatever is in the names.

    >>> copyable("dither", "chat", "my model.gguf"), copyable("dither", "chat", "-x.gguf")
    ("dither chat 'my model.gguf'", 'dither chat ./-x.gguf')
    """
    import shlex

    first, *rest = map(str, words)
    return plain(shlex.join([first, *(f"./{word}" if word.startswith("-") else word for word in rest)]))


@contextlib.contextmanager
def stop_on_error(as_json: bool = False, resumable: bool | str = False) -> Iterator[None]:
    """Turns what stops a command into its message, its JSON document and its exit code.

    A DitherError has its own code; Ctrl-C is 130 and SIGTERM 143, both after everything below has
    put its work in order, and with a word on whether it can be resumed, or with other words on what is left.
    """
    begin()
    before: Any = None
    with contextlib.suppress(ValueError):  # only the main thread may
        before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except BrokenPipeError:
        _let_go_of_stdout()
        raise typer.Exit(1) from None
    except DitherError as error:
        raise _told(error, as_json) from None
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        way_out = out_of_memory(resumable is True)
        refused = DitherError("memory", f"ran out ({error or 'no more could be had'})", way_out)
        raise _told(refused, as_json) from None
    except OSError as error:  # refused outside the work itself: a full disk behind stdout, most often
        name = error.filename if error.filename is not None else "standard output"
        if error.filename is None:
            _let_go_of_stdout()
        elif as_json:
            print_failure(str(name), str(error.strerror or error))
        err.print(f"[bold red]error:[/] {plain(DitherError(str(name), str(error.strerror or error)))}")
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != _TERMINATED:
            raise
        how, code = ("terminated", _TERMINATED) if isinstance(error, SystemExit) else ("interrupted", INTERRUPTED)
        way_out = resumable if isinstance(resumable, str) else CONTINUES if resumable else ""
        if as_json:
            print_failure("the run", f"was {how}", way_out)
        err.print(f"\n{how}" + (f"; {way_out}" if way_out else ""))
        raise typer.Exit(code) from None
    finally:
        if before is not None:  # a program that calls the command gets its own handler back
            signal.signal(signal.SIGTERM, before)


def _told(error: DitherError, as_json: bool) -> typer.Exit:
    """The exit of a command that an error stopped, once that is said."""
    if as_json:
        print_failure(error.thing, error.reason, error.way_out)
    err.print(f"[bold red]error:[/] {plain(error)}")
    return typer.Exit(error.exit_code)


def out_of_memory(resumable: bool) -> str:
    way_out = "Close other programs, or take less at a time: --threads 1"
    if not resumable:
        return f"{way_out}."
    way_out = f"{way_out}, or --max-memory SIZE where the command has it."
    return f"{way_out} {CONTINUES.capitalize()}."


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _let_go_of_stdout() -> None:
    """What is still buffered can go nowhere; Python would try once more on leaving, and say so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


def print_notes(notes: Iterable[str], console: Console = err) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {plain(note)}")


class Meter:
    """`dither.progress.Progress` on a terminal: a bar with an ETA; in a log, a line every ten seconds.

    A watching process reads the same from a file (`dither.cli.reported`).
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
            print_notes([text])

    def start(self, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._started = self._spoke = time.monotonic()
        self._reported.tell(done, total, "", None)
        if self._bar is not None:  # one piece of work after another: writing text, then running it
            self._bar.stop()
        if err.is_terminal and not self.quiet:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=err, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, amount: int, what: str) -> None:
        self._done += amount
        self._reported.tell(self._done, self._total, what, self._left())
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, description=plain(what))
        elif not self.quiet and time.monotonic() - self._spoke >= 10:
            self._spoke = time.monotonic()
            left = self._left()
            rest = "" if left is None else f", about {left:.0f} s left"
            err.print(f"{100 * self._done / max(1, self._total):.0f} %{rest} ({plain(what)})")

    def _left(self) -> float | None:
        """Seconds, if the rest goes as fast as what this run has done."""
        done, rest = self._done - self._before, max(0, self._total - self._done)
        return rest * (time.monotonic() - self._started) / done if done > 0 else None
