"""E4M3 bytes under scales: DeepSeek's blocks, and compressed-tensors' rows and tensors.

    block     weight F8_E4M3 [O, I], weight_scale_inv F32 [⌈O/128⌉, ⌈I/128⌉]
    channel   weight F8_E4M3 [O, I], weight_scale [O, 1]
    tensor    weight F8_E4M3 [O, I], weight_scale [1]

All scales multiply: "inv" is the quantizer's point of view (DeepSeek-V3, arXiv:2412.19437, section 3.3).

Legend: O out features, I in features.
"""

from __future__ import annotations

import numpy as np

from dither.formats.layouts.methods import Method
from dither.formats.layouts.numbers import narrow
from dither.formats.layouts.parts import Arrays, Shapes
from dither.types import Bytes, Floats

BLOCK = 128  # rows and columns
METHODS = (Method("fp8", "FP8"),)


def parts(rows: int, columns: int, kind: str = "block", *, scale: str = "F32") -> Shapes:
    """The tensors of one matrix; `kind` is "block", "channel" or "tensor"."""
    grids = {"block": (-(-rows // BLOCK), -(-columns // BLOCK)), "channel": (rows, 1), "tensor": (1,)}
    return {"weight": ("F8_E4M3", (rows, columns)), _suffix(kind): (scale, grids[kind])}


def pack(codes_OI: Bytes, grid: Floats, kind: str = "block", *, scale: str = "F32") -> Arrays:
    """The tensors of `parts`, of E4M3 bits and their scales.

    Raises UsageError for scales that the number type does not have.
    """
    stored = narrow(grid, scale)
    codes_OI = np.ascontiguousarray(codes_OI, np.uint8)
    return {"weight": codes_OI, _suffix(kind): stored.reshape(1) if kind == "tensor" else stored}


def _suffix(kind: str) -> str:
    return "weight_scale_inv" if kind == "block" else "weight_scale"
