"""GPTQ checkpoints, those of AutoRound that are packed alike, and the settings of single layers in both.

GPTQModel's `dynamic` maps patterns to settings, the first that matches a layer's name counting: "+:" or
nothing before it overrides, "-:" says that the layer was left alone.  AutoRound's `extra_config` maps names.
Bits follow from the shapes as well: where a setting disagrees and exactly one number of bits fits every
part, that one is true, because loaders read the parts.

Sources: GPTQModel, `QuantizeConfig` and `dynamic_get`; AutoRound, `export_to_autoround`, whose own packing
keeps zero points as they are and whose "gptq" packings take 1 off, as AutoGPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.formats.layouts import gptq
from dither.formats.layouts.words import words
from dither.models.packed import awq
from dither.models.packed.matrix import FLOATS, Joined, Module, kind_of, modules
from dither.models.packed.settings import Quantization, flag, matches, whole
from dither.models.stored import PlainTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    stated = found.text("checkpoint_format", "format") or "gptq"
    if stated not in ("gptq", "gptq_v2") or found.config.get("is_marlin_format"):
        raise found.refuse(f"packed as {stated if stated != 'gptq' else 'marlin'}, which is not read")
    if found.config.get("rotation"):
        raise found.refuse("with weights rotated for a run-time that rotates back")
    return [_weight(module, found, stated == "gptq") for module in modules(stored, "qweight", PARTS)]


def join_auto_round(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    packing = found.text("packing_format", "backend")
    kind = found.text("data_type") or "int"
    if kind != "int":
        raise found.refuse(f"as {kind}, which is not read")
    if "awq" in packing:
        return awq.join(stored, found)
    return [_weight(module, found, "gptq" in packing) for module in modules(stored, "qweight", PARTS)]


def _weight(module: Module, found: Quantization, v1: bool) -> Joined:
    settings = {**found.config, **_overrides(module.name, found)}
    qweight = module.part("qweight", ["I32"], 2)
    qzeros = module.part("qzeros", ["I32"], 2)
    scales = module.part("scales", FLOATS, 2)
    groups, rows = scales.shape
    if not groups or not rows or qweight.shape[1] != rows or qzeros.shape[0] != groups:
        reason = f"has scales {list(scales.shape)}, qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}"
        raise module.wrong(f"{reason}, which do not belong together")
    columns = module.part("g_idx", ["I32", "I64"], 1).shape[0] if module.has("g_idx") else 0
    bits = _bits(module, whole(settings, "bits", found.thing), columns)
    columns = columns or qweight.shape[0] * 32 // bits
    if module.has("g_idx"):
        module.expect("g_idx", (columns,))
    if whole(settings, "group_size", found.thing, -1) == 0:
        raise module.wrong("has groups of no columns, says its config")
    if not module.has("g_idx") and columns % groups:
        raise module.wrong(f"has {columns} columns in {groups} groups, and no g_idx says which is in which")
    symmetric = flag(settings, "sym", found.thing, True)
    kind = kind_of(bits, symmetric, columns, groups)
    return module.joined((rows, columns), kind, gptq.unpack, PARTS, bits=bits, v1=v1, columns=columns)


def _bits(module: Module, stated: int | None, columns: int) -> int:
    """The number of bits that every part fits; the stated one where several do."""
    qweight, qzeros = module.tensors["qweight"].shape, module.tensors["qzeros"].shape
    fitting = [
        bits
        for bits in gptq.BITS
        if qweight[0] == words(columns or qweight[0] * 32 // bits, bits)
        and qweight[0] > 0
        and qzeros[1] == words(qweight[1], bits)
    ]
    if stated in fitting:
        return stated
    if len(fitting) == 1:
        return fitting[0]
    reason = f"has {stated} bits, says its config, but qweight {list(qweight)} and qzeros {list(qzeros)}"
    way = f"fit {fitting}" if fitting else f"fit none of {list(gptq.BITS)}"
    raise module.wrong(f"{reason} {way}" + (f" with {columns} columns" if columns else ""))


def _overrides(name: str, found: Quantization) -> Mapping[str, Any]:
    """The settings of one layer where they are others than the checkpoint's."""
    extra = found.config.get("extra_config")
    if isinstance(extra, dict) and isinstance(extra.get(name), dict):
        return dict(extra[name])
    dynamic = found.config.get("dynamic")
    for rule, settings in dynamic.items() if isinstance(dynamic, dict) else ():
        pattern = rule.removeprefix("+:").removeprefix("-:")
        if matches(pattern, name, f"{found.thing}, dynamic"):
            return settings if isinstance(settings, dict) and not rule.startswith("-:") else {}
    return {}


METHODS = {"gptq": join, "auto-round": join_auto_round, "intel/auto-round": join_auto_round}
