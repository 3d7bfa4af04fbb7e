"""IQ4_NL and IQ4_XS: four bits that index sixteen unevenly spaced numbers.

Weights gather around zero, so a codebook that is dense there and sparse outside beats equal steps at the
same four bits.  Source of the sixteen numbers (`kvalues_iq4nl`) and of the layouts (`block_iq4_nl`,
`block_iq4_xs`): ggml-common.h.

    IQ4_NL   32 weights, ŵ = d · codebook[code]: float16 d, then 16 bytes of nibbles
    IQ4_XS   8 × 32 weights, ŵ = d · (l − 32) · codebook[code]: float16 d, the upper two bits of each l in two
             bytes, the lower four in four bytes, then 8 × 16 bytes of nibbles

Byte j of each 16 holds weight j below weight j + 16.  How scales are searched for: kernels/iq4.py.

Legend: R rows, C columns, B weights of a block, S sub-blocks of 32, K some columns, N bytes of a packed row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import BlockCodec, Levels, OneScale, Scales, TableCodec, multiple_scales, plain_levels
from dither.codecs.blocks import (
    Kernels,
    blocks,
    bytes_of_scale,
    codes_of_nibbles,
    importance_blocks,
    invert,
    nibbles,
    scale_values,
)
from dither.formats.ggml import GGML_TYPES
from dither.types import Bytes, Codes, Floats, Grid

kernels = Kernels("iq4")
CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# Entry k is the code nearest to the numbers from (k − 512) / 2 up to the next half step.
CENTER = np.float32(512)
BORDERS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2
NEAREST = np.searchsorted(BORDERS, (np.arange(1024) - 512) / 2, side="right").astype(np.int32)
NEAREST_VALUE = CODEBOOK[NEAREST]
# Codebook positions on which the largest weight is tried to land, on the long side and the short one.
CANDIDATES = np.concatenate([-np.linspace(108, 150, 8), np.linspace(95, 140, 8)]).astype(np.float32)


def nearest_codes(w_RK: Floats, scale_RK: Floats) -> Codes:
    """Codes of the codebook entries nearest to w / scale, by the arithmetic of the kernel.

    Where the scale is zero, code 8: the entry 1, which is nearest to zero.
    """
    with np.errstate(over="ignore"):  # an infinite quotient is clamped like any other
        steps_RK = np.asarray(w_RK, np.float32) * invert(scale_RK) * np.float32(2) + CENTER
    codes: Codes = NEAREST[np.clip(steps_RK, 0, len(NEAREST) - 1).astype(np.int32)].astype(np.uint8)
    return codes


class NonLinear(TableCodec):
    name, block, stored, table = "IQ4_NL", 32, "float16", CODEBOOK
    block_bytes, scales_at = GGML_TYPES["IQ4_NL"].block_bytes, (0,)
    levels = plain_levels(CODEBOOK, np.arange(16, dtype=np.uint8), 32)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        w_NB = blocks(w_RB, self.block)
        scale_N = np.empty(len(w_NB), np.float32)
        kernels.fit_nl(w_NB, importance_blocks(importance_B, 32), CANDIDATES, NEAREST_VALUE, scale_N)
        return OneScale(scale_N)

    def snap(self, w_RK: Floats, grid: OneScale, at: slice) -> Codes:
        return nearest_codes(w_RK, grid.scale_R[:, None])

    def pack(self, codes_RB: Codes, grid: OneScale) -> Bytes:
        return np.concatenate([bytes_of_scale(grid.scale_R, "float16"), nibbles(codes_RB, 32)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        return codes_of_nibbles(raw_RN[:, 2:], 32), OneScale(scale_values(raw_RN, "float16"))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        kernels.pack_nl(w_NB, self.fit(w_NB, importance_PB).scale_R, NEAREST, raw_NN)
        self.restore_length(w_NB, importance_PB, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_nl(raw_NN, CODEBOOK, w_NB)


class SuperGrid(NamedTuple):
    scale_R: Floats  # a float16's value
    multiple_RS: npt.NDArray[np.int8]  # −32 … 31


class NonLinearSuper(BlockCodec):
    name, block = "IQ4_XS", 256
    block_bytes, scales_at = GGML_TYPES["IQ4_XS"].block_bytes, (0,)
    levels = Levels(
        CODEBOOK, np.arange(16, dtype=np.uint8), 32, np.arange(-32, 32, dtype=np.float32), np.zeros(1, np.float32), True
    )

    def to_scales(self, grid: SuperGrid) -> Scales:
        multiple_RS = grid.multiple_RS.astype(np.int16) + np.int16(32)
        return multiple_scales(grid.scale_R.copy(), multiple_RS)

    def from_scales(self, scales: Scales) -> SuperGrid:
        return SuperGrid(scales.unit_R, (scales.multiple_RS - np.int16(32)).astype(np.int8))

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        w_N32, importance_P32 = blocks(w_RB, 32), importance_blocks(importance_B, 32)
        scale_N = np.empty(len(w_N32) // 8, np.float32)
        multiple_NS = np.empty((len(scale_N), 8), np.int8)
        kernels.fit_xs(w_N32, importance_P32, CANDIDATES, NEAREST_VALUE, scale_N, multiple_NS)
        return SuperGrid(scale_N, multiple_NS)

    @staticmethod
    def scales_of(grid: SuperGrid, at: slice) -> Floats:
        """The scale of each column in `at`."""
        scale_RS: Floats = grid.scale_R[:, None] * grid.multiple_RS.astype(np.float32)
        return scale_RS[:, np.arange(*at.indices(256)) // 32]

    def snap(self, w_RK: Floats, grid: SuperGrid, at: slice) -> Codes:
        return nearest_codes(w_RK, self.scales_of(grid, at))

    def value(self, codes_RK: Codes, grid: SuperGrid, at: slice) -> Floats:
        return CODEBOOK[codes_RK] * self.scales_of(grid, at)

    def pack(self, codes_RB: Codes, grid: SuperGrid) -> Bytes:
        biased_RS = (grid.multiple_RS + np.int8(32)).astype(np.uint8)
        low = biased_RS & np.uint8(15)
        upper = ((biased_RS >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype="<u2")
        scale_R2, upper_R2 = bytes_of_scale(grid.scale_R, "float16"), upper.view(np.uint8).reshape(-1, 2)
        return np.concatenate([scale_R2, upper_R2, low[:, ::2] | low[:, 1::2] << 4, nibbles(codes_RB, 32)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        upper_R = np.ascontiguousarray(raw_RN[:, 2:4]).view("<u2")
        upper_RS = (upper_R >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
        low_RS = np.stack([raw_RN[:, 4:8] & 15, raw_RN[:, 4:8] >> 4], axis=2).reshape(-1, 8)
        multiple_RS = (low_RS | (upper_RS << 4)).astype(np.int8) - np.int8(32)
        return codes_of_nibbles(raw_RN[:, 8:], 32), SuperGrid(scale_values(raw_RN, "float16"), multiple_RS)

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        kernels.pack_xs(w_NB, *self.fit(w_NB, importance_PB), NEAREST, raw_NN)
        self.restore_length(w_NB, importance_PB, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_xs(raw_NN, CODEBOOK, w_NB)


CODECS = (NonLinear(), NonLinearSuper())
