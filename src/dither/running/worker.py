"""One model in a process of its own, so that its memory and its speed are its own.

    parent → {"path", "context", "threads"}            ← {"load_seconds", "context", "engine", "gpu"}
    parent → {"prompt", "generate", "seed"}            ← one `Trial`
    parent → {"memory": true}                          ← {"peak", "before"}

One JSON document a line, over standard input and output; an error is {"error": [thing, reason, way out]}.
The process ends with its parent, because its standard input is closed then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dither.engines.llama_start import accelerated
from dither.engines.llamacpp import EngineError, LlamaCpp
from dither.errors import DitherError
from dither.running.energy import EnergyMeter
from dither.running.memory import peak_bytes
from dither.system import isolated


@dataclass(frozen=True)
class Trial:
    """One prompt read and one answer written; speeds in tokens per second, 0 if there was nothing to time."""

    prefill: float  # by the engine's clock
    engine_decode: float  # by the engine's clock, without the first token, which comes with the prompt
    decode: float  # as the tokens arrive
    first_token: float  # seconds from asking
    joules_per_token: float | None


def run_trial(engine: LlamaCpp, meter: EnergyMeter, prompt: int, generate: int, seed: int) -> Trial:
    """Times a prompt of random tokens, as llama-bench does: speed does not depend on what they mean."""
    import numpy as np

    tokens = np.random.default_rng(seed).integers(0, engine.vocabulary_size, prompt).tolist()
    started = time.perf_counter()
    reply = engine.generate(tokens, max_tokens=generate, temperature=0, ignore_end=True)
    next(reply, None)  # comes with the prompt
    begun, written, before = time.perf_counter(), reply.tokens, meter.read()
    for _ in reply:
        pass
    ended, after = time.perf_counter(), meter.read()
    steps = reply.tokens - written
    joules = meter.between(before, after) if steps else None
    timings = reply.timings
    return Trial(
        prefill=_rate(timings.get("prompt_n", 0), timings.get("prompt_ms", 0) / 1e3),
        engine_decode=_rate(timings.get("predicted_n", 0) - 1, timings.get("predicted_ms", 0) / 1e3),
        decode=_rate(steps, ended - begun),
        first_token=begun - started,
        joules_per_token=None if joules is None else joules / steps,
    )


def _rate(count: float, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


class Worker:
    """The parent's side, to be closed; raises EngineError if the process dies."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        self.path = path
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 — lives as long as the process
        self._process = subprocess.Popen(
            isolated.command("dither.running.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        try:
            about = self._ask({"path": str(path), "context": context, "threads": threads})
        except BaseException:
            self.close()
            raise
        self.load_seconds = float(about["load_seconds"])
        self.context, self.engine = int(about["context"]), str(about["engine"])
        self.gpu = bool(about["gpu"])

    def trial(self, prompt: int, generate: int, seed: int) -> Trial:
        return Trial(**self._ask({"prompt": prompt, "generate": generate, "seed": seed}))

    def memory(self) -> tuple[int, int]:
        """Bytes: the process's peak so far, and what it had before it loaded the model."""
        found = self._ask({"memory": True})
        return int(found["peak"]), int(found["before"])

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._complaints.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        try:
            pipe_in.write(json.dumps(request) + "\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except OSError:
            line = ""
        if not line:
            raise EngineError(str(self.path), f"its process ended ({self._last_words()})", "Is memory enough?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(*answer["error"])
        return answer

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._complaints.seek(0)
        lines = self._complaints.read()[-4096:].decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:200] if said else f"exit code {self._process.returncode}"


def _serve(requests: IO[str], answers: IO[str]) -> None:
    engine, meter, before = None, EnergyMeter(), 0
    try:
        for line in requests:
            request = json.loads(line)
            try:
                if "path" in request:
                    engine, before, answer = _load(request)
                elif "memory" in request:
                    answer = {"peak": peak_bytes(), "before": before}
                else:
                    assert engine is not None
                    answer = asdict(run_trial(engine, meter, **request))
            except DitherError as error:
                answer = {"error": [error.thing, error.reason, error.way_out]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        if engine is not None:
            engine.close()


def _load(request: Mapping[str, Any]) -> tuple[LlamaCpp, int, dict[str, Any]]:
    import numpy as np  # noqa: F401 — counts as what the process had before the model
    import xllamacpp

    before, started = peak_bytes(), time.perf_counter()
    engine = LlamaCpp(request["path"], context=request["context"], threads=request["threads"], gpu_layers=-1)
    seconds = time.perf_counter() - started
    build = str(getattr(xllamacpp, "__version__", "")) or "unknown"
    about = {
        "load_seconds": seconds,
        "context": engine.context,
        "engine": f"llama.cpp (xllamacpp {build})",
        "gpu": accelerated(),
    }
    return engine, before, about


def main() -> None:
    # C code may print to file descriptor 1, so answers go to another one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        _serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
