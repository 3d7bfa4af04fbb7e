"""TQ1_0 and TQ2_0: weights −d, 0 or d in blocks of 256, for models trained to be ternary (BitNet).

    TQ1_0   five base-3 digits in a byte, which has room for 3⁵ = 243 of its 256 values: 1.6875 bits a weight
    TQ2_0   four two-bit digits in a byte: 2.0625 bits a weight

A byte of TQ1_0 is the number 0.d₀d₁d₂d₃d₄ (base 3) in units of 1/256, rounded up, so that a decoder peels
off digits by multiplying by 3 and taking what overflows.  The first 32 bytes hold weights m, m + 32, …
m + 128, the next 16 bytes 160 + m, 176 + m, …, the last four bytes 240 + m, 244 + m, … with a fifth digit of
zero; d follows.  Byte m of half a block of TQ2_0 holds weights m, m + 32, m + 64, m + 96.
Source: `block_tq1_0` and `block_tq2_0` in ggml-common.h.

Without importance d is the largest magnitude and the bytes are ggml's, which is exact for a ternary model and
poor for any other; with importance the best of a few dozen d is searched for.

Legend: R rows, C columns, B = 256 weights of a block, K some columns, N bytes of a packed row.
"""

from __future__ import annotations

import numpy as np

from dither.codecs.base import plain_levels
from dither.codecs.blocks import Kernels, blocks, bytes_of_scale, importance_blocks, scale_values
from dither.codecs.legacy import BELOW_HALF, FactorCodec, ScaleGrid, empty_grid, steps_from, stored_grid
from dither.formats.ggml import GGML_TYPES
from dither.types import Bytes, Codes, Floats, Grid

kernels, scaling, searches = Kernels("ternary"), Kernels("legacy"), Kernels("uniform")
# Inverse scales to try, in units of one over the largest weight: rounding up begins at half a scale.
CANDIDATES = np.geomspace(0.75, 6.0, 32).astype(np.float32)
# TQ1_0's three regions: first weight, weights apart, digits, bytes.
REGIONS = ((0, 32, 5, slice(0, 32)), (160, 16, 5, slice(32, 48)), (240, 4, 4, slice(48, 52)))
POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


class TernaryCodec(FactorCodec):
    block = 256

    def __init__(self, name: str) -> None:
        self.name = name
        self.block_bytes = GGML_TYPES[name].block_bytes
        self.levels = plain_levels((-1, 0, 1), np.arange(3, dtype=np.uint8), self.block)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        w_NB = blocks(w_RB, self.block)
        grid = empty_grid(len(w_NB))
        scaling.fit_absmax(w_NB, np.float32(1), *grid[:2])
        if importance_B is not None:
            importance_PB = importance_blocks(importance_B, self.block)
            searches.search_signed(w_NB, importance_PB, CANDIDATES, np.float32(-1), np.float32(2), *grid[:2])
        return grid

    def snap(self, w_RK: Floats, grid: ScaleGrid, at: slice) -> Codes:
        steps_RK, _ = steps_from(w_RK, grid, 0.0)
        steps_RK += np.copysign(BELOW_HALF, steps_RK)
        return (np.clip(steps_RK, -1, 1).astype(np.int8) + 1).astype(np.uint8)

    def value(self, codes_RK: Codes, grid: ScaleGrid, at: slice) -> Floats:
        return (codes_RK.astype(np.int8) - np.int8(1)).astype(np.float32) * grid.scale_R[:, None]

    def pack(self, codes_RB: Codes, grid: ScaleGrid) -> Bytes:
        digits_RB = codes_RB.astype(np.uint16)
        packed = self._pack_base3(digits_RB) if self.name == "TQ1_0" else self._pack_two_bits(digits_RB)
        return np.concatenate([*packed, bytes_of_scale(grid.scale_R, "float16")], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        scale_R = scale_values(raw_RN[:, -2:], "float16")
        parts = self._unpack_base3(raw_RN) if self.name == "TQ1_0" else self._unpack_two_bits(raw_RN)
        return np.concatenate(parts, axis=1).astype(np.uint8), stored_grid(scale_R, np.zeros_like(scale_R))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        getattr(kernels, f"pack_{self.name[:3].lower()}")(w_NB, *self.fit(w_NB, importance_PB)[:2], raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        getattr(kernels, f"decode_{self.name[:3].lower()}")(raw_NN, w_NB)

    @staticmethod
    def _pack_base3(digits_RB: Codes) -> list[Bytes]:
        parts = []
        for start, width, count, _ in REGIONS:
            digits = digits_RB[:, start : start + width * count].reshape(-1, count, width)
            number = (digits * POWERS[:count, None]).sum(axis=1, dtype=np.uint16)
            parts.append(((number.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
        return parts

    @staticmethod
    def _unpack_base3(raw_RN: Bytes) -> list[Codes]:
        parts = []
        for _, _, count, where in REGIONS:
            rest: Codes = raw_RN[:, where].astype(np.uint16)
            for _ in range(count):
                tripled: Codes = rest * np.uint16(3)
                parts.append(tripled >> np.uint16(8))
                rest = tripled & np.uint16(255)
        return parts

    @staticmethod
    def _pack_two_bits(digits_RB: Codes) -> list[Bytes]:
        digits = digits_RB.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint16)[:, None]
        packed = digits.sum(axis=2, dtype=np.uint16).astype(np.uint8)
        return [packed.reshape(len(digits_RB), 64)]

    @staticmethod
    def _unpack_two_bits(raw_RN: Bytes) -> list[Codes]:
        bytes_R2 = raw_RN[:, :64].reshape(-1, 2, 1, 32)
        digits = (bytes_R2 >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
        return [digits.reshape(len(raw_RN), 256)]


CODECS = (TernaryCodec("TQ2_0"), TernaryCodec("TQ1_0"))
