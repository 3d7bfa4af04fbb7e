"""llama.cpp's own benchmark, if its program is on the PATH: a second opinion on every speed.

Source: llama.cpp, tools/llama-bench/README.md.  With `-o json` it prints one object per test, `n_prompt`
or `n_gen` telling which it was, `avg_ts` its tokens per second.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "llama-bench"
_PATIENCE = 1800  # seconds for one round
_MOST_OUTPUT = 2**20  # characters


@dataclass(frozen=True)
class Opinion:
    prefill: float
    decode: float


def ask(found: str, model: Path, *, prompt: int, generate: int, threads: int, gpu: bool) -> tuple[Opinion | None, str]:
    """One round on `model`, or why there is no result."""
    command = [found, "-m", str(model), "-p", str(prompt), "-n", str(generate), "-t", str(threads)]
    command += ["-r", "1", "-o", "json", *([] if gpu else ["-ngl", "0"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{PROGRAM} gave no answer ({type(error).__name__})"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return None, f"{PROGRAM} failed with code {done.returncode} ({said})"
    try:
        tests = json.loads(done.stdout[:_MOST_OUTPUT])
        prefill = next(float(test["avg_ts"]) for test in tests if test["n_prompt"] and not test["n_gen"])
        decode = next(float(test["avg_ts"]) for test in tests if test["n_gen"] and not test["n_prompt"])
    except (ValueError, KeyError, TypeError, StopIteration):
        return None, f"{PROGRAM} printed something else than its results"
    return Opinion(prefill, decode), ""
