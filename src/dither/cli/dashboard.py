"""`dither dashboard`: a live page of all results, which starts jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dither.cli.screen import err, out, plain, print_json, stop_on_error


def dashboard(
    context: typer.Context,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUNS", help="Quantized files, or folders with such files. Default: this folder."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original model, if it is not beside the files.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; from other machines, a token is required.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: 8765, or the next free port. 0: any free port.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the browser.")] = False,
    state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder that keeps the jobs between two starts.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as one JSON document.")] = False,
) -> None:
    """Serve a live page of all results, and start jobs from it."""
    with stop_on_error(as_json):
        import threading
        import webbrowser

        from dither.cli.forms import forms
        from dither.dashboard.forms import Forms
        from dither.dashboard.serve import serve

        def ready(url: str) -> None:
            if as_json:
                print_json({"url": url})
            else:
                out.print(f"The dashboard is at [bold]{plain(url)}[/]; Ctrl-C ends it.", soft_wrap=True)
                out.file.flush()
            if not no_open:  # in the background: some browsers do not return until they are closed
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        jobs = serve(
            runs or [Path()],
            Forms(lambda: forms(context.find_root().command)),
            host=host,
            port=port,
            against=against,
            state=state,
            ready=ready,
        )
        if jobs:
            words = "1 job goes" if jobs == 1 else f"{jobs} jobs go"
            err.print(f"{words} on; the next `dither dashboard` shows them again.")


COMMANDS = {140: dashboard}
