"""A block of some rows, rounded: what error feedback and refitting ask of it, for two kinds of codec.

Codecs whose grids are scaled levels (`codecs.base.LevelCodec`) go through compiled loops, which also improve
scales in the Hessian's metric; any other codec through `fit`, `snap` and `value` alone, as many columns at a
time as `snap` must take together.

Legend: R rows, B a block's columns in the order in which they are rounded, K some of these, S sub-blocks,
N bytes of a packed block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dither.codecs.base import KINDS, LevelCodec, Scales
from dither.solvers.feedback.cholesky import Doubles
from dither.solvers.feedback.column_blocks import BlockMetric, ColumnBlock
from dither.types import Bytes, Codec, Codes, Floats, Grid

WIDE = 512  # columns; a block of scaled levels beyond is rounded in panels
PARTS = 8  # of a block that is encoded as a whole
Rows = npt.NDArray[np.bool_]
Self = TypeVar("Self", bound="Rounded")


class Rounded(Protocol):
    """R rows of one block, rounded where earlier blocks left its best, x_RB."""

    value_RB: Floats  # in the order of rounding
    loss_R: Doubles  # ‖(x − ŵ) F_BB‖²

    def take(self: Self, other: Self, rows_R: Rows) -> None:
        """Those rows of another answer, in place."""

    def improve(self, x_RB: Floats) -> None:
        """Better scales for the codes as they are, codes anew under them, kept where that costs less."""

    def again(self: Self, x_RB: Floats) -> Self:
        """Another answer: codes anew where x is by now, under the scales as they are by now."""
        ...

    def refine(self, gradient_RB: Floats) -> None:
        """Lower the rows' whole loss, all other blocks held, given (w − ŵ) H in this block's columns."""

    def pack(self) -> Bytes: ...


def rounded(codec: Codec, place: ColumnBlock, x_RB: Floats, importance_B: Floats) -> Rounded:
    """Rounded under scales that the codec fits to x with the columns weighed so, as stored."""
    leveled: Any = codec
    if not _has_levels(leveled):
        return AnyBlock(codec, place, x_RB, importance_B)
    grid = leveled.fit(x_RB.take(place.back_B, axis=1), importance_B)
    return LevelBlock(leveled, place, x_RB, leveled.to_scales(grid))


@lru_cache(maxsize=16)
def _has_levels(codec: Codec) -> bool:
    """Remembered, because to see whether an object keeps a protocol takes as long as to round some rows."""
    return isinstance(codec, LevelCodec)


def sub_block(codec: Codec) -> int:
    """How many columns share a scale."""
    return codec.levels.size if isinstance(codec, LevelCodec) else codec.block


def rechooses(codec: Codec) -> bool:
    """Whether sub-blocks have a choice of multiples or zero points that is looked at again.

    A zero point of thousands of columns is left as the codec chose it: what it could still gain is little,
    and each look costs the square of its columns.
    """
    if not isinstance(codec, LevelCodec):
        return False
    levels = codec.levels
    return levels.size <= WIDE and max(len(levels.multiples_M), len(levels.lowers_M)) > 1


def is_wide(codec: Codec) -> bool:
    return isinstance(codec, LevelCodec) and codec.block > WIDE


class LevelBlock:
    """A block of scaled levels, in compiled loops."""

    def __init__(self, codec: LevelCodec, place: ColumnBlock, x_RB: Floats, scales: Scales) -> None:
        self.codec, self.place, self.scales, self.levels = codec, place, scales, codec.levels
        self.even = bool((np.diff(self.levels.numbers_K) == 1).all())
        self.level_RB = np.empty(x_RB.shape, np.uint8)
        self.value_RB = np.empty(x_RB.shape, np.float32)
        self.loss_R = np.empty(len(x_RB))
        self._feed(x_RB)

    def take(self, other: LevelBlock, rows_R: Rows) -> None:
        for target, source in zip(self._by_rows(), other._by_rows(), strict=True):
            target[rows_R] = source[rows_R]

    def _by_rows(self) -> list[npt.NDArray[Any]]:
        return [self.level_RB, self.value_RB, self.loss_R, *self.scales]

    def improve(self, x_RB: Floats) -> None:
        # The gradient at the codes as they are, in the metric in which later columns can still make up for errors.
        trial, free = self._copy(), self.place.free
        gradient_RB: Floats = np.matmul(x_RB - self.value_RB, free.m_BB, dtype=np.float32)
        trial._rescale(gradient_RB, free)
        # Under other scales other codes are nearest, and feedback goes elsewhere: judged by the whole, row by row.
        trial._feed(x_RB)
        self.take(trial, trial.loss_R < self.loss_R)

    def again(self, x_RB: Floats) -> LevelBlock:
        other = self._copy()
        other._feed(x_RB)
        other.improve(x_RB)
        return other

    def refine(self, gradient_RB: Floats) -> None:
        gradient_RB = np.array(gradient_RB, order="C")  # the loops below keep theirs up to date
        # Codes before scales, so that scales are fitted to codes worth keeping, and again after.
        self._descend(gradient_RB)
        self._rescale(gradient_RB, self.place.held)
        self._descend(gradient_RB)

    def pack(self) -> Bytes:
        codes_RB: Codes = self.levels.codes_K[self.level_RB.take(self.place.back_B, axis=1)]
        return self.codec.pack(codes_RB, self.codec.from_scales(self.scales))

    def _copy(self) -> LevelBlock:
        twin = object.__new__(LevelBlock)
        twin.__dict__.update(self.__dict__)
        twin.level_RB, twin.value_RB = self.level_RB.copy(), self.value_RB.copy()
        twin.loss_R, twin.scales = self.loss_R.copy(), self.scales.copied()
        return twin

    def _feed(self, x_RB: Floats) -> None:
        """Codes with feedback from column to column, under the scales as they are."""
        from dither.codecs.kernels.feedback import feed

        place, numbers = self.place, (self.levels.numbers_K, self.even)
        scales_now = self.scales.of_sub_blocks(self.levels)
        if place.forward_BB is not None:
            done = self.level_RB, self.value_RB, self.loss_R
            feed(x_RB, place.forward_BB, place.cost_B, *numbers, *scales_now, place.sub_B, *done)
            return
        # A block of thousands of columns: the loop above would touch all columns after each, far out of cache.
        residual_RB, loss_R = np.zeros_like(x_RB), np.zeros_like(self.loss_R)
        for panel in place.panels:
            at = panel.at
            x_RK = panel.target(x_RB, residual_RB)
            level_RK, value_RK = np.empty(x_RK.shape, np.uint8), np.empty_like(x_RK)
            done = level_RK, value_RK, self.loss_R
            feed(x_RK, panel.forward_KK, place.cost_B[at], *numbers, *scales_now, place.sub_B[at], *done)
            self.level_RB[:, at], self.value_RB[:, at] = level_RK, value_RK
            residual_RB[:, at] = x_RB[:, at] - value_RK
            loss_R += self.loss_R  # one square per column, so that panels add up
        self.loss_R[:] = loss_R

    def _descend(self, gradient_RB: Floats) -> None:
        """Codes one by one to where the quadratic is least, scales and all other codes held."""
        from dither.codecs.kernels.feedback import descend

        numbers, scales_now = (self.levels.numbers_K, self.even), self.scales.of_sub_blocks(self.levels)
        done = self.place.sub_B, self.level_RB, self.value_RB
        descend(gradient_RB, self.place.held.m_BB, *numbers, *scales_now, *done)

    def _rescale(self, gradient_RB: Floats, metric: BlockMetric) -> None:
        """Better scales in the metric, codes held: first the numbers of the block, then its sub-blocks' multiples."""
        from dither.codecs.kernels.rescale import rechoose
        from dither.codecs.kernels.units import fit_units

        place, levels, parts = self.place, self.levels, metric.parts
        done, tables = (self.level_RB, self.value_RB), (levels.multiples_M, levels.lowers_M)
        if levels.free_unit:
            kind = levels.tied, levels.positive, KINDS[levels.unit_type]
            fit_units(gradient_RB, metric.m_BB, levels.numbers_K, *done, place.sub_B, *tables, *kind, *self.scales)
        if parts is not None:
            numbers, factors = (levels.numbers_K, self.even), (parts.forward_SII, parts.cost_SI, parts.inverse_SII)
            # Here codes move too: another multiple is worth only what its own nearest codes make of it.
            rechoose(gradient_RB, metric.m_BB, *numbers, *done, place.members_SI, *factors, *tables, *self.scales)


