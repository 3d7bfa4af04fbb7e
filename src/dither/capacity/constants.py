"""Every constant of the arithmetic, by name, for programs in other languages that compute the same.

The dashboard's page does (`showing/page/js/memory.js`): it is handed these numbers with its document
instead of repeating them, so that a constant is changed in one place.
"""

from __future__ import annotations

from typing import Any

from dither.capacity import advice, memory, speed, words


def constants() -> dict[str, Any]:
    """Bytes, tokens, seconds and shares, as their modules name them."""
    return {
        "cells": memory.CELLS,
        "batch": memory.BATCH,
        "kv_types": {name: list(block) for name, block in memory.KV_TYPES.items()},
        "runtime": memory.RUNTIME,
        "token": memory.TOKEN,
        "merge": memory.MERGE,
        "gpu_runtime": memory.GPU_RUNTIME,
        "margin_most": memory.MARGIN_MOST,
        "margin_share": memory.MARGIN_SHARE,
        "low": speed.LOW,
        "likely": speed.LIKELY,
        "high": speed.HIGH,
        "cpu_layer": speed.CPU_LAYER,
        "gpu_layer": speed.GPU_LAYER,
        "sampling": speed.SAMPLING,
        "reading": advice.READING,
        "ladder": list(words.LADDER),
        "least_good": words.LEAST_GOOD,
        "good_bits": words.GOOD_BITS,
    }
