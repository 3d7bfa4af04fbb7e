"""Llama 2 and 3.x, and everything that trains under their name: SmolLM2, TinyLlama, Vicuna, DeepSeek-LLM.

The one trap is rotary embedding.  Meta's weights rotate neighboring rows (2i, 2i+1); transformers
rotates rows i and i + d/2, and permuted q and k when it converted them.  llama.cpp rotates neighbors
again, so both are permuted back.
"""

from __future__ import annotations

from dataclasses import replace

from dither.models.arch import usual
from dither.models.arch.family import graph, rules

BIASES = """
blk.*.attn_output.bias? = hidden
"""
FEED_FORWARD_BIASES = """
blk.*.ffn_gate.bias? = inner
blk.*.ffn_up.bias? = inner
blk.*.ffn_down.bias? = hidden
"""
FREQUENCIES = """
rope_freqs.weight? = frequencies
rope_factors_long.weight? = long_frequencies
rope_factors_short.weight? = long_frequencies
"""

LLAMA = usual.DECODER.variant(
    "Llama",
    "LlamaForCausalLM",
    "llama",
    arch="llama",
    rules=rules(usual.EMBEDDING, usual.NORMS, usual.ROTATED_ATTENTION, usual.FEED_FORWARD, usual.HEAD),
    graph=graph(*usual.GRAPH_DENSE, BIASES, FEED_FORWARD_BIASES, FREQUENCIES),
    biases={**usual.ATTENTION_BIAS, **usual.MLP_BIAS},
    scalings=("linear", "yarn", "dynamic", "llama3", "longrope"),
)

FAMILIES = (
    replace(
        LLAMA,
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        defaults={**LLAMA.defaults, "attention_bias": False, "mlp_bias": False},
    ),
)
