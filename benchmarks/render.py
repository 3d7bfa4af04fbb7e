"""Writes docs/speed.md from the kept results, so that no number there is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"

TEXT = """# Speed, error and memory of the encoders

Made by `python benchmarks/render.py` from `benchmarks/results/`. The yardstick is ggml's own C encoders, through the
`libgguf` wheel, on the same weights and one thread in the same run. Times are CPU time per weight on {processor}; the
machine was not idle and its clock drifts, so trust the ratios. An error is ours divided by ggml's: below 1 is better.

## From checkpoint to file

`{end_to_end_command}`: reading bf16, encoding, counting the error, writing; only the encoder differs. The error is the
root of the squared weight error over the whole file.

{end_to_end}

Q8_0, whose plain rounding leaves nothing to search, spends most of its time on the way; the searching types spend it
searching. `libgguf` is a portable build of ggml: a llama-quantize compiled for one processor is faster, and has not been
raced here.

## The encoders alone

`{encode_command}`: Gaussian weights, and heavy-tailed ones (Student's t with 3 degrees of freedom); squared error, with
importance weighted by it. Legacy types without importance are ggml's bytes, one for one.

{encode}

Where it falls short: the ternary types with importance search more than ggml does and take twice its time, for less
than half of its weighted error on Gaussian weights.

## Memory

`{memory_command}`: a checkpoint of 1.1 B parameters. The peak is memory of the process's own; the checkpoint is
read by rows, and never counted.

{memory}
"""


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()))


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def end_to_end(document: dict[str, Any]) -> str:
    rows = [
        [
            row["type"],
            f"{row['ours']['ns_per_weight']:.1f}",
            f"{row['ggml']['ns_per_weight']:.1f}",
            f"{row['time_ratio']:.3f}",
            f"{row['error_ratio']:.3f}",
        ]
        for row in document["rows"]
    ]
    return table(["type", "ours, ns", "ggml, ns", "time, ours / ggml", "error, ours / ggml"], rows)


def encode(document: dict[str, Any]) -> str:
    rows = []
    for row in document["rows"]:
        for case in ("plain", "importance"):
            if case in row:
                found = row[case]
                rows.append(
                    [
                        row["type"] + (", importance" if case == "importance" else ""),
                        f"{found['ns_per_weight']:.1f}",
                        f"{found['ggml_ns_per_weight']:.1f}",
                        f"{found['times_faster']:.1f} ×",
                        f"{found['error_ratio']['gaussian']:.3f}",
                        f"{found['error_ratio']['student_t3']:.3f}",
                    ]
                )
    return table(["type", "ours, ns", "ggml, ns", "faster", "error, Gaussian", "error, heavy tails"], rows)


def memory(document: dict[str, Any]) -> str:
    rows = [
        [row["type"], f"{row['ours']['anonymous_bytes'] / 2**20:.0f} MiB", f"{row['ours']['seconds']:.0f} s"]
        for row in document["rows"]
    ]
    return table(["type", "peak", "time"], rows)


def page() -> str:
    documents = {name: load(name) for name in ("end_to_end", "encode", "memory")}
    return TEXT.format(
        processor=documents["encode"]["processor"],
        end_to_end=end_to_end(documents["end_to_end"]),
        encode=encode(documents["encode"]),
        memory=memory(documents["memory"]),
        **{f"{name}_command": document["command"] for name, document in documents.items()},
    )


if __name__ == "__main__":
    PAGE.write_text(page())
