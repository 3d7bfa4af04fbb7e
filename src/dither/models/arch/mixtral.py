"""Mixtral: Mistral's attention over a mixture of experts (Jiang et al. 2024, arXiv:2401.04088).

Checkpoints name an expert's matrices w1 (gate), w2 (down) and w3 (up); transformers 5 may store all
experts fused instead.  GGUF wants each of the three stacked over the experts.
"""

from __future__ import annotations

from dither.models.arch import llama, usual
from dither.models.arch.family import feeds, graph, keys, rules

EXPERTS = """
model.layers.*.block_sparse_moe.gate.weight -> blk.*.ffn_gate_inp.weight
model.layers.*.mlp.gate.weight -> blk.*.ffn_gate_inp.weight
model.layers.*.block_sparse_moe.experts.#.w1.weight -> blk.*.ffn_gate_exps.weight [stack]
model.layers.*.block_sparse_moe.experts.#.w3.weight -> blk.*.ffn_up_exps.weight [stack]
model.layers.*.block_sparse_moe.experts.#.w2.weight -> blk.*.ffn_down_exps.weight [stack]
"""
# llama.cpp's graph of a "llama" with experts: their width is the feed-forward layer's.
GRAPH_EXPERTS = """
blk.*.ffn_gate_inp.weight = experts hidden
blk.*.ffn_gate_exps.weight? = experts inner hidden
blk.*.ffn_up_exps.weight = experts inner hidden
blk.*.ffn_down_exps.weight = experts hidden inner
"""

FAMILIES = (
    usual.DECODER.variant(
        "Mixtral",
        "MixtralForCausalLM",
        "mixtral",
        arch="llama",
        rules=rules(usual.EMBEDDING, usual.NORMS, usual.ROTATED_ATTENTION, EXPERTS, usual.FUSED_EXPERTS, usual.HEAD),
        feeds=feeds(usual.EXPERT_FEEDS),
        keys=keys(usual.COMMON_KEYS, usual.EXPERT_KEYS),
        graph=graph(
            usual.GRAPH_OUTSIDE,
            usual.GRAPH_NORMS,
            usual.GRAPH_ATTENTION,
            GRAPH_EXPERTS,
            llama.BIASES,
            llama.FREQUENCIES,
        ),
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        ignores_window=True,
    ),
)
