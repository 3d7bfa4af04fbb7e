"""The command line: one file per command, each a plain function; this file names them.

Heavy imports (numba, llama.cpp) happen inside the commands, so that `dither --help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dither._version import __version__
from dither.cli.answers import answers
from dither.cli.bench import bench
from dither.cli.calibrate import calibrate
from dither.cli.chat import chat
from dither.cli.compare import compare
from dither.cli.convert import convert
from dither.cli.dashboard import dashboard
from dither.cli.demo import demo
from dither.cli.doctor import doctor
from dither.cli.export import export
from dither.cli.fit import fit
from dither.cli.inspect import inspect, types
from dither.cli.measure import measure
from dither.cli.plan import ladder, plan
from dither.cli.quantize import quantize
from dither.cli.report import report
from dither.cli.serve import serve
from dither.cli.tasks import tasks

app = typer.Typer(
    name="dither",
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


app.command()(quantize)
app.command("quantise", hidden=True)(quantize)
app.command()(calibrate)
app.command()(plan)
app.command()(ladder)
app.command()(measure)
app.command()(compare)
app.command()(answers)
app.command()(fit)
app.command()(inspect)
app.command()(types)
app.command()(convert)
app.command()(chat)
app.command()(report)
app.command()(dashboard)
app.command()(bench)
app.command()(tasks)
app.command()(export)
app.command()(serve)
app.command()(demo)
app.command()(doctor)


def main() -> None:
    app()
