"""Which quantized weights are a type of GGUF already: the same numbers, only laid out otherwise.

    Q4_0    ŵ = d · (q − 8)        32 weights: d float16, then 16 bytes
    Q4_1    ŵ = d · q + m          32 weights: d and m float16, then 16 bytes
    MXFP4   ŵ = 2^(e − 127) · v    32 weights: e, then 16 bytes

Byte j of a block holds weight j in its low nibble and weight j + 16 in its high one (`block_q4_0` in
ggml-common.h).  Groups of a multiple of 32 columns become several blocks of the same scale.  What has a zero
point z becomes q − z = (q + 8 − z) − 8 where that still fits four bits, and s · (q − z) = s·q + (−s·z) where
the product is a float16: then d·q and m are both multiples of one unit and their float32 sum is exact.

Legend: O rows, I columns, B blocks of a row, N bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dither.formats.layouts.parts import Affine, Micro
from dither.types import Bytes, Floats

_BLOCK = 32


def recode(weight: Affine | Micro, kind: str) -> Bytes | None:
    """Whole rows as ggml's blocks of `kind`, uint8 (O, N); None where a weight would not be the same."""
    if isinstance(weight, Micro):
        plain = weight.bits == 4 and weight.global_scale is None and weight.multiplier is None
        rows, blocks = weight.scale_OG.shape
        if kind != "MXFP4" or not plain or weight.codes_OI.shape[1] != blocks * _BLOCK:
            return None
        if not ((weight.scale_OG > 0) & (weight.scale_OG < 255)).all():  # halved to nothing by ggml, and NaN
            return None
        return _blocks([weight.scale_OG[..., None]], weight.codes_OI.reshape(rows, blocks, _BLOCK))
    columns = weight.codes_OI.shape[1]
    groups = weight.scale_OG.shape[1]
    whole = weight.group_of_I is None and columns % (groups * _BLOCK) == 0
    if not whole or kind not in ("Q4_0", "Q4_1"):
        return None
    blocks = columns // _BLOCK
    scale_OB = np.repeat(weight.scale_OG, blocks // groups, axis=1)
    zero_OB = np.repeat(weight.zero_OG.astype(np.int16), blocks // groups, axis=1)
    codes_OB = weight.codes_OI.astype(np.int16).reshape(len(scale_OB), blocks, _BLOCK)
    if kind == "Q4_0":
        return _blocks([_float16(scale_OB)], codes_OB + (8 - zero_OB)[..., None])
    lowest_OB = -scale_OB * zero_OB.astype(np.float32)
    return _blocks([_float16(scale_OB), _float16(lowest_OB)], codes_OB)


def _float16(values: Floats) -> Bytes | None:
    """The bytes of every value, (O, B, 2); None where one is no float16."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    same = np.isfinite(narrow).all() and np.array_equal(narrow.astype(np.float32), values)
    return narrow[..., None].view(np.uint8) if same else None


def _blocks(headers: list[Bytes | None], codes_OB: npt.NDArray[Any]) -> Bytes | None:
    pieces = [header for header in headers if header is not None]
    if len(pieces) < len(headers) or (codes_OB.size and not 0 <= codes_OB.min() <= codes_OB.max() <= 15):
        return None
    nibbles = codes_OB.astype(np.uint8)
    raw = np.concatenate([*pieces, nibbles[..., : _BLOCK // 2] | nibbles[..., _BLOCK // 2 :] << np.uint8(4)], axis=2)
    return raw.reshape(len(raw), raw.shape[1] * raw.shape[2])
