"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 weights under one float16 scale, or a scale and a minimum.

    Q8_0           ŵ = d · q,  q = −127 … 127, d = max|w| / 127
    Q4_0, Q5_0     ŵ = d · q,  q = −8 … 7 or −16 … 15; the largest weight gets the lowest code
    Q4_1, Q5_1     ŵ = d · q + m,  q = 0 … 15 or 0 … 31, m = min w

Bytes: d (float16), m where there is one, then for five bits a little-endian word of 32 fifth bits, then 16
bytes of nibbles, byte j holding weight j below weight j + 16.  Source: `block_q*` in ggml-common.h.

Without importance the bytes are those of ggml's reference encoder: weights are rounded under the scale as it
was *before* it became a float16, so a grid keeps that factor beside the stored scale.  With importance the
scale (and minimum) that keeps Σ importance · (w − ŵ)² least is searched for; Q8_0 keeps the plain formula,
since at eight bits nearly all of the error is rounding that no scale avoids.

Legend: R rows, C columns, B = 32 weights of a block, K some of its columns, N bytes of a packed block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import BlockCodec, Scales, plain_levels, plain_scales
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

kernels, searches = Kernels("legacy"), Kernels("uniform")
BELOW_HALF = np.float32(0.49999997)


class ScaleGrid(NamedTuple):
    """Stored, as float16: `scale_R` and `minimum_R`.  A weight's code is (w − origin) · inverse, rounded."""

    scale_R: Floats
    inverse_R: Floats
    minimum_R: Floats  # zero, as is the origin, where a type stores none
    origin_R: Floats


def stored_grid(scale_R: Floats, minimum_R: Floats) -> ScaleGrid:
    """A grid that rounds under what is stored."""
    return ScaleGrid(scale_R, invert(scale_R), minimum_R, minimum_R)


def empty_grid(rows: int) -> ScaleGrid:
    return ScaleGrid(*(np.zeros(rows, np.float32) for _ in range(4)))


