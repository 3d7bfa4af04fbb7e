"""Read, encode, write: Dither against ggml's own C encoders through the same pipeline, in one run.

A synthetic bf16 checkpoint (263 M parameters; 1.1 B with --layers 22) is quantized to each type, once by our
kernels and once by ggml's encoders (`libgguf`, a wheel around them), with the same reader, writer, count of
the error and number of threads; only the encoder differs.  Reported: user-CPU nanoseconds per weight, peak
resident memory beyond the mapped file, and the ratios; `--alone` measures Dither without the contestant.

    python benchmarks/end_to_end.py [--types Q8_0,Q4_K_M] [--threads 1] [--alone] [--save NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import synthetic

HERE = str(Path(__file__).parent)
TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M,Q2_K"

CHILD = """
import json, os, resource, sys, threading, time
from dither.quantizing import quantize as job
model, to, out, encoder, threads = sys.argv[1:]
if hasattr(os, "sched_setaffinity"):  # libgguf starts as many threads as there are cores to run on
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(threads)])
solver = None
if encoder == "ggml":
    from ggml import Ggml
    solver = Ggml()
opened = job.open_model(model)
job.preview(opened, to)
class Meter:
    def note(self, text): pass
    def start(self, total, done): self.total, self.before = total, resource.getrusage(resource.RUSAGE_SELF)
    def advance(self, amount, what): pass
peak = 0
def watch():
    global peak
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
meter = Meter()
result = job.quantize(opened, to, out, solver=solver, threads=int(threads), force=True, progress=meter)
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "ns_per_weight": (after.ru_utime - meter.before.ru_utime) / meter.total * 1e9,
    "seconds": result.seconds, "relative_error": result.relative_error,
    "anonymous_bytes": peak, "bytes": result.bytes,
}))
"""


def measure(model: Path, to: str, encoder: str, threads: int, scratch: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(model), to, str(scratch / "out.gguf"), encoder, str(threads)]
    # -c puts the folder one stands in on the path, not the script's
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": HERE}
    ).stdout
    (scratch / "out.gguf").unlink()
    return dict(json.loads(printed))


def summarize(to: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The round with the least time for each encoder, and the median ratio over rounds."""
    row: dict[str, Any] = {"type": to}
    for encoder in rounds[0]:
        row[encoder] = min((r[encoder] for r in rounds), key=lambda measured: measured["ns_per_weight"])
    if "ggml" in row:
        row["time_ratio"] = statistics.median(r["ours"]["ns_per_weight"] / r["ggml"]["ns_per_weight"] for r in rounds)
        row["error_ratio"] = row["ours"]["relative_error"] / row["ggml"]["relative_error"]
    return row


def show(row: dict[str, Any]) -> None:
    ours = row["ours"]
    against = f"{'':10} {'':6} {'':11}"
    if "ggml" in row:
        ggml = row["ggml"]["ns_per_weight"]
        against = f"{ggml:10.2f} {row['time_ratio']:6.3f} {row['error_ratio']:11.4f}"
    memory = ours["anonymous_bytes"] / 2**20
    print(f"{row['type']:8} {ours['ns_per_weight']:10.2f} {against} {memory:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3, help="of the synthetic model")
    parser.add_argument("--alone", action="store_true", help="do not run ggml's encoders")
    parser.add_argument("--save", metavar="NAME", help="keep the numbers in results/NAME.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = synthetic.write(scratch / "model", args.layers)
        encoders = ("ours",) if args.alone else ("ours", "ggml")
        rows = []
        print(f"{'type':8} {'ours ns/w':>10} {'ggml ns/w':>10} {'ratio':>6} {'error/ggml':>11} {'anon MiB':>9}")
        for to in args.types.split(","):
            rounds = [
                {encoder: measure(model, to, encoder, args.threads, scratch) for encoder in encoders}
                for _ in range(args.rounds)
            ]
            rows.append(summarize(to, rounds))
            show(rows[-1])
    if args.save:
        record.save(args.save, rows)


if __name__ == "__main__":
    main()
