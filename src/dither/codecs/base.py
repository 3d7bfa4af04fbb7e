"""What block codecs have in common: arithmetic on their sizes, and rows cut into blocks.

Legend: R rows, C columns, B the weights of one block, N bytes of a packed row, S sub-blocks, K levels,
M multiples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dither.errors import UsageError
from dither.types import Bytes, Codes, Floats, Grid


class Levels(NamedTuple):
    """A grid of scaled levels as data: ŵ = unit · multiples[i_s] · numbers[k] − below · lowers[j_s].

    A block has one `unit` (and one `below`), each sub-block s of `size` neighbors its own multiples of them,
    and each weight its level k.  Whoever holds this can round weights and improve scales in any metric
    without knowing the codec.
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


@runtime_checkable
class LevelCodec(Protocol):
    """A codec whose grids are scaled levels; lattices and plain floats are none."""

    @property
    def levels(self) -> Levels: ...
    def to_scales(self, grid: Grid) -> Scales: ...
    def from_scales(self, scales: Scales) -> Grid: ...


def plain_levels(numbers: npt.ArrayLike, codes: npt.ArrayLike, size: int, lower: bool = False) -> Levels:
    """Levels of a block that has one scale, and with `lower` one number subtracted."""
    one = np.ones(1, np.float32)
    return Levels(np.asarray(numbers, np.float32), np.asarray(codes), size, one, one if lower else one * 0, True)


def plain_scales(scale_R: Floats, minimum_R: Floats | None = None) -> Scales:
    """The record of blocks with one scale: a stored minimum is minus what is subtracted."""
    zero_R1 = np.zeros((len(scale_R), 1), np.int16)
    below_R = np.zeros_like(scale_R) if minimum_R is None else -minimum_R
    return Scales(scale_R.copy(), zero_R1, below_R, zero_R1.copy())


HALF_MAX = 65504.0  # the largest finite float16
BFLOAT_MAX = float(np.array(0x7F7F0000, np.uint32).view(np.float32))


KINDS = {"float16": 0, "bfloat16": 1, "float32": 2}  # as kernels/stored.py numbers them


def as_stored(x: Floats, kind: str) -> Floats:
    """The nearest finite numbers of a float type ("float16", "bfloat16" or "float32"), ties to even."""
    if kind == "float16":
        half: Floats = np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)
        return half
    if kind == "bfloat16":
        bits = np.ascontiguousarray(np.clip(x, -BFLOAT_MAX, BFLOAT_MAX), np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        bfloat: Floats = ((bits + (odd + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
        return bfloat
    return np.asarray(x, np.float32)


class BlockCodec(ABC):
    """A codec whose rows are independent blocks.  Subclasses with a fused kernel override `encode`
    and `decode`; these here go through `fit`, `snap`, `pack` and `unpack`, `value`, and define what a
    fused kernel must reproduce."""

    name: str
    block: int
    block_bytes: int
    snap_columns: int = 1
    needs_importance: bool = False
    rows_together: int = 1
    smaller: str = "such as Q8_0"  # what to do with rows that are no whole blocks

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
        w_RB, importance_RB = blocks_of(w_RC, importance_C, self.block)
        grid = self.fit(w_RB, importance_RB)
        packed = self.pack(self.snap(w_RB, grid, slice(0, self.block)), grid)
        return packed.reshape(rows, columns // self.block * self.block_bytes)

    def decode(self, raw_RN: Bytes) -> Floats:
        rows = raw_RN.shape[0]
        codes, grid = self.unpack(np.ascontiguousarray(raw_RN).reshape(-1, self.block_bytes))
        return self.value(codes, grid, slice(0, self.block)).reshape(rows, -1)

    def check_columns(self, w_RC: Floats) -> tuple[int, int]:
        rows, columns = w_RC.shape
        if columns % self.block:
            raise UsageError(
                f"{columns} columns",
                f"{self.name} needs a multiple of {self.block}",
                f"Choose a type with a smaller block, {self.smaller}.",
            )
        return rows, columns


def blocks_of(w_RC: Floats, importance_C: Floats | None, block: int) -> tuple[Floats, Floats | None]:
    """Rows cut into blocks, one per line, with each block's importance beside it."""
    w_RB = np.ascontiguousarray(w_RC, dtype=np.float32).reshape(-1, block)
    if importance_C is None:
        return w_RB, None
    per_row = np.ascontiguousarray(importance_C, dtype=np.float32).reshape(-1, block)
    return w_RB, np.tile(per_row, (w_RC.shape[0], 1))
