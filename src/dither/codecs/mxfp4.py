"""MXFP4 and NVFP4: four-bit floats (E2M1) under a shared scale that is a tiny float too.

    MXFP4   32 weights, scale 2^(e − 127) (E8M0): one byte e, then 16 bytes of codes
    NVFP4   64 weights in four groups of 16, each with an unsigned E4M3 scale: 4 bytes, then 4 × 8 of codes

A code is a sign bit above an index into 0, ½, 1, 1½, 2, 3, 4, 6.  Byte j of a group holds weight j below
weight j + half a group.  Sources: OCP Microscaling Formats v1.0 §5.2 and §5.4; `block_mxfp4` and
`block_nvfp4` in ggml-common.h.  As there, the magnitudes are doubled and the scales halved.

The formats' papers and ggml take the scale from the largest weight alone.  Here its neighbors are tried too
and the one of least Σ importance · (w − ŵ)² is kept: a scale this coarse is often better one step away.
NVFP4's further scale per tensor is a tensor of its own in GGUF and no part of these blocks; without it,
weights below 2⁻⁹ meet E4M3's subnormal end and few scales are left to choose from.  `nvfp4-e8` is NVFP4 of
weights times 2⁸, for files that store such a scale: as a power of two it changes no mantissa.

Legend: R rows, C columns, B weights of a block, G of a group, S groups of a block, K some columns,
N bytes of a packed row.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import Levels, Scales, SplitBlocks, multiple_scales
from dither.codecs.blocks import Kernels, blocks, codes_of_nibbles, importance_blocks, nibbles, quotients
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.types import Bytes, Codec, Codes, Floats, Grid

kernels = Kernels("fp4")
FAMILY = "nvfp4-e8 (of weights times 2⁸)"
NAME = re.compile(r"nvfp4-e(-?(?:0|[1-9]\d{0,2}))")
FARTHEST = 100  # exponents that leave all products normal float32s
FINITE = float(np.finfo(np.float32).max)
MAGNITUDES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # doubled
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
MIDDLES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
# E8M0: half of 2^(e − 127) for every byte e; the first two are subnormal.
E8M0_SCALES = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def ue4m3_scales() -> Floats:
    """Half of each unsigned E4M3 number (bias 7); the NaN pattern 127 counts as zero, bit 7 is ignored."""
    exponent, mantissa = (np.arange(256) >> 3) & 15, np.arange(256) & 7
    subnormal, normal = mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    scales = np.where(exponent == 0, subnormal, normal) / 2
    scales[127] = 0.0
    return scales.astype(np.float32)


class Fp4Grid(NamedTuple):
    index_RS: npt.NDArray[np.uint8]  # the stored scale bytes


class Fp4Codec(SplitBlocks):
    """`split`: codes, a sign in bit 3 above an index of magnitude, and the scales' bytes_RS.

    The bytes are plain E8M0 or E4M3 for magnitudes that are not doubled.  With an exponent they are those of
    weights times 2^exponent, and what they stand for is to be divided by as much.
    """

    stored, table = "uint8", VALUES

    def __init__(self, name: str, group: int, scales: Floats, window: tuple[int, int, int], exponent: int = 0) -> None:
        """`window`: scales below and above the first guess that are tried, and the largest that may be chosen."""
        self.name, self.group, self.scales, self.window, self.exponent = name, group, scales, window, exponent
        self.up, self.down = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        kind = GGML_TYPES[name.partition("-")[0].upper()]
        self.block, self.block_bytes, self.groups = kind.block, kind.block_bytes, kind.block // group
        numbers, codes = np.unique(VALUES, return_index=True)
        multiples = scales[: window[2] + 1] * self.down
        self.levels = Levels(numbers, codes.astype(np.uint8), group, multiples, np.zeros(1, np.float32), False)

    def _raised(self, w: Floats) -> Floats:
        w = np.asarray(w, np.float32)
        if not self.exponent:
            return w
        with np.errstate(over="ignore"):
            raised: Floats = np.clip(w * self.up, -FINITE, FINITE)
        return raised

    def to_scales(self, grid: Fp4Grid) -> Scales:
        multiple_RS = grid.index_RS.astype(np.int16)
        return multiple_scales(np.ones(len(multiple_RS), np.float32), multiple_RS)

    def from_scales(self, scales: Scales) -> Fp4Grid:
        return Fp4Grid(scales.multiple_RS.astype(np.uint8))

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The scale byte of least weighted error for each group."""
        return self._fit(self._raised(w_RB), importance_B)

    def _fit(self, raised_RB: Floats, importance_B: Floats | None) -> Fp4Grid:
        w_NG, importance_PG = blocks(raised_RB, self.group), importance_blocks(importance_B, self.group)
        index_N = np.empty(len(w_NG), np.uint8)
        kernels.fit_scales(w_NG, importance_PG, self.scales, self.group == 32, *self.window, index_N)
        return Fp4Grid(index_N.reshape(len(w_NG) // self.groups, self.groups))

    def scales_of(self, grid: Fp4Grid, at: slice) -> Floats:
        """The scale of each column in `at`."""
        group_K = np.arange(*at.indices(self.block)) // self.group
        return self.scales[grid.index_RS][:, group_K]

    def snap(self, w_RK: Floats, grid: Fp4Grid, at: slice) -> Codes:
        w_RK = self._raised(w_RK)
        sizes_RK = quotients(np.abs(w_RK), self.scales_of(grid, at), np.zeros_like(w_RK))
        index_RK = np.searchsorted(MIDDLES, sizes_RK).astype(np.uint8)
        return index_RK | ((w_RK < 0) & (index_RK > 0)).astype(np.uint8) << np.uint8(3)

    def value(self, codes_RK: Codes, grid: Fp4Grid, at: slice) -> Floats:
        values: Floats = VALUES[codes_RK] * self.scales_of(grid, at)
        return values * self.down

    def pack(self, codes_RB: Codes, grid: Fp4Grid) -> Bytes:
        return np.concatenate([grid.index_RS, nibbles(codes_RB, self.group)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        codes_RB = codes_of_nibbles(raw_RN[:, self.groups :], self.group)
        return codes_RB, Fp4Grid(np.ascontiguousarray(raw_RN[:, : self.groups]))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        raised_NB = self._raised(w_NB)
        index_RS, w_NG = self._fit(raised_NB, importance_PB).index_RS, raised_NB.reshape(-1, self.group)
        codes_N = np.empty((len(w_NG), self.group // 2), np.uint8)
        kernels.pack_codes(w_NG, self.scales, index_RS.reshape(-1), codes_N)
        raw_NN[:, : self.groups] = index_RS
        raw_NN[:, self.groups :] = codes_N.reshape(len(raw_NN), self.block // 2)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        codes_N = np.ascontiguousarray(raw_NN[:, self.groups :]).reshape(-1, self.group // 2)
        index_N = np.ascontiguousarray(raw_NN[:, : self.groups]).reshape(-1)
        kernels.unpack_values(codes_N, self.scales, index_N, VALUES, w_NB.reshape(-1, self.group))
        if self.exponent:
            w_NB *= self.down


def parse(name: str, columns: int) -> Codec | None:
    """The codec of a lower-case name, None for another family's.  UsageError for an exponent too large."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    exponent = int(found[1])
    if abs(exponent) > FARTHEST or found[1] == "-0":
        raise UsageError(f"type {name}", f"has an exponent beyond ±{FARTHEST}, or -0")
    scaled = _nvfp4(name, exponent)
    scaled.smaller = "such as int4-g32"
    return scaled


def _nvfp4(name: str, exponent: int = 0) -> Fp4Codec:
    return Fp4Codec(name, 16, ue4m3_scales(), (3, 7, 126), exponent)


CODECS = (_nvfp4("NVFP4"), Fp4Codec("MXFP4", 32, E8M0_SCALES, (1, 1, 252)))
