"""`dither fit`: whether a model fits this machine, how fast it runs, and which type to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import out, plain, print_json, print_notes, stop_on_error, table as grid
from dither.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

    from dither.capacity.result import Candidate, Fit

NOTHING_FITS = 3
_COLORS = {"GPU": "green", "RAM": "green", "part in RAM": "yellow", "from disk": "yellow", "no": "red"}
_MARK = {"measured": "", "literature": "*", "told": ""}


def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|FILE", help="A checkpoint, a .gguf file, or a hub id (org/name).")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="RAM to assume, such as 16GiB. Default: this machine's.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="GPU memory to assume, such as 8GiB; 0: no GPU.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("-c", "--context", help="Tokens of context for each conversation. Default: 8192.")
    ] = None,
    kv: Annotated[str, typer.Option(metavar="TYPE", help="Type of the KV cache: f16, q8_0, q4_0.")] = "f16",
    slots: Annotated[int, typer.Option(help="Conversations at once.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether a model fits this machine, and which type to take.

    Only headers are read, also of a model on the hub.  Exits with 3 when nothing fits.
    """
    with stop_on_error(as_json):
        from dither.capacity.fit import fit as judge

        found = judge(model, memory=memory, vram=vram, context=context, kv=kv, slots=slots)
        print_json(found.to_json()) if as_json else show(found)
    if not found.fits:
        raise typer.Exit(NOTHING_FITS)


def show(found: Fit) -> None:
    out.print(f"[bold]{plain(found.model)}[/], {plain(found.arch)}, {format_count(found.parameters)} weights")
    for line in machine_lines(found):
        out.print(plain(line))
    slots = f", {found.slots} conversations at once" if found.slots > 1 else ""
    out.print(plain(f"{found.context} tokens of context{slots}, cache in {found.kv}"), end="\n\n")
    out.print(table(found))
    out.print(f"\n[{'bold' if found.fits else 'bold red'}]{plain(found.recommendation)}[/]")
    for command in found.commands:
        out.print(f"  {plain(command)}", soft_wrap=True)
    out.print()
    if found.ruled_out and found.fits:
        reasons = grid("ruled out", "because")
        for what, why in found.ruled_out:
            reasons.add_row(plain(what), plain(why))
        out.print(reasons)
        out.print()
    for engine in found.engines:  # by purpose; what does not suit this machine says why
        mark = "[green]✓[/]" if engine.suits else "[dim]·[/]"
        out.print(f"{mark} to {engine.purpose}: {engine.format} with {engine.engine}: {engine.reason}")
    out.print()
    out.print(legend(found), style="dim")
    print_notes(found.notes, out)


def machine_lines(found: Fit) -> list[str]:
    machine, own = found.machine, found.machine.memory
    speed = f", read at {own.bandwidth / 1e9:.0f} GB/s ({own.how_bandwidth})" if own.bandwidth else ""
    lines = [f"{format_bytes(own.bytes)} {own.name} ({own.how_bytes}){speed}, {machine.cores} cores"]
    for gpu in machine.gpus:
        speed = f", {gpu.bandwidth / 1e9:.0f} GB/s ({gpu.how_bandwidth})" if gpu.bandwidth else ""
        lines.append(f"{gpu.name}, {format_bytes(gpu.bytes)} ({gpu.how_bytes}){speed}")
    if not machine.gpus:
        lines.append("no GPU")
    return lines


def shown_candidates(found: Fit) -> list[Candidate]:
    """The ladder a person chooses on, and whatever else matters here; --json has all."""
    from dither.capacity.recommendation import LADDER

    return [c for c in found.candidates if c.file or c.type in (*LADDER, "BF16", "F16")]


def table(found: Fit) -> Table:
    """Nine columns in eighty characters: one space between them has to do."""
    shown = grid("type", padding=(0, 1, 0, 0))
    for heading in ("weights", "cache", "comp.", "over.", "total", "runs", "tok/s", "KL"):
        shown.add_column(heading, justify="left" if heading == "runs" else "right", no_wrap=True)
    for candidate in shown_candidates(found):
        memory, word = candidate.memory, candidate.verdict.word
        chosen = candidate.type == found.chosen
        parts = (memory.weights, memory.cache, memory.compute, memory.overhead, memory.total)
        shown.add_row(
            ("→ " if chosen else "  ") + plain(candidate.type),
            *map(compact, parts),
            f"[{_COLORS[word]}]{word}[/]",
            _speed(candidate),
            _kl(candidate),
            style="bold" if chosen else None,
        )
    return shown


def compact(count: float) -> str:
    """
    >>> compact(4.58 * 2**30), compact(16 * 2**20), compact(300)
    ('4.58G', '16.0M', '0.0M')
    """
    size, unit = (count / 2**30, "G") if count >= 2**30 else (count / 2**20, "M")
    return f"{size:.{2 if unit == 'G' and size < 10 else 1 if size < 100 else 0}f}{unit}"


def _speed(candidate: Candidate) -> str:
    speed = candidate.verdict.speed
    if speed is None:
        return "?" if candidate.fits else "–"
    return f"{_number(speed.likely)} ({_number(speed.low)}–{_number(speed.high)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _kl(candidate: Candidate) -> str:
    quality = candidate.quality
    return f"{quality.kl:.2g}{_MARK[quality.tag]}" if quality else "?"


def legend(found: Fit) -> str:
    lines = [
        "G and M are GiB and MiB. Weights are counted in the headers; cache, compute, overhead and "
        "tokens/s are estimated, the last as a range in brackets.",
        "KL divergence from the original, nats per token: measured on this model, * published for Llama 3 8B "
        "(llama.cpp's scoreboard), ? not known.",
    ]
    unknown = {c.verdict.why_no_speed for c in shown_candidates(found) if c.fits and not c.verdict.speed}
    lines += [f"No tokens/s: {reason}." for reason in sorted(unknown)]
    if any(c.notes and "cannot be" in c.notes[0] for c in shown_candidates(found)):
        lines.append("Some tensors get another type where rows do not fit; see --json or `dither quantize --dry-run`.")
    if found.bytes_read is not None:
        lines.append(f"Read from the network: {format_bytes(found.bytes_read)} of headers.")
    return " ".join(lines)


COMMANDS = {80: fit}
