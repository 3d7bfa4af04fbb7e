"""Seconds of one linear layer as `dither.load` makes it, beside a dense one of the same type.

    python benchmarks/load_layer.py [--sizes 2048 4096] [--inputs 1 16 512] [--threads 1] [--save NAME]

A square layer of random weights in bfloat16: dense; `dither`, int4 in groups of 64 de-quantized for each
product; `torch`, the same codes on torch's 4-bit kernel.  Contestants run in turn within each repeat; the
median is shown, in milliseconds, and its ratio to the dense layer's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import record
import torch
from torch import nn

from dither.loading.int4 import Int4Linear
from dither.loading.linear import Grid, QuantizedLinear

GROUP = 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    options.add_argument("--inputs", type=int, nargs="+", default=[1, 16, 512])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--save", metavar="NAME")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    rows: list[dict[str, Any]] = []
    for size in chosen.sizes:
        for inputs in chosen.inputs:
            rows += race(size, inputs, chosen.repeats)
    if chosen.save:
        record.save(chosen.save, rows)


@torch.no_grad()
def race(size: int, inputs: int, repeats: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (size, size), generator=random, dtype=torch.uint8)
    scale = (torch.rand(size, size // GROUP, generator=random) / 100).bfloat16()
    grid = Grid("steps", 4, size)
    plain = QuantizedLinear(grid, grid.packed(codes), scale, codes[:, :0], None)
    dense = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    dense.weight.data = plain.dequantize(torch.bfloat16)
    x = torch.randn(inputs, size, generator=random).bfloat16()
    layers: dict[str, nn.Module] = {"dense": dense, "dither": plain, "torch": Int4Linear(plain)}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 1):
        for name, layer in layers.items():
            began = time.perf_counter()
            layer(x)
            if repeat:  # the first warms
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows = []
    for name, median in medians.items():
        ratio = median / medians["dense"]
        print(f"{size}² × {inputs:4d}  {name:7s} {1000 * median:9.2f} ms  {ratio:6.2f} of dense")
        rows.append({"size": size, "inputs": inputs, "layer": name, "seconds": median, "ratio": ratio})
    return rows


if __name__ == "__main__":
    main()
