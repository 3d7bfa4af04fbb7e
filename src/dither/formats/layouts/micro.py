"""MXFP4, NVFP4 and MXFP6 in safetensors: four-bit floats (E2M1), two to a byte, the low nibble first, and
six-bit ones (E2M3), four to three bytes, the first in the lowest bits.

    mxfp4-pack-quantized   weight_packed U8 [O, I/2], weight_scale U8 [O, I/32] (the bits of an E8M0)
    nvfp4-pack-quantized   weight_packed U8 [O, I/2], weight_scale F8_E4M3 [O, I/16],
                           weight_global_scale F32 [1], which divides
    mxfp6-pack-quantized   weight_packed U8 [O, 3I/4], weight_scale U8 [O, I/32]; read, not written
    ModelOpt's NVFP4       weight U8 [O, I/2], weight_scale F8_E4M3 [O, I/16], weight_scale_2 F32 [],
                           which multiplies; read, not written
    gpt-oss                *_blocks U8 [E, O, I/32, 16], *_scales U8 [E, O, I/32]: the first, by experts

Sources: OCP Microscaling Formats 1.0; compressed-tensors, `compressors/mxfp4`, `mxfp6` and `nvfp4`; NVIDIA
ModelOpt, `quantization/qtensor/nvfp4_tensor.py`; gpt-oss' model card (arXiv:2508.10925) and transformers'
`integrations/mxfp4.py`.

Legend: O out features, I in features, G groups, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts.methods import Method
from dither.formats.layouts.parts import Arrays, Micro, Shapes

GROUPS = {"MXFP4": 32, "MXFP6": 32, "NVFP4": 16}
METHODS = (Method("mxfp4", "MXFP4"), Method("modelopt", "ModelOpt"))


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
    return found | {"weight_scale": ("F8_E4M3", (rows, columns // group)), "weight_global_scale": ("F32", (1,))}


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


def unpack_six(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Micro:
    """Rows `start` to `stop` of an MXFP6 matrix."""
    packed_ON = arrays["weight_packed"][start:stop]
    return Micro(sixes(packed_ON), arrays["weight_scale"][start:stop], bits=6)


def unpack_modelopt(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Micro:
    """Rows `start` to `stop` of a matrix of ModelOpt's NVFP4."""
    whole = float(arrays["weight_scale_2"].flat[0])
    return Micro(nibbles(arrays["weight"][start:stop]), arrays["weight_scale"][start:stop], multiplier=whole)


def unpack_experts(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Micro:
    """Rows `start` to `stop` of gpt-oss' stack, experts one below the other."""
    blocks_EOGN, scales_EOG = arrays["blocks"], arrays["scales"]
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


def sixes(packed_ON: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Four codes of every three bytes, the first in the lowest bits."""
    bytes_OW3 = packed_ON.reshape(len(packed_ON), -1, 3).astype(np.uint32)
    words_OW = bytes_OW3 @ np.array([1, 1 << 8, 1 << 16], np.uint32)
    codes_OW4 = words_OW[..., None] >> np.array([0, 6, 12, 18], np.uint32) & 63
    return codes_OW4.reshape(len(packed_ON), -1).astype(np.uint8)
