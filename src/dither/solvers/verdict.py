"""Whether a solver's answer is worth keeping: held against nearest rounding on inputs it has not seen.

Whoever minimizes tr(E H Eᵀ) learns from few tokens what does not hold for others.  So answers are compared on
input rows that were held back from H, and the better one is kept; without such rows, on H itself.

Legend: R rows, C columns, H held-back input rows, N bytes of a packed row, K diagonal blocks of O rows each.
"""

from __future__ import annotations

import numpy as np

from dither.solvers.outputs import weighed
from dither.types import Bytes, Codec, Evidence, Floats, Solved

SHARED = "scales are shared between rows: rounded to nearest"


def objective(error_RC: Floats, hessian_CC: Floats, output_KOO: Floats | None = None) -> float:
    """tr(G E H Eᵀ); G is the identity where it is not given."""
    left_RC = error_RC if output_KOO is None else weighed(output_KOO, error_RC)
    return float(np.einsum("rc,rc->", error_RC @ hessian_CC, left_RC, dtype=np.float64))


def held_objective(error_RC: Floats, held_HC: Floats, output_KOO: Floats | None = None) -> float:
    """tr(G (E Xᵀ)(E Xᵀ)ᵀ) / n: the mean squared output error on n inputs, in G's metric."""
    error_RH = error_RC @ held_HC.T
    left_RH = error_RH if output_KOO is None else weighed(output_KOO, error_RH)
    return float(np.einsum("rh,rh->", error_RH, left_RH, dtype=np.float64) / len(held_HC))


def kept(
    solver: str, what: str, w_RC: Floats, codec: Codec, evidence: Evidence, raw_RN: Bytes,
    notes: tuple[str, ...] = (), **record: float,
) -> Solved:  # fmt: skip
    """`solver`'s bytes, or nearest rounding's where these were better; `what` names its method in a note.

    The record's objectives are tr(E H Eᵀ), or tr(G E H Eᵀ) with an output Hessian.
    """
    assert evidence.hessian_CC is not None
    nearest_RN = codec.encode(w_RC, evidence.mean_square_C)
    error_RC, nearest_RC = w_RC - codec.decode(raw_RN), w_RC - codec.decode(nearest_RN)
    found = {
        "objective": objective(error_RC, evidence.hessian_CC, evidence.output_KOO),
        "nearest_objective": objective(nearest_RC, evidence.hessian_CC, evidence.output_KOO),
        **record,
    }
    judge = "objective"
    if evidence.held_HC is not None and len(evidence.held_HC):
        judge = "held"
        found["held"] = held_objective(error_RC, evidence.held_HC, evidence.output_KOO)
        found["nearest_held"] = held_objective(nearest_RC, evidence.held_HC, evidence.output_KOO)
    if not found[judge] <= found[f"nearest_{judge}"]:
        where = "inputs held back" if judge == "held" else "the Hessian itself"
        worse = f"{what} was no better than nearest rounding on {where}: nearest kept"
        return Solved(nearest_RN, "nearest", found, (*notes, worse))
    return Solved(raw_RN, solver, found, notes)
