"""`dither demo`: the main jobs on the model that ships with Dither: making, measuring, showing, running.

Every row of the table is measured here and now: the file is written, decoded again for its error,
loaded into llama.cpp and made to write a line.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.request import Request, urlopen

import typer

from dither.cli.screen import Meter, copyable, err, out, plain, print_json, stop_on_error, table
from dither.system.files import make_folder
from dither.units import format_bytes, format_count, format_seconds

LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
PROMPT = "The old man looked at the sea and"
SERVED = "Q4_K_M"
MEASURED = 1024  # tokens: enough to tell these files apart


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path("demo-out"),
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text that each file continues.")] = PROMPT,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Quantize the bundled model to several types; report and serve."""
    with stop_on_error(as_json), as_file(files("dither") / "demo_model") as model:
        from dither.reporting.report import report as write

        make_folder(output, "Choose another with -o.")
        prepare_encoders(model)
        rows = [run_one(model, to, output, prompt, threads) for to in LADDER]
        paths = [row["path"] for row in rows]
        measured = measure_all(rows, model)
        report = write(paths, output / "report.html", against=model, title="dither-demo", force=True).path
        served = serve_one(rows, prompt, threads)
        if as_json:
            print_json({"model": "dither-demo", "prompt": prompt, "rows": rows, "report": report, "served": served})
            return
        show(rows, prompt, measured)
        out.print(f"\n[bold]Over HTTP[/], {plain(served['model'])} at {served['url']} answered\n")
        out.print(f"  {plain(served['text'])}")
        show_next(output, report)


def prepare_encoders(model: Path) -> None:
    """Compiles what the ladder needs, so that the times in the table are those of every later run."""
    from dither.models.source import open_model
    from dither.quantizing.quantize import prepare, preview

    opened = open_model(model)
    with Meter() as meter:
        prepare({t.type for to in LADDER for t in preview(opened, to).tensors}, progress=meter)


def run_one(model: Path, to: str, folder: Path, prompt: str, threads: int | None) -> dict[str, Any]:
    """Writes one file, lets llama.cpp continue the prompt with it, and gives the table's row."""
    from dither.engines.llamacpp import LlamaCpp
    from dither.quantizing.quantize import quantize

    err.print(f"quantizing to {to} …")
    with Meter() as meter:
        path = folder / f"dither-demo-{to}.gguf"
        result = quantize(model, to, path, check=True, threads=threads, force=True, progress=meter)
    with LlamaCpp(result.path, context=256, threads=threads) as engine:
        text = "".join(engine.generate(prompt, max_tokens=24, temperature=0.0))
    return {
        "type": to,
        "path": result.path,
        "bytes": result.bytes,
        "parameters": result.plan.parameters,
        "bits_per_weight": result.bits_per_weight,
        "compression": result.compression,
        "seconds": result.seconds,
        "relative_error": result.relative_error,
        "text": " ".join(text.split()),
    }


def measure_all(rows: list[dict[str, Any]], model: Path) -> bool:
    """Adds `kl`, nats per token, to the rows of quantized files, where what that takes is installed."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return False
    from dither.measuring.measure import measure

    err.print("measuring what was lost …")
    files = [row for row in rows if row["type"] != "F16"]
    with Meter() as meter:
        found = measure([row["path"] for row in files], model, tokens=MEASURED, progress=meter)
    for row, measurement in zip(files, found, strict=True):
        row["kl"] = measurement.kl_mean
    return True


def serve_one(rows: list[dict[str, Any]], prompt: str, threads: int | None) -> dict[str, Any]:
    """Serves one file as `dither serve` does, and asks for a continuation over HTTP, as any client would."""
    from dither.serving.server import serve

    err.print(f"serving {SERVED} …")
    path = next(row["path"] for row in rows if row["type"] == SERVED)
    with serve([path], context=256, slots=1, threads=threads) as server:
        body = {"model": server.models[0].name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        request = Request(f"{server.url}/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        text = " ".join(found["choices"][0]["text"].split())
        return {"url": server.url, "model": body["model"], "usage": found["usage"], "text": text}


def show_next(folder: Path, report: str) -> None:
    example = folder / f"dither-demo-{SERVED}.gguf"
    out.print("\n[bold]Next[/]")
    out.print(f"  {plain(report)} shows all of it: it opens in a browser, offline", soft_wrap=True)
    out.print(f"  {copyable('dither', 'dashboard', folder)}  shows the same, live", soft_wrap=True)
    for command in ("chat", "serve", "inspect"):
        out.print(f"  {copyable('dither', command, example)}", soft_wrap=True)
    out.print("  dither quantize path/to/your-model --to Q4_K_M")


def show(rows: list[dict[str, Any]], prompt: str, measured: bool) -> None:
    headings = ("size", "bits/weight", "smaller", "time", "weight error", *(["KL"] if measured else []))
    shown = table("type", numbers=headings)
    for row in rows:
        shown.add_row(
            row["type"],
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['compression']:.2f}×",
            format_seconds(row["seconds"]),
            f"{100 * row['relative_error']:.2f} %",
            *([f"{row['kl']:.4f}" if "kl" in row else ""] if measured else []),
        )
    out.print(f"\n[bold]The bundled model, {format_count(rows[0]['parameters'])} parameters, made smaller[/]\n")
    out.print(shown)
    out.print(f"\n[bold]“{plain(prompt)} …”[/] as each file continues it\n")
    for row in rows:
        out.print(f"[bold]{row['type']:7}[/] {plain(row['text'])}", soft_wrap=False)
    said = "KL is what the rounding did to the predictions: the divergence from the original's, in nats per token."
    if not measured:
        said = "How much of the model's quality is left, the weights alone cannot say: `dither measure` can, after "
        said += "`pip install 'dither\\[calibrate]'`."
    out.print(
        "\n[bold]Reading the table[/]: fewer bits per weight make a smaller file, and weights further from the "
        f"original's. The error is measured on the files just written. {said}"
    )


COMMANDS = {190: demo}