class AnyBlock:
    """A block of any codec, through `fit`, `snap` and `value` alone.

    Bytes are kept rather than codes and grids, whose rows only their codec could choose among.
    """

    def __init__(self, codec: Codec, place: ColumnBlock, x_RB: Floats, importance_B: Floats) -> None:
        self.codec, self.place = codec, place
        self.value_RB, self.raw_RN, self.loss_R = self._round(x_RB, importance_B, place.upper_BB)

    def take(self, other: AnyBlock, rows_R: Rows) -> None:
        self.value_RB[rows_R] = other.value_RB[rows_R]
        self.raw_RN[rows_R] = other.raw_RN[rows_R]
        self.loss_R[rows_R] = other.loss_R[rows_R]

    def improve(self, x_RB: Floats) -> None:
        """Nothing: whoever improves scales must know what they are."""

    def again(self, x_RB: Floats) -> AnyBlock:
        """Fitted anew, as there are no scales to keep."""
        return AnyBlock(self.codec, self.place, x_RB, self.place.importances[0])

    def refine(self, gradient_RB: Floats) -> None:
        """Fitted and rounded anew where all other blocks now leave this one, kept where that is better."""
        place = self.place
        # With all others held, the loss is least where the gradient is zero: a Newton step, exact for a quadratic.
        step_RB = np.linalg.solve(place.held_BB, gradient_RB.T.astype(np.float64)).T
        wanted_RB = (self.value_RB + step_RB).astype(np.float32)
        old_R = cost(wanted_RB - self.value_RB, place.held_upper_BB)
        value_RB, raw_RN, new_R = self._round(wanted_RB, place.importances[1], place.held_upper_BB)
        better_R = new_R < old_R
        self.value_RB[better_R], self.raw_RN[better_R] = value_RB[better_R], raw_RN[better_R]

    def pack(self) -> Bytes:
        return self.raw_RN

    def _round(self, x_RB: Floats, importance_B: Floats, upper_BB: Doubles) -> tuple[Floats, Bytes, Doubles]:
        """Values, bytes and ‖(x − ŵ) F‖² for the factor F of a metric."""
        if self.codec.snap_columns == self.codec.block:
            return self._round_whole(x_RB, importance_B, upper_BB)
        value_RB, raw_RN = self._round_groups(x_RB, importance_B, upper_BB)
        return value_RB, raw_RN, cost(x_RB - value_RB, upper_BB)

    def _round_groups(self, x_RB: Floats, importance_B: Floats, upper_BB: Doubles) -> tuple[Floats, Bytes]:
        """Feedback from each group of columns that `snap` takes together to the next, under one grid."""
        step, place = self.codec.snap_columns, self.place
        grid = self._fit(x_RB, importance_B)
        value_RB, codes = np.empty_like(x_RB), []
        for start in range(0, self.codec.block, step):
            at = slice(start, start + step)
            # t = x + (r F)_past F_kk⁻¹, as between blocks.
            past_RK = (x_RB[:, :start] - value_RB[:, :start]) @ upper_BB[:start, at]
            t_RK = x_RB[:, at] + past_RK @ np.linalg.inv(upper_BB[at, at])
            first = int(place.order_B[start])
            stored = slice(first, first + step)
            codes.append(self.codec.snap(np.ascontiguousarray(t_RK, np.float32), grid, stored))
            value_RB[:, at] = self.codec.value(codes[-1], grid, stored)
        codes_RB = np.concatenate(codes, axis=1).take(place.back_B, axis=1)
        return value_RB, np.array(self.codec.pack(codes_RB, grid))

    def _round_whole(self, x_RB: Floats, importance_B: Floats, upper_BB: Doubles) -> tuple[Floats, Bytes, Doubles]:
        """Feedback inside a block that is only ever encoded as a whole, by encoding it again and again.

        Each time, a part more of it is asked to stay what it was rounded to, which the codec mostly grants,
        and the rest is moved to make up for it.  The cheapest of all these answers is kept, row by row.
        """
        value_RB, raw_RN = self._encode(x_RB, importance_B)
        best_RB, best_RN, best_R = value_RB, raw_RN, cost(x_RB - value_RB, upper_BB)
        part = self.codec.block // PARTS
        for start in range(part, self.codec.block, part):
            # What came first stays at its numbers, and the columns after it take the places where the loss is least.
            wanted_RB = x_RB.copy()
            wanted_RB[:, :start] = value_RB[:, :start]
            past_RK = (x_RB - value_RB)[:, :start] @ upper_BB[:start, start:]
            wanted_RB[:, start:] += np.linalg.solve(upper_BB[start:, start:].T, past_RK.T).T
            value_RB, raw_RN = self._encode(wanted_RB, importance_B)
            now_R = cost(x_RB - value_RB, upper_BB)
            better_R = now_R < best_R
            best_RB = np.where(better_R[:, None], value_RB, best_RB)
            best_RN = np.where(better_R[:, None], raw_RN, best_RN)
            best_R = np.minimum(now_R, best_R)
        return best_RB, best_RN, best_R

    def _encode(self, x_RB: Floats, importance_B: Floats) -> tuple[Floats, Bytes]:
        grid, whole = self._fit(x_RB, importance_B), slice(0, self.codec.block)
        codes = self.codec.snap(x_RB.take(self.place.back_B, axis=1), grid, whole)
        value_RB = self.codec.value(codes, grid, whole).take(self.place.order_B, axis=1)
        return value_RB, np.array(self.codec.pack(codes, grid))

    def _fit(self, x_RB: Floats, importance_B: Floats) -> Grid:
        return self.codec.fit(x_RB.take(self.place.back_B, axis=1), importance_B)


def cost(r_RB: Floats, upper_BB: Doubles) -> Doubles:
    """‖r F‖² of each row."""
    losses: Doubles = np.square(r_RB @ upper_BB).sum(axis=1)
    return losses
