"""NF4 and FP4 of bitsandbytes: sixteen numbers from −1 to 1, times the largest magnitude of a block.

    nf4-g64       quantiles of a normal distribution: weights that are normal use all codes equally often
    fp4-g64       a sign, two bits of exponent, one of mantissa: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1
    nf4-g64-dq    double quantization: a file stores each 256 scales in eight bits and a float32

Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), sections 3 and 3.1 and the table of appendix E; FP4's
table and order of codes: `get_4bit_type` of bitsandbytes.  Without importance the bytes are those of its
encoder: weights times one over the largest, cut to ±1, and the nearest number, the lower one on a border.
Its FP4 has two zeros, and sends small positive numbers to the second; so does this one.  With importance, a
scale that keeps Σ importance · (w − ŵ)² less is searched for.

Packed here in either case: a float32 scale, then codes as one stream of bits; nesting the scales is the
container's part, which alone sees all of them.

Legend: R rows, C columns, G groups of a row, B weights of a block, K some columns, or levels, N bytes of a
packed row.
"""

from __future__ import annotations

import re

import numpy as np

from dither.codecs.base import Levels, OneScale, TableCodec
from dither.codecs.blocks import Kernels, blocks, bytes_of_scale, importance_blocks, packed_blocks, scale_values
from dither.codecs.integers import group_of
from dither.formats.layouts.parts import TABLES
from dither.types import Bytes, Codec, Codes, Floats, Grid

kernels, streams = Kernels("tables"), Kernels("stored")
FAMILY = "nf4-g64 and fp4-g64 (groups of 32 to 4096; -dq)"
NAME = re.compile(r"(nf4|fp4)-g([1-9]\d{1,3})(-dq)?")
NESTED = 256  # scales that share a scale of their own
LEAST = np.float32(1e-38)
# Inverse scales to try, in units of one over the largest weight.
CANDIDATES = np.geomspace(0.9, 1.9, 28).astype(np.float32)


class Numbers(TableCodec):
    """Codes of `table`, one scale per `block`; `nested` says that a file quantizes the scales too.

    `split`: codes from 0 to 15 and absmax_RG: ŵ = absmax · table[code].
    """

    block_bytes: int

    def __init__(self, name: str, table: Floats, block: int, nested: bool) -> None:
        self.name, self.table, self.block, self.nested = name, table, block, nested
        self.smaller = f"such as {name[:3]}-g32"
        self.block_bytes = 4 + block // 2
        # Rising, the two zeros of FP4 side by side, the first of them reached from below.
        self.codes_K = np.argsort(table, kind="stable").astype(np.uint8)
        self.rising_K = table[self.codes_K]
        self.borders_K: Floats = (self.rising_K[:-1] + self.rising_K[1:]) / np.float32(2)
        numbers_K, first_K = np.unique(table, return_index=True)
        one = np.ones(1, np.float32)
        self.levels = Levels(numbers_K, first_K.astype(np.uint8), block, one, one * 0, True, "float32", positive=True)

    @property
    def bits_per_weight(self) -> float:
        return 4 + ((8 + 32 / NESTED) if self.nested else 32) / self.block

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The largest magnitude without importance; with it the scale of least weighted error found."""
        w_NB = blocks(w_RB, self.block)
        grid = OneScale(np.empty(len(w_NB), np.float32))
        kernels.fit_largest(w_NB, grid.scale_R)
        if importance_B is not None:
            importance_PB = importance_blocks(importance_B, self.block)
            kernels.search_scale(w_NB, importance_PB, CANDIDATES, self.rising_K, self.borders_K, grid.scale_R)
        return grid

    def snap(self, w_RK: Floats, grid: OneScale, at: slice) -> Codes:
        inverse_R1 = np.float32(1) / np.maximum(grid.scale_R, LEAST)[:, None]
        with np.errstate(over="ignore"):  # an infinite position is cut like any other
            position_RK = np.clip(np.asarray(w_RK, np.float32) * inverse_R1, np.float32(-1), np.float32(1))
        codes: Codes = self.codes_K[np.searchsorted(self.borders_K, position_RK)]
        return codes

    def pack(self, codes_RB: Codes, grid: OneScale) -> Bytes:
        raw_RN = np.empty((len(codes_RB), self.block_bytes), np.uint8)
        raw_RN[:, :4] = bytes_of_scale(grid.scale_R, "float32")
        streams.pack_all(packed_blocks(codes_RB, self.block), 4, 4, raw_RN)
        return raw_RN

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = packed_blocks(raw_RN, self.block_bytes)
        codes_RB = np.empty((len(raw_RN), self.block), np.uint8)
        streams.unpack_all(raw_RN, 4, 4, codes_RB)
        return codes_RB, OneScale(scale_values(raw_RN, "float32"))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        kernels.pack_numbers(w_NB, self.fit(w_NB, importance_PB).scale_R, self.borders_K, self.codes_K, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_numbers(raw_NN, self.table, w_NB)


def parse(name: str, columns: int) -> Codec | None:
    """The codec of a lower-case name, None for another family's.  UsageError for a group that is none."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    kind, group, nested = found.groups()
    return Numbers(name, TABLES[kind], group_of(name, int(group)), nested is not None)
