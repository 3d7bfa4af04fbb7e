"""SmolLM3: Llama's tensors and permutation, no rotary embedding in every fourth layer.

Which layers go without is built into llama.cpp (NoPE, Yang et al. 2025, arXiv:2501.18795).
"""

from __future__ import annotations

from dither.models.arch import usual
from dither.models.arch.family import Config, graph
from dither.models.arch.llama import LLAMA


def built_in(config: Config) -> Config:
    """transformers marks a rotated layer with 1; without marks it counts by the interval."""
    marked = {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]}
    return marked if config.get("no_rope_layers") else {**marked, "no_rope_layer_interval": 4}


FAMILIES = (
    LLAMA.variant(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "smollm3",
        arch="smollm3",
        graph=graph(*usual.GRAPH_DENSE),
        defaults={
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
        },
        assumes={"use_sliding_window": False},
        assumes_of=built_in,
        scalings=usual.DECODER.scalings,
    ),
)
