"""Time and error of every codec against ggml's own C encoder, on one thread and the same weights.

    python benchmarks/encode.py [TYPE …] [--weights 262144] [--repeats 5] [--json] [--save NAME]

The yardstick is `libgguf`, ggml's encoders in a wheel.  Both contestants run in turn within each repeat, and
the ratio is the median over repeats, so that a busy machine disturbs both alike; times are CPU time of the
whole process, pinned to one core.  An error is Σ importance · (w − ŵ)², ours divided by ggml's: below 1 is
better than ggml.  Weights are Gaussian and Student's t with 3 degrees of freedom; importance is log-normal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import libgguf
import numpy as np
import record

from dither.codecs import all_codecs
from dither.formats.ggml import GGML_TYPES
from dither.types import Codec, Floats

COLUMNS = 2048


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("types", nargs="*", help="types to measure; all that ggml can encode by default")
    options.add_argument("--weights", type=int, default=1 << 18)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options.add_argument("--save", metavar="NAME", help="keep the numbers in results/NAME.json")
    chosen = options.parse_args()
    if hasattr(os, "sched_setaffinity"):  # libgguf starts as many threads as there are cores to run on
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    weights = sample(max(1, chosen.weights // COLUMNS))
    importance_C = np.exp(np.random.default_rng(1).standard_normal(COLUMNS)).astype(np.float32)
    rows = []
    for name, codec in all_codecs().items():
        if (chosen.types and name not in {wanted.upper() for wanted in chosen.types}) or not encodes(name):
            continue
        rows.append(measure(codec, weights, importance_C, chosen.repeats))
        if not chosen.json:
            show(rows[-1], header=len(rows) == 1)
    if chosen.save:
        record.save(chosen.save, rows)
    if chosen.json:
        print(json.dumps({"columns": COLUMNS, "weights": chosen.weights, "types": rows}, indent=2))


def sample(rows: int) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    return {
        "gaussian": (0.02 * random.standard_normal((rows, COLUMNS))).astype(np.float32),
        "student_t3": (0.02 * random.standard_t(3, (rows, COLUMNS))).astype(np.float32),
    }


def encodes(name: str) -> bool:
    """Whether ggml's encoder is here to compare with (plain floats are no codec to race)."""
    if name not in GGML_TYPES or name in {"F32", "F16", "BF16"}:
        return False
    try:
        reference_encode(name, np.zeros((1, COLUMNS), np.float32), np.ones(COLUMNS, np.float32))
    except ValueError:  # libgguf: "unsupported quantization type"
        return False
    return True


def reference_encode(name: str, w_RC: Floats, importance_C: Floats | None) -> bytes:
    raw: bytes = libgguf.quantize_rows_raw(GGML_TYPES[name].id, w_RC, *w_RC.shape, importance_C)
    return raw


def measure(codec: Codec, weights: dict[str, Floats], importance_C: Floats, repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {"type": codec.name, "bits_per_weight": codec.bits_per_weight}
    always = codec.needs_importance or libgguf.quantize_requires_imatrix(GGML_TYPES[codec.name].id)
    for case, importance in (("plain", None), ("importance", importance_C)):
        if importance is None and always:
            continue
        result[case] = {
            "error_ratio": {kind: error_ratio(codec, w_RC, importance) for kind, w_RC in weights.items()}
        } | race(codec, weights["gaussian"], importance, repeats)
    return result


def race(codec: Codec, w_RC: Floats, importance_C: Floats | None, repeats: int) -> dict[str, float]:
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(cpu_seconds(lambda: codec.encode(w_RC, importance_C)))
        theirs.append(cpu_seconds(lambda: reference_encode(codec.name, w_RC, importance_C)))
    per_weight = 1e9 / w_RC.size
    return {
        "ns_per_weight": statistics.median(ours) * per_weight,
        "ggml_ns_per_weight": statistics.median(theirs) * per_weight,
        "times_faster": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def error_ratio(codec: Codec, w_RC: Floats, importance_C: Floats | None) -> float:
    """Both sides decoded by ggml's C decoder."""
    weight_C = np.ones(w_RC.shape[1]) if importance_C is None else importance_C.astype(np.float64)
    kind = GGML_TYPES[codec.name].id

    def error(raw: bytes) -> float:
        decoded = np.frombuffer(libgguf.dequantize_rows_raw(kind, raw, *w_RC.shape), np.float32)
        return float((weight_C * (w_RC.astype(np.float64) - decoded.reshape(w_RC.shape)) ** 2).sum())

    theirs = error(reference_encode(codec.name, w_RC, importance_C))
    return error(codec.encode(w_RC, importance_C).tobytes()) / theirs


def show(row: dict[str, Any], header: bool) -> None:
    if header:
        print("                    ns per weight            times   error ÷ ggml's error")
        print("type     case           ours      ggml      faster   gaussian   student t3")
    for case in ("plain", "importance"):
        if case in row:
            entry = row[case]
            errors = entry["error_ratio"]
            print(
                f"{row['type']:8} {case:10} {entry['ns_per_weight']:8.2f} {entry['ggml_ns_per_weight']:9.2f}"
                f" {entry['times_faster']:10.1f}× {errors['gaussian']:10.4f} {errors['student_t3']:10.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
