"""The number types that checkpoints store, turned into float32.

bfloat16 is the upper half of a float32, so a shift restores it.  The 8-bit types have 256 values
each: a table of them is the whole decoder (`formats.layouts.numbers` computes those of E4M3 and E8M0;
E5M2 is the upper half of a float16, Micikevicius et al. 2022, arXiv:2209.05433, table 1).

Legend: N bytes, n numbers.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from dither.formats.layouts import numbers
from dither.types import Bytes, Floats

_CHUNK = 1 << 15  # numbers whose table indices, widened by numpy to 8 bytes each, still fit the L2 cache
_PLAIN = {
    "F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
READABLE = frozenset(_PLAIN) | FP8 | {"BF16", "F16", "F8_E8M0"}


def to_float32(raw_N: Bytes, dtype: str) -> Floats:
    """Stored little-endian bytes as a new, writable float32 (n,) array.

    `dtype` is safetensors' name, one of READABLE.  F64 and integers are rounded to the nearest
    float32; a value beyond its range becomes infinite.
    """
    if dtype in ("BF16", "F16"):
        from dither.codecs.kernels.widen import widen_bf16, widen_f16

        bits_n = np.empty(raw_N.size // 2, dtype=np.uint32)
        (widen_bf16 if dtype == "BF16" else widen_f16)(raw_N.view("<u2"), bits_n)
        return bits_n.view(np.float32)
    if dtype in _PLAIN:
        with np.errstate(over="ignore"):
            return raw_N.view(_PLAIN[dtype]).astype(np.float32)
    table, w_n = _table(dtype), np.empty(raw_N.size, dtype=np.float32)
    for start in range(0, raw_N.size, _CHUNK):
        piece = slice(start, start + _CHUNK)
        # "clip" spares numpy a check, and no byte is out of a table of 256.
        np.take(table, raw_N[piece], out=w_n[piece], mode="clip")
    return w_n


@cache
def _table(dtype: str) -> Floats:
    byte = np.arange(256)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (byte.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    values = numbers.e8m0() if dtype == "F8_E8M0" else numbers.e4m3()
    return values.astype(np.float32)
