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
from dither.codecs.blocks import blocks, importance_blocks
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.types import Bytes, Codec, Codes, Floats, Grid

FAMILY = "nvfp4-e8 (of weights times 2⁸)"
NAME = re.compile(r"nvfp4-e(-?(?:0|[1-9]\d{0,2}))")
FARTHEST = 100  # exponents that leave all products normal float32s
FINITE = float(np.finfo(np.float32).max)
MAGNITUDES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # doubled
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
MIDDLES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2


def e8m0_scales() -> Floats:
    """Half of 2^(e − 127) for every byte e; the first two are subnormal."""
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


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

    The bytes are plain E8M0 or E4M3 for magnitudes that are not doubled.
    """

    stored, table = "uint8", VALUES

    def __init__(self, name: str, group: int, scales: Floats, window: tuple[int, int], last: int) -> None:
        self.name, self.group, self.scales = name, group, scales
        self.below, self.above = window
        self.last = last  # the largest scale that may be chosen
        self.block, self.block_bytes = GGML_TYPES[name].block, GGML_TYPES[name].block_bytes
        self.groups = self.block // group
        numbers, codes = np.unique(VALUES, return_index=True)
        multiples = scales[: last + 1]
        self.levels = Levels(numbers, codes.astype(np.uint8), group, multiples, np.zeros(1, np.float32), False)

    def to_scales(self, grid: Grid) -> Scales:
        multiple_RS = grid.index_RS.astype(np.int16)
        return multiple_scales(np.ones(len(multiple_RS), np.float32), multiple_RS)

    def from_scales(self, scales: Scales) -> Fp4Grid:
        return Fp4Grid(scales.multiple_RS.astype(np.uint8))

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The scale byte of least weighted error for each group."""
        from dither.codecs.kernels import fp4

        w_NG = blocks(w_RB, self.group)
        index_N = np.empty(len(w_NG), np.uint8)
        importance_PG, window = importance_blocks(importance_B, self.group), (self.below, self.above, self.last)
        fp4.fit_scales(w_NG, importance_PG, self.scales, self.name == "MXFP4", *window, index_N)
        return Fp4Grid(index_N.reshape(len(w_NG) // self.groups, self.groups))

    def scales_of(self, grid: Grid, at: slice) -> Floats:
        """The scale of each column in `at`."""
        group_K = np.arange(*at.indices(self.block)) // self.group
        scales_RK: Floats = self.scales[grid.index_RS][:, group_K]
        return scales_RK

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        w_RK = np.asarray(w_RK, np.float32)
        scales_RK = self.scales_of(grid, at)
        sizes_RK = np.zeros_like(w_RK)
        with np.errstate(over="ignore"):  # a quotient beyond float32 is still beyond the last magnitude
            np.divide(np.abs(w_RK), scales_RK, out=sizes_RK, where=scales_RK > 0)
        index_RK = np.searchsorted(MIDDLES, sizes_RK).astype(np.uint8)
        return index_RK | ((w_RK < 0) & (index_RK > 0)).astype(np.uint8) << np.uint8(3)

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        values: Floats = VALUES[codes_RK] * self.scales_of(grid, at)
        return values

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        codes_RSG = codes_RB.astype(np.uint8).reshape(-1, self.groups, self.group)
        low, high = codes_RSG[..., : self.group // 2], codes_RSG[..., self.group // 2 :]
        codes_RN = (low | high << np.uint8(4)).reshape(len(codes_RB), self.block // 2)
        return np.concatenate([grid.index_RS, codes_RN], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        bytes_RSG = raw_RN[:, self.groups :].reshape(len(raw_RN), self.groups, self.group // 2)
        codes_RSG = np.concatenate([bytes_RSG & 15, bytes_RSG >> 4], axis=2)
        index_RS = np.ascontiguousarray(raw_RN[:, : self.groups])
        return codes_RSG.reshape(len(raw_RN), self.block), Fp4Grid(index_RS)

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        from dither.codecs.kernels import fp4

        w_NG, index_RS = blocks(w_NB, self.group), self.fit(w_NB, importance_PB).index_RS
        codes_N = np.empty((len(w_NG), self.group // 2), np.uint8)
        fp4.pack_codes(w_NG, self.scales, index_RS.reshape(-1), codes_N)
        raw_NN[:, : self.groups] = index_RS
        raw_NN[:, self.groups :] = codes_N.reshape(len(raw_NN), self.block // 2)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        from dither.codecs.kernels import fp4

        codes_N = np.ascontiguousarray(raw_NN[:, self.groups :]).reshape(-1, self.group // 2)
        index_N = np.ascontiguousarray(raw_NN[:, : self.groups]).reshape(-1)
        fp4.unpack_values(codes_N, self.scales, index_N, VALUES, w_NB.reshape(-1, self.group))


class Scaled(SplitBlocks):
    """Another codec's numbers divided by 2^exponent; its bytes are those of weights times as much.

    `split`: as of the codec that is scaled; what its numbers are to be divided by is `up`.
    """

    stored, table = "uint8", VALUES

    def __init__(self, name: str, inner: Fp4Codec, exponent: int) -> None:
        self.name, self.inner, self.exponent = name, inner, exponent
        self.block, self.block_bytes, self.smaller = inner.block, inner.block_bytes, "such as int4-g32"
        self.up, self.down = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        self.levels = inner.levels._replace(multiples_M=inner.levels.multiples_M * self.down)

    def _raised(self, w: Floats) -> Floats:
        with np.errstate(over="ignore"):
            raised: Floats = np.clip(np.asarray(w, np.float32) * self.up, -FINITE, FINITE)
        return raised

    def to_scales(self, grid: Grid) -> Scales:
        return self.inner.to_scales(grid)

    def from_scales(self, scales: Scales) -> Fp4Grid:
        return self.inner.from_scales(scales)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        return self.inner.fit(self._raised(w_RB), importance_B)

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        return self.inner.snap(self._raised(w_RK), grid, at)

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        return self.inner.value(codes_RK, grid, at) * self.down

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        return self.inner.pack(codes_RB, grid)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        return self.inner.unpack(raw_RN)

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        self.inner.encode_blocks(self._raised(w_NB), importance_PB, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        self.inner.decode_blocks(raw_NN, w_NB)
        w_NB *= self.down


def parse(name: str, columns: int) -> Codec | None:
    """The codec of a lower-case name, None for another family's.  UsageError for an exponent too large."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    exponent = int(found[1])
    if abs(exponent) > FARTHEST or found[1] == "-0":
        raise UsageError(f"type {name}", f"has an exponent beyond ±{FARTHEST}, or -0")
    return Scaled(name, CODECS[0], exponent)


CODECS = (
    Fp4Codec("NVFP4", 16, ue4m3_scales(), window=(3, 7), last=126),
    Fp4Codec("MXFP4", 32, e8m0_scales(), window=(1, 1), last=252),
)
