"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: q, k, v in one matrix, gate and up in another, both kept fused.

The long-context models scale every rotary frequency by its own factor, one list for prompts that fit
the original context and one for longer ones (LongRoPE, Ding et al. 2024, arXiv:2402.13753).
"""

from __future__ import annotations

from dataclasses import replace

from dither.models.arch import usual
from dither.models.arch.family import feeds, graph, keys, linear, rules

FUSED = "\n".join(
    linear(f"model.layers.*.{source}", f"blk.*.{target}")
    for source, target in (
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    )
)
GRAPH = """
blk.*.ffn_up.weight = 2*inner hidden
blk.*.ffn_down.weight = hidden inner
rope_factors_long.weight? = half_rotated
rope_factors_short.weight? = half_rotated
"""
FEEDS = """
attn_norm -> attn_qkv
attn_qkv -> attn_output
ffn_norm -> ffn_up
ffn_up -> ffn_down
output_norm -> output
"""

FAMILIES = (
    replace(
        usual.DECODER,
        name="Phi-3",
        arch="phi3",
        architectures=("Phi3ForCausalLM",),
        model_types=("phi3",),
        rules=rules(usual.EMBEDDING, usual.NORMS, FUSED, usual.HEAD),
        feeds=feeds(FEEDS),
        keys=keys(
            usual.COMMON_KEYS,
            "attention.sliding_window <- sliding_window [u32=0]",  # zero tells llama.cpp that this is Phi-4
            "rope.scaling.original_context_length <- original_max_position_embeddings [u32]",
        ),
        graph=graph(usual.GRAPH_OUTSIDE, usual.GRAPH_NORMS, usual.GRAPH_ATTENTION, GRAPH),
        query_is_hidden=True,
        defaults={**usual.DECODER.defaults, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        assumes={"hidden_act": "silu"},
        scalings=("longrope",),
        ignores_window=True,
    ),
)
