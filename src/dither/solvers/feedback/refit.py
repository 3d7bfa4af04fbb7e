"""What can still be gained once every column is rounded: scales and codes in turn, in the Hessian's metric.

Feedback decides column by column with what follows still free; looking back, some codes and scales are no
longer the best for what did follow.  With all other blocks held, a block's share of the loss is a quadratic
in ŵ_B with curvature H_BB and half its negative gradient g = ((w − ŵ) H)_B, so that a block can be improved
with no look at the others: codes by coordinate descent (QuantEase, Behdin et al. 2023, arXiv:2309.01885;
CDQuant, Nair and Suggala 2024, arXiv:2406.17542), scales by least squares.  Every step lowers the loss or is
not taken.  What a block changed is then passed on to the gradient of all columns by one matrix product.

Legend: R rows, C columns in the order of rounding, B the columns of one block.
"""

from __future__ import annotations

import numpy as np

from dither.solvers.feedback.blocks import Rounded
from dither.solvers.feedback.column_blocks import ColumnBlock
from dither.types import Floats

ENOUGH = 3e-3  # a sweep that gains less than this share of the loss is the last


def refit_rows(w_RC: Floats, blocks: list[Rounded], here: list[ColumnBlock], damped_CC: Floats, sweeps: int) -> Floats:
    """Improve rounded rows in place, at most `sweeps` times over all blocks; returns each row's loss."""
    # The gradient of all columns is carried along: computed anew for each block it would cost a whole product.
    residual_RC = w_RC - np.concatenate([block.value_RB for block in blocks], axis=1)
    gradient_RC = residual_RC @ damped_CC
    loss_R: Floats = (residual_RC * gradient_RC).sum(axis=1)
    for _ in range(sweeps):
        before = float(loss_R.sum(dtype=np.float64))
        for place, block in zip(here, blocks, strict=True):
            at = place.at
            block.refine(gradient_RC[:, at])
            left_RB = w_RC[:, at] - block.value_RB
            # What the block changed moves everybody's gradient; where it changed nothing, there is nothing to pass on.
            step_RB = left_RB - residual_RC[:, at]
            if step_RB.any():
                gradient_RC += step_RB @ damped_CC[at]
                residual_RC[:, at] = left_RB
        # r H rᵀ from what is at hand; sweeps converge quickly, and the last ones are not worth their time.
        loss_R = (residual_RC * gradient_RC).sum(axis=1)
        if float(loss_R.sum(dtype=np.float64)) >= (1 - ENOUGH) * before:
            break
    return loss_R
