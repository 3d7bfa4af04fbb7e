"""How the command line speaks: results on stdout, everything else on stderr.

Names that come from a model file are printed as plain text: no markup, no control characters.
"""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dither.errors import DitherError
from dither.units import format_count

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def plain(text: object) -> str:
    """Text of unknown origin, safe to print: control characters replaced, markup escaped."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return escape(printable)


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout; NaN is refused, as JSON has none."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


class stop_on_error:  # noqa: N801 — reads as a statement: `with stop_on_error(as_json):`
    """Turns a DitherError into its message and exit code, Ctrl-C into 130 (and says if work can resume)."""

    def __init__(self, as_json: bool = False, resumable: bool = False) -> None:
        self.as_json, self.resumable = as_json, resumable

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DitherError):
            if self.as_json:
                print_json(
                    {"error": {"thing": error.thing, "reason": error.reason, "way_out": error.way_out}}
                )
            err.print(f"[bold red]error:[/] {plain(error)}")
            raise typer.Exit(error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            again = "; the same command continues where this stopped" if self.resumable else ""
            err.print(f"\ninterrupted{again}")
            raise typer.Exit(130)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(1)


class Meter:
    """`dither.progress.Progress` on a terminal: a bar with an ETA; in a log, a line every ten seconds."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._total, self._done = 0, 0
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
        self._total, self._done = total, done
        self._started = self._spoke = time.monotonic()
        if err.is_terminal and not self.quiet:
            self._bar = Progress(
                BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
                console=err, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, amount: int, what: str) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, description=plain(what))
        elif not self.quiet and time.monotonic() - self._spoke >= 10:
            self._spoke = time.monotonic()
            rate = amount and self._done / max(1e-9, self._spoke - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            err.print(
                f"{100 * self._done / self._total:.0f} % of {format_count(self._total)} weights, "
                f"about {left:.0f} s left"
            )
