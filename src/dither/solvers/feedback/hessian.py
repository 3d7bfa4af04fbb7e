"""The Hessian of a layer, made ready for error feedback: damped, ordered, and factored as H = F Fᵀ.

With F upper triangular the loss of a row's residual r = w − ŵ falls apart into one square per column,

    r H rᵀ = ‖r F‖² = Σ_k F_kk² (r_k + Σ_{j<k} r_j F_jk / F_kk)²

so that rounding column k where the columns before it have left its minimum is all that can be done about
that square.  GPTQ (Frantar et al. 2022, arXiv:2210.17323) writes the same through the upper Cholesky factor U
of H⁻¹; U = F⁻¹, and working with F saves the inverse and its loss of precision (the LDLQ form of QuIP, Chee
et al. 2023, arXiv:2307.13304, section 3).

Legend: C columns in the order in which they are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dither.errors import DitherError, UsageError
from dither.solvers.feedback.cholesky import Doubles, Each, upper_factor
from dither.types import Codec, Evidence, Floats

Order = npt.NDArray[np.intp]

STEP = 10.0  # damping grows by this factor until the factorization holds
FIRST = 1e-4  # where it starts to grow from, if none was asked for
MOST = 1e3  # a Hessian that is not definite even so is none
PIVOT = 1e-7  # least squared diagonal of F, relative to the mean of H's: float32 loops lose their way below


@dataclass(frozen=True)
class Factored:
    """H + λI and its factor, with λ = `damping` · mean(diag H)."""

    damped_CC: Floats
    upper_CC: Doubles
    damping: float


def needed_hessian(evidence: Evidence | None, solver: str) -> Floats:
    """The evidence's Hessian.  Raises UsageError, about `solver`, where it holds none."""
    if evidence is None or evidence.hessian_CC is None:
        raise UsageError(
            solver,
            "needs a Hessian, and the evidence holds none",
            "Calibrate with Hessians, or choose the nearest solver.",
        )
    return evidence.hessian_CC


def check_layer(columns: int, codec: Codec, hessian_CC: Floats) -> None:
    """Raises UsageError where columns are no whole blocks, DitherError for a Hessian of another shape or with
    numbers that no mean of squares can be."""
    if columns % codec.block:
        raise UsageError(
            f"{columns} columns",
            f"{codec.name} needs a multiple of {codec.block}",
            "Choose a type with a smaller block.",
        )
    if hessian_CC.shape != (columns, columns):
        raise DitherError(
            f"Hessian of shape {hessian_CC.shape}",
            f"does not fit weights of {columns} columns",
            "Use the evidence that was made from this very model.",
        )
    if not np.isfinite(hessian_CC).all():
        raise DitherError(
            "Hessian", "holds numbers that are not finite", "Calibrate again; see that the model runs in float32."
        )
    diagonal_C = np.diagonal(hessian_CC)
    if (diagonal_C < 0).any():
        column = int(np.argmin(diagonal_C))
        raise DitherError(
            "Hessian", f"has a negative mean square in column {column}", "Calibrate again: the evidence is damaged."
        )


def factor(hessian_CC: Floats, damping: float, each: Each = map) -> Factored:
    """Damp and factor; damping grows tenfold as often as it takes, and says so in the result.

    `each` is `map`, or a pool's: the bits are the same.

    Raises DitherError for a matrix that no damping makes definite.
    """
    diagonal_C = np.diagonal(hessian_CC).astype(np.float64)
    scale = float(diagonal_C.mean()) or 1.0
    # Sums in float32 leave a Hessian a little asymmetric, and the factor reads only one of its halves.
    damped_CC = np.add(hessian_CC, hessian_CC.T, dtype=np.float32)
    damped_CC *= 0.5
    while damping <= MOST:
        raised_C = diagonal_C + damping * scale
        np.fill_diagonal(damped_CC, raised_C)
        try:
            # The diagonal goes in apart, in float64: in float32 a small λ would be lost beside a large square.
            upper_CC = upper_factor(damped_CC, each, raised_C)
        except np.linalg.LinAlgError:
            upper_CC = None
        if upper_CC is not None and np.diagonal(upper_CC).min() ** 2 >= PIVOT * scale:
            return Factored(damped_CC, upper_CC, damping)
        # Few tokens leave directions that no input ever had; λ alone holds them, so more of it is the remedy.
        damping = max(STEP * damping, FIRST)
    raise DitherError(
        "Hessian",
        f"is not positive definite even when damped by {MOST:g} times its mean diagonal",
        "Calibrate again: no sum of squares looks like this.",
    )


def column_order(hessian_CC: Floats, block: int, within: bool) -> Order:
    """Blocks by falling total of their diagonal, and `within` a block columns by falling diagonal.

    What is rounded early can be made up for by all that follows, so what matters most goes first (act-order).
    Columns of one block stay together, because its scales are fitted when its turn comes.
    """
    diagonal_NB = np.diagonal(hessian_CC).reshape(-1, block)
    order_NB = np.arange(hessian_CC.shape[0], dtype=np.intp).reshape(-1, block)
    if within:
        inside_NB = np.argsort(-diagonal_NB, axis=1, kind="stable")
        order_NB = np.take_along_axis(order_NB, inside_NB, axis=1)
    # A block counts by its sum, so that its columns may stay together.
    first_N = np.argsort(-diagonal_NB.sum(axis=1, dtype=np.float64), kind="stable")
    return order_NB[first_N].reshape(-1)
