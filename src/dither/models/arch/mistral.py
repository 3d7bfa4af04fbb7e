"""Mistral 7B, Nemo and Small: Llama's tensors, with or without a sliding window that llama.cpp leaves out."""

from __future__ import annotations

from dither.models.arch import usual
from dither.models.arch.llama import LLAMA

FAMILIES = (
    LLAMA.variant(
        "Mistral",
        "MistralForCausalLM",
        "mistral",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        biases={},
        scalings=usual.DECODER.scalings,
        ignores_window=True,
    ),
)
