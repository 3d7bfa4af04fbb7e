"""SmolLM3: Llama's tensors and permutation, no rotary embedding in every fourth layer.

Which layers go without is built into llama.cpp (NoPE, Yang et al. 2025, arXiv:2501.18795).
"""

from __future__ import annotations

from dither.models.arch.family import (
    COMMON_KEYS,
    DENSE_FEEDS,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    NORMS,
    ROTATED_ATTENTION,
    Config,
    Family,
    feeds,
    keys,
    rules,
)


def built_in(config: Config) -> Config:
    """transformers marks a rotated layer with 1."""
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]}


FAMILIES = (
    Family(
        name="SmolLM3",
        arch="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        model_types=("smollm3",),
        rules=rules(EMBEDDING, NORMS, ROTATED_ATTENTION, FEED_FORWARD, HEAD),
        feeds=feeds(DENSE_FEEDS),
        keys=keys(COMMON_KEYS),
        defaults={
            "rms_norm_eps": 1e-6,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
        },
        assumes={"hidden_act": "silu", "partial_rotary_factor": 1.0, "use_sliding_window": False},
        assumes_of=built_in,
    ),
)
