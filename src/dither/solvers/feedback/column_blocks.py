"""Blocks of columns in the Hessian's eyes: what every row's rounding of a block needs to know, computed once.

When a block's turn comes, the columns before it are rounded and those after it are still free.  With the
factor F of `hessian` the best that the block could be is x = w + (r F)_past F_BB⁻¹, and what a choice ŵ costs,
later columns making up for it as well as they can, is exactly ‖(x − ŵ) F_BB‖²: the metric F_BB F_BBᵀ, `free`.
Once all is rounded and a block is looked at again with all others held, the metric is H_BB, `held`.

A block as long as a row of thousands of columns, for codecs with one scale per row, is fed in panels: matrix
products carry the feedback from panel to panel, as they do from block to block.

Legend: C columns and B a block's columns in the order in which they are rounded, K those of a panel, S
sub-blocks, I members of a sub-block.
"""

from __future__ import annotations

import numpy as np

from dither.solvers.feedback.cholesky import Doubles, upper_factor
from dither.solvers.feedback.hessian import Factored, Order
from dither.types import Floats

PANEL = 128


class BlockMetric:
    """A quadratic form over a block's columns, and where they are asked for its parts within sub-blocks."""

    def __init__(self, m_BB: Doubles | Floats, members_SI: Order | None) -> None:
        self.m_BB = np.ascontiguousarray(m_BB, np.float32)
        self.parts = None if members_SI is None else Parts(m_BB.astype(np.float64), members_SI)


class Parts:
    """A form's diagonal blocks, each factored and inverted."""

    def __init__(self, m_BB: Doubles, members_SI: Order) -> None:
        parts = [m_BB[np.ix_(members_I, members_I)] for members_I in members_SI]
        uppers = [upper_factor(part) for part in parts]
        self.forward_SII = np.array([forward(upper) for upper in uppers], np.float32)
        self.cost_SI = np.array([np.diagonal(upper) ** 2 for upper in uppers], np.float32)
        self.inverse_SII = np.array([np.linalg.inv(part) for part in parts], np.float32)


def forward(upper: Doubles) -> Doubles:
    """A factor with its columns divided by their diagonal: how a residual moves the columns after it."""
    return upper / np.diagonal(upper)


class Panel:
    """Some neighboring columns of a wide block."""

    def __init__(self, upper_BB: Floats, at: slice) -> None:
        self.at = at
        upper_KK = upper_BB[at, at].astype(np.float64)
        self.past_BK = upper_BB[: at.start, at]
        self.inverse_KK = np.linalg.inv(upper_KK).astype(np.float32)
        self.forward_KK = forward(upper_KK).astype(np.float32)

    def target(self, x_RB: Floats, residual_RB: Floats) -> Floats:
        """The best that these columns could be, given the residual of those before them."""
        past_RK: Floats = np.matmul(residual_RB[:, : self.at.start], self.past_BK, dtype=np.float32)
        return np.ascontiguousarray(x_RB[:, self.at] + past_RK @ self.inverse_KK)


class ColumnBlock:
    """One block of columns; `size` columns share a scale.

    `rechosen`: sub-blocks choose their multiples anew, for which the metrics' parts are needed.
    `wide`: for scaled levels in panels; there is no `forward_BB`, and nothing for any other codec.
    """

    inverse_BB: Floats | None
    forward_BB: Floats | None = None
    panels: tuple[Panel, ...] = ()

    def __init__(self, factored: Factored, order_C: Order, at: slice, size: int, rechosen: bool, wide: bool) -> None:
        self.at = at  # in the order of rounding
        self.order_B = order_C[at] - order_C[at].min()  # each column's place in the block as stored
        self.back_B = np.argsort(self.order_B)  # takes arrays to the order as stored
        self.sub_B = self.order_B // size
        self.members_SI = np.argsort(self.sub_B, kind="stable").reshape(-1, size)
        upper_BB, damped_BB = factored.upper_CC[at, at], factored.damped_CC[at, at]
        self.upper_BB = np.ascontiguousarray(upper_BB)
        self.cost_B = (np.diagonal(upper_BB) ** 2).astype(np.float32)
        self.importances = self._importances(np.diagonal(damped_BB).astype(np.float64))
        if wide:
            self._wide(damped_BB, whole=len(upper_BB) == len(order_C))
        else:
            self._narrow(damped_BB.astype(np.float64), self.members_SI if rechosen else None)

    def _narrow(self, held_BB: Doubles, members_SI: Order | None) -> None:
        # What feedback does inside the block, column by column, and to the block as a whole.
        self.inverse_BB = np.linalg.inv(self.upper_BB).astype(np.float32)
        self.forward_BB = forward(self.upper_BB).astype(np.float32)
        # Two metrics: while later columns can still make up for an error, and once nothing else may move.
        self.free = BlockMetric(self.upper_BB @ self.upper_BB.T, members_SI)
        self.held = BlockMetric(held_BB, members_SI)
        self.held_BB, self.held_upper_BB = held_BB, upper_factor(held_BB)

    def _wide(self, damped_BB: Floats, whole: bool) -> None:
        """Matrices of so many columns fill gigabytes: none is made that nobody asks for.

        Where the block is the `whole` row, nothing comes before or after it, and both metrics are one.
        """
        upper_BB = self.upper_BB.astype(np.float32)
        # Feedback within a panel is a loop over its columns; from panel to panel it is one matrix product.
        starts = range(0, len(upper_BB), PANEL)
        self.panels = tuple(Panel(upper_BB, slice(k, min(k + PANEL, len(upper_BB)))) for k in starts)
        self.held = BlockMetric(damped_BB, None)
        self.free = self.held if whole else BlockMetric(upper_BB @ upper_BB.T, None)
        self.inverse_BB = None if whole else np.linalg.inv(self.upper_BB).astype(np.float32)

    def _importances(self, held_B: Doubles) -> list[Floats]:
        """Weights of the columns under which scales are fitted, as stored, the best for most rows first.

        What a column costs with later ones free; with all others held; between the two; all columns alike.
        """
        # No weighting is best for all rows: outliers, sub-blocks and the order of columns decide, row by row.
        choices = (self.cost_B, held_B, np.sqrt(self.cost_B * held_B), np.ones_like(held_B))
        return [np.ascontiguousarray(choice[self.back_B], np.float32) for choice in choices]


def column_blocks(
    factored: Factored, order_C: Order, block: int, size: int, rechosen: bool = True, wide: bool = False
) -> list[ColumnBlock]:
    starts = range(0, len(order_C), block)
    return [ColumnBlock(factored, order_C, slice(k, k + block), size, rechosen, wide) for k in starts]
