"""int2 … int8 and uint2 … uint8: equally spaced codes under one scale per group or per row.

    int4-g128      symmetric   ŵ = s · (q − 8),  q = 0 … 15
    uint4-g128     affine      ŵ = s · (q − z),  z = 0 … 15 stored as a code of its own

These are the numbers of GPTQ, AWQ and compressed-tensors files, which differ in how they lay them out, not
in what they can hold.  A name is the type, then the group (a power of two, or "channel": one scale for the
whole row), then the scale's type where it is not float16: `int4-g128-bf16`, `int8-channel-f32`.  The zero
point is a whole number of steps, which is what separates these types from GGUF's: some code is exactly zero.

Eight bits around zero leave out −128, so that ±127 reach equally far (Dettmers et al. 2022, arXiv:2208.07339,
section 2); with fewer bits the lowest code is worth having, and where the largest weight is positive the
scale may be negative to let it have it.  How scales and zero points are searched for: kernels/integers.py.

A packed block is the scale, one byte of zero point if affine, then codes as one stream of bits
(kernels/stored.py).  `bits_per_weight` counts what files store: a zero point in as many bits as a code.

Legend: R rows, C columns, G groups of a row, B weights of a block, K some columns, N bytes of a packed row.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from dither.codecs.base import KINDS, Levels, Scales, SplitBlocks, plain_scales
from dither.codecs.blocks import (
    Kernels,
    blocks,
    bytes_of_scale,
    importance_blocks,
    packed_blocks,
    quotients,
    scale_values,
)
from dither.errors import UsageError
from dither.types import Bytes, Codec, Codes, Floats, Grid

kernels, streams = Kernels("integers"), Kernels("stored")
FAMILY = "int4-g128 and uint4-g128 (2, 3, 4 or 8 bits; groups of 32 to 4096 or -channel; -bf16, -f32)"
NAME = re.compile(r"(u?)int([2348])-(?:g([1-9]\d{1,3})|channel)(?:-(bf16|f32))?")
GROUPS = tuple(2**k for k in range(5, 13))
TYPES = {None: "float16", "bf16": "bfloat16", "f32": "float32"}
# Inverse scales to try, relative to that of the plain formula: below 1 the range is wider than the weights,
# beyond it the largest are cut off.  The fewer the codes, the more that is worth.
FACTORS = {
    2: np.geomspace(0.7, 5.0, 32),
    3: np.geomspace(0.8, 3.6, 32),
    4: np.geomspace(0.88, 3.2, 36),
    8: np.linspace(0.99, 1.01, 5),
}
REACH = {2: 3, 3: 4, 4: 4, 8: 1}  # zero points tried on either side of the plain one, at most


class IntegerGrid(NamedTuple):
    scale_R: Floats  # numbers of the stored type
    zero_R: Bytes


class Integers(SplitBlocks):
    """`bits` per code, `affine` or around zero; a scale of type `stored` for each `block` weights.

    `split`: codes from 0 up, scale_RG float32 and zero_RG uint8: ŵ = s · (q − z).
    """

    def __init__(self, name: str, bits: int, affine: bool, block: int, stored: str) -> None:
        self.name, self.bits, self.affine, self.block, self.stored = name, bits, affine, block, stored
        self.smaller = f"such as {'u' if affine else ''}int{bits}-g32"
        self.kind = KINDS[stored]
        self.scale_size = 4 if stored == "float32" else 2
        self.codes_at = self.scale_size + affine
        self.block_bytes = self.codes_at + -(-block * bits // 8)
        self.most, self.middle = (1 << bits) - 1, 1 << (bits - 1)
        self.lowest = 1 if bits == 8 and not affine else 0  # the lowest code that is given out
        self.levels = self._levels()
        factors = FACTORS[bits]
        if affine:
            candidates = self.most * factors
        elif self.lowest:
            candidates = (self.middle - 1) * factors
        else:
            candidates = np.concatenate([-self.middle * factors, (self.middle - 0.5) * factors])
        self.candidates = candidates.astype(np.float32)

    def _levels(self) -> Levels:
        codes_K = np.arange(self.lowest, self.most + 1, dtype=np.uint8)
        numbers_K = codes_K.astype(np.float32) - np.float32(0 if self.affine else self.middle)
        lowers = np.arange(self.most + 1 if self.affine else 1, dtype=np.float32)
        one, positive = np.ones(1, np.float32), self.affine or bool(self.lowest)
        return Levels(numbers_K, codes_K, self.block, one, lowers, True, self.stored, self.affine, positive)

    @property
    def bits_per_weight(self) -> float:
        shared = 8 * self.scale_size + (self.bits if self.affine else 0)
        return self.bits + shared / self.block

    def to_scales(self, grid: IntegerGrid) -> Scales:
        if not self.affine:
            return plain_scales(grid.scale_R)
        zero_RS = grid.zero_R.astype(np.int16)[:, None]
        return Scales(grid.scale_R.copy(), np.zeros_like(zero_RS), grid.scale_R.copy(), zero_RS)

    def from_scales(self, scales: Scales) -> IntegerGrid:
        if self.affine:
            return IntegerGrid(scales.unit_R, scales.lower_RS[:, 0].astype(np.uint8))
        return self._grid(scales.unit_R)

    def _grid(self, scale_R: Floats) -> IntegerGrid:
        return IntegerGrid(scale_R, np.full(len(scale_R), self.middle, np.uint8))

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The scale, and zero point, of least weighted error that a search finds; never a plain formula's."""
        w_NB, importance_PB = blocks(w_RB, self.block), importance_blocks(importance_B, self.block)
        grid, most, middle = self._grid(np.empty(len(w_NB), np.float32)), np.float32(self.most), np.float32(self.middle)
        if self.affine:
            reach = REACH[self.bits]
            kernels.fit_affine_integers(w_NB, importance_PB, self.candidates, reach, most, self.kind, *grid)
        else:
            how = middle, bool(self.lowest), self.kind
            kernels.fit_signed_integers(w_NB, importance_PB, self.candidates, *how, grid.scale_R)
        return grid

    def snap(self, w_RK: Floats, grid: IntegerGrid, at: slice) -> Codes:
        w_RK, scale_R1 = np.asarray(w_RK, np.float32), grid.scale_R[:, None]
        zero_R1 = grid.zero_R[:, None].astype(np.float32)
        number_RK = quotients(w_RK, scale_R1, np.zeros_like(w_RK))
        number_RK = np.clip(number_RK, np.float32(self.lowest) - zero_R1, np.float32(self.most) - zero_R1)
        codes: Codes = (np.rint(number_RK) + zero_R1).astype(np.uint8)
        return codes

    def value(self, codes_RK: Codes, grid: IntegerGrid, at: slice) -> Floats:
        steps_RK = codes_RK.astype(np.int16) - grid.zero_R[:, None].astype(np.int16)
        return steps_RK.astype(np.float32) * grid.scale_R[:, None]

    def pack(self, codes_RB: Codes, grid: IntegerGrid) -> Bytes:
        raw_RN = np.empty((len(codes_RB), self.block_bytes), np.uint8)
        raw_RN[:, : self.scale_size] = bytes_of_scale(grid.scale_R, self.stored)
        if self.affine:
            raw_RN[:, self.scale_size] = grid.zero_R
        streams.pack_all(packed_blocks(codes_RB, self.block), self.bits, self.codes_at, raw_RN)
        return raw_RN

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = packed_blocks(raw_RN, self.block_bytes)
        codes_RB = np.empty((len(raw_RN), self.block), np.uint8)
        streams.unpack_all(raw_RN, self.bits, self.codes_at, codes_RB)
        grid = self._grid(scale_values(raw_RN, self.stored))
        return codes_RB, grid._replace(zero_R=raw_RN[:, self.scale_size].copy()) if self.affine else grid

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        grid, lowest, most = self.fit(w_NB, importance_PB), np.float32(self.lowest), np.float32(self.most)
        kernels.pack_integers(w_NB, *grid, lowest, most, self.affine, self.kind, self.bits, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_integers(raw_NN, np.int32(self.middle), self.affine, self.kind, self.bits, w_NB)


def parse(name: str, columns: int) -> Codec | None:
    """The codec of a lower-case name, None for another family's.  UsageError for a group that is none."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    unsigned, bits, group, stored = found.groups()
    block = group_of(name, int(group)) if group else row_of(name, columns)
    return Integers(name, int(bits), bool(unsigned), block, TYPES[stored])


def group_of(name: str, group: int) -> int:
    """A group's size, checked."""
    if group not in GROUPS:
        known = ", ".join(str(size) for size in GROUPS)
        raise UsageError(f"type {name}", f"has groups of {group}", f"Choose one of {known}.")
    return group


def row_of(name: str, columns: int) -> int:
    """The block of a type that has one scale per row."""
    if columns < 1:
        raise UsageError(f"type {name}", "has one scale per row, and how long rows are was not said", "Pass columns.")
    return columns
