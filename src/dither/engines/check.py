"""Whether an engine loads a file and computes one token with it.

A table says what an engine takes; only the engine itself knows.  It runs in a child, because a file that is wrong
may end the process that loads it, and because memory is then given back at once.  What counts as loaded: every tensor
found its place, none was left over, and the scores of the token that comes next are numbers.

    llama.cpp      a GGUF
    transformers   a folder, with the package of its format where it has one
    vLLM           a folder, by the interpreter that has vLLM; on a CPU slowly
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dither.engines import vllm
from dither.engines.llama_start import EngineError
from dither.errors import DitherError, UsageError
from dither.system import isolated
from dither.system.text import shown

LLAMA, TRANSFORMERS, VLLM = "llama.cpp", "transformers", "vLLM"
_INSTALL = {
    "": "pip install 'dither[calibrate]'",
    "bitsandbytes": "pip install 'dither[bnb]'",
    "compressed_tensors": "pip install 'dither[compressed]'",
    "gptqmodel": "pip install 'dither[gptq]'",
}
_LAST = 300  # letters of what a child said last
_MARK = "DITHER-CHECK "  # before the one line of vLLM's child that counts
_VLLM = f"""
import os, sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, max_num_seqs=1, disable_log_stats=True)
found = model.generate([{{"prompt_token_ids": [1]}}], SamplingParams(max_tokens=1, temperature=0, detokenize=False))
print("{_MARK}" + str(found[0].outputs[0].token_ids[0]), flush=True)
os._exit(0)
"""


@dataclass(frozen=True)
class Checked:
    """An engine loaded the file, and found `token` the likeliest to come first."""

    engine: str
    token: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(engines: Sequence[str], needs: str) -> str:
    """The first of `engines` that is at hand; transformers wants the package `needs` besides.

    Raises UsageError naming what would have to be installed.
    """
    lacking = {engine: _lacking(engine, needs) for engine in engines}
    found = next((engine for engine, what in lacking.items() if not what), None)
    if found is not None:
        return found
    reason = "needs " + " or ".join(f"{engine} ({what} is not installed)" for engine, what in lacking.items())
    way_out = _INSTALL.get(needs, "") if TRANSFORMERS in engines else "Install it where PATH finds it"
    raise UsageError("--check", reason, f"{way_out}, or leave --check out.")


def _lacking(engine: str, needs: str) -> str:
    """The package that is missing, "" for none."""
    if engine == VLLM:
        return "" if vllm.interpreter() else "vllm"
    names = ("xllamacpp",) if engine == LLAMA else ("torch", "transformers", *([needs] if needs else ()))
    return next((name for name in names if find_spec(name) is None), "")


def check(engine: str, path: Path, threads: int) -> Checked:
    """Loads the file once.  Raises EngineError with the engine's own reason where it does not load or compute."""
    started = time.monotonic()
    token = _by_vllm(path) if engine == VLLM else _by_child(engine, path, threads)
    return Checked(engine, token, time.monotonic() - started)


def _by_child(engine: str, path: Path, threads: int) -> int:
    asked = json.dumps({"engine": engine, "path": str(path), "threads": threads})
    said = subprocess.run(
        isolated.command("dither.engines.check"), input=asked, capture_output=True, text=True, check=False
    )
    lines = [line.removeprefix(_MARK) for line in said.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise _failed(engine, path, f"its process ended ({_how(said.returncode)}): {_last(said.stderr)}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise _failed(engine, path, answer["error"])
    return int(answer["token"])


def _by_vllm(path: Path) -> int:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ,
    }  # fmt: skip
    said = subprocess.run(
        [vllm.interpreter() or sys.executable, "-c", _VLLM, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = [line.removeprefix(_MARK) for line in said.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise _failed(VLLM, path, _last(said.stderr))
    return int(lines[-1])


def _failed(engine: str, path: Path, reason: str) -> EngineError:
    name = str(path).removesuffix(".part")
    way_out = f"It is kept as {path.name}, without its name; please report this, with the model it was made of."
    return EngineError(name, f"{engine} does not run it: {reason}", way_out)


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return shown(lines[-1], _LAST) if lines else "without a word"


def main() -> None:
    """The child: one question as JSON on stdin, one answer on stdout."""
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    try:
        load = _llama if asked["engine"] == LLAMA else _transformers
        answer: dict[str, Any] = {"token": load(asked["path"], int(asked["threads"]))}
    except DitherError as error:
        answer = {"error": error.reason}
    print(f"{_MARK}{json.dumps(answer)}", flush=True)
    os._exit(0)  # the system takes everything back


def _llama(path: str, threads: int) -> int:
    from dither.engines.llamacpp import LlamaCpp

    with LlamaCpp(path, context=64, threads=threads) as engine:
        p_V = engine.next_token_probabilities([0])
        if not math.isfinite(float(p_V.sum())):
            raise EngineError(path, "its scores of the next token are no numbers")
        return int(p_V.argmax())


def _transformers(path: str, threads: int) -> int:
    from dither.engines.transformers import load_once

    return load_once(path, threads)
