"""The shapes that llama.cpp will ask for, held against those that are there.

llama.cpp computes the size of every tensor from the metadata and refuses a file that disagrees, minutes
after it was written.  A header with transposed sizes, or a config.json of another model, shows here first.

Sizes, by name: hidden (the residual stream), query and key (all heads of one kind side by side), head
(one of them), inner (the feed-forward layer, an expert's where there are experts).  A product of a
number and a size is written 2*inner, a sum query+2*key.  Tensors that no line names are not checked.

Source: llama.cpp's model loader, which creates every tensor with these dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dither.errors import SourceError
from dither.formats.tensor_names import within_block
from dither.models.json_object import JsonObject
from dither.system.text import shown
from dither.types import Tensor

COMMON = """
token_embd.weight output.weight = vocabulary hidden
output_norm.weight attn_norm.weight ffn_norm.weight post_attention_norm.weight post_ffw_norm.weight = hidden
attn_q.weight = query hidden
attn_k.weight attn_v.weight = key hidden
attn_qkv.weight = query+2*key hidden
attn_output.weight = hidden query
attn_q_norm.weight attn_k_norm.weight = head
ffn_gate.weight ffn_up.weight = inner hidden
ffn_down.weight = hidden inner
ffn_gate_inp.weight = experts hidden
ffn_gate_exps.weight ffn_up_exps.weight = experts inner hidden
ffn_down_exps.weight = experts hidden inner
attn_output.bias ffn_down.bias = hidden
attn_q.bias = query
attn_k.bias attn_v.bias = key
attn_qkv.bias = query+2*key
ffn_gate.bias ffn_up.bias = inner
"""
GATE_AND_UP_FUSED = """
ffn_up.weight = 2*inner hidden
ffn_up.bias = 2*inner
"""
_WAY_OUT = "Take config.json and the weights from the same model, and fetch both again."


def check_shapes(tensors: Iterable[Tensor], config: JsonObject, vocabulary: int) -> None:
    """Raises SourceError naming the first tensor whose shape is not the one that config.json makes."""
    listed = list(tensors)
    fused = not any(tensor.name.endswith(".ffn_gate.weight") for tensor in listed)
    lines = (COMMON + (GATE_AND_UP_FUSED if fused else "")).strip().splitlines()
    table = {name: terms for names, terms in (line.split(" = ") for line in lines if line) for name in names.split()}
    sizes = _sizes(config, vocabulary)
    for tensor in listed:
        terms = table.get(within_block(tensor.name))
        expected = tuple(_size(term, sizes) for term in terms.split()) if terms else tensor.shape
        if tensor.shape != expected:
            reason = f"has shape {list(tensor.shape)}, but config.json makes it {list(expected)}"
            raise SourceError(f"tensor {shown(tensor.name)}", reason, _WAY_OUT)


def head_dimension(config: JsonObject) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _sizes(config: JsonObject, vocabulary: int) -> dict[str, int]:
    heads, head = int(config["num_attention_heads"]), head_dimension(config)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    inner = config.whole("intermediate_size") or 0
    return {
        "vocabulary": vocabulary,
        "hidden": config["hidden_size"],
        "head": head,
        "query": heads * head,
        "key": (config.get("num_key_value_heads") or heads) * head,
        "inner": (config.whole("moe_intermediate_size") if experts else None) or inner,
        "experts": experts,
    }


def _size(term: str, sizes: Mapping[str, int]) -> int:
    """
    >>> _size("query+2*key", {"query": 64, "key": 16})
    96
    """
    parts = (part.rpartition("*") for part in term.split("+"))
    return sum(int(factor or 1) * sizes[name] for factor, _, name in parts)
