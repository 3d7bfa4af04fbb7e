"""IQ1, IQ2 and IQ3: weights in groups of four or eight, each group one point of a listed lattice.

Below four bits a weight of its own is too coarse, so these types quantize vectors: a group of 8 (4 for IQ3)
magnitudes becomes the index of one of 256 to 2048 listed points, with signs and a small scale beside it.  The
lists and the search over neighboring points are ggml's, and so, for now, is the encoder: `libgguf` carries
ggml's C code.  Source: `block_iq*` in ggml-common.h and the tables in ggml-quants.c.

A code of such a block cannot be chosen weight by weight, so the interface holds for whole blocks only:
`fit` keeps the importance, `snap` of all 256 columns makes the stored bytes, and those bytes are the codes.

Legend: R rows, C columns, B = 256 weights of a block, N bytes of a packed row.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from dither.codecs.base import HALF_MAX, BlockCodec, check_importance
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.types import Bytes, Codes, Floats, Grid

_TABLES = threading.Lock()  # ggml builds a type's lattice tables on first use, and not atomically
_ready: set[str] = set()


def tame(importance_C: Floats) -> Floats:
    """The same importance in units, and with a floor, that ggml's searches survive.

    They compare weighted sums with fixed thresholds, so that tiny importance looks like no weights at all,
    and without any importance they find no lattice point.  The unit is the power of two at the mean, which
    changes no mantissa; whatever is below a millionth of it counts as a millionth.
    """
    largest = float(importance_C.max(initial=0.0))
    if not largest > 0.0:
        return np.ones(importance_C.shape, np.float32)
    mean = float(np.mean(importance_C / largest, dtype=np.float64)) * largest
    unit = 2.0 ** np.floor(np.log2(mean))
    tamed: Floats = np.maximum(importance_C.astype(np.float64) / unit, 1e-6).astype(np.float32)
    return tamed


class LatticeGrid(NamedTuple):
    importance_RB: Floats | None  # (B,), (R, B), or nothing
    stored_RN: Bytes | None = None  # the bytes it was read from


class LatticeCodec(BlockCodec):
    block = 256
    snap_columns = 256

    def __init__(self, name: str, needs_importance: bool = False) -> None:
        self.name = name
        self.kind = GGML_TYPES[name].id
        self.block_bytes = GGML_TYPES[name].block_bytes
        self.needs_importance = needs_importance

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """The importance itself: scales and points are chosen together, by `snap`.

        Raises UsageError when this type cannot do without importance and there is none.
        """
        self._check_importance(importance_B)
        return LatticeGrid(importance_B)

    def snap(self, w_RK: Floats, grid: LatticeGrid, at: slice) -> Codes:
        """The packed bytes, uint8 (R, block_bytes), of whole blocks; UsageError for part of a block.

        Blocks that a stored grid decodes to are those bytes: ggml's search might settle on others.
        """
        if at.indices(self.block) != (0, self.block, 1):
            raise UsageError(
                f"columns {at.start} to {at.stop} of a block",
                f"{self.name} rounds {self.block} weights together",
                "Round whole blocks, or choose a type whose weights stand alone, such as IQ4_XS.",
            )
        w_RB = np.ascontiguousarray(w_RK, dtype=np.float32)
        importance: Floats | None = grid.importance_RB
        if grid.stored_RN is not None:
            known_R = (self.decode(grid.stored_RN) == w_RB).all(axis=1)
            codes_RN: Bytes = grid.stored_RN.copy()
            codes_RN[~known_R] = self.encode(w_RB[~known_R], importance) if not known_R.all() else 0
            return codes_RN
        if importance is None or importance.ndim == 1:
            return self.encode(w_RB, importance)
        if len(importance) and (importance == importance[0]).all():
            return self.encode(w_RB, importance[0])
        rows = [self.encode(w_RB[row : row + 1], importance[row]) for row in range(len(w_RB))]
        return np.concatenate([np.empty((0, self.block_bytes), np.uint8), *rows])

    def value(self, codes_RK: Codes, grid: LatticeGrid, at: slice) -> Floats:
        """All 256 numbers of each block are decoded; `at` takes its columns from them."""
        return self.decode(codes_RK)[:, at]

    def pack(self, codes_RB: Codes, grid: LatticeGrid) -> Bytes:
        return codes_RB

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = np.ascontiguousarray(raw_RN, dtype=np.uint8)
        return raw_RN, LatticeGrid(None, raw_RN)

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        import libgguf

        self._check_importance(importance_C)
        rows, columns = self.check_columns(w_RC)
        check_importance(importance_C, columns)
        self._build_tables()
        raw_RN = np.empty((rows, columns // self.block * self.block_bytes), np.uint8)
        if raw_RN.size:
            # Beyond float16's range ggml's searches read outside their tables.
            w_RC = np.ascontiguousarray(np.clip(w_RC, -HALF_MAX, HALF_MAX), dtype=np.float32)
            importance_C = None if importance_C is None else tame(importance_C)
            libgguf.quantize_rows_into_raw(self.kind, w_RC, raw_RN, rows, columns, importance_C)
        return raw_RN

    def decode(self, raw_RN: Bytes) -> Floats:
        import libgguf

        raw_RN = np.ascontiguousarray(raw_RN, dtype=np.uint8)
        rows, columns = raw_RN.shape[0], raw_RN.shape[1] // self.block_bytes * self.block
        w_RC = np.empty((rows, columns), np.float32)
        if w_RC.size:
            libgguf.dequantize_rows_into_raw(self.kind, raw_RN, w_RC, rows, columns)
        return w_RC

    def _check_importance(self, importance: Floats | None) -> None:
        if self.needs_importance and importance is None:
            raise UsageError(
                self.name,
                "needs an importance matrix, and none was given",
                "Calibrate first or pass --imatrix FILE; IQ3_XXS and IQ4_XS do without.",
            )

    def _build_tables(self) -> None:
        """Encode one block under a lock before any thread encodes freely."""
        import libgguf

        if self.name in _ready:
            return
        with _TABLES:
            ones = np.ones(self.block, np.float32)
            libgguf.quantize_rows_raw(self.kind, ones, 1, self.block, ones)
            _ready.add(self.name)


CODECS = (
    LatticeCodec("IQ3_S"),
    LatticeCodec("IQ3_XXS"),
    LatticeCodec("IQ2_S"),
    LatticeCodec("IQ2_XS", needs_importance=True),
    LatticeCodec("IQ2_XXS", needs_importance=True),
    LatticeCodec("IQ1_M"),
    LatticeCodec("IQ1_S", needs_importance=True),
)
