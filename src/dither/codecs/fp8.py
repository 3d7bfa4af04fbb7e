"""fp8: weights as eight-bit floats, E4M3 without infinities, with a scale per row, per tensor or per tile.

    fp8-channel    a scale per row, float32 (or -bf16): compressed-tensors, FBGEMM
    fp8-e3         one scale 2⁻³ for the whole tensor; fp8-e-3 is 2³
    fp8-128x128    a float32 scale per tile of 128 rows and 128 columns (DeepSeek-V3 technical report,
                   section 3.3); tiles at the edges may be smaller

A float format loses nothing by a power of two but where it ends, so the scale of a tensor is one, and is
part of the name: rows can then be written one by one.  For rows and tiles the largest weight goes to 448, or
to one of a few numbers down to half of it where that happens to round better.

A packed block is its scale, then one byte per weight.  Tiles share scales between rows, which repeat them
here; their codec says so by `rows_together`, and must be given whole multiples of so many rows, or all.

Legend: R rows, C columns, G scales of a row, B weights of a block, K some columns, or numbers, N bytes of a
packed row, T tiles.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from dither.codecs.base import KINDS, Levels, OneScale, Scales, SplitBlocks, TableCodec, check_importance, plain_scales
from dither.codecs.blocks import (
    Kernels,
    blocks,
    bytes_of_scale,
    importance_blocks,
    packed_blocks,
    quotients,
    scale_values,
)
from dither.codecs.integers import TYPES, row_of
from dither.errors import UsageError
from dither.formats.layouts import numbers
from dither.types import Bytes, Codec, Codes, Floats, Grid

kernels = Kernels("fp8")
FAMILY = "fp8-channel (-bf16), fp8-e3 (scale 2⁻³), fp8-128x128"
NAME = re.compile(r"fp8-(?:channel(?:-(bf16|f32))?|e(-?(?:0|[1-9]\d{0,2}))|(128x128))")
FARTHEST = 117  # exponents whose products with E4M3's numbers are normal float32s
TILE = 128
# What the largest weight may become: one binade of numbers.
TARGETS = np.array([448, 416, 384, 352, 320, 288, 256, 240], np.float32)


NUMBERS = numbers.e4m3().astype(np.float32)  # of every pattern; 127 and 255 are NaN
# Rising and without NaN or −0, with their patterns.
RISING = np.concatenate([np.arange(0xFE, 0x80, -1), np.arange(0x7F)]).astype(np.uint8)


def to_e4m3(x: Floats) -> Bytes:
    """Patterns of the nearest numbers, ties to even, at most ±448."""
    flat = np.require(x, np.float32, ("C", "A", "W")).reshape(-1)
    found = np.empty(flat.size, np.uint8)
    kernels.patterns(flat, found)
    return found.reshape(x.shape)


class FloatRows(TableCodec):
    """Blocks of one scale each, of type `stored`; a whole row is a block.  `split`: patterns and scale_RG."""

    table = NUMBERS

    def __init__(self, name: str, block: int, stored: str) -> None:
        self.name, self.block, self.stored, self.kind = name, block, stored, KINDS[stored]
        self.smaller = "such as fp8-e0"
        self.scale_size = 4 if stored == "float32" else 2
        self.block_bytes = self.scale_size + block
        one = np.ones(1, np.float32)
        self.levels = Levels(NUMBERS[RISING], RISING, block, one, one * 0, True, stored, positive=True)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The scale of least weighted error among a few that use all of the range."""
        w_NB = blocks(w_RB, self.block)
        grid = OneScale(np.empty(len(w_NB), np.float32))
        kernels.fit_largest(w_NB, importance_blocks(importance_B, self.block), TARGETS, self.kind, grid.scale_R)
        return grid

    def snap(self, w_RK: Floats, grid: OneScale, at: slice) -> Codes:
        return to_e4m3(quotients(w_RK, grid.scale_R[:, None], np.array(w_RK, np.float32)))

    def pack(self, codes_RB: Codes, grid: OneScale) -> Bytes:
        return np.concatenate([bytes_of_scale(grid.scale_R, self.stored), codes_RB.astype(np.uint8)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = packed_blocks(raw_RN, self.block_bytes)
        return raw_RN[:, self.scale_size :].copy(), OneScale(scale_values(raw_RN, self.stored))

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        kernels.pack_floats(w_NB, self.fit(w_NB, importance_PB).scale_R, self.kind, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        kernels.decode_floats(raw_NN, self.kind, NUMBERS, w_NB)


class TensorGrid(NamedTuple):
    rows: int  # no scale is stored: the codec knows it


class FloatTensor(SplitBlocks):
    """One scale 2^−exponent for all blocks, which are therefore of any size: bare bytes."""

    table = NUMBERS

    def __init__(self, name: str, exponent: int, block: int) -> None:
        self.name, self.block, self.block_bytes = name, block, block
        self.scale = np.float32(2.0**-exponent)
        self.levels = Levels(NUMBERS[RISING], RISING, block, np.full(1, self.scale), np.zeros(1, np.float32), False)

    def to_scales(self, grid: TensorGrid) -> Scales:
        return plain_scales(np.ones(grid.rows, np.float32))

    def from_scales(self, scales: Scales) -> Grid:
        return TensorGrid(len(scales.unit_R))

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """Nothing is left to choose."""
        return TensorGrid(len(w_RB))

    def snap(self, w_RK: Floats, grid: TensorGrid, at: slice) -> Codes:
        with np.errstate(over="ignore"):
            return to_e4m3(np.asarray(w_RK, np.float32) / self.scale)

    def value(self, codes_RK: Codes, grid: TensorGrid, at: slice) -> Floats:
        return NUMBERS[codes_RK] * self.scale

    def pack(self, codes_RB: Codes, grid: TensorGrid) -> Bytes:
        return codes_RB.astype(np.uint8)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        return packed_blocks(raw_RN, self.block).copy(), TensorGrid(raw_RN.size // self.block)

    def split(self, raw_RN: Bytes) -> tuple[Bytes, Floats]:
        """Patterns, and the scale_RG of each row: the tensor's."""
        return np.ascontiguousarray(raw_RN), np.full((len(raw_RN), 1), self.scale)


class TileGrid(NamedTuple):
    scale_RT: Floats  # of each row's tiles in a block


class FloatTiles(SplitBlocks):
    """Tiles of 128 × 128.  A block is one tile wide, or the whole row where its last tile is narrower.

    `split`: patterns and scale_RG, one per tile and repeated for its rows.
    """

    rows_together = TILE
    table = NUMBERS

    def __init__(self, name: str, block: int) -> None:
        self.name, self.block = name, block
        self.smaller = "such as fp8-channel"
        self.starts = tuple(range(0, block, TILE))
        self.block_bytes = block + 4 * len(self.starts)

    @property
    def bits_per_weight(self) -> float:
        return 8 + 32 * len(self.starts) / (self.block * TILE)

    def _tiles(self, w_RB: Floats) -> Floats:
        """Each tile as one line, filled up with zeros."""
        rows, tall = len(w_RB), -(-len(w_RB) // TILE)
        padded = np.zeros((tall * TILE, len(self.starts) * TILE), np.float32)
        padded[:rows, : self.block] = w_RB
        tiles = padded.reshape(tall, TILE, len(self.starts), TILE).swapaxes(1, 2)
        return np.ascontiguousarray(tiles).reshape(-1, TILE * TILE)

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """A scale for each 128 rows, the last of them fewer, and 128 columns, repeated for every row."""
        w_RB = np.asarray(w_RB, np.float32)
        if importance_B is None:
            importance_B = np.ones(self.block, np.float32)
        importance_TI = self._tiles(np.broadcast_to(importance_B, w_RB.shape))
        scale_T = np.empty(len(importance_TI), np.float32)
        kernels.fit_largest(self._tiles(w_RB), importance_TI, TARGETS, KINDS["float32"], scale_T)
        return TileGrid(np.repeat(scale_T.reshape(-1, len(self.starts)), TILE, axis=0)[: len(w_RB)])

    def _scale_of(self, grid: TileGrid, at: slice) -> Floats:
        return grid.scale_RT[:, np.arange(*at.indices(self.block)) // TILE]

    def snap(self, w_RK: Floats, grid: TileGrid, at: slice) -> Codes:
        return to_e4m3(quotients(w_RK, self._scale_of(grid, at), np.array(w_RK, np.float32)))

    def value(self, codes_RK: Codes, grid: TileGrid, at: slice) -> Floats:
        return NUMBERS[codes_RK] * self._scale_of(grid, at)

    def pack(self, codes_RB: Codes, grid: TileGrid) -> Bytes:
        scale_RT = np.ascontiguousarray(grid.scale_RT, "<f4")
        return np.concatenate([scale_RT.view(np.uint8), codes_RB.astype(np.uint8)], axis=1)

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = packed_blocks(raw_RN, self.block_bytes)
        scales_at = 4 * len(self.starts)
        scale_RT = np.ascontiguousarray(raw_RN[:, :scales_at]).view("<f4").astype(np.float32)
        return raw_RN[:, scales_at:].copy(), TileGrid(scale_RT)

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        """Rows from a multiple of 128 on: as many as make whole tiles, or all that are left."""
        rows, columns = self.check_columns(w_RC)
        check_importance(importance_C, columns)
        raw_RN = np.empty((rows, columns // self.block * self.block_bytes), np.uint8)
        whole = slice(0, self.block)
        for block in range(columns // self.block):
            at = slice(block * self.block, (block + 1) * self.block)
            w_RB = np.asarray(w_RC[:, at], np.float32)
            grid = self.fit(w_RB, None if importance_C is None else importance_C[at])
            stored = slice(block * self.block_bytes, (block + 1) * self.block_bytes)
            raw_RN[:, stored] = self.pack(self.snap(w_RB, grid, whole), grid)
        return raw_RN


def parse(name: str, columns: int) -> Codec | None:
    """The codec of a lower-case name, None for another family's.

    A tensor's or a tile's blocks are as wide as rows where `columns` says how wide that is.  UsageError for
    an exponent that float32 has no room for.
    """
    found = NAME.fullmatch(name)
    if found is None:
        return None
    stored, exponent, tile = found.groups()
    if tile is not None:
        return FloatTiles(name, columns if columns % TILE else TILE)
    if exponent is None:
        return FloatRows(name, row_of(name, columns), TYPES[stored or "f32"])
    if abs(int(exponent)) > FARTHEST or exponent == "-0":
        raise UsageError(f"type {name}", f"has an exponent beyond ±{FARTHEST}, or -0")
    return FloatTensor(name, int(exponent), max(columns, 1))
