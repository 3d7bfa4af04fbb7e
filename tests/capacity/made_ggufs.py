"""GGUFs with random weights of architectures that Dither does not convert, small enough to serve at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, LAYERS = 128, 3
# the letters that byte-level BPE writes bytes as, and three merges
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = [chr(code) for code in _PRINTED] + [chr(256 + i) for i in range(256 - len(_PRINTED))]
TOKENS = [*LETTERS, "th", "the", "in"]
MERGES = ["t h", "th e", "i n"]


def write(path: Path, arch: str, keys: dict[str, Any], layer: dict[str, tuple[int, ...]]) -> Path:
    """`layer` are the tensors of each layer, columns last; keys lack the architecture's prefix."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {"block_count": LAYERS, "context_length": 512, "embedding_length": WIDTH, **keys}
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    named = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    named["output.weight"] = (len(TOKENS), WIDTH)
    for i in range(keys["block_count"]):
        named |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in named.items():
        writer.add_tensor(name, (0.05 * rng.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def latent_attention(path: Path) -> Path:
    """DeepSeek-V2's graph, without experts: 64 latent numbers and 32 rotary ones are cached per token."""
    heads, rank, rope, plain, value = 4, 64, 32, 32, 32
    keys = {
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": plain + rope,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "feed_forward_length": 384,
        "expert_count": 2,
        "expert_used_count": 1,
        "expert_feed_forward_length": 64,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.0,
        "leading_dense_block_count": LAYERS,
        "attention.q_lora_rank": 48,
    }
    layer = {
        "attn_norm.weight": (WIDTH,),
        "attn_q_a.weight": (48, WIDTH),
        "attn_q_a_norm.weight": (48,),
        "attn_q_b.weight": (heads * (plain + rope), 48),
        "attn_kv_a_mqa.weight": (rank + rope, WIDTH),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (heads, rank, plain),
        "attn_v_b.weight": (heads, value, rank),
        "attn_output.weight": (WIDTH, heads * value),
        "ffn_norm.weight": (WIDTH,),
        "ffn_gate.weight": (384, WIDTH),
        "ffn_up.weight": (384, WIDTH),
        "ffn_down.weight": (WIDTH, 384),
    }
    return write(path, "deepseek2", keys, layer)


def mamba(path: Path) -> Path:
    inner, state, rank, kernel = 256, 16, 8, 4
    keys = {
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "feed_forward_length": 0,
        "attention.head_count": 0,
    }
    layer = {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (2 * inner, WIDTH),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (WIDTH, inner),
    }
    return write(path, "mamba", keys, layer)


def _heads(count: int, kv: int, size: int) -> dict[str, Any]:
    return {
        "attention.head_count": count,
        "attention.head_count_kv": kv,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }


def _attention(count: int, kv: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm.weight": (WIDTH,),
        "attn_q.weight": (count * size, WIDTH),
        "attn_k.weight": (kv * size, WIDTH),
        "attn_v.weight": (kv * size, WIDTH),
        "attn_output.weight": (WIDTH, count * size),
        "attn_q_norm.weight": (size,),
        "attn_k_norm.weight": (size,),
        "ffn_norm.weight": (WIDTH,),
    }


def windows(path: Path) -> Path:
    """Gemma 3: five of six layers look back 64 tokens."""
    keys = {
        **_heads(2, 1, 64),
        "block_count": 6,
        "context_length": 2048,
        "feed_forward_length": 384,
        "attention.sliding_window": 64,
    }
    layer = {
        **_attention(2, 1, 64),
        "post_attention_norm.weight": (WIDTH,),
        "post_ffw_norm.weight": (WIDTH,),
        "ffn_gate.weight": (384, WIDTH),
        "ffn_up.weight": (384, WIDTH),
        "ffn_down.weight": (WIDTH, 384),
    }
    return write(path, "gemma3", keys, layer)


def experts(path: Path) -> Path:
    """Qwen3-MoE in the proportions of 30B-A3B: 8 experts of 3/8 of the width each."""
    keys = {
        **_heads(4, 2, 64),
        "feed_forward_length": 384,
        "expert_count": 16,
        "expert_used_count": 8,
        "expert_feed_forward_length": 48,
    }
    layer = {
        **_attention(4, 2, 64),
        "ffn_gate_inp.weight": (16, WIDTH),
        "ffn_gate_exps.weight": (16, 48, WIDTH),
        "ffn_up_exps.weight": (16, 48, WIDTH),
        "ffn_down_exps.weight": (16, WIDTH, 48),
    }
    return write(path, "qwen3moe", keys, layer)
