"""`dither report`: what is known about some files, as one page to keep or send, and as a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, copyable, out, plain, print_json, stop_on_error
from dither.units import counted, format_bytes

if TYPE_CHECKING:
    from dither.reporting.report import Report


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUNS", help="Quantized files, folders with such files, or measurements (.measure.json)."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a model card, such as README.md.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original model. Default: looked for beside the files.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that Dither did not write.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a report on quantized files, as a page and a model card.

    The page is one HTML file that opens offline.
    """
    with stop_on_error(as_json):
        from dither.reporting import report as job

        with Meter() as meter:
            found = job.report(runs, output, card=card, against=against, title=title, force=force, progress=meter)
        print_json(found.to_json()) if as_json else show(found, runs)


def show(found: Report, folders: list[str]) -> None:
    from dither.reporting.choice import told_apart
    from dither.reporting.frontier import points, sentence

    given, count = points(found.document.runs), len(found.document.runs)
    for point in (point for point in given if point["pareto"]):
        said = sentence(found.document.runs, point["bytes"])
        out.print(plain(f"{said} {told_apart(given, point)}".rstrip()), soft_wrap=True)
    if not given:
        out.print("No file is measured yet, so what was lost is unknown: dither measure FILE --against MODEL")
    size = f"{counted(count, 'file')}, {format_bytes(found.bytes)}"
    out.print(f"[bold]{plain(found.path)}[/]: {size}; opens in a browser, offline.", soft_wrap=True)
    if found.card is not None:
        with_picture = f", with {plain(found.picture)}" if found.picture else ""
        out.print(f"[bold]{plain(found.card)}[/]: the model card{with_picture}.", soft_wrap=True)
    out.print(f"Look at it live:  {copyable('dither', 'dashboard', *folders)}", soft_wrap=True)


COMMANDS = {130: report}
