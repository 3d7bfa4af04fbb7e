"""AWQ checkpoints in the GEMM layout, the one that transformers, vLLM and AutoAWQ exchange."""

from __future__ import annotations

from collections.abc import Mapping

from dither.formats.layouts import awq
from dither.models.packed.matrix import FLOATS, Joined, Module, kind_of, modules
from dither.models.packed.settings import Quantization, whole
from dither.models.stored import PlainTensor

PARTS = ("qweight", "qzeros", "scales")


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    layout = found.text("version", "checkpoint_format", "format") or "gemm"
    if layout != "gemm":
        raise found.refuse(f"packed as {layout}; of AWQ's layouts only gemm is read")
    bits = whole(found.config, "w_bit" if "w_bit" in found.config else "bits", found.thing, awq.BITS)
    if bits != awq.BITS:
        raise found.refuse(f"with {bits} bits; AWQ has 4")
    return [_weight(module) for module in modules(stored, "qweight", PARTS)]


def _weight(module: Module) -> Joined:
    columns = module.part("qweight", ["I32"], 2).shape[0]
    groups, rows = module.part("scales", FLOATS, 2).shape
    if rows % 8 or not rows:
        raise module.wrong(f"has {rows} rows, which are no whole words of 8")
    module.expect("qweight", (columns, rows // 8))
    module.part("qzeros", ["I32"], (groups, rows // 8))
    if not groups or not columns or columns % groups:
        raise module.wrong(f"has {columns} columns, which are not {groups} groups")
    return module.joined((rows, columns), kind_of(awq.BITS, False, columns, groups), awq.unpack, PARTS)


METHODS = {"awq": join}
