"""Gemma 2 and 3 (text): norms stored as w − 1, four norms a layer, local and global attention in turn.

Gemma 2 caps attention scores and logits by tanh (Gemma Team 2024, arXiv:2408.00118, section 2); Gemma 3
drops the caps for norms on queries and keys, and rotates its local layers with a base of their own
(arXiv:2503.19786, section 2).  The embedding, scaled on its way in, is the output matrix in both.
llama.cpp derives which layers are local, and the scale of attention scores, from the shape alone: both
are held against config.json.  A multimodal Gemma 3 checkpoint gives up its text model; its eyes stay
behind.
"""

from __future__ import annotations

from functools import partial

from dither.models.arch import usual
from dither.models.arch.family import Config, Family, feeds, graph, keys, rules

FOUR_NORMS = """
model.layers.*.input_layernorm.weight -> blk.*.attn_norm.weight
model.layers.*.post_attention_layernorm.weight -> blk.*.post_attention_norm.weight
model.layers.*.pre_feedforward_layernorm.weight -> blk.*.ffn_norm.weight
model.layers.*.post_feedforward_layernorm.weight -> blk.*.post_ffw_norm.weight
"""
GRAPH_POST_NORMS = """
blk.*.post_attention_norm.weight = hidden
blk.*.post_ffw_norm.weight = hidden
"""
# Gemma 2's loader takes the embedding for the output matrix, whatever else the file holds.
GRAPH_OUTSIDE_2 = """
token_embd.weight = vocabulary hidden
output_norm.weight = hidden
"""
# For embedding models made of Gemma 3.
GRAPH_DENSE_OUT = """
dense_2.weight? = dense_out hidden
dense_3.weight? = hidden dense_in
"""
NORM_FEEDS = "post_attention_norm ->\npost_ffw_norm ->"


def plus_one(table: str) -> str:
    """The same table with every norm's offset marked."""
    lines = (line for line in table.splitlines() if line.strip())
    return "\n".join(f"{line} [plus_one]" if "norm.weight" in line else line for line in lines)


WINDOW = "attention.sliding_window <- sliding_window [u32?]"
SOFTCAPS = """
attn_logit_softcapping <- attn_logit_softcapping [f32]
final_logit_softcapping <- final_logit_softcapping [f32]
"""
DEFAULTS_2 = {
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "head_dim": 256,
    "num_key_value_heads": 4, "num_attention_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
DEFAULTS_3 = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
    "head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26,
}  # fmt: skip


def built_in(config: Config, *, every: int, widest: int) -> Config:
    """What llama.cpp derives: one global layer in `every`; scores scaled by the head's dimension, but
    by hidden size / heads in the model with `widest` layers (27B in both generations)."""
    layers = config["num_hidden_layers"]
    kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == widest else config["head_dim"]
    return {"layer_types": kinds, "query_pre_attn_scalar": scale}


def built_in_3(config: Config) -> Config:
    return {**built_in(config, every=6, widest=62), "sliding_window_pattern": 6, "_sliding_window_pattern": 6}


BUILT_IN = {
    "hidden_activation": "gelu_pytorch_tanh",
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "attention_bias": False,
}

FAMILIES = (
    Family(
        name="Gemma 2",
        arch="gemma2",
        architectures=("Gemma2ForCausalLM",),
        model_types=("gemma2",),
        rules=rules(usual.EMBEDDING, plus_one(FOUR_NORMS), usual.ATTENTION, usual.FEED_FORWARD, plus_one(usual.HEAD)),
        feeds=feeds(usual.DENSE_FEEDS, NORM_FEEDS),
        keys=keys(usual.COMMON_KEYS, WINDOW, SOFTCAPS),
        graph=graph(
            GRAPH_OUTSIDE_2, usual.GRAPH_NORMS, usual.GRAPH_ATTENTION, usual.GRAPH_FEED_FORWARD, GRAPH_POST_NORMS
        ),
        biases=usual.ATTENTION_BIAS,
        defaults=DEFAULTS_2,
        assumes={**BUILT_IN, "tie_word_embeddings": True},  # llama.cpp has room for no other output matrix
        assumes_of=partial(built_in, every=2, widest=46),
        window_period=2,
        scaled_embedding=True,
    ),
    Family(
        name="Gemma 3",
        arch="gemma3",
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        model_types=("gemma3_text", "gemma3"),
        rules=rules(
            usual.EMBEDDING,
            plus_one(FOUR_NORMS),
            usual.ATTENTION,
            plus_one(usual.HEAD_NORMS),
            usual.FEED_FORWARD,
            plus_one(usual.HEAD),
        ),
        feeds=feeds(usual.DENSE_FEEDS, NORM_FEEDS, usual.HEAD_NORM_FEEDS),
        keys=keys(usual.COMMON_KEYS, WINDOW, "final_logit_softcapping <- final_logit_softcapping [f32?]"),
        graph=graph(*usual.GRAPH_DENSE, GRAPH_POST_NORMS, usual.GRAPH_HEAD_NORMS, GRAPH_DENSE_OUT),
        biases=usual.ATTENTION_BIAS,
        defaults=DEFAULTS_3,
        assumes={**BUILT_IN, "attn_logit_softcapping": None},
        assumes_of=built_in_3,
        window_period=6,
        prefixes={
            "language_model.model.": "model.",
            "model.language_model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        dropped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        crop_embedding=True,
        scaled_embedding=True,
    ),
)
