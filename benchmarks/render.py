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

## Divergence

`{two_judges_command}`: what rounding costs a network, beside the squared error that the sections below count, on two networks that
have little in common. *whisper* is whisper-base, trained in float16, whose decoder listens to spoken text; *bundled* is the demo model,
on held-out books. All linear layers are rounded to one type (of whisper those of the decoder). Figures are KL divergences divided by that of
ggml's encoder in the same setting, with a jackknife's standard error over the text; another rounding of the same quality moves a ratio by a
few per cent besides.

{two_judges}

*Least error* is the answer of the search, which has less squared error than ggml's and yet often loses more. A scale of least squared error
shortens each block by its relative error, 7 % at two bits: Σ ŵ·(w − ŵ) = 0 means that ŵ keeps 1 − ε of w. Errors that are noise average out
over layers, shortenings add up. So blocks of Q2_K to Q5_K, IQ4_NL and IQ4_XS keep the codes of least error, and their float16 scales are
raised until the block is as long as its weights were, which costs ε more squared error.

Where it falls short: rows above 1 lose more than ggml's. On the bundled model the shortening did no harm, and undoing it costs 1 to
5 % at two and three bits. Legacy types, lattices, ternary types and four-bit floats are not lengthened.

## From checkpoint to file

`{end_to_end_command}`: reading bf16, encoding, counting the error, writing; only the encoder differs. The error is the
root of the squared weight error over the whole file. These files were made before blocks
were given their length back, which adds up to 4 % to it at two bits.

{end_to_end}

Q8_0, whose plain rounding leaves nothing to search, spends most of its time on the way; the searching types spend it
searching. `libgguf` is a portable build of ggml: a llama-quantize compiled for one processor is faster, and has not been
raced here.

## The encoders alone

`{encode_command}`: Gaussian weights, and heavy-tailed ones (Student's t with 3 degrees of freedom); squared error, with
importance weighted by it, of what is written: with the length restored where it is. Legacy types without importance are ggml's bytes, one for one.

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


def two_judges(document: dict[str, Any]) -> str:
    rows = [
        [
            row["type"] + (", importance" if row["importance"] else ""),
            row["judge"],
            f"{row['ggml_kl']:.4f}",
            *(f"{row[f'{who}_ratio']:.2f} ± {row[f'{who}_error']:.2f}" for who in ("search", "ours")),
        ]
        for row in document["rows"]
    ]
    return table(["type", "network", "ggml's KL", "least error", "ours: length restored"], rows)


def page() -> str:
    documents = {name: load(name) for name in ("two_judges", "end_to_end", "encode", "memory")}
    return TEXT.format(
        processor=documents["encode"]["processor"],
        two_judges=two_judges(documents["two_judges"]),
        end_to_end=end_to_end(documents["end_to_end"]),
        encode=encode(documents["encode"]),
        memory=memory(documents["memory"]),
        **{f"{name}_command": document["command"] for name, document in documents.items()},
    )


if __name__ == "__main__":
    PAGE.write_text(page())
