"""The program around the commands: with `--json` every run prints one document, however it ends.

A command turns its own failures into their document (`screen.stop_on_error`).  What is left happens before a command
begins or where nobody expected it: a word that is missing, an option or a command that does not exist, Ctrl-C
while modules load, a fault of ours.  A program that reads our output must never have to guess from an empty
stdout, so these get a document too, of the same shape: `{"error": {"thing", "reason", "way_out"}}`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from dither.cli import screen

# typer brings a click of its own, or uses the one that is installed: its errors are found through what it exports.
_Refused: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_REPORT = "This is a fault of Dither: please report it with what stands on stderr."


class Program(TyperGroup):
    """All commands; typer makes one of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # outside a command's own handling: before its work began, or when that was done
            screen.err.print("\ninterrupted")
            raise typer.Exit(screen.INTERRUPTED) from None

    def main(self, args: Sequence[str] | None = None, *_: Any, standalone_mode: bool = True, **named: Any) -> Any:
        screen.begin()
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or not _wants_json(words):
            return super().main(args, standalone_mode=standalone_mode, **named)
        try:
            code = super().main(args, standalone_mode=False, **named)
        except _Refused as error:
            screen.print_failure(*_said(error))
            error.show()
            sys.exit(error.exit_code)
        except typer.Abort:
            code = screen.INTERRUPTED
        except Exception as error:  # a fault of ours: told, and raised on for its traceback
            screen.print_failure("dither", f"failed ({type(error).__name__}: {error})", _REPORT)
            raise
        if code == screen.INTERRUPTED:  # before the command's own handling began
            screen.print_failure("the run", "was interrupted")
        sys.exit(code or 0)


def _wants_json(words: Sequence[str]) -> bool:
    """
    >>> _wants_json(["inspect", "--json"]), _wants_json(["inspect", "--", "--json"])
    (True, False)
    """
    words = list(words)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _said(error: Any) -> tuple[str, str, str]:
    """What the parser of arguments refuses, as thing, reason and way out."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dither"
    reason = error.format_message().rstrip(".")
    return command, reason[:1].lower() + reason[1:], f"See {command} --help."
