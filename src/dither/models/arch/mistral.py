"""Mistral 7B, Nemo and Small: Llama's tensors, with or without a sliding window that llama.cpp leaves out."""

from __future__ import annotations

from dither.models.arch.family import (
    COMMON_KEYS,
    DENSE_FEEDS,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    NORMS,
    ROTATED_ATTENTION,
    Family,
    feeds,
    keys,
    rules,
)

FAMILIES = (
    Family(
        name="Mistral",
        arch="llama",
        architectures=("MistralForCausalLM",),
        model_types=("mistral",),
        rules=rules(EMBEDDING, NORMS, ROTATED_ATTENTION, FEED_FORWARD, HEAD),
        feeds=feeds(DENSE_FEEDS),
        keys=keys(COMMON_KEYS),
        defaults={
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
        },
        assumes={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        ignores_window=True,
    ),
)
