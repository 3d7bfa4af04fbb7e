"""F32, F16 and BF16: each weight stored as a floating-point number of its own, with no shared scale.

They fill the codec interface trivially (a block is one weight, the code is its bit pattern, the grid is
empty), so that a plan may leave a tensor unquantized without anybody treating it as a special case.

Rounding is to nearest, ties to even, as IEEE 754 asks of F16 and as ggml does for BF16, which is the upper
half of a float32: bfloat16 has float32's range and 8 bits of precision, half has 11 bits and ends at 65504.
A weight beyond that end is clamped to it here; telling the user is the caller's part.

Legend: R rows, C columns, K some columns, N bytes of a packed row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dither.codecs.base import HALF_MAX, BlockCodec
from dither.codecs.blocks import Kernels
from dither.types import Bytes, Codes, Floats, Grid

kernels = Kernels("widen")


class FloatCodec(BlockCodec):
    """A float format of `code_type`'s width; subclasses say how numbers and bits correspond."""

    block = 1
    code_type: np.dtype[Any]

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """Nothing is shared between weights, so there is nothing to fit: an empty tuple."""
        return ()

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        return np.ascontiguousarray(codes_RB, dtype=self.code_type).view(np.uint8)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        return np.ascontiguousarray(raw_RN).view(self.code_type), ()

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        return self.pack(self.snap(w_RC, (), slice(None)), ())

    def decode(self, raw_RN: Bytes) -> Floats:
        return self.value(self.unpack(raw_RN)[0], (), slice(None))


class Float32(FloatCodec):
    name, block_bytes = "F32", 4
    code_type = np.dtype("<u4")

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        return np.ascontiguousarray(w_RK, np.float32).view(self.code_type)

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        return np.ascontiguousarray(codes_RK).view(np.float32)


class Float16(FloatCodec):
    """Clamps to ±65504 rather than make an infinity out of a finite weight."""

    name, block_bytes = "F16", 2
    code_type = np.dtype("<u2")

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        half = np.clip(np.asarray(w_RK, np.float32), -HALF_MAX, HALF_MAX).astype(np.float16)
        return half.view(self.code_type)

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        bits = np.empty(codes_RK.size, np.uint32)
        kernels.widen_f16(np.ascontiguousarray(codes_RK).reshape(-1), bits)
        return bits.view(np.float32).reshape(codes_RK.shape)


class BFloat16(FloatCodec):
    name, block_bytes = "BF16", 2
    code_type = np.dtype("<u2")

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        bits = np.ascontiguousarray(w_RK, np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even neighbor
        return ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        return (codes_RK.astype(np.uint32) << np.uint32(16)).view(np.float32)


CODECS = (Float32(), Float16(), BFloat16())
