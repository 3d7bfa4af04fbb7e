"""Qwen3, dense and mixture of experts: no biases, an RMS norm over every query and key head."""

from __future__ import annotations

from dither.models.arch.family import (
    ATTENTION,
    COMMON_KEYS,
    DENSE_FEEDS,
    EMBEDDING,
    EXPERT_FEEDS,
    EXPERT_KEYS,
    FEED_FORWARD,
    FUSED_EXPERTS,
    HEAD,
    HEAD_NORMS,
    NORMS,
    Family,
    feeds,
    keys,
    rules,
)

EXPERTS = """
model.layers.*.mlp.gate.weight -> blk.*.ffn_gate_inp.weight
model.layers.*.mlp.experts.#.gate_proj.weight -> blk.*.ffn_gate_exps.weight [stack]
model.layers.*.mlp.experts.#.up_proj.weight -> blk.*.ffn_up_exps.weight [stack]
model.layers.*.mlp.experts.#.down_proj.weight -> blk.*.ffn_down_exps.weight [stack]
"""
SHARED = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "use_sliding_window": False}
BUILT_IN = {"hidden_act": "silu", "partial_rotary_factor": 1.0}

FAMILIES = (
    Family(
        name="Qwen3",
        arch="qwen3",
        architectures=("Qwen3ForCausalLM",),
        model_types=("qwen3",),
        rules=rules(EMBEDDING, NORMS, ATTENTION, HEAD_NORMS, FEED_FORWARD, HEAD),
        feeds=feeds(DENSE_FEEDS),
        keys=keys(COMMON_KEYS),
        defaults={**SHARED, "head_dim": 128},
        assumes=BUILT_IN,
        ignores_window=True,
    ),
    Family(
        name="Qwen3-MoE",
        arch="qwen3moe",
        architectures=("Qwen3MoeForCausalLM",),
        model_types=("qwen3_moe",),
        rules=rules(EMBEDDING, NORMS, ATTENTION, HEAD_NORMS, EXPERTS, FUSED_EXPERTS, HEAD),
        feeds=feeds(EXPERT_FEEDS),
        keys=keys(COMMON_KEYS, EXPERT_KEYS, "expert_feed_forward_length <- moe_intermediate_size [u32]"),
        defaults={**SHARED, "num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1},
        # Every layer has experts there, and the chosen experts' weights are scaled to add up to one.
        assumes={**BUILT_IN, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ignores_window=True,
    ),
)
