"""What most families have in common: tensors, keys and feeds as lines, and the decoder that they vary."""

from __future__ import annotations

from dither.models.arch.family import Family, feeds, graph, keys, linear, rules

EMBEDDING = "model.embed_tokens.weight -> token_embd.weight [vocabulary]"
HEAD = """
model.norm.weight -> output_norm.weight
lm_head.weight -> output.weight [vocabulary]
"""
NORMS = """
model.layers.*.input_layernorm.weight -> blk.*.attn_norm.weight
model.layers.*.post_attention_layernorm.weight -> blk.*.ffn_norm.weight
"""
_PROJECTIONS = {"q": "q", "k": "k", "v": "v", "o": "output"}
ATTENTION = "\n".join(
    linear(f"model.layers.*.self_attn.{source}_proj", f"blk.*.attn_{target}") for source, target in _PROJECTIONS.items()
)
# Llama's checkpoints keep the two halves of a rotated pair d/2 rows apart; llama.cpp wants them adjacent.
_ROTATED = {"q": "rope_rows_q", "k": "rope_rows_k"}
ROTATED_ATTENTION = "\n".join(
    linear(f"model.layers.*.self_attn.{source}_proj", f"blk.*.attn_{target}", _ROTATED.get(source, ""))
    for source, target in _PROJECTIONS.items()
)
HEAD_NORMS = """
model.layers.*.self_attn.q_norm.weight -> blk.*.attn_q_norm.weight
model.layers.*.self_attn.k_norm.weight -> blk.*.attn_k_norm.weight
"""
FEED_FORWARD = "\n".join(
    linear(f"model.layers.*.mlp.{part}_proj", f"blk.*.ffn_{part}") for part in ("gate", "up", "down")
)
FUSED_EXPERTS = """
model.layers.*.mlp.experts.gate_up_proj -> blk.*.ffn_gate_exps.weight [expert_gate]
model.layers.*.mlp.experts.gate_up_proj -> blk.*.ffn_up_exps.weight [expert_up]
model.layers.*.mlp.experts.down_proj -> blk.*.ffn_down_exps.weight
"""

COMMON_KEYS = """
block_count <- num_hidden_layers [u32]
context_length <- max_position_embeddings [u32]
embedding_length <- hidden_size [u32]
feed_forward_length <- intermediate_size [u32]
attention.head_count <- num_attention_heads [u32]
attention.head_count_kv <- num_key_value_heads | num_attention_heads [u32]
attention.layer_norm_rms_epsilon <- rms_norm_eps [f32]
"""
EXPERT_KEYS = """
expert_count <- num_local_experts | num_experts [u32]
expert_used_count <- num_experts_per_tok [u32]
"""

DENSE_FEEDS = """
attn_norm -> attn_q attn_k attn_v
attn_v -> attn_output
ffn_norm -> ffn_gate ffn_up
ffn_up -> ffn_down
output_norm -> output
"""
EXPERT_FEEDS = """
attn_norm -> attn_q attn_k attn_v
attn_v -> attn_output
ffn_norm -> ffn_gate_inp ffn_gate_exps ffn_up_exps
ffn_up_exps -> ffn_down_exps
output_norm -> output
"""
HEAD_NORM_FEEDS = "attn_q_norm ->\nattn_k_norm ->"

# What llama.cpp's loader creates (src/models/*.cpp; attention: `create_tensor_qkv` in src/llama-model.cpp).
GRAPH_OUTSIDE = """
token_embd.weight = vocabulary hidden
output_norm.weight = hidden
output.weight? = vocabulary hidden
"""
GRAPH_NORMS = """
blk.*.attn_norm.weight = hidden
blk.*.ffn_norm.weight = hidden
"""
GRAPH_ATTENTION = """
blk.*.attn_qkv.weight? = query+2*key hidden
blk.*.attn_qkv.bias? = query+2*key beside blk.*.attn_qkv.weight
blk.*.attn_q.weight = query hidden unless blk.*.attn_qkv.weight
blk.*.attn_k.weight = key hidden unless blk.*.attn_qkv.weight
blk.*.attn_v.weight = key hidden unless blk.*.attn_qkv.weight
blk.*.attn_q.bias? = query unless blk.*.attn_qkv.bias
blk.*.attn_k.bias? = key unless blk.*.attn_qkv.bias
blk.*.attn_v.bias? = key unless blk.*.attn_qkv.bias
blk.*.attn_output.weight = hidden query
"""
GRAPH_HEAD_NORMS = """
blk.*.attn_q_norm.weight = head
blk.*.attn_k_norm.weight = head
"""
GRAPH_FEED_FORWARD = """
blk.*.ffn_gate.weight = inner hidden
blk.*.ffn_up.weight = inner hidden
blk.*.ffn_down.weight = hidden inner
"""
GRAPH_EXPERTS = """
blk.*.ffn_gate_inp.weight = experts hidden
blk.*.ffn_gate_exps.weight = experts expert_inner hidden
blk.*.ffn_up_exps.weight = experts expert_inner hidden
blk.*.ffn_down_exps.weight = experts hidden expert_inner
"""
GRAPH_DENSE = (GRAPH_OUTSIDE, GRAPH_NORMS, GRAPH_ATTENTION, GRAPH_FEED_FORWARD)
_QKV = ("attn_q", "attn_k", "attn_v")
# Switches of config.json, and the layers that have a bias in transformers' network where they are on.
ATTENTION_BIAS = {"attention_bias": (*_QKV, "attn_output")}
MLP_BIAS = {"mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}
QKV_BIAS = {"": _QKV}

# The decoder that most families vary: norms before attention and a gated feed-forward layer, rotary halves apart.
DECODER = Family(
    name="",
    arch="",
    architectures=(),
    model_types=(),
    rules=rules(EMBEDDING, NORMS, ATTENTION, FEED_FORWARD, HEAD),
    feeds=feeds(DENSE_FEEDS),
    keys=keys(COMMON_KEYS),
    graph=graph(*GRAPH_DENSE),
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False},
    assumes={"hidden_act": "silu", "partial_rotary_factor": 1.0},
)
