"""`dither calibrate`: text goes through a model, what its layers see becomes a folder of evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.options import Json, ModelName, Threads, spread
from dither.cli.screen import Meter, copyable, out, plain, print_json, stop_on_error
from dither.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from dither.measuring.calibrate import Calibration


@dataclass(frozen=True)
class CalibrationOptions:
    """What to learn, and from which text; their names are those of Python's keywords."""

    data: Annotated[
        str, typer.Option(metavar="TEXT", help="A text file, JSON lines, hf:DATASET, or self: the model writes.")
    ] = "self"
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens to run.")] = 2**15
    context: Annotated[
        int | None, typer.Option("-c", "--context", min=2, help="Tokens per sequence: 512, or the model's.")
    ] = None
    hessians: Annotated[
        bool, typer.Option("--hessians/--no-hessians", help="Keep E[x xᵀ], which gptq needs, or only E[x²].")
    ] = True
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also walk back: better files, three times the time.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="For the text that the model writes.")] = 0
    device: Annotated[str, typer.Option(help="Where the blocks run: cpu, cuda, …")] = "cpu"
    threads: Threads = None


@spread
def calibrate(
    *,
    model: ModelName,
    learning: CalibrationOptions,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where the evidence goes.")] = Path(
        "evidence"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace existing evidence.")] = False,
    as_json: Json = False,
) -> None:
    """Learn from text which weights matter."""
    with stop_on_error(as_json, resumable=True):
        from dither.measuring import calibrate as job

        with Meter() as meter:
            result = job.calibrate(model, out=output, force=force, progress=meter, **vars(learning))
        print_json(result.to_json()) if as_json else print_result(result, model)


def print_result(result: Calibration, model: str) -> None:
    kept = "mean squares and Hessians" if result.hessians else "mean squares"
    kept = "mean squares, Hessians and output Hessians" if result.gradients else kept
    out.print(
        f"[bold]{plain(result.path)}[/]: {format_bytes(result.bytes)}, {kept} of the inputs of "
        f"{result.tensors} matrices in {result.blocks} blocks"
    )
    out.print(
        f"Learnt from {result.tokens:,} tokens in {result.sequences} sequences of {result.context}: "
        f"{plain(result.data)}; {format_seconds(result.seconds)}"
    )
    if result.few:
        experts = sum(map(len, result.few.values()))
        out.print(f"{experts} experts in {len(result.few)} layers saw few tokens; more text would reach them.")
    words = ["dither", "quantize", model, "--to", "Q4_K_M", "--evidence", result.path]
    out.print(f"Use it:  {copyable_command(words)}", soft_wrap=True)


def copyable_command(words: list[str]) -> str:
    """`copyable` for a command with options, whose names are ours and need no quotes."""
    first, command, model, *options, folder = words
    return " ".join([copyable(first, command, model), *options, copyable(folder)])


COMMANDS = {20: calibrate}
