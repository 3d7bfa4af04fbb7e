"""What block codecs have in common: arithmetic on their sizes, and rows cut into blocks.

Legend: R rows, C columns, B the weights of one block, N bytes of a packed row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from dither.errors import UsageError
from dither.types import Bytes, Codes, Floats, Grid


class BlockCodec(ABC):
    """A codec whose rows are independent blocks.  Subclasses with a fused kernel override `encode`
    and `decode`; these here go through `fit`, `snap`, `pack` and `unpack`, `value`, and define what a
    fused kernel must reproduce."""

    name: str
    block: int
    block_bytes: int
    snap_columns: int = 1
    needs_importance: bool = False

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
                f"{columns} columns", f"{self.name} needs a multiple of {self.block}",
                "Choose a type with a smaller block, such as Q8_0.",
            )  # fmt: skip
        return rows, columns


def blocks_of(w_RC: Floats, importance_C: Floats | None, block: int) -> tuple[Floats, Floats | None]:
    """Rows cut into blocks, one per line, with each block's importance beside it."""
    w_RB = np.ascontiguousarray(w_RC, dtype=np.float32).reshape(-1, block)
    if importance_C is None:
        return w_RB, None
    per_row = np.ascontiguousarray(importance_C, dtype=np.float32).reshape(-1, block)
    return w_RB, np.tile(per_row, (w_RC.shape[0], 1))
