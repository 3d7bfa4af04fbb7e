"""Error feedback block by block: each block is fitted, rounded and improved where earlier ones left it.

What blocks cost, as `column_blocks` measures it, adds up to the row's whole loss, so that candidates can be judged
block by block and row by row.  The candidates are scales: fitted by the codec to x with differently weighed
columns, then improved by least squares in that very metric.  Each is rounded with feedback; the cheapest is
kept.

Legend: R rows, C columns and B a block's columns in the order in which they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dither.solvers.feedback.blocks import Rounded, rounded
from dither.solvers.feedback.column_blocks import ColumnBlock
from dither.types import Codec, Floats

Round = Callable[[ColumnBlock, Floats], Rounded]


def round_rows(
    w_RC: Floats, codec: Codec, here: list[ColumnBlock], upper_CC: Floats, fits: int, improvements: int
) -> list[Rounded]:
    """All blocks of some rows for the first time; `upper_CC` is F in float32, w in the order of rounding."""

    def first(place: ColumnBlock, x_RB: Floats) -> Rounded:
        # Whole answers are compared, not scales: only after feedback is it known what a scale is good for.
        weightings = place.importances[:fits]
        best, *others = [rounded(codec, place, x_RB, importance_B) for importance_B in weightings]
        for other in others:
            best.take(other, other.loss_R < best.loss_R)
        # Least squares needs codes to fit to, so scales are improved once there are some.
        for _ in range(improvements):
            best.improve(x_RB)
        return best

    return _in_turn(w_RC, here, upper_CC, first)


def round_again(w_RC: Floats, blocks: list[Rounded], here: list[ColumnBlock], upper_CC: Floats) -> list[Rounded]:
    """Another answer for the same rows, which starts from the scales of one that is complete."""
    old = dict(zip((place.at.start for place in here), blocks, strict=True))
    return _in_turn(w_RC, here, upper_CC, lambda place, x_RB: old[place.at.start].again(x_RB))


def _in_turn(w_RC: Floats, here: list[ColumnBlock], upper_CC: Floats, round_block: Round) -> list[Rounded]:
    residual_RC = np.zeros_like(w_RC)
    blocks: list[Rounded] = []
    for place in here:
        at = place.at
        x_RB: Floats = w_RC[:, at]
        # x = w + (r F)_past F_BB⁻¹: where the columns that are rounded already have moved the block's optimum.
        if place.inverse_BB is not None:
            past_RB = residual_RC[:, : at.start] @ upper_CC[: at.start, at]
            x_RB = x_RB + np.matmul(past_RB, place.inverse_BB, dtype=np.float32)
        blocks.append(round_block(place, x_RB))
        # The residual is against the weights themselves, not x: F's columns add up what all of them left.
        residual_RC[:, at] = w_RC[:, at] - blocks[-1].value_RB
    return blocks
