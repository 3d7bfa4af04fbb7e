"""E4M3 bytes under scales: DeepSeek's blocks, and compressed-tensors' rows and tensors.

    block     weight F8_E4M3 [O, I], weight_scale_inv F32 [⌈O/128⌉, ⌈I/128⌉]
    channel   weight F8_E4M3 [O, I], weight_scale [O, 1]
    tensor    weight F8_E4M3 [O, I], weight_scale [1]

All scales multiply: "inv" is the quantizer's point of view (DeepSeek-V3, arXiv:2412.19437, section 3.3).

Legend: O out features, I in features, K columns of the scales' grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.formats.layouts.methods import Method
from dither.formats.layouts.numbers import narrow, widen
from dither.formats.layouts.parts import Arrays, Float8, Shapes

BLOCK = (128, 128)
METHODS = (Method("fp8", "FP8"),)


def parts(
    rows: int, columns: int, kind: str = "block", *, block: tuple[int, int] = BLOCK, scale: str = "F32"
) -> Shapes:
    """The tensors of one matrix; `kind` is "block", "channel" or "tensor"."""
    grids = {"block": (-(-rows // block[0]), -(-columns // block[1])), "channel": (rows, 1), "tensor": (1,)}
    return {"weight": ("F8_E4M3", (rows, columns)), _suffix(kind): (scale, grids[kind])}


def pack(weight: Float8, kind: str = "block", *, scale: str = "F32") -> Arrays:
    """The tensors of `parts`.  Raises UsageError for scales that the number type does not have."""
    grid = narrow(weight.scale, scale)
    return {
        "weight": np.ascontiguousarray(weight.codes_OI, np.uint8),
        _suffix(kind): grid.reshape(1) if kind == "tensor" else grid,
    }


def unpack(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int, *, block: tuple[int, int] = BLOCK) -> Float8:
    """Rows `start` to `stop` of the matrix, with one line of scales for each."""
    codes_OI = arrays["weight"][start:stop]
    columns = codes_OI.shape[1]
    if "weight_scale_inv" in arrays:
        lines_O = np.arange(start, stop) // block[0]
        return Float8(codes_OI, widen(arrays["weight_scale_inv"][lines_O]), (1, block[1]))
    scale = arrays["weight_scale"]
    if scale.size == 1:
        return Float8(codes_OI, widen(scale.reshape(1, 1)), (max(stop - start, 1), columns))
    return Float8(codes_OI, widen(scale[start:stop].reshape(-1, 1)), (1, columns))


def _suffix(kind: str) -> str:
    return "weight_scale_inv" if kind == "block" else "weight_scale"
