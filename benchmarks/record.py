"""Where a benchmark's numbers go: a JSON file with the command, the processor and the versions."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    widest = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else platform.machine()
    return f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, {widest}"


def _without_folder(word: str) -> str:
    """A file by its name: where it lies is this machine's business."""
    return Path(word).name if "/" in word and Path(word).exists() else word


def save(name: str, rows: Any) -> Path:
    """Writes `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    script = Path(sys.argv[0]).name
    document = {
        "command": shlex.join(["python", f"benchmarks/{script}", *map(_without_folder, sys.argv[1:])]),
        "processor": processor(),
        "versions": {name: version(name) for name in ("numba", "numpy", "libgguf")},
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
