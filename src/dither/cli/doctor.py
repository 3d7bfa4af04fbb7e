"""`dither doctor`: what this machine has, what that enables, and how to get what is missing.

Nothing heavy is imported to find out: installed packages are read from their metadata, the machine as
`capacity.machine` reads it.  Only llama.cpp's wheel is loaded, since loading is what may fail.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dither._version import __version__
from dither.cli.screen import out, plain, print_json, stop_on_error, table
from dither.system.cores import usable_cores
from dither.units import format_bytes

OK, MISSING, NOTE = "ok", "missing", "note"
_MARKS = {OK: "[green]✓[/]", MISSING: "[red]✗[/]", NOTE: "[dim]·[/]"}

# package → whether Dither needs it, what it is for
_PACKAGES = {
    "numba": (True, "compiles the quantization kernels"),
    "libgguf": (True, "the lower IQ types, through ggml's own encoders"),
    "huggingface_hub": (True, "fetches models named org/name"),
    "torch": (False, "calibrate, measure and --solver learned: pip install 'dither[calibrate]'"),
    "transformers": (False, "the networks that calibrate and measure run"),
    "vllm": (False, "not needed; serves unquantized checkpoints"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.  `note` says what it means or, where something is missing, the way out;
    `data` holds the bare numbers for --json."""

    name: str
    state: str
    found: str
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show what is installed here and what it enables."""
    with stop_on_error(as_json):
        findings = list(examine())
        document = {"dither": __version__, "findings": [asdict(finding) for finding in findings]}
        print_json(document) if as_json else _show(findings)


def examine() -> Iterator[Finding]:
    """Everything that is looked at, in the order it is shown."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", OK, python, sys.executable, {"version": platform.python_version()})
    yield _cpu()
    yield _memory()
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    yield Finding("disk", OK, f"{format_bytes(free)} free", f"in {here}", {"free": free, "path": str(here)})
    accelerators = [*_nvidia(), *_other_gpus()]
    yield from accelerators or [Finding("accelerator", NOTE, "none found", "Everything runs on the CPU.")]
    yield from (_package(name) for name in _PACKAGES)
    yield _kernel_cache()
    yield _llama_cpp(bool(accelerators))
    yield _hub()


def _show(findings: list[Finding]) -> None:
    shown = table(show_header=False, padding=(0, 2, 0, 0))
    for column in ({"width": 1}, {"no_wrap": True}, {"ratio": 1}, {"ratio": 1, "style": "dim"}):
        shown.add_column(overflow="fold", **column)
    for finding in findings:
        shown.add_row(_MARKS[finding.state], finding.name, plain(finding.found), plain(finding.note))
    out.print(f"dither {__version__}\n")
    out.print(shown)
    missing = [finding.name for finding in findings if finding.state == MISSING]
    out.print(f"\nMissing: {', '.join(missing)}." if missing else "\nNothing is missing.")


def _cpu() -> Finding:
    from dither.capacity.machine import cpu_name, cpu_quota, cpu_vectors

    model, vectors, quota = cpu_name(), cpu_vectors(), cpu_quota()
    logical, cores = os.cpu_count() or 1, usable_cores()
    limit = f", limited to {quota:g} by a quota" if quota and quota < logical else ""
    found = f"{model}, {cores} cores, {logical} threads{limit}"
    data = {"model": model, "logical": logical, "cores": cores, "quota": quota, "vectors": vectors}
    return Finding("CPU", OK, found, ", ".join(vectors) or "vector extensions unknown", data)


def _memory() -> Finding:
    from dither.capacity.machine import system_memory

    total, available = system_memory()
    if not total:
        return Finding("memory", NOTE, "unknown")
    found = f"{format_bytes(total)}, {format_bytes(available)} free" if available else format_bytes(total)
    note = "A model runs where its file and about 1 GiB more fit; quantizing needs a fraction."
    return Finding("memory", OK, found, note, {"total": total, "available": available or None})


def _nvidia() -> Iterator[Finding]:
    from dither.capacity.machine import nvidia_smi

    cards = nvidia_smi("name", "memory.total", "driver_version", "compute_cap")
    if cards is None:
        yield Finding("NVIDIA", MISSING, "nvidia-smi does not answer", "Reinstall or reload the NVIDIA driver.")
    for name, memory, driver, capability in cards or ():
        size = int(memory) * 2**20 if memory.isdigit() else None
        shown = f"{name}, {format_bytes(size)}" if size else name
        data = {"name": name, "memory": size, "driver": driver, "compute_capability": capability}
        yield Finding("NVIDIA", OK, shown, f"driver {driver}, compute capability {capability}", data)


def _other_gpus() -> Iterator[Finding]:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        yield Finding("Apple", OK, "Metal, sharing the machine's memory", "llama.cpp runs models on it.")
    if Path("/dev/kfd").exists():
        note = "llama.cpp can use it through a ROCm or Vulkan build of xllamacpp."
        yield Finding("AMD", OK, "a GPU with its compute driver", note)


def _package(name: str) -> Finding:
    needed, purpose = _PACKAGES[name]
    if version := _version(name):
        return Finding(name, OK, version, purpose, {"version": version})
    way_out = f"{purpose}: pip install {name}" if needed else purpose
    return Finding(name, MISSING if needed else NOTE, "not installed", way_out, {"version": None})


def _kernel_cache() -> Finding:
    """Where numba keeps compiled kernels: its own order, a folder of the person's choice, beside the
    source, or the user's cache folder."""
    from tempfile import TemporaryFile

    import dither.codecs

    chosen = os.environ.get("NUMBA_CACHE_DIR")
    kernels = sys.modules.get("dither.codecs.kernels")  # not imported for this: numba takes a second
    if chosen and chosen == getattr(kernels, "THIS_RUN", None):  # nobody's choice: it goes with this process
        chosen = None
    beside = Path(next(iter(dither.codecs.__path__))) / "kernels" / "__pycache__"
    candidates = [Path(chosen)] if chosen else [beside, Path.home() / ".cache" / "numba"]
    for folder in candidates:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
            return Finding("kernel cache", OK, "writable", str(folder), {"path": str(folder)})
    note = "Kernels are compiled again in every run; set NUMBA_CACHE_DIR to a writable folder."
    return Finding("kernel cache", MISSING, "no folder can be written", note, {"path": None})


def _llama_cpp(accelerated: bool) -> Finding:
    version = _version("xllamacpp")
    if not version:
        way_out = "chat, demo and probabilities need it: pip install xllamacpp"
        return Finding("llama.cpp", MISSING, "not installed", way_out, {"version": None})
    try:
        devices = importlib.import_module("xllamacpp").get_device_info()
    except (ImportError, OSError) as error:
        way_out = f"It cannot be loaded ({error}): pip install --force-reinstall xllamacpp"
        return Finding("llama.cpp", MISSING, f"xllamacpp {version}", way_out, {"version": version})
    names = [str(device["name"]) for device in devices]
    note = f"runs GGUF files on {', '.join(names)}"
    if accelerated and names == ["CPU"]:
        note += "; its project offers CUDA, ROCm and Vulkan wheels: github.com/xorbitsai/xllamacpp"
    return Finding("llama.cpp", OK, f"xllamacpp {version}", note, {"version": version, "devices": names})


def _hub() -> Finding:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    found = f"{'offline' if offline else 'online'}, {'a' if token else 'no'} token"
    return Finding("hub", NOTE, found, f"cache in {home}", {"home": str(home), "offline": offline, "token": token})


def _version(package: str) -> str | None:
    from importlib import metadata

    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


COMMANDS = {200: doctor}
