"""Llama 2 and 3.x, and everything that trains under their name: SmolLM2, TinyLlama, Vicuna, DeepSeek-LLM.

The one trap is rotary embedding.  Meta's weights rotate neighboring rows (2i, 2i+1); transformers
rotates rows i and i + d/2, and permuted q and k when it converted them.  llama.cpp rotates neighbors
again, so both are permuted back.
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
    Family,
    feeds,
    keys,
    rules,
)

FAMILIES = (
    Family(
        name="Llama",
        arch="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        model_types=("llama",),
        rules=rules(EMBEDDING, NORMS, ROTATED_ATTENTION, FEED_FORWARD, HEAD),
        feeds=feeds(DENSE_FEEDS),
        keys=keys(COMMON_KEYS),
        defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False},
        assumes={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        scalings=("linear", "yarn", "dynamic", "llama3", "longrope"),
    ),
)
