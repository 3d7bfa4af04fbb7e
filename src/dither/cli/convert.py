"""`dither convert`: between file formats, exactly where the other format allows it."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli.quantize import types_table
from dither.cli.screen import Meter, copyable, out, plain, print_json, stop_on_error
from dither.units import format_bytes, format_seconds


def convert(
    model: Annotated[
        str, typer.Argument(metavar="IN", help="A checkpoint folder, a .gguf file, or a hub id (org/name).")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The file (.gguf) or the folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="One type for all quantized matrices, such as Q4_0, or a folder format. Default: exact types."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of unquantized tensors, and of those that no type holds exactly: bf16, f16, f32.")
    ] = "bf16",
    pre: Annotated[str | None, typer.Option(metavar="NAME", help="The pre-tokenizer, if it is not recognized.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: all cores.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Convert between safetensors and GGUF, exactly where possible."""
    with stop_on_error(as_json, resumable=True):
        from dither.quantizing import convert as job

        with Meter() as meter:
            found = job.convert(model, output, to, dtype=dtype, pre=pre, threads=threads, force=force, progress=meter)
        if as_json:
            print_json(found.to_json())
            return
        result = found.result
        out.print(types_table(result.plan))
        said = f"{found.exact} matrices carried over exactly"
        if found.rounded:
            said += f", {found.rounded} rounded (relative weight error {100 * result.relative_error:.3g} %)"
        size, time = format_bytes(result.bytes), format_seconds(result.seconds)
        out.print(f"[bold]{plain(result.path)}[/]: {size}, {time}. {said}.")
        out.print(f"Look at it:  {copyable('dither', 'inspect', result.path)}", soft_wrap=True)


COMMANDS = {110: convert}
