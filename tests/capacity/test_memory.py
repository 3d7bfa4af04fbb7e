"""The arithmetic against numbers computed by hand for published shapes.

`golden.json` is read by everybody who computes the same (a page in a browser, say).  The expected bytes
are spelled out here, factor by factor, from the models' config.json and llama.cpp's rules; the file must
hold exactly those, and the code must give exactly those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dither.capacity.memory import (
    Layer,
    Shape,
    batch_tokens,
    cache_bytes,
    cells,
    compute_bytes,
    margin,
    needed,
    overhead_bytes,
    padded,
    weights_budget,
)
from dither.capacity.speed import active_bytes, decode_speed

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
KIB, MIB, GIB = 2**10, 2**20, 2**30

# What each entry of golden.json must hold, by hand.  cells · layers · heads · (d_k + d_v) · bytes.
CACHE = {
    # 2 = keys and values; 1 GiB is what every description of Llama 3's cache at 8 K says
    "Llama-3.1-8B, 8192, f16": 8192 * 32 * 8 * 128 * 2 * 2,
    "Llama-3.1-8B, 131072, q8_0": 131072 * 32 * 8 * 128 * 2 * 34 // 32,
    "Llama-3.1-8B, 8192, f16, 4 slots": 4 * 8192 * 32 * 8 * 128 * 2 * 2,
    "Llama-3.1-70B, 8192, f16": 8192 * 80 * 8 * 128 * 2 * 2,
    "Llama-3.1-70B, 8000, q4_0": 8192 * 80 * 8 * 128 * 2 * 18 // 32,  # 8000 → 32 · 256
    "Qwen3-30B-A3B, 32768, f16": 32768 * 48 * 4 * 128 * 2 * 2,
    # 62 layers, every 6th in full: 10; the other 52 look back 1024, and one batch of 512 goes on top
    "Gemma-3-27B, 32768, f16": 32768 * 10 * 16 * 128 * 2 * 2 + (1024 + 512) * 52 * 16 * 128 * 2 * 2,
    "Gemma-3-27B, 32768, q8_0": (32768 * 10 + 1536 * 52) * 16 * 128 * 2 * 34 // 32,
    "Gemma-3-27B, 1024, f16": 1024 * 62 * 16 * 128 * 2 * 2,  # shorter than the window: nothing is saved
    # 512 + 64 numbers per token and layer, keys alone
    "DeepSeek-V3, 16384, f16": 16384 * 61 * (512 + 64) * 2,
    "DeepSeek-V3, 16384, q8_0": 16384 * 61 * (512 + 64) * 34 // 32,
    # (4 − 1) · (5120 + 2 · 0 · 16) + 16 · 5120 float32 numbers in each of 64 layers, whatever the context
    "Mamba-2.8B, 8192, f16": 64 * (3 * 5120 + 16 * 5120) * 4,
    # 30 layers of which 20 keep: every 5th in full, 4 and 16; 2 heads of 256, window 512
    "Gemma-3n-E2B, 8192, f16": (8192 * 4 + (512 + 512) * 16) * 2 * 256 * 2 * 2,
}

# batch · (4 bytes · activations + 32 of indices + 2 bytes · cells of each mask) + 4 · vocabulary · slots
COMPUTE = {
    "Llama-3.1-8B, 8192, f16": 512 * (4 * (5 * 4096 + 3 * 14336) + 32 + 2 * 8192) + 4 * 128256,
    "Llama-3.1-8B, 131072, q8_0": 512 * (4 * (5 * 4096 + 3 * 14336) + 32 + 2 * 131072)
    + 4 * 128256
    + 4 * (128 * 128 + 64 * 64),
    "Llama-3.1-8B, 8192, f16, 4 slots": 512 * (4 * (5 * 4096 + 3 * 14336) + 32 + 2 * 8192) + 4 * 128256 * 4,
    "Llama-3.1-70B, 8192, f16": 512 * (4 * (5 * 8192 + 3 * 28672) + 32 + 2 * 8192) + 4 * 128256,
    "Llama-3.1-70B, 8000, q4_0": 512 * (4 * (5 * 8192 + 3 * 28672) + 32 + 2 * 8192)
    + 4 * 128256
    + 4 * (128 * 128 + 64 * 64),
    # 8 experts of 768 inside, answers of 2048 each waiting twice: 3 · 2048 + 8 · 768 + 2 · 8 · 2048
    "Qwen3-30B-A3B, 32768, f16": 512 * (4 * (6144 + 6144 + 32768) + 32 + 2 * 32768) + 4 * 151936,
    "Gemma-3-27B, 32768, f16": 512 * (4 * (5 * 5376 + 3 * 21504) + 32 + 2 * (32768 + 1536)) + 4 * 262144,
    # a rotation of keys and one of values for each of the two caches
    "Gemma-3-27B, 32768, q8_0": 512 * (4 * (5 * 5376 + 3 * 21504) + 32 + 2 * (32768 + 1536))
    + 4 * 262144
    + 2 * 4 * (128 * 128 + 64 * 64),
    "Gemma-3-27B, 1024, f16": 512 * (4 * (5 * 5376 + 3 * 21504) + 32 + 2 * (1024 + 1024)) + 4 * 262144,
    # 5 · 7168, 128 queries of 192, and twice the 576 that each becomes to meet the cache: more than 8 experts
    "DeepSeek-V3, 16384, f16": 512 * (4 * (35840 + 2 * 128 * 576 + 128 * 192) + 32 + 2 * 16384) + 4 * 129280,
    "DeepSeek-V3, 16384, q8_0": 512 * (4 * (35840 + 2 * 128 * 576 + 128 * 192) + 32 + 2 * 16384)
    + 4 * 129280
    + 4 * (64 * 64 + 64 * 64),
    # 7 times the inner width and the residual; one layer's state is copied
    "Mamba-2.8B, 8192, f16": 512 * (4 * (2560 + 7 * 5120) + 32) + 4 * 50280 + 4 * 19 * 5120,
    "Gemma-3n-E2B, 8192, f16": 512 * (4 * (5 * 2048 + 3 * 8192) + 32 + 2 * (8192 + 1024)) + 4 * 262144,
}


def shape(entry: dict[str, Any]) -> Shape:
    stored = entry["shape"]
    layers = [Layer(**kind["layer"]) for kind in stored["layers"] for _ in range(kind["count"])]
    return Shape(layers=tuple(layers), **{key: value for key, value in stored.items() if key != "layers"})


@pytest.mark.parametrize("entry", GOLDEN["cases"], ids=lambda entry: entry["name"])
def test_published_shapes_take_the_bytes_computed_by_hand(entry: dict[str, Any]) -> None:
    name, asked, expected = entry["name"], entry["inputs"], entry["bytes"]
    assert entry["source"]
    assert (expected["cache"], expected["compute"]) == (CACHE[name], COMPUTE[name])
    counted = shape(entry)
    tokens = counted.vocabulary * (230 + 200 * counted.merges)
    assert expected["overhead"] == 10 * MIB + tokens
    parts = needed(counted, expected["weights"], asked["context"], asked["kv"], asked["slots"])
    assert parts.cache == expected["cache"]
    assert parts.compute == expected["compute"]
    assert parts.overhead == expected["overhead"] == overhead_bytes(counted)
    assert parts.total == expected["total"] == sum(expected[k] for k in ("weights", "cache", "compute", "overhead"))


def test_every_case_is_in_the_file() -> None:
    assert {entry["name"] for entry in GOLDEN["cases"]} == set(CACHE) == set(COMPUTE)


def test_cells_come_in_steps_and_a_window_bounds_them() -> None:
    assert [cells(count) for count in (1, 256, 257, 8000)] == [256, 256, 512, 8192]
    assert cells(100_000, window=1024) == 1536 and cells(300, window=1024) == 512
    assert padded(0, 256) == 0 and batch_tokens(100) == 256 and batch_tokens(100, slots=8) == 512


def tiny() -> Shape:
    return Shape((Layer(keys=64, values=64),) * 3, width=128, inner=384, query=128, head=64, vocabulary=1000)


def test_the_budget_is_what_the_rest_leaves() -> None:
    rest = cache_bytes(tiny(), 4096, "q8_0", 2) + compute_bytes(tiny(), 4096, "q8_0", 2) + overhead_bytes(tiny())
    memory = 8 * GIB
    budget = weights_budget(memory, tiny(), 4096, "q8_0", 2)
    assert budget == memory - 512 * MIB - rest  # a sixteenth stays free
    assert needed(tiny(), budget, 4096, "q8_0", 2).total + margin(memory) == memory
    assert weights_budget(MIB, tiny(), 4096) == 0
    assert margin(64 * GIB) == GIB


def test_only_chosen_experts_are_read() -> None:
    tensors = [
        ("token_embd.weight", 1000),
        ("output.weight", 900),
        ("blk.0.attn_q.weight", 100),
        ("blk.0.ffn_up_exps.weight", 1600),
        ("blk.0.ffn_up_shexp.weight", 7),
    ]
    assert active_bytes(tensors, 128, 8) == 900 + 100 + 1600 * 8 // 128 + 7
    tied = [entry for entry in tensors if entry[0] != "output.weight"]
    assert active_bytes(tied, 0, 0) == 1000 + 100 + 1600 + 7


def test_speed_is_a_band_around_bandwidth() -> None:
    speed = decode_speed([(4 * 10**9, 100e9)])
    assert speed.low < speed.likely < speed.high < 25  # 25 tokens/s would take every byte per second there is
    both = decode_speed([(2 * 10**9, 100e9), (2 * 10**9, 10e9)])
    assert both.likely == pytest.approx(speed.likely / 5.5)
    assert decode_speed([(4 * 10**9, 100e9)], fixed=1.0).likely < 1
