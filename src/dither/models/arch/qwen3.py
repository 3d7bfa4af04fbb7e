"""Qwen3, dense and mixture of experts: no biases, an RMS norm over every query and key head."""

from __future__ import annotations

from dither.models.arch import usual
from dither.models.arch.family import feeds, graph, keys, rules
from dither.models.arch.qwen2 import QWEN2

EXPERTS = """
model.layers.*.mlp.gate.weight -> blk.*.ffn_gate_inp.weight
model.layers.*.mlp.experts.#.gate_proj.weight -> blk.*.ffn_gate_exps.weight [stack]
model.layers.*.mlp.experts.#.up_proj.weight -> blk.*.ffn_up_exps.weight [stack]
model.layers.*.mlp.experts.#.down_proj.weight -> blk.*.ffn_down_exps.weight [stack]
"""
FAMILIES = (
    QWEN2.variant(
        "Qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        arch="qwen3",
        rules=rules(usual.EMBEDDING, usual.NORMS, usual.ATTENTION, usual.HEAD_NORMS, usual.FEED_FORWARD, usual.HEAD),
        feeds=feeds(usual.DENSE_FEEDS, usual.HEAD_NORM_FEEDS),
        graph=graph(*usual.GRAPH_DENSE, usual.GRAPH_HEAD_NORMS, "cls.output.weight? = labels hidden"),
        biases=usual.ATTENTION_BIAS,
        query_is_hidden=False,
        defaults={"head_dim": 128, "attention_bias": False},
    ),
    QWEN2.variant(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        arch="qwen3moe",
        rules=rules(
            usual.EMBEDDING, usual.NORMS, usual.ATTENTION, usual.HEAD_NORMS, EXPERTS, usual.FUSED_EXPERTS, usual.HEAD
        ),
        feeds=feeds(usual.EXPERT_FEEDS, usual.HEAD_NORM_FEEDS),
        keys=keys(usual.COMMON_KEYS, usual.EXPERT_KEYS, "expert_feed_forward_length <- moe_intermediate_size [u32]"),
        graph=graph(
            usual.GRAPH_OUTSIDE, usual.GRAPH_NORMS, usual.GRAPH_ATTENTION, usual.GRAPH_HEAD_NORMS, usual.GRAPH_EXPERTS
        ),
        biases=usual.ATTENTION_BIAS,
        query_is_hidden=False,
        defaults={"attention_bias": False, "num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1},
        # Every layer has experts there, and the chosen experts' weights are scaled to add up to one.
        assumes={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
)
