"""Tokens per second of calibrating, with and without Hessians, and what it holds in memory.

    python benchmarks/calibrate_speed.py MODEL TEXT [--tokens N] [--threads N] [--rounds N]
    python benchmarks/calibrate_speed.py --memory FOLDER TEXT [--blocks N] [--tokens N]

The first form alternates the two, so that a busy machine slows both alike, and reports the fastest of
each: wall-clock seconds, the processor's seconds, tokens per second and the ratio.  The second makes
the synthetic Llama of `synthetic.py` (1.1 B parameters where all its 22 blocks are made; every block is
of the real shape, so fewer blocks cost the same memory but for the file) and reports the highest
resident memory of a process that calibrates on it, against the bytes of one block, its Hessians and the
hidden states.  Resident memory includes pages of the mapped checkpoint, which the system may take back.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

MIB = 2**20


def timed(model: str, text: Path, tokens: int, threads: int, hessians: bool) -> dict[str, float]:
    from dither.measuring.calibrate import calibrate

    folder = Path(tempfile.mkdtemp(prefix="calibrate-speed-"))
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        done = calibrate(model, text, tokens=tokens, hessians=hessians, out=folder / "evidence", threads=threads)
        return {
            "tokens": done.tokens,
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - cpu,
        }
    finally:
        shutil.rmtree(folder)


def speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    timed(arguments.model, arguments.text, 1024, arguments.threads, False)  # imports and caches
    for _ in range(arguments.rounds):
        for hessians in (False, True):
            run = timed(arguments.model, arguments.text, arguments.tokens, arguments.threads, hessians)
            found[hessians].append(run)
            print(f"hessians {hessians}: {run['seconds']:.1f} s, processor {run['processor_seconds']:.1f} s")
    rows = []
    for hessians, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        cpu = min(run["processor_seconds"] for run in runs)
        rows.append(
            {
                "model": Path(arguments.model).name,
                "hessians": hessians,
                "threads": arguments.threads,
                "tokens": best["tokens"],
                "seconds": round(best["seconds"], 2),
                "tokens_per_second": round(best["tokens"] / best["seconds"], 1),
                "processor_seconds": round(cpu, 2),
            }
        )
    rows[1]["processor_ratio"] = round(rows[1]["processor_seconds"] / rows[0]["processor_seconds"], 2)
    return rows


CHILD = """
import resource, sys
from dither.measuring.calibrate import calibrate
import torch, transformers
from dither.models.blocks import open_blocks
from dither.models.source import open_model
open_blocks(open_model(sys.argv[1]))
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
calibrate(sys.argv[1], sys.argv[2], tokens=int(sys.argv[3]), out=sys.argv[4])
print(idle, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import synthetic

    from dither.models.source import open_model

    folder = synthetic.write(Path(arguments.model), arguments.blocks)
    with tempfile.TemporaryDirectory() as out:
        printed = subprocess.run(
            [sys.executable, "-c", CHILD, folder, arguments.text, str(arguments.tokens), f"{out}/evidence"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    kib = 1024 if sys.platform != "darwin" else 1
    idle, peak = (int(number) * kib for number in printed.split())
    opened = open_model(folder)
    block = sum(4 * tensor.size for tensor in opened.tensors if tensor.name.startswith("blk.0."))
    head = max(4 * tensor.size for tensor in opened.tensors if not tensor.name.startswith("blk."))
    hessians = 4 * (3 * synthetic.HIDDEN**2 + synthetic.FFN**2)
    row = {
        "parameters": opened.parameters,
        "blocks": arguments.blocks,
        "tokens": arguments.tokens,
        "peak_mib": round(peak / MIB),
        "before_work_mib": round(idle / MIB),
        "block_mib": round(block / MIB),
        "output_matrix_mib": round(head / MIB),
        "hessians_mib": round(hessians / MIB),
        "hidden_states_mib": round(4 * arguments.tokens * synthetic.HIDDEN / MIB),
        "source_mib": round(sum(tensor.stored_bytes for tensor in opened.tensors) / MIB),
    }
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=22)
    arguments = parser.parse_args()
    rows = memory(arguments) if arguments.memory else speed(arguments)
    for row in rows:
        print(row)
    print(record.save("calibrate_memory" if arguments.memory else "calibrate_speed", rows))


if __name__ == "__main__":
    main()
