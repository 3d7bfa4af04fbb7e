"""Qwen 1.5, 2 and 2.5: biases on q, k and v, rotary halves kept apart (llama.cpp rotates them so)."""

from __future__ import annotations

from dither.models.arch import usual
from dither.models.arch.family import graph

QWEN2 = usual.DECODER.variant(
    "Qwen2",
    "Qwen2ForCausalLM",
    "qwen2",
    arch="qwen2",
    graph=graph(*usual.GRAPH_DENSE, "output.bias? = vocabulary"),
    biases=usual.QKV_BIAS,
    query_is_hidden=True,
    defaults={"use_sliding_window": False},
    ignores_window=True,
)

FAMILIES = (QWEN2,)
