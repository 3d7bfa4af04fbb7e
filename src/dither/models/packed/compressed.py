"""compressed-tensors checkpoints: every layer looked up in `config_groups`, several formats in one file.

A group has `targets`, names of layers, patterns after "re:", or classes ("Linear"), the more specific
counting first, and `weights`, the arguments that its layers were quantized with.  What `ignore` names was
left alone and is stored as it is, so nothing needs to be ignored here: a layer that is stored in parts was
quantized.  Floats of eight bits, MXFP8's too, are left to `float8`.

Source: vllm-project/compressed-tensors, `quantization/quant_config.py` and `utils/match.py`.

Legend: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from dither.errors import FormatError
from dither.formats.layouts import compressed, integers, micro
from dither.formats.layouts.words import words
from dither.models.packed.matrix import FLOATS, Joined, Module, kind_of, modules
from dither.models.packed.settings import WAY_OUT, Quantization, flag, matches, whole
from dither.models.stored import PlainTensor

FORMATS = (
    "", "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_INTEGERS = ("weight", "weight_scale", "weight_zero_point")
_MICRO = ("weight_packed", "weight_scale", "weight_global_scale")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    groups = _groups(found)
    joined = []
    for module in modules(stored, "weight_packed", (*_PACKED, "weight_global_scale")):
        if module.tensors["weight_packed"].dtype == "U8":
            joined.append(_micro(module.only(_MICRO)))
        else:
            weights = _weights_of(module, groups, found)
            joined.append(_packed(module.only(_PACKED), weights, found.thing))
    for module in modules(stored, "weight", _INTEGERS):
        if module.tensors["weight"].dtype == "I8" and module.has("weight_scale"):
            joined.append(_integers(module))
    return joined


def _groups(found: Quantization) -> list[Mapping[str, Any]]:
    """The groups of layers, and a check that none needs what is not read."""
    sparsity = found.config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise found.refuse("with sparse weights, which are not read")
    if found.config.get("transform_config"):
        raise found.refuse("with weights transformed for a run-time that transforms back")
    groups = found.config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise FormatError(found.thing, "config_groups holds no groups", WAY_OUT)
    for stated in (found.config, *groups.values()):
        kind = Quantization(found.method, stated, found.thing).text("format")
        if kind not in FORMATS:
            raise found.refuse(f"in the format {kind}, which is not read")
    return list(groups.values())


def _weights_of(module: Module, groups: list[Mapping[str, Any]], found: Quantization) -> Mapping[str, Any]:
    """The arguments of the first group that is about a layer: by name, by pattern, by class."""
    kind = "Embedding" if module.name.rpartition(".")[2] in _EMBEDDINGS else "Linear"
    ranked: list[tuple[int, Mapping[str, Any]]] = []
    for group in groups:
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if target == module.name:
                ranked.append((0, group))
            elif isinstance(target, str) and target.startswith("re:"):
                if matches(target[3:], module.name, f"{found.thing}, targets"):
                    ranked.append((1, group))
            elif target == kind:
                ranked.append((2, group))
    if not ranked:
        raise module.wrong("is packed, but no group of config_groups is about it")
    weights = min(ranked, key=lambda pair: pair[0])[1].get("weights")
    if not isinstance(weights, dict):
        raise module.wrong("is packed, but its group of config_groups has no weights")
    return weights


def _packed(module: Module, weights: Mapping[str, Any], thing: str) -> Joined:
    packed = module.part("weight_packed", ["I32"], 2)
    rows, width = packed.shape
    bits = whole(weights, "num_bits", thing)
    if bits not in compressed.BITS or not rows or not width:
        raise module.wrong(f"has {bits} bits and shape {list(packed.shape)}, which is no packed matrix")
    groups = _scale_groups(module, rows)
    columns = _columns(module, bits, groups, whole(weights, "group_size", thing))
    if columns % groups and not module.has("weight_g_idx"):
        raise module.wrong(f"has {columns} columns, which are not {groups} groups")
    _check_zero_point(module, rows, bits, groups, flag(weights, "symmetric", thing, True))
    if module.has("weight_g_idx"):
        module.part("weight_g_idx", ["I32", "I64"], (columns,))
    kind = _kind(module, bits, (rows, columns), groups)
    return module.joined((rows, columns), kind, compressed.unpack, _PACKED, bits=bits, columns=columns)


def _scale_groups(module: Module, rows: int) -> int:
    """Groups per row.  Raises FormatError for scales that do not cover the rows."""
    scale = module.tensors.get("weight_scale")
    if scale is None or scale.dtype not in FLOATS:
        raise module.wrong("lacks its part weight_scale" if scale is None else f"has {scale.dtype} scales")
    if scale.shape in ((1,), (1, 1), ()) or scale.shape == (rows,):
        return 1
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
        raise module.wrong(f"has {rows} rows, but scales of shape {list(scale.shape)}")
    return scale.shape[1]


def _columns(module: Module, bits: int, groups: int, group_size: int | None) -> int:
    """How many columns the words hold: weight_shape says it, groups do, or the words alone."""
    rows, width = module.tensors["weight_packed"].shape
    columns = width * 32 // bits
    grouped = group_size is not None and group_size > 0
    if group_size is not None and grouped:
        columns = groups * group_size
    if module.has("weight_shape"):
        stated = module.part("weight_shape", ["I64", "I32"], 1).array().tolist()
        if len(stated) != 2 or (any(stated) and (stated[0] != rows or not 0 < stated[1] < 2**40)):
            raise module.wrong(f"has weight_shape {stated!s:.60} and {rows} packed rows")
        if grouped and any(stated) and stated[1] != columns:
            reason = f"{stated[1]} columns and {groups} groups of {group_size}"
            raise module.wrong(f"has {reason}, which do not belong together")
        columns = stated[1] or columns  # zeros: a header whose weights are elsewhere
    if words(columns, bits) != width:
        raise module.wrong(f"has {columns} columns of {bits} bits in {width} words")
    return columns


def _check_zero_point(module: Module, rows: int, bits: int, groups: int, symmetric: bool) -> None:
    if not module.has("weight_zero_point"):
        if not symmetric:
            raise module.wrong("is asymmetric, but lacks its part weight_zero_point")
        return
    zero = module.tensors["weight_zero_point"]
    if zero.dtype == "I32":
        module.expect("weight_zero_point", (words(rows, bits), groups))
    elif zero.dtype != "I8" or zero.shape not in ((rows, groups), (1,), ()):
        raise module.wrong(f"has zero points of {zero.dtype} and shape {list(zero.shape)}")


def _integers(module: Module) -> Joined:
    rows, columns = module.part("weight", ["I8"], 2).shape
    groups = _scale_groups(module, rows)
    if not columns or columns % groups:
        raise module.wrong(f"has {columns} columns, which are not {groups} groups")
    scale = module.tensors["weight_scale"]
    if module.has("weight_zero_point"):
        zero = module.tensors["weight_zero_point"]
        if zero.dtype != "I8" or zero.shape not in (scale.shape, (1,), ()):
            raise module.wrong(f"has zero points of {zero.dtype} and shape {list(zero.shape)}")
    return module.joined((rows, columns), _kind(module, 8, (rows, columns), groups), integers.unpack, _INTEGERS)


def _kind(module: Module, bits: int, shape: tuple[int, int], groups: int) -> str:
    kind = kind_of(bits, not module.has("weight_zero_point"), shape[1], groups)
    one_scale = shape[0] > 1 and prod(module.tensors["weight_scale"].shape) == 1
    return kind.replace("channel", "tensor") if one_scale else kind


def _micro(module: Module) -> Joined:
    rows, half = module.part("weight_packed", ["U8"], 2).shape
    scale = module.part("weight_scale", ["U8", "F8_E8M0", "F8_E4M3"], 2)
    kind, columns = "NVFP4" if scale.dtype == "F8_E4M3" else "MXFP4", 2 * half
    if kind == "MXFP4" and 4 * half == 3 * micro.GROUPS["MXFP6"] * scale.shape[1]:
        kind, columns = "MXFP6", 4 * half // 3
    if not rows or not half or columns % micro.GROUPS[kind]:
        raise module.wrong(f"has shape {[rows, columns]}, which is no {kind}")
    module.expect("weight_scale", (rows, columns // micro.GROUPS[kind]))
    suffixes = _MICRO if kind == "NVFP4" else _MICRO[:2]
    if kind == "NVFP4":
        whole_scale = module.tensors.get("weight_global_scale")
        if whole_scale is None or whole_scale.dtype != "F32" or whole_scale.shape not in ((1,), ()):
            raise module.wrong("is NVFP4, but lacks its one weight_global_scale")
    return module.joined((rows, columns), kind, micro.unpack_six if kind == "MXFP6" else micro.unpack, suffixes)


METHODS = {"compressed-tensors": join}
LEAVES_FLOATS = True
