"""`dither compare`: one file beside another, or beside its original; with a limit, a gate for CI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.measure import Context, Data, Device, Tokens, print_measurements, short, table
from dither.cli.options import Json
from dither.cli.screen import Meter, out, print_json, print_notes, stop_on_error

if TYPE_CHECKING:
    from dither.measuring.comparison import Comparison

LIMIT_BROKEN = 3  # the exit code


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A measured file, its .measure.json, or the original of B.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The file in question, or its .measure.json.")],
    max_kld: Annotated[
        float | None, typer.Option(min=0.0, help="Exit with 3 where B's mean KL divergence is above.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure what has no measurement against this.")
    ] = None,
    data: Data = None,
    tokens: Tokens = None,
    context: Context = None,
    device: Device = "cpu",
    no_save: Annotated[bool, typer.Option("--no-save", help="Write no .measure.json.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two files, or a file with its original.

    The exit code is 3 where a limit is broken.
    """
    with stop_on_error(as_json):
        from dither.measuring import measure as job

        with Meter() as meter:
            found = job.compare(
                a,
                b,
                against=against,
                max_kld=max_kld,
                data=data,
                tokens=tokens,
                context=context,
                device=device,
                save=not no_save,
                progress=meter,
            )
        print_json(found.to_json()) if as_json else show(found)
        if not found.passed:
            raise typer.Exit(LIMIT_BROKEN)


def show(found: Comparison) -> None:
    print_notes(found.notes)
    if found.a is None:
        print_measurements([found.b])
    else:
        out.print(table([found.a, found.b], titles=("A", "B")))
        out.print()
        out.print(_verdict(found))
    if found.max_kld is not None:
        is_above = "is within" if found.passed else "[bold red]is above[/]"
        out.print(f"B's mean KL divergence, {short(found.b.kl_mean)}, {is_above} the limit of {found.max_kld:g}.")


def _verdict(found: Comparison) -> str:
    if found.verdict == "":
        return "Whether they differ cannot be told."
    if found.overlap is None:
        return "One sequence alone has no interval, so whether they differ cannot be told; more --tokens may."
    told = {
        "lower": "B is closer to the reference than A.",
        "higher": "A is closer to the reference than B.",
        "same": "This text does not tell which is closer to the reference; more --tokens may.",
    }[found.verdict]
    intervals = f"Their intervals {'overlap' if found.overlap else 'do not overlap'}"
    if found.difference is None:
        return f"{told} {intervals}."
    apart = found.difference
    ends = f" (95 %: {short(apart.both[0])} to {short(apart.both[1])})" if apart.both else ""
    return f"{told} {intervals}; sequence by sequence, B's KL less A's is {short(apart.value)}{ends}."


COMMANDS = {60: compare}
