"""Seconds that GPTQ takes for one layer, beside llm-compressor's own, and what each leaves of nearest's loss.

    python benchmarks/gptq_speed.py [--sizes 1024 2048] [--repeats 3] [--threads 1] [--json] [--save NAME]

Contestants are given the same weights, Hessian, damping and number of threads, and run in turn within each
repeat, so that a busy machine disturbs all alike; the median is shown.  `llm-compressor` is
`quantize_weight` of llmcompressor 0.14 in eager torch, 4 bits in symmetric groups of 128, columns as stored;
its scales are found before the clock starts.  It is left out, and that is said, where it cannot be imported.
Ours are timed from weights to bytes, the choice of scales and the comparison with nearest included: `plain`
is feedback alone, as in the other; `default` refits.  A loss is tr(E H Eᵀ) over that of nearest rounding on
the contestant's own grid: grids differ in bits per weight, so losses of different grids say little of each
other.

Legend: R rows, C columns, T tokens, G groups of a row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import record
from threadpoolctl import threadpool_limits

from dither.codecs import codec
from dither.solvers.gptq import Gptq
from dither.types import Evidence, Floats

DAMPING = 0.01
PLAIN = {"fits": 1, "scale_rounds": 0, "refit_rounds": 0, "passes": 0}
Answer = tuple[float, float]  # seconds, loss over nearest's


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    options.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K"])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options.add_argument("--save", metavar="NAME", help="keep the numbers in results/NAME.json")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    for size in chosen.sizes:
        rows += measure(size, chosen.types, chosen.repeats, chosen.threads, quiet=chosen.json)
    if chosen.save:
        record.save(chosen.save, rows)
    if chosen.json:
        print(json.dumps(rows, indent=2))


def measure(size: int, types: list[str], repeats: int, threads: int, quiet: bool) -> list[dict[str, Any]]:
    w_RC, hessian_CC = layer(size)
    contestants: dict[str, Callable[[], Answer]] = {}
    for name in types:
        for label, options in (("plain", PLAIN), ("default", {})):
            contestants[f"{name} {label}"] = ours(name, w_RC, hessian_CC, threads, options)
    peer = llm_compressor(w_RC, hessian_CC, threads)
    if peer is not None:
        contestants["llm-compressor int4 g128"] = peer
    for run in contestants.values():
        run()  # compiles, warms
    answers: dict[str, list[Answer]] = {label: [] for label in contestants}
    for _ in range(repeats):
        for label, run in contestants.items():
            answers[label].append(run())
    rows = []
    for label, found in answers.items():
        seconds, loss = statistics.median(s for s, _ in found), found[0][1]
        rows.append({"size": size, "threads": threads, "solver": label, "seconds": seconds, "loss": loss})
        if not quiet:
            print(f"{size:5d}²  {threads} threads  {label:26s} {seconds:8.2f} s   loss {loss:.3f} of nearest")
    return rows


def layer(size: int) -> tuple[Floats, Floats]:
    """Gaussian weights; inputs that walk along the columns, so that neighbors are correlated."""
    random = np.random.default_rng(0)
    x_TC = random.standard_normal((2 * size, size)).astype(np.float32)
    for column in range(1, size):
        x_TC[:, column] += 0.7 * x_TC[:, column - 1]
    x_TC *= random.lognormal(0, 0.5, size).astype(np.float32)
    return (0.02 * random.standard_normal((size, size))).astype(np.float32), x_TC.T @ x_TC / len(x_TC)


def ours(name: str, w_RC: Floats, hessian_CC: Floats, threads: int, options: dict[str, int]) -> Callable[[], Answer]:
    known = Evidence(1, np.ascontiguousarray(np.diagonal(hessian_CC)), hessian_CC)

    def run() -> Answer:
        solver = Gptq(damping=DAMPING, threads=threads, **options)  # new: it would remember the Hessian
        start = time.perf_counter()
        solved = solver(w_RC, codec(name), known)
        seconds = time.perf_counter() - start
        return seconds, solved.record["objective"] / solved.record["nearest_objective"]

    return run


def llm_compressor(w_RC: Floats, hessian_CC: Floats, threads: int) -> Callable[[], Answer] | None:
    try:
        import torch
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError as reason:
        print(f"llm-compressor is left out: {reason}")
        return None
    w_RGK = w_RC.reshape(len(w_RC), -1, 128)
    scale_RG = np.abs(w_RGK).max(axis=2) / np.float32(7.5)
    nearest_RGK = np.clip(np.rint(w_RGK / scale_RG[..., None]), -8, 7) * scale_RG[..., None]
    nearest = loss(w_RC - nearest_RGK.reshape(w_RC.shape), hessian_CC)
    kind = QuantizationArgs(num_bits=4, group_size=128, strategy="group", symmetric=True)

    def run() -> Answer:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            weights, hessian = torch.tensor(w_RC)[None], torch.tensor(hessian_CC)[None]
            scale = torch.from_numpy(scale_RG)[None]
            start = time.perf_counter()
            found, _, _ = quantize_weight(
                weights, hessian, scale, torch.zeros_like(scale), None, kind, percdamp=DAMPING
            )
            seconds = time.perf_counter() - start
        return seconds, loss(w_RC - found[0].numpy(), hessian_CC) / nearest

    return run


def loss(error_RC: Floats, hessian_CC: Floats) -> float:
    """tr(E H Eᵀ)."""
    return float(np.vdot(error_RC @ hessian_CC, error_RC))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
