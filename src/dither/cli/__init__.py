"""The command line: one file per command, each a plain function; adding a command is adding a file.

A module lists its commands by their places in `dither --help`, `COMMANDS = {10: quantize}`, and in `HIDDEN`
those that the help passes over, by their names.  Files are found as `dither.system.discovery` finds them.

Heavy imports (numba, llama.cpp) happen inside the commands, so that `dither --help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dither._version import __version__
from dither.cli.program import Program
from dither.system.discovery import modules, room_path

__path__ = room_path(__path__, __name__)

app = typer.Typer(
    name="dither",
    cls=Program,
    help="Quantize large language models, prove what that cost, and run them.",
    epilog="Start with `dither demo`, then `dither quantize MODEL --to Q4_K_M`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around the help would cost a Markdown renderer at every start
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dither {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_FOUND = modules(__name__)
_PLACED = [pair for module in _FOUND for pair in getattr(module, "COMMANDS", {}).items()]
for _, _command in sorted(_PLACED, key=lambda pair: (pair[0], pair[1].__name__)):
    app.command()(_command)
for _name, _command in (pair for module in _FOUND for pair in getattr(module, "HIDDEN", {}).items()):
    app.command(_name, hidden=True)(_command)


def main() -> None:
    app()
