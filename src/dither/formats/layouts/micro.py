"""MXFP4 and NVFP4 in safetensors: four-bit floats (E2M1), two to a byte, the low nibble first.

    mxfp4-pack-quantized   weight_packed U8 [O, I/2], weight_scale U8 [O, I/32] (the bits of an E8M0)
    nvfp4-pack-quantized   weight_packed U8 [O, I/2], weight_scale F8_E4M3 [O, I/16],
                           weight_global_scale F32 [1], which divides
    gpt-oss                *_blocks U8 [E, O, I/32, 16], *_scales U8 [E, O, I/32]: the first, by experts

Sources: OCP Microscaling Formats 1.0; compressed-tensors, `compressors/mxfp4` and `nvfp4`; gpt-oss' model
card (arXiv:2508.10925) and transformers' `integrations/mxfp4.py`.

Legend: O out features, I in features, G groups, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts.parts import Arrays, Micro, Shapes

GROUPS = {"MXFP4": 32, "NVFP4": 16}


def parts(rows: int, columns: int, kind: str) -> Shapes:
    """The tensors of one matrix as "MXFP4" or "NVFP4".

    Raises UnsupportedError where the groups are not whole.
    """
    group = GROUPS[kind]
    if columns % group:
        reason = f"needs whole groups, and {columns} columns are no multiple of {group}"
        raise UnsupportedError(f"{rows} × {columns} as {kind}", reason, "Leave the tensor unquantized.")
    found: Shapes = {"weight_packed": ("U8", (rows, columns // 2))}
    if kind == "MXFP4":
        return found | {"weight_scale": ("U8", (rows, columns // group))}
    return found | {
        "weight_scale": ("F8_E4M3", (rows, columns // group)),
        "weight_global_scale": ("F32", (1,)),
    }


def pack(weight: Micro) -> Arrays:
    """The tensors of `parts`: NVFP4's where there is a scale of the tensor."""
    codes_OI = weight.codes_OI.astype(np.uint8)
    found: Arrays = {
        "weight_packed": codes_OI[:, ::2] | codes_OI[:, 1::2] << np.uint8(4),
        "weight_scale": np.ascontiguousarray(weight.scale_OG, np.uint8),
    }
    if weight.global_scale is not None:
        found["weight_global_scale"] = np.array([weight.global_scale], np.float32)
    return found


def unpack(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Micro:
    """Rows `start` to `stop` of the matrix."""
    codes_OI = nibbles(arrays["weight_packed"][start:stop])
    whole = arrays.get("weight_global_scale")
    scale_OG = arrays["weight_scale"][start:stop]
    return Micro(codes_OI, scale_OG, None if whole is None else float(whole.flat[0]))


def unpack_experts(
    blocks_EOGN: npt.NDArray[np.uint8], scales_EOG: npt.NDArray[np.uint8], start: int, stop: int
) -> Micro:
    """Rows `start` to `stop` of gpt-oss' stack, experts one below the other."""
    *experts, groups, half = blocks_EOGN.shape
    rows = int(np.prod(experts))
    packed_ON = blocks_EOGN.reshape(rows, groups * half)[start:stop]
    return Micro(nibbles(packed_ON), scales_EOG.reshape(rows, groups)[start:stop])


def nibbles(packed_ON: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two codes of every byte, the low one first."""
    codes_OI = np.empty((len(packed_ON), packed_ON.shape[1] * 2), np.uint8)
    codes_OI[:, ::2] = packed_ON & 15
    codes_OI[:, 1::2] = packed_ON >> 4
    return codes_OI
