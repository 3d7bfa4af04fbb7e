"""Error feedback between rows: what one output gets wrong, others make up for.

Without more knowledge each row of a layer is rounded for itself, as if errors of different outputs could only
add up.  The model reads them together: a loss L pulls at the outputs with g = ∂L/∂y, and with G = E[g gᵀ] an
error E of the weights costs ½ tr(G E H Eᵀ), the KL divergence it causes to second order (`types.Evidence`).

G is to rows what H is to columns.  With G = F Fᵀ, F upper triangular, the cost falls apart into one term per
row,

    tr(G E H Eᵀ) = Σ_k F_kk² · r_k H r_kᵀ,    r_k = e_k + Σ_{j<k} e_j F_jk / F_kk

so that the row k, rounded where the rows before it have left its best, w_k + Σ_{j<k} e_j F_jk / F_kk, is the
layer's old problem with another target: any solver of rows serves (YAQA, Tseng et al. 2025,
arXiv:2505.22988, section 3.3, does so for its two-sided LDLQ).  Rows are taken some at a time, those that
matter most first; rows of one portion do not hear of each other.

Legend: R rows, C columns, K diagonal blocks of G over O rows each, P rows of a portion, N bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dither.errors import DitherError
from dither.solvers.feedback.cholesky import Doubles, Each, portions, upper_factor
from dither.types import Bytes, Floats

DAMPING = 0.05  # over the mean of G's diagonal
PORTIONS = 32  # of a diagonal block: 3 % of its pairs of rows do not hear of each other
FEWEST, MOST = 16, 128  # rows of a portion
COLUMNS = 512  # of one task

SolveRows = Callable[[Floats], tuple[Bytes, Floats]]
"""Targets (P, C) → their bytes and what these decode to."""


def check_output(output_KOO: Floats, rows: int) -> None:
    """Raises DitherError for an output Hessian of another layer, or with numbers that are none."""
    blocks, size, across = output_KOO.shape if output_KOO.ndim == 3 else (0, 0, 0)
    if output_KOO.ndim != 3 or blocks * size != rows or across != size:
        raise DitherError(
            f"output Hessian of shape {output_KOO.shape}",
            f"does not fit weights of {rows} rows",
            "Use the evidence that was made from this very model.",
        )
    if not np.isfinite(output_KOO).all():
        raise DitherError("output Hessian", "holds numbers that are not finite", "Calibrate again.")


def portion_rows(rows: int) -> int:
    return min(MOST, max(FEWEST, -(-rows // PORTIONS)))


def solve_in_turn(w_RC: Floats, output_KOO: Floats, solve: SolveRows, each: Each = map) -> Bytes:
    """The bytes of all rows, each portion solved for what those before it left: uint8 (R, N).

    `each` is `map`, or a pool's: the bytes are the same.
    """
    w_KOC = w_RC.reshape(*output_KOO.shape[:2], w_RC.shape[1])
    pairs = zip(w_KOC, output_KOO, strict=True)
    return np.concatenate([_solve_block(w_OC, output_OO, solve, each) for w_OC, output_OO in pairs])


def _solve_block(w_OC: Floats, output_OO: Floats, solve: SolveRows, each: Each) -> Bytes:
    # Rows that matter most go first: errors of theirs can be made up for by all that follow.
    order_O = np.argsort(-np.diagonal(output_OO), kind="stable")
    upper_OO = damped_factor(output_OO[np.ix_(order_O, order_O)], each)
    w_OC = w_OC[order_O]
    error_OC = np.zeros_like(w_OC)
    parts = []
    step = portion_rows(len(w_OC))
    for start in range(0, len(w_OC), step):
        at = slice(start, start + step)
        past_PC = _product(upper_OO[:start, at].T.astype(np.float32), error_OC[:start], each)
        # Σ_{j<k} e_j F_jk / F_kk for a portion of rows at once: its triangle of F takes the place of F_kk.
        moved_PC = np.linalg.solve(upper_OO[at, at].T, past_PC)
        raw_PN, value_PC = solve((w_OC[at] + moved_PC).astype(np.float32))
        # Later rows hear of errors against the weights, not against the targets that were moved.
        error_OC[at] = w_OC[at] - value_PC
        parts.append(raw_PN)
    raw_ON = np.concatenate(parts)
    back_ON = np.empty_like(raw_ON)
    back_ON[order_O] = raw_ON
    return back_ON


def _product(a_PO: Floats, b_OC: Floats, each: Each) -> Floats:
    """A B, some columns at a time."""
    parts = each(lambda at: a_PO @ b_OC[:, at], portions(b_OC.shape[1], COLUMNS))
    return np.concatenate(list(parts), axis=1)


def damped_factor(output_OO: Floats, each: Each = map) -> Doubles:
    """F of G + λI.  G is a sum of squares, so that any λ > 0 makes it definite; zero throughout, G = I.

    Raises DitherError for a G that is none.
    """
    plain_OO = output_OO.astype(np.float64)
    scale = float(np.mean(np.diagonal(plain_OO)))
    if not scale > 0:
        return np.eye(len(plain_OO))
    plain_OO = (plain_OO + plain_OO.T) / 2
    plain_OO[np.diag_indices_from(plain_OO)] += DAMPING * scale
    try:
        return upper_factor(plain_OO, each)
    except np.linalg.LinAlgError:
        raise DitherError(
            "output Hessian",
            "is not positive definite even when damped",
            "Calibrate again: no sum of squares looks like this.",
        ) from None