def steps_from(w_RK: Floats, grid: ScaleGrid, shift: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(w − origin) · inverse + shift, and which rows have a finite inverse: the others get code 0.

    The inverse of a scale below 2⁻¹²⁸ overflows.  Its float16 is zero, so their code has no meaning, but
    ggml's bytes are reproduced for it too.
    """
    finite_R1 = np.isfinite(grid.inverse_R)[:, None]
    inverse_R1 = np.where(finite_R1, grid.inverse_R[:, None], np.float32(0))
    steps_RK = (np.asarray(w_RK, np.float32) - grid.origin_R[:, None]) * inverse_R1
    return steps_RK + np.float32(shift), finite_R1


class FactorCodec(BlockCodec):
    """What the types of `ScaleGrid` share; `affine` ones store a minimum."""

    affine = False

    def to_scales(self, grid: ScaleGrid) -> Scales:
        return plain_scales(grid.scale_R, grid.minimum_R if self.affine else None)

    def from_scales(self, scales: Scales) -> Grid:
        return stored_grid(scales.unit_R, -scales.below_R)


class Q8(FactorCodec):
    name, block = "Q8_0", 32
    block_bytes = GGML_TYPES["Q8_0"].block_bytes
    levels = plain_levels(range(-127, 128), np.arange(-127, 128, dtype=np.int8), 32)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        w_NB = blocks(w_RB, self.block)
        grid = empty_grid(len(w_NB))
        kernels.fit_absmax(w_NB, np.float32(127), grid.scale_R, grid.inverse_R)
        return grid

    def snap(self, w_RK: Floats, grid: ScaleGrid, at: slice) -> Codes:
        steps_RK, _ = steps_from(w_RK, grid, 0.0)
        steps_RK += np.copysign(BELOW_HALF, steps_RK)  # halves go away from zero, as in C's roundf
        return np.clip(steps_RK, -127, 127).astype(np.int8)

    def value(self, codes_RK: Codes, grid: ScaleGrid, at: slice) -> Floats:
        return codes_RK.astype(np.float32) * grid.scale_R[:, None]

    def pack(self, codes_RB: Codes, grid: ScaleGrid) -> Bytes:
        codes_RB = codes_RB.astype(np.int8).view(np.uint8)
        return np.concatenate([bytes_of_scale(grid.scale_R, "float16"), codes_RB], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        scale_R = scale_values(raw_RN, "float16")
        return np.ascontiguousarray(raw_RN[:, 2:]).view(np.int8), stored_grid(scale_R, np.zeros_like(scale_R))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        kernels.pack_q8(w_NB, *self.fit(w_NB, None)[:2], raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_q8(raw_NN, w_NB)


class LowBits(FactorCodec):
    """Q4_0, Q4_1, Q5_0, Q5_1: four or five bits, with a minimum (affine) or around zero."""

    block = 32

    def __init__(self, name: str, bits: int, affine: bool) -> None:
        self.name, self.bits, self.affine = name, bits, affine
        self.block_bytes = GGML_TYPES[name].block_bytes
        self.most = (1 << bits) - 1
        self.middle = 0 if affine else 1 << (bits - 1)
        self.shift = 0.5 + self.middle
        # Inverse scales to try, in units of one over the spread, or over the largest weight.  Around zero the
        # codes reach one step further down than up, so the largest weight may lie on either side.
        steps = np.arange(-9, 10, dtype=np.float32) * np.float32(0.1 if bits == 4 else 0.125)
        if affine:
            self.candidates = self.most + steps
        else:
            self.candidates = np.concatenate([-(self.middle + steps), self.middle - 1 + steps + np.float32(0.5)])

        codes = np.arange(self.most + 1, dtype=np.uint8)
        self.levels = plain_levels(codes.astype(np.float32) - self.middle, codes, 32, lower=affine)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """ggml's formula without importance; the best of a few dozen scales with it."""
        w_NB, most, middle = blocks(w_RB, self.block), np.float32(self.most), np.float32(self.middle)
        grid = empty_grid(len(w_NB))
        if self.affine:
            kernels.fit_affine(w_NB, most, *grid)
        else:
            kernels.fit_signed(w_NB, middle, *grid[:2])
        if importance_B is None:
            return grid
        importance_PB = importance_blocks(importance_B, self.block)
        if self.affine:
            searches.search_affine(w_NB, importance_PB, self.candidates, most, *grid)
        else:
            searches.search_signed(w_NB, importance_PB, self.candidates, -middle, most, *grid[:2])
        return grid

    def snap(self, w_RK: Floats, grid: ScaleGrid, at: slice) -> Codes:
        steps_RK, finite_R1 = steps_from(w_RK, grid, self.shift)
        codes_RK = np.clip(steps_RK, 0, self.most).astype(np.uint8)
        return np.where(finite_R1, codes_RK, np.uint8(0))

    def value(self, codes_RK: Codes, grid: ScaleGrid, at: slice) -> Floats:
        steps_RK = (codes_RK.astype(np.int8) - np.int8(self.middle)).astype(np.float32)
        values: Floats = steps_RK * grid.scale_R[:, None]
        return values + grid.minimum_R[:, None] if self.affine else values

    def pack(self, codes_RB: Codes, grid: ScaleGrid) -> Bytes:
        codes_RB = codes_RB.astype(np.uint8)
        parts = [bytes_of_scale(stored_R, "float16") for stored_R in (grid.scale_R, grid.minimum_R)[: 1 + self.affine]]
        if self.bits == 5:
            parts.append(np.packbits(codes_RB >> 4, axis=1, bitorder="little"))
        return np.concatenate([*parts, nibbles(codes_RB & np.uint8(15), 32)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        scale_R = scale_values(raw_RN, "float16")
        minimum_R = scale_values(raw_RN[:, 2:4], "float16") if self.affine else np.zeros_like(scale_R)
        codes_RB = codes_of_nibbles(raw_RN[:, -16:], 32)
        if self.bits == 5:
            fifth_RB = np.unpackbits(raw_RN[:, -20:-16], axis=1, bitorder="little")
            codes_RB |= fifth_RB << np.uint8(4)
        return codes_RB, stored_grid(scale_R, minimum_R)

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        grid = self.fit(w_NB, importance_PB)
        kernels.pack_low_bits(w_NB, *grid, np.float32(self.shift), self.bits, self.affine, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_low_bits(raw_NN, self.bits, self.affine, w_NB)


CODECS = (
    Q8(),
    LowBits("Q5_1", 5, affine=True),
    LowBits("Q5_0", 5, affine=False),
    LowBits("Q4_1", 4, affine=True),
    LowBits("Q4_0", 4, affine=False),
)
