"""Quantized checkpoints: the several tensors of a linear layer joined to the one weight they stand for.

`model.layers.0.mlp.up_proj.qweight`, `.qzeros`, `.scales` and `.g_idx` become one tensor
`model.layers.0.mlp.up_proj.weight` that reads as float32 like any other; the parts are not shown.

A reader is found by iterating this folder: every module may define `METHODS`, which maps the `quant_method` of
config.json to a function that joins a checkpoint's parts, and `LEAVES_FLOATS = True` where tensors of eight-bit
floats beside them are for `float8` to join.  Adding one is adding a file.

config.json says how a model was quantized, the tensors' names and shapes show it; where they contradict each
other a FormatError names the tensor.  Methods that nothing here reads are refused by name, because their
codes would pass for weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import TypeAlias

from dither.errors import FormatError, UnsupportedError
from dither.models import fp8
from dither.models.contradictions import note
from dither.models.packed import float8
from dither.models.packed.matrix import Joined
from dither.models.packed.settings import WAY_OUT, Quantization
from dither.models.stored import PlainTensor, StoredTensor
from dither.system.discovery import modules, room_path
from dither.system.text import shown

Join: TypeAlias = Callable[[Mapping[str, PlainTensor], Quantization], list[Joined]]

__path__ = room_path(__path__, __name__)
_AT_RUN_TIME = (*fp8.ACTIVATION_SCALES, "input_zero_point", "output_zero_point", "input_global_scale")
# Of attention's cache, wherever layers are dense too: at the layer itself, or at the matrix that fills the cache.
_OF_CACHES = re.compile(
    r".*\.(self_attn|attn|attention|[qkv]_proj|qkv_proj)\.([qkv]|kv|prob|[qkv]_cache|kv_cache)_(scale|zero_point)"
)
_MOST_SCALES = 2**16  # numbers in one; per head, or for the whole layer


@cache
def readers() -> dict[str, tuple[Join, bool]]:
    """Method → what joins its parts, and whether it leaves floats of eight bits to `float8`."""
    return {
        method: (join_parts, getattr(module, "LEAVES_FLOATS", False))
        for module in modules(__name__)
        for method, join_parts in getattr(module, "METHODS", {}).items()
    }


def join(stored: Mapping[str, PlainTensor], found: Quantization | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of the model, and notes on those that were quantized.

    Raises UnsupportedError for a method that nothing here reads, FormatError where parts do not fit.
    """
    _refuse_unmarked(stored)
    of_caches = {name for name, tensor in stored.items() if _is_of_cache(name, tensor)}
    tensors, notes = _joined({name: tensor for name, tensor in stored.items() if name not in of_caches}, found)
    if of_caches:
        notes.append(note("scales of a cache", count=len(of_caches)))
    return tensors, notes


def _is_of_cache(name: str, tensor: PlainTensor) -> bool:
    return _OF_CACHES.fullmatch(name) is not None and prod(tensor.shape) <= _MOST_SCALES


def _joined(stored: Mapping[str, PlainTensor], found: Quantization | None) -> tuple[dict[str, StoredTensor], list[str]]:
    if found is None:
        return float8.join(stored, None)
    if found.method not in readers():
        known = ", ".join(name for name in readers() if "/" not in name)
        reason = f"is already quantized ({shown(found.method)}); {known} can be read, this cannot"
        raise UnsupportedError(found.thing, reason, WAY_OUT)
    join_parts, leaves_floats = readers()[found.method]
    joined = join_parts(stored, found)
    block = fp8.block_of(found.config, found.thing) if leaves_floats else None
    hidden = {name for weight in joined for name in weight.parts}
    hidden.update(*(fp8.beside(weight.tensor.name, _AT_RUN_TIME) for weight in joined))
    tensors, notes = float8.join({name: own for name, own in stored.items() if name not in hidden}, block)
    for weight in joined:
        if weight.tensor.name in tensors:
            reason = "is there as it is and again in quantized parts"
            raise FormatError(f"tensor {shown(weight.tensor.name)}", reason, WAY_OUT)
        tensors[weight.tensor.name] = weight.tensor
    notes += found.notes
    if joined:
        kinds = ", ".join(sorted({weight.tensor.dtype for weight in joined}))
        notes.insert(0, f"{len(joined)} tensors are quantized ({kinds}): de-quantized as they are read")
    return tensors, notes


def _refuse_unmarked(stored: Mapping[str, PlainTensor]) -> None:
    """Tools that leave no word in config.json, whose files other readers take for weights."""
    for name, tensor in stored.items():
        stem = name.removesuffix(".weight")
        if name.endswith(".W_q"):
            reason = "holds codes of HQQ, which config.json does not describe"
        elif tensor.dtype == "U32" and f"{stem}.scales" in stored and f"{stem}.biases" in stored:
            reason = "holds codes of MLX"
        else:
            continue
        raise UnsupportedError(f"tensor {shown(name)}", reason, WAY_OUT)
