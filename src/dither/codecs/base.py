"""What block codecs have in common: the way through them, and what else a codec may offer to whoever asks.

    BlockCodec    `encode` and `decode` for all; a codec fills in the loop over blocks
    LevelCodec    its grid as data (`Levels`, `Scales`), for solvers
    SplitCodec    its rows as arrays of codes and scales, for formats that store them apart

Legend: R rows, C columns, B the weights of one block, P blocks of a row, N bytes of a packed row, or blocks
where it comes first, S sub-blocks, K levels, M multiples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dither.codecs.blocks import Kernels, blocks, importance_blocks, packed_blocks
from dither.errors import UsageError
from dither.types import Bytes, Codec, Codes, Floats, Grid


class Levels(NamedTuple):
    """A grid of scaled levels as data: ŵ = unit · multiples[i_s] · numbers[k] − below · lowers[j_s].

    A block has one `unit` (and one `below`), each sub-block s of `size` neighbors its own multiples of them,
    and each weight its level k.  Whoever holds this can round weights and improve scales in any metric
    without knowing the codec.

        here           elsewhere                        in Q4_K's ŵ = d·sc·q − dmin·m
        unit           scale, super-block's scale, d    d
        multiples      sub-scales                       sc = 0 … 63
        below          min, offset, dmin                dmin
        lowers         sub-mins; zero points if tied    m = 0 … 63
        numbers        levels, code book                q = 0 … 15
        size           group size                       32
    """

    numbers_K: Floats  # rising
    codes_K: npt.NDArray[np.generic]  # the code that stands for each number
    size: int
    multiples_M: Floats  # rising; what a sub-block may multiply `unit` by
    lowers_M: Floats  # rising; what it may multiply `below` by: (0,) where nothing is subtracted
    free_unit: bool  # `unit` and `below` are any numbers of `unit_type`; otherwise they are 1 and 0
    unit_type: str = "float16"
    tied: bool = False  # `below` is `unit` itself and `lowers` are zero points: ŵ = unit · (number − lower)
    positive: bool = False  # `unit` may not be negative


class Scales(NamedTuple):
    """The numbers that a grid of levels stores for R blocks."""

    unit_R: Floats  # values of `Levels.unit_type`
    multiple_RS: npt.NDArray[np.int16]  # index into `Levels.multiples_M`
    below_R: Floats
    lower_RS: npt.NDArray[np.int16]

    def of_sub_blocks(self, levels: Levels) -> tuple[Floats, Floats]:
        """What numbers are multiplied by and what is subtracted, (R, S), multiplied as decoders do."""
        scale_RS = self.unit_R[:, None] * levels.multiples_M[self.multiple_RS]
        return scale_RS, self.below_R[:, None] * levels.lowers_M[self.lower_RS]

    def copied(self) -> Scales:
        return Scales._make(part.copy() for part in self)


@runtime_checkable
class LevelCodec(Codec, Protocol):
    """A codec whose grids are scaled levels; lattices and plain floats are none."""

    @property
    def levels(self) -> Levels: ...
    def to_scales(self, grid: Grid) -> Scales: ...
    def from_scales(self, scales: Scales) -> Grid: ...


@runtime_checkable
class SplitCodec(Codec, Protocol):
    """A codec whose rows come apart into codes and what they share: the types that GPUs read."""

    @property
    def stored(self) -> str: ...  # the scales' type: "float16", "bfloat16", "float32"; "uint8" for tiny floats
    @property
    def table(self) -> Floats: ...  # the number of each code; empty where codes are equal steps
    def split(self, raw_RN: Bytes) -> tuple[npt.NDArray[Any], ...]:
        """Whole rows as codes, uint8 (R, C), and the parts of the grid, each (R, groups of a row)."""
        ...


def plain_levels(numbers: npt.ArrayLike, codes: npt.ArrayLike, size: int, lower: bool = False) -> Levels:
    """Levels of a block that has one scale, and with `lower` one number subtracted."""
    one = np.ones(1, np.float32)
    return Levels(np.asarray(numbers, np.float32), np.asarray(codes), size, one, one if lower else one * 0, True)


def plain_scales(scale_R: Floats, minimum_R: Floats | None = None) -> Scales:
    """The record of blocks with one scale: a stored minimum is minus what is subtracted."""
    scales = multiple_scales(scale_R.copy(), np.zeros((len(scale_R), 1), np.int16))
    return scales if minimum_R is None else scales._replace(below_R=-minimum_R)


def multiple_scales(unit_R: Floats, multiple_RS: npt.NDArray[np.int16]) -> Scales:
    """The record of blocks from which nothing is subtracted."""
    return Scales(unit_R, multiple_RS, np.zeros_like(unit_R), np.zeros_like(multiple_RS))


SHARE = np.float32(1)  # of the shortening that is undone
CHUNK = 1 << 18  # weights encoded at a time: few enough for the second-level cache, many enough to call
HALF_MAX = 65504.0  # the largest finite float16
BFLOAT_MAX = float(np.array(0x7F7F0000, np.uint32).view(np.float32))
KINDS = {"float16": 0, "bfloat16": 1, "float32": 2}  # as kernels/stored.py numbers them


def as_stored(x: Floats, kind: str) -> Floats:
    """The nearest finite numbers of a float type ("float16", "bfloat16" or "float32"), ties to even."""
    if kind == "float16":
        return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)
    if kind == "bfloat16":
        bits = np.ascontiguousarray(np.clip(x, -BFLOAT_MAX, BFLOAT_MAX), np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + (odd + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.asarray(x, np.float32)


length = Kernels("length")


class BlockCodec(ABC):
    """A codec whose rows are independent blocks.

    A subclass with kernels overrides `encode_blocks` and `decode_blocks`; those here go through `fit`, `snap`,
    `pack` and `unpack`, `value`, and define what a kernel must reproduce.  `encode_blocks` ends with blocks
    at the length that their weights had (kernels/length.py), where `scales_at` says which bytes make it.
    """

    name: str
    block: int
    block_bytes: int
    snap_columns: int = 1
    needs_importance: bool = False
    rows_together: int = 1
    smaller: str = "such as Q8_0"  # what to do with rows that are no whole blocks
    scales_at: tuple[int, ...] = ()  # bytes where float16s begin that all of a packed block is proportional to

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @abstractmethod
    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid: ...
    @abstractmethod
    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes: ...
    @abstractmethod
    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats: ...
    @abstractmethod
    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes: ...
    @abstractmethod
    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]: ...

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        rows, columns = self.check_columns(w_RC)
        check_importance(importance_C, columns)
        importance_PB = None if importance_C is None else blocks(importance_C, self.block)
        w_NB = blocks(w_RC, self.block)
        raw_NN = np.empty((len(w_NB), self.block_bytes), np.uint8)
        # Whole rows at a time, so that importance begins anew with each part.
        step = max(1, CHUNK // max(columns, 1)) * (columns // self.block)
        for at in _parts(len(w_NB), step):
            self.encode_blocks(w_NB[at], importance_PB, raw_NN[at])
        return raw_NN.reshape(rows, columns // self.block * self.block_bytes)

    def decode(self, raw_RN: Bytes) -> Floats:
        raw_NN = packed_blocks(raw_RN, self.block_bytes)
        w_NB = np.empty((len(raw_NN), self.block), np.float32)
        for at in _parts(len(raw_NN), CHUNK // self.block):
            self.decode_blocks(raw_NN[at], w_NB[at])
        return w_NB.reshape(len(raw_RN), raw_RN.shape[1] // self.block_bytes * self.block)

    def encode_blocks(self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes) -> None:
        """Into `raw_NN` the blocks of whole rows; `importance_PB`, of one row's blocks, repeats down the rows."""
        if importance_PB is not None:
            importance_PB = np.tile(importance_PB, (len(w_NB) // len(importance_PB), 1))
        grid, whole = self.fit(w_NB, importance_PB), slice(0, self.block)
        codes_NB = self.snap(w_NB, grid, whole)
        raw_NN[:] = self.pack(codes_NB, grid)
        if self.scales_at:
            self.restore_length(w_NB, importance_PB, raw_NN, self.value(codes_NB, grid, whole))

    def restore_length(
        self, w_NB: Floats, importance_PB: Floats | None, raw_NN: Bytes, value_NB: Floats | None = None
    ) -> None:
        """Packed blocks of least squared error, which are too short, made as long as the weights were.

        `value_NB`: what they decode to, where that is known already.
        """
        if not self.scales_at:
            return
        if value_NB is None:
            value_NB = np.empty_like(w_NB)
            self.decode_blocks(raw_NN, value_NB)
        importance_PB = importance_blocks(importance_PB, self.block)
        length.restore(w_NB, value_NB, importance_PB, SHARE, self.scales_at, raw_NN)

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        """Into `w_NB` the numbers that blocks stand for."""
        codes_NB, grid = self.unpack(raw_NN)
        w_NB[:] = self.value(codes_NB, grid, slice(0, self.block))

    def check_columns(self, w_RC: Floats) -> tuple[int, int]:
        rows, columns = w_RC.shape
        if columns % self.block:
            raise UsageError(
                f"{columns} columns",
                f"{self.name} needs a multiple of {self.block}",
                f"Choose a type with a smaller block, {self.smaller}.",
            )
        return rows, columns


def check_importance(importance: Floats | None, columns: int) -> None:
    if importance is not None and importance.shape[-1] != columns:
        raise UsageError(
            f"importance of {importance.shape[-1]} columns",
            f"does not fit weights of {columns}",
            "Use the importance matrix that was made from this very model.",
        )


def _parts(count: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    return (slice(start, start + step) for start in range(0, count, step))


class SplitBlocks(BlockCodec):
    """`SplitCodec` for blocks whose grid is a tuple of what a file stores."""

    stored = "float32"
    table: Floats = np.empty(0, np.float32)

    def split(self, raw_RN: Bytes) -> tuple[npt.NDArray[Any], ...]:
        rows, groups = len(raw_RN), raw_RN.shape[1] // self.block_bytes
        codes_NB, grid = self.unpack(packed_blocks(raw_RN, self.block_bytes))
        return tuple(part.reshape(rows, groups * prod(part.shape[1:])) for part in (codes_NB, *grid))


class OneScale(NamedTuple):
    scale_R: Floats  # a number of the stored type


class TableCodec(SplitBlocks):
    """Blocks of one scale each: ŵ = scale · table[code]."""

    def to_scales(self, grid: OneScale) -> Scales:
        return plain_scales(grid.scale_R)

    def from_scales(self, scales: Scales) -> OneScale:
        return OneScale(scales.unit_R)

    def value(self, codes_RK: Codes, grid: OneScale, at: slice) -> Floats:
        return self.table[codes_RK] * grid.scale_R[:, None]
