"""`dither serve`: models over HTTP, in OpenAI's form.

Where it listens is said on stdout, as a line or as one JSON document, once it does; then it runs until
Ctrl-C or SIGTERM, lets what runs finish, and exits with 0.  A second signal ends it at once.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.options import spread
from dither.cli.screen import err, out, plain, print_json, print_notes, stop_on_error
from dither.errors import UsageError
from dither.units import format_bytes

if TYPE_CHECKING:
    from dither.serving.server import Server

_SECOND_SIGNAL = 130


@dataclass(frozen=True)
class Address:
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8080


@dataclass(frozen=True)
class Conversations:
    context: Annotated[int | None, typer.Option("-c", "--context", help="Tokens each conversation may have; 8192.")] = (
        None
    )
    slots: Annotated[int | None, typer.Option(help="Conversations at once; default: up to 4, as memory allows.")] = None
    kv: Annotated[str, typer.Option(metavar="TYPE", help="The cache's type: f16, q8_0, q4_0.")] = "f16"


@dataclass(frozen=True)
class Ours:
    """What servers of other programs have options of their own for."""

    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None
    gpu_layers: Annotated[int, typer.Option(min=-1, help="Layers on the GPU; -1: as many as fit.")] = -1
    grammars: Annotated[bool, typer.Option("--grammars", help="Take llama.cpp's grammars from people you trust.")] = (
        False
    )


@spread
def serve(
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="GGUFs, or folders of checkpoints.", show_default=False)
    ],
    address: Address,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line; requests need one.")
    ] = None,
    conversations: Conversations,
    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A LoRA adapter as GGUF.")] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="auto, llamacpp, transformers or vllm.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What loaded models may take together: 16GiB.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait before others get 429.")] = 128,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    ours: Ours,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON document.")] = False,
) -> None:
    """Serve models over HTTP, to clients that speak OpenAI's API."""
    with stop_on_error(as_json):
        options: dict[str, Any] = {
            **vars(address),
            **vars(conversations),
            "api_keys": _keys(api_key_file),
            "loras": lora or (),
            "insecure": insecure,
        }
        if engine == "vllm":
            _become_vllm(files, options, as_json)
        from dither.serving.server import serve as start

        with err.status("loading"):
            server = start(files, engine=engine, memory=memory, queue=queue, **vars(ours), **options)
        _announce(server, as_json)
        _run(server)


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    from dither.serving.access import read_keys

    keys, warning = read_keys(path)
    if warning:
        err.print(f"[yellow]warning:[/] {plain(warning)}")
    return keys


def _become_vllm(files: list[Path], options: dict[str, Any], as_json: bool) -> None:
    """Does not return: the process becomes vLLM's server."""
    from dither.capacity.machine import graphics_cards
    from dither.engines.vllm import plan, replace_process
    from dither.serving.access import Access

    if len(files) != 1:
        raise UsageError("--engine vllm", "serves one model", "Start one server for each.")
    Access(options["api_keys"], options["host"], options.pop("insecure"))
    launch = plan(files[0], gpus=len(graphics_cards()) or 1, **options)
    if as_json:
        print_json(launch.to_json())
    print_notes(launch.notes)
    err.print(plain(launch.shown()))
    replace_process(launch)


def _announce(server: Server, as_json: bool) -> None:
    if server.access.open_to_all:
        err.print("[yellow]warning:[/] everybody on the network may use these models: there is no key")
    for model in server.models:
        print_notes(model.notes)
    if as_json:
        print_json(document(server))
        return
    out.print(f"serving at [bold]{plain(server.url)}[/]", soft_wrap=True)
    for model in server.models:
        slots = f"{model.slots} × {model.context} tokens"
        out.print(f"  {plain(model.name)}: {format_bytes(model.need)} predicted, {slots}", soft_wrap=True)
    out.print(f"  at most {format_bytes(server.budget)} loaded at once; Ctrl-C stops", soft_wrap=True)
    out.file.flush()


def document(server: Server) -> dict[str, Any]:
    """What `--json` prints once the server listens; bytes are predictions."""
    return {
        "url": server.url,
        "memory_budget_bytes": server.budget,
        "models": [
            {
                "name": model.name,
                "path": str(model.path),
                "engine": model.engine,
                "aliases": [model.title] if model.title else [],
                "context": model.context,
                "slots": model.slots,
                "memory_bytes": model.need,
                "tags": {"memory_bytes": "estimated"},
            }
            for model in server.models
        ],
    }


def _run(server: Server) -> None:
    """Until a signal, then until the answers under way are done."""
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise SystemExit(_SECOND_SIGNAL)
        stopping.set()
        server.drain()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not server.wait(0.5):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    server.close()


COMMANDS = {180: serve}
