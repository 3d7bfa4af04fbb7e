"""`dither export`: puts a finished file where Ollama, LM Studio or the hub expects it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, out, plain, print_json, print_notes, stop_on_error
from dither.errors import UsageError
from dither.units import format_bytes

if TYPE_CHECKING:
    from dither.running.export import Exported


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF, or its first part.", show_default=False)],
    ollama: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a Modelfile and the file into this folder.")
    ] = None,
    lmstudio: Annotated[Path | None, typer.Option(metavar="DIR", help="Put it into LM Studio's models folder.")] = None,
    hf: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Show what would go to the hub.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --hf: send it.")] = False,
    private: Annotated[bool, typer.Option("--private", help="With --hf: make a new repository private.")] = False,
    shard: Annotated[str, typer.Option(metavar="SIZE", help="With --hf: the largest part.")] = "48GB",
    publisher: Annotated[str, typer.Option(help="With --lmstudio: the publisher's folder.")] = "dither",
    context: Annotated[
        int | None, typer.Option("-c", "--context", min=1, help="With --ollama: tokens; default: up to 8192.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a file to Ollama, LM Studio or the Hugging Face hub."""
    with stop_on_error(as_json):
        from dither.running import export as job

        wanted = {"ollama": ollama, "lmstudio": lmstudio, "hf": hf}
        named = [(to, place) for to, place in wanted.items() if place is not None]
        if len(named) != 1:
            raise UsageError("dither export", "needs one of --ollama, --lmstudio and --hf", "Name one.")
        if yes and hf is None:
            raise UsageError("--yes", "goes with --hf alone", "Leave it out.")
        with Meter(quiet=as_json) as meter:
            done = job.export(
                file,
                *named[0],
                publisher=publisher,
                context=context,
                upload=yes,
                private=private,
                shard=shard,
                progress=meter,
            )
        print_json(done.to_json()) if as_json else show(done)


def show(done: Exported) -> None:
    print_notes(done.notes)
    for name, size in done.files.items():
        out.print(f"{format_bytes(size):>10}  {plain(name)}", soft_wrap=True)
    did = {"hf": "sent to" if done.sent else "would go to"}.get(done.to, f"{done.how} in")
    out.print(f"{did} {plain(done.place)}", soft_wrap=True)
    out.print(plain(done.next), soft_wrap=True)


COMMANDS = {170: export}
