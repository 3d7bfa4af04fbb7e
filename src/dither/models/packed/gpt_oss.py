"""gpt-oss checkpoints: all experts of a layer in one stack of MXFP4.

`mlp.experts.down_proj_blocks` and `_scales` become `mlp.experts.down_proj.weight` of shape [E, O, I], as
every other linear layer has it.  The name is not `mlp.experts.down_proj`: unquantized checkpoints have that,
and there each expert's matrix is turned over.

Legend: E experts, O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

from dither.formats.layouts import micro
from dither.models.packed.matrix import Joined, Module
from dither.models.packed.settings import Quantization
from dither.models.stored import PlainTensor


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    joined = []
    for name, blocks in stored.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            scales = stored.get(f"{stem}_scales")
            parts = {"blocks": blocks} | ({"scales": scales} if scales else {})
            joined.append(_stack(Module(stem, parts)))
    return joined


def _stack(module: Module) -> Joined:
    experts, rows, groups, half = module.part("blocks", ["U8"], 4).shape
    module.part("scales", ["U8"], (experts, rows, groups))
    if half != micro.GROUPS["MXFP4"] // 2 or not experts * rows * groups:
        raise module.wrong(f"has blocks of {half} bytes, where 16 are due")
    return module.joined((experts, rows, groups * 2 * half), "MXFP4", micro.unpack_experts, ("blocks", "scales"))


METHODS = {"mxfp4": join}
