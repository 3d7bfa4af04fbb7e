"""`dither measure`: what quantization cost, in numbers with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, copyable, out, plain, print_json, stop_on_error, table as grid
from dither.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from dither.measuring.schema import Measurement

Data = Annotated[
    str | None, typer.Option(metavar="FILE|self", help="Text, .jsonl, hf:DATASET; self lets the reference write it.")
]
Tokens = Annotated[int | None, typer.Option(min=2, help="Tokens of text to run; 9216.")]
Context = Annotated[int | None, typer.Option("-c", "--context", min=2, help="Tokens per sequence; 512.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")]


def measure(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Quantized files: GGUFs of any tool, or checkpoints.")
    ],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The original: a checkpoint, a GGUF, a hub id.")],
    data: Data = None,
    tokens: Tokens = None,
    context: Context = None,
    skip: Annotated[
        int | None, typer.Option(min=0, help="Positions not scored at the start of each sequence; default: half.")
    ] = None,
    device: Device = "cpu",
    no_save: Annotated[bool, typer.Option("--no-save", help="Write no FILE.measure.json.")] = False,
    replace_proof: Annotated[
        bool, typer.Option("--replace-proof", help="Put it into a file that carries a better measurement, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure what quantization cost, as KL divergence.

    Perplexity and lost top tokens are measured beside it.
    """
    with stop_on_error(as_json):
        from dither.measuring import measure as job
        from dither.measuring.schema import path_for

        with Meter() as meter:
            found = job.measure(
                files,
                against,
                data=data,
                tokens=tokens or job.TOKENS,
                context=context,
                skip=skip,
                device=device,
                save=not no_save,
                replace_proof=replace_proof,
                progress=meter,
            )
        if as_json:
            documents = [measurement.model_dump(mode="json") for measurement in found]
            print_json(documents[0] if len(documents) == 1 else documents)
            return
        print_measurements(found)
        kept = [] if no_save else [path for path in map(path_for, files) if path.exists()]
        if kept:
            out.print(f"Kept as {plain(kept[0])}{' and so on' if len(kept) > 1 else ''}.", soft_wrap=True)
        if len(found) == 2:
            out.print(f"Which is better:  {copyable('dither', 'compare', *files)}", soft_wrap=True)


def print_measurements(found: Sequence[Measurement]) -> None:
    out.print(table(found))
    first = found[0]
    out.print(
        f"\nKL, in nats per token, says how far the predictions are from {plain(first.reference)}'s: "
        "0 is no loss. 1 % of the tokens lie above p99; same top: how often both find the same token "
        f"likeliest; ppl: the perplexity, times the reference's {first.ppl_reference:.4g}."
    )
    out.print(
        f"Measured on {plain(first.data)}: {counted(first.tokens, 'token')} scored in "
        f"{counted(first.sequences, 'sequence')} of {first.context}, {format_seconds(first.seconds)}."
        + (" A thin proof: ask for more --tokens." if first.thin else "")
    )
    if len(found) == 1 and first.drift:
        least, most = (f"{100 * drift:.2g} %" for drift in (first.drift[0], first.drift[-1]))
        out.print(f"Hidden states drift by {least} in the first block, by {most} up to the last.")


def table(found: Sequence[Measurement], titles: Sequence[str] = ()) -> Table:
    """Rows named by type, or by file where types repeat; `titles` stand before the names."""
    repeated = max(Counter(measurement.type for measurement in found).values()) > 1
    headings = ("size", "bpw", "KL", "95 % interval", "p99", "same top", "ppl")
    shown = grid("file" if repeated else "type", numbers=headings)
    for index, measurement in enumerate(found):
        name = measurement.file if repeated or not measurement.type else measurement.type
        shown.add_row(
            plain(f"{titles[index]} {name}" if titles else name),
            format_bytes(measurement.bytes),
            f"{measurement.bpw:.2f}",
            short(measurement.kl_mean),
            between(measurement.kl_mean.low, measurement.kl_mean.high),
            short(measurement.kl_p99),
            f"{100 * measurement.same_top:.1f} %",
            f"×{measurement.ppl_ratio:.3f}",
        )
    return shown


def short(value: float) -> str:
    """Three digits that count.

    >>> short(0.0095419), short(9.42e-05), short(1.5), short(0.0), short(0.1)
    ('0.00954', '9.4e-05', '1.50', '0', '0.100')
    """
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 0.0005 else f"{value:#.3g}"


def between(low: float | None, high: float | None) -> str:
    """An interval in a table.

    >>> between(0.0095419, 0.0125), between(None, None)
    ('0.00954–0.0125', 'none')
    """
    return "none" if low is None or high is None else f"{short(low)}–{short(high)}"


COMMANDS = {50: measure}
