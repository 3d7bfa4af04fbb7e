"""The shapes that llama.cpp will ask for, held against those that are there.

llama.cpp computes the size of every tensor from the metadata and refuses a file that disagrees, minutes
after it was written.  A header with transposed sizes, or a config.json of another model, shows here first.

Which sizes a tensor has is said where the family says what llama.cpp takes (`Family.graph`, `graph.py`); here they are
made of config.json.  Tensors that no line names are not checked.

Source: llama.cpp's model loader, which creates every tensor with these dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

from dither.errors import SourceError
from dither.formats.tensor_names import in_every_block
from dither.models.arch.family import Family
from dither.models.arch.graph import Sizes, size_of
from dither.models.json_object import JsonObject
from dither.system.text import shown
from dither.types import Tensor

_WAY_OUT = "Take config.json and the weights from the same model, and fetch both again."


def check_shapes(family: Family, tensors: Iterable[Tensor], config: JsonObject, vocabulary: int) -> None:
    """Raises SourceError naming the first tensor whose shape is not the one that config.json makes."""
    table = {taken.name: taken.sizes for taken in family.graph}
    sizes = _sizes(config, vocabulary)
    for tensor in tensors:
        terms = table.get(in_every_block(tensor.name), ())
        expected = tuple(size_of(term, sizes) for term in terms)
        if expected and None not in expected and tensor.shape != expected:
            reason = f"has shape {list(tensor.shape)}, but config.json makes it {list(expected)}"
            raise SourceError(f"tensor {shown(tensor.name)}", reason, _WAY_OUT)


def head_dimension(config: JsonObject) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _sizes(config: JsonObject, vocabulary: int) -> Sizes:
    """Those of a network's own tensors; rotary factors are made here, of the right length."""
    heads, head = int(config["num_attention_heads"]), head_dimension(config)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    inner = config.whole("intermediate_size") or 0
    of_expert = (config.whole("moe_intermediate_size") if experts else None) or inner
    return {
        "vocabulary": vocabulary,
        "hidden": config["hidden_size"],
        "head": head,
        "query": heads * head,
        "key": (config.get("num_key_value_heads") or heads) * head,
        "inner": inner,
        "experts": experts,
        "expert_inner": of_expert,
    }
