"""Blocks of columns in the Hessian's eyes: what every row's rounding of a block needs to know, computed once.

When a block's turn comes, the columns before it are rounded and those after it are still free.  With the
factor F of `linalg` the best that the block could be is x = w + (r F)_past F_BB⁻¹, and what a choice ŵ costs,
later columns making up for it as well as they can, is exactly ‖(x − ŵ) F_BB‖²: the metric F_BB F_BBᵀ, `free`.
Once all is rounded and a block is looked at again with all others held, the metric is H_BB, `held`.

Legend: C columns and B a block's columns in the order in which they are rounded, S sub-blocks, I members of
a sub-block.
"""

from __future__ import annotations

import numpy as np

from dither.solvers.linalg import Doubles, Factored, Order, upper_factor
from dither.types import Floats


class Metric:
    """A quadratic form over a block's columns, and its parts within sub-blocks, each factored."""

    def __init__(self, m_BB: Doubles, members_SI: Order) -> None:
        self.m_BB = m_BB.astype(np.float32)
        parts = [m_BB[np.ix_(members_I, members_I)] for members_I in members_SI]
        uppers = [upper_factor(part) for part in parts]
        self.forward_SII = np.array([forward(upper) for upper in uppers], np.float32)
        self.cost_SI = np.array([np.diagonal(upper) ** 2 for upper in uppers], np.float32)
        self.inverse_SII = np.array([np.linalg.inv(part) for part in parts], np.float32)


def forward(upper: Doubles) -> Doubles:
    """A factor with its columns divided by their diagonal: how a residual moves the columns after it."""
    moves: Doubles = upper / np.diagonal(upper)
    return moves


class Place:
    """One block of columns; `size` columns share a scale."""

    def __init__(self, factored: Factored, order_C: Order, at: slice, size: int) -> None:
        self.at = at  # in the order of rounding
        self.order_B = order_C[at] - order_C[at].min()  # each column's place in the block as stored
        self.back_B = np.argsort(self.order_B)  # takes arrays to the order as stored
        self.sub_B = self.order_B // size
        self.members_SI = np.argsort(self.sub_B, kind="stable").reshape(-1, size)
        upper_BB, held_BB = factored.upper_CC[at, at], factored.damped_CC[at, at].astype(np.float64)
        self.upper_BB = np.ascontiguousarray(upper_BB)
        self.inverse_BB = np.linalg.inv(upper_BB).astype(np.float32)
        self.forward_BB = forward(upper_BB).astype(np.float32)
        self.cost_B = (np.diagonal(upper_BB) ** 2).astype(np.float32)
        self.free = Metric(upper_BB @ upper_BB.T, self.members_SI)
        self.held = Metric(held_BB, self.members_SI)
        self.held_BB, self.held_upper_BB = held_BB, upper_factor(held_BB)
        self.importances = self._importances(np.diagonal(held_BB))

    def _importances(self, held_B: Doubles) -> list[Floats]:
        """Weights of the columns under which scales are fitted, as stored, the best for most rows first.

        What a column costs with later ones free; with all others held; between the two; all columns alike.
        """
        choices = (self.cost_B, held_B, np.sqrt(self.cost_B * held_B), np.ones_like(held_B))
        return [np.ascontiguousarray(choice[self.back_B], np.float32) for choice in choices]


def places(factored: Factored, order_C: Order, block: int, size: int) -> list[Place]:
    starts = range(0, len(order_C), block)
    return [Place(factored, order_C, slice(start, start + block), size) for start in starts]
