"""Hessians made ready for feedback once: layers that share an input, and types that share blocks, ask again.

Of a model's block, q, k and v are solved one after the other with one Hessian, gate and up with another; a
plan tries a dozen types on each.  The factor depends on the Hessian, on how columns may be ordered and on
nothing else, and takes longer than the rows of a narrow matrix.

Legend: C columns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from dither.solvers.feedback.blocks import is_wide, rechooses, sub_block
from dither.solvers.feedback.cholesky import Each
from dither.solvers.feedback.column_blocks import ColumnBlock, column_blocks
from dither.solvers.feedback.hessian import Factored, Order, column_order, factor
from dither.types import Codec, Floats

KEPT_BYTES = 2**29  # of what is kept beside the newest
_BYTES = 4 + 4 + 8 + 4  # per pair of columns: H, damped, factored, and factored in float32


@dataclass(frozen=True)
class Factors:
    """What rows are rounded with."""

    order_C: Order
    factored: Factored
    upper_CC: Floats
    column_blocks: list[ColumnBlock]


@dataclass
class _Known:
    """Of one Hessian under one order of its columns.  Holding the array keeps its identity its own."""

    hessian_CC: Floats
    diagonal_C: Floats
    lock: threading.Lock = field(default_factory=threading.Lock)
    base: tuple[Order, Factored, Floats] | None = None
    column_blocks: dict[tuple[int, bool, bool], list[ColumnBlock]] = field(default_factory=dict)


class FactorCache:
    """By Hessian (the very array) and codec.  Safe to call from several threads.

    The newest stays; older ones as far as `kept_bytes` go, and none while another is made that needs the
    room, so that nothing is held that was not held at some time anyway.
    """

    def __init__(self, damping: float, act_order: bool) -> None:
        self.damping, self.act_order = damping, act_order
        self.kept_bytes = KEPT_BYTES
        self._known: OrderedDict[tuple[int, int, bool], _Known] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, hessian_CC: Floats, codec: Codec, each: Each = map) -> Factors:
        """Raises DitherError for a matrix that no damping makes definite.  `each` is `map`, or a pool's."""
        known = self._of(hessian_CC, codec)
        # Whoever comes second waits here for the first, instead of factoring the same matrix beside it.
        with known.lock:
            if known.base is None:
                known.base = self._base(hessian_CC, codec, each)
            order_C, factored, upper_CC = known.base
            how = sub_block(codec), rechooses(codec), is_wide(codec)
            if how not in known.column_blocks:
                known.column_blocks[how] = column_blocks(factored, order_C, codec.block, *how)
            return Factors(order_C, factored, upper_CC, known.column_blocks[how])

    def _base(self, hessian_CC: Floats, codec: Codec, each: Each) -> tuple[Order, Factored, Floats]:
        order_C = np.arange(len(hessian_CC), dtype=np.intp)
        # A lattice takes neighboring columns together, so its columns stay in place inside a block.
        if self.act_order:
            order_C = column_order(hessian_CC, codec.block, within=codec.snap_columns == 1)
        factored = factor(hessian_CC.take(order_C, axis=0).take(order_C, axis=1), self.damping, each)
        return order_C, factored, factored.upper_CC.astype(np.float32)

    def _of(self, hessian_CC: Floats, codec: Codec) -> _Known:
        diagonal_C = np.diagonal(hessian_CC).copy()
        key = id(hessian_CC), codec.block, codec.snap_columns == 1
        with self._lock:
            known = self._known.pop(key, None)
            # An array that was changed since is another Hessian; its diagonal is evidence enough, and quick to compare.
            if known is None or not np.array_equal(known.diagonal_C, diagonal_C):
                self._make_room(len(hessian_CC))
                known = _Known(hessian_CC, diagonal_C)
            self._known[key] = known
        return known

    def _make_room(self, columns: int) -> None:
        while self._known:
            held = sum(_BYTES * len(known.diagonal_C) ** 2 for known in self._known.values())
            # The oldest goes first: layers that share an input follow each other.
            if held + _BYTES * columns**2 <= self.kept_bytes:
                return
            self._known.popitem(last=False)
