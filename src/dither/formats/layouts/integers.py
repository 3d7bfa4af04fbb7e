"""One signed byte per weight: compressed-tensors' int-quantized and bitsandbytes' LLM.int8.

    int-quantized   weight I8 [O, I], weight_scale [O, 1], and where asymmetric weight_zero_point I8 [O, 1]
    LLM.int8        weight I8 [O, I], SCB F32 [O], weight_format U8 []

SCB is the largest magnitude of a row, so the scale is SCB / 127 (Dettmers et al. 2022, arXiv:2208.07339,
section 2.1).  `weight_format` 0 says that rows lie as they are; other values were layouts of old GPUs.

Sources: compressed-tensors, `compressors/naive_quantized`; bitsandbytes, `nn/modules.py`, Linear8bitLt.

Legend: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts.numbers import narrow, of_rows, widen
from dither.formats.layouts.parts import Arrays, Int8, Shapes

ROW_MAJOR = 0  # the one weight_format that is still written


def parts(rows: int, columns: int, kind: str, *, symmetric: bool = True, scale: str = "BF16") -> Shapes:
    """The tensors of one matrix as "int-quantized" or "llm-int8", with a scale per row."""
    weight: Shapes = {"weight": ("I8", (rows, columns))}
    if kind == "llm-int8":
        return weight | {"SCB": ("F32", (rows,)), "weight_format": ("U8", ())}
    found: Shapes = weight | {"weight_scale": (scale, (rows, 1))}
    return found if symmetric else found | {"weight_zero_point": ("I8", (rows, 1))}


def pack(weight: Int8, kind: str, *, scale: str = "BF16") -> Arrays:
    """The tensors of `parts`.

    Raises UnsupportedError where LLM.int8 has no place for zero points or groups, UsageError for scales that
    the number type does not have.
    """
    codes: Arrays = {"weight": np.ascontiguousarray(weight.codes_OI, np.int8)}
    if kind == "llm-int8":
        if weight.zero_OG is not None or weight.scale_OG.shape[1] != 1:
            raise UnsupportedError("LLM.int8", "has one scale per row and no zero points", "Choose int-quantized.")
        absmax_O = (weight.scale_OG[:, 0] * np.float32(127)).astype(np.float32)
        return codes | {"SCB": absmax_O, "weight_format": np.array(ROW_MAJOR, np.uint8)}
    found: Arrays = codes | {"weight_scale": narrow(weight.scale_OG, scale)}
    if weight.zero_OG is not None:
        found["weight_zero_point"] = np.ascontiguousarray(weight.zero_OG, np.int8)
    return found


def unpack(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Int8:
    """Rows `start` to `stop` of the matrix, from whichever scales there are."""
    codes_OI = arrays["weight"][start:stop]
    if "SCB" in arrays:
        return Int8(codes_OI, (widen(arrays["SCB"][start:stop]) / np.float32(127))[:, None])
    scale_OG = widen(of_rows(arrays["weight_scale"], start, stop))
    zero = arrays.get("weight_zero_point")
    zero_OG = None if zero is None else np.broadcast_to(of_rows(zero, start, stop), scale_OG.shape)
    return Int8(codes_OI, scale_OG, zero_OG)
