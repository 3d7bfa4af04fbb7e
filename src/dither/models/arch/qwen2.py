"""Qwen 1.5, 2 and 2.5: biases on q, k and v, rotary halves kept apart (llama.cpp rotates them so)."""

from __future__ import annotations

from dither.models.arch import usual

QWEN2 = usual.DECODER.variant(
    "Qwen2", "Qwen2ForCausalLM", "qwen2", arch="qwen2", defaults={"use_sliding_window": False}, ignores_window=True
)

FAMILIES = (QWEN2,)
