"""Models that are nothing but a header: metadata and shapes of published models, no weights."""

from __future__ import annotations

from typing import Any

from dither.formats.ggml import Field, ValueType, array, boolean, string, u32
from dither.types import Floats, Model, Tensor


def unread(_start: int, _stop: int) -> Floats:
    raise AssertionError("a weight was read")


def field(value: Any) -> Field:
    if isinstance(value, str):
        return string(value)
    if isinstance(value, bool):
        return boolean(value)
    return array(ValueType.UINT32, value) if isinstance(value, list) else u32(value)


def outlined(arch: str, tensors: dict[str, tuple[int, ...]], **keys: Any) -> Model:
    """`keys` have double underscores for dots: attention__head_count=32."""
    metadata = {f"{arch}.{key.replace('__', '.')}": field(value) for key, value in keys.items()}
    listed = []
    for name, shape in tensors.items():
        size = 1
        for dimension in shape:
            size *= dimension
        listed.append(Tensor(name, shape, "BF16", 2 * size, unread))
    return Model(arch, arch, metadata, tuple(listed), f"{arch}-outline", "safetensors", (), "0" * 64)


def llama_31_8b() -> Model:
    """meta-llama/Llama-3.1-8B, from its config.json."""
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (128256, 4096)}
    for i in range(32):
        block = f"blk.{i}."
        tensors |= {
            f"{block}attn_norm.weight": (4096,),
            f"{block}attn_q.weight": (4096, 4096),
            f"{block}attn_k.weight": (1024, 4096),
            f"{block}attn_v.weight": (1024, 4096),
            f"{block}attn_output.weight": (4096, 4096),
            f"{block}ffn_norm.weight": (4096,),
            f"{block}ffn_gate.weight": (14336, 4096),
            f"{block}ffn_up.weight": (14336, 4096),
            f"{block}ffn_down.weight": (4096, 14336),
        }
    tensors |= {"output_norm.weight": (4096,), "output.weight": (128256, 4096), "rope_freqs.weight": (64,)}
    return outlined(
        "llama",
        tensors,
        block_count=32,
        context_length=131072,
        embedding_length=4096,
        feed_forward_length=14336,
        attention__head_count=32,
        attention__head_count_kv=8,
    )
