"""`dither bench`: how fast files run on this machine, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, out, plain, print_json, print_notes, stop_on_error, table
from dither.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from dither.running.benchmark import Benchmark, Spread


def bench(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="GGUFs; they take turns.")],
    against: Annotated[str | None, typer.Option(metavar="FILE", help="Another GGUF: speeds as ratios to its.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    context: Annotated[int, typer.Option("-c", "--context", min=0, help="Tokens of context; 0 is up to 4096.")] = 0,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=1, help="Tokens to read.")] = 512,
    generate: Annotated[int, typer.Option("-n", "--generate", min=2, help="Tokens to write.")] = 64,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1, max=1000, help="Rounds that count.")] = 5,
    no_save: Annotated[bool, typer.Option("--no-save", help="Write no FILE.bench.json.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure speed, memory and energy of GGUFs on this machine.

    Speed is tokens per second, read and written, and the time to the first token.
    """
    with stop_on_error(as_json):
        from dither.running import bench as job

        with Meter(quiet=as_json) as meter:
            found = job.bench(
                files,
                against=against,
                threads=threads,
                context=context,
                prompt=prompt,
                generate=generate,
                repeats=repeats,
                save=not no_save,
                progress=meter,
            )
        if as_json:
            documents = [result.model_dump(mode="json") for result in found]
            print_json(documents[0] if len(documents) == 1 else documents)
            return
        show(found)
        if not no_save:
            more = " and so on" if len(found) > 1 else ""
            out.print(f"Kept as {plain(found[0].file)}.bench.json beside the file{more}.", soft_wrap=True)


def show(found: Sequence[Benchmark]) -> None:
    for result in found:
        print_notes(f"{result.file}: {note}" for note in result.notes)
    out.print(_table(found))
    first = found[0]
    several = f"the median of {first.repeats} rounds and their least and most"
    out.print(
        f"\nTokens per second, {'of one round' if first.repeats == 1 else several}; "
        f"{counted(first.prompt_tokens, 'token')} read, {first.generated_tokens} written, "
        f"{counted(first.threads, 'thread')} on {plain(first.cpu)}."
    )
    out.print(f"Energy: {plain(first.energy_note)}.")
    for result in found:
        if result.decode_ratio is not None and result.prefill_ratio is not None:
            out.print(
                f"{plain(result.file)} reads ×{_range(result.prefill_ratio, 2)} and writes "
                f"×{_range(result.decode_ratio, 2)} as fast as {plain(result.against)}."
            )
        out.print(_engine(result))


def _table(found: Sequence[Benchmark]) -> Table:
    headings = ["read t/s", "write t/s", "first token", "load", "memory"]
    energy = any(result.joules_per_token is not None for result in found)
    shown = table("file")
    for heading in [*headings, *(["J/token"] if energy else [])]:
        shown.add_column(heading, justify="right")  # may wrap: seven columns are wide
    for result in found:
        joules = "–" if result.joules_per_token is None else f"{result.joules_per_token:.3g}"
        shown.add_row(
            plain(result.file),
            _range(result.prefill_tokens_per_second),
            _range(result.decode_tokens_per_second),
            f"{1000 * result.time_to_first_token_seconds:.0f} ms",
            format_seconds(result.load_seconds),
            format_bytes(result.peak_memory_bytes),
            *([joules] if energy else []),
        )
    return shown


def _engine(result: Benchmark) -> str:
    """How much of llama.cpp's speed arrives here, by its own clock and by llama-bench's."""
    own = result.engine_decode_tokens_per_second
    share = result.decode_tokens_per_second / own if own else 1.0
    told = f"{plain(result.file)}: the engine's own clock says {own:.1f} t/s written, "
    told += f"of which {100 * share:.1f} % arrive here" if share <= 1 else "no more than arrived"
    beside = result.llama_bench_decode_tokens_per_second
    if beside is None:
        return f"{told}; {plain(result.llama_bench_note)}."
    ratio = result.decode_tokens_per_second / beside if beside else 0.0
    return f"{told}; llama-bench {beside:.1f} t/s, of which {100 * ratio:.1f} %."


def _range(spread: Spread, digits: int = 1) -> str:
    return f"{spread:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


COMMANDS = {150: bench}
