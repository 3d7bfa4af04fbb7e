"""Qwen 1.5, 2 and 2.5: biases on q, k and v, rotary halves kept apart (llama.cpp rotates them so)."""

from __future__ import annotations

from dither.models.arch.family import (
    ATTENTION,
    COMMON_KEYS,
    DENSE_FEEDS,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    NORMS,
    Family,
    feeds,
    keys,
    rules,
)

FAMILIES = (
    Family(
        name="Qwen2",
        arch="qwen2",
        architectures=("Qwen2ForCausalLM",),
        model_types=("qwen2",),
        rules=rules(EMBEDDING, NORMS, ATTENTION, FEED_FORWARD, HEAD),
        feeds=feeds(DENSE_FEEDS),
        keys=keys(COMMON_KEYS),
        defaults={
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        assumes={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        ignores_window=True,
    ),
)
