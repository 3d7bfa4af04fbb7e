"""Whether a solver's answer is worth keeping: compared with nearest rounding on inputs it has not seen.

Whoever minimizes tr(E H Eᵀ) learns from few tokens what does not hold for others.  So answers are compared on
input rows that were held back from H, and the better one is kept; without such rows, on H itself.

Everything is a sum over rows, of which threads take portions of fixed size: no number depends on how many
threads there are.

Legend: R rows, C columns, H held-back input rows, N bytes of a packed row or numbers of a row, P columns of a
panel, K diagonal blocks of O rows each.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dither.solvers.feedback.cholesky import Each, portions
from dither.types import Bytes, Codec, Evidence, Floats, Solved

EXACT = "the type holds these weights as they are: nothing to solve"
SHARED = "scales are shared between rows: rounded to nearest"
_FIRST = 16  # rows that tell whether the others may be exact too
_ROWS = 256  # of a portion
_PANEL = 256  # columns


def objective(error_RC: Floats, hessian_CC: Floats, output_KOO: Floats | None = None, each: Each = map) -> float:
    """tr(G E H Eᵀ); G is the identity where it is not given."""
    if output_KOO is None:
        return float(sum(each(lambda at: _form(error_RC[at], hessian_CC), portions(len(error_RC), _ROWS))))
    return _paired(error_RC, _times(error_RC, hessian_CC, each), output_KOO, each)


def held_objective(error_RC: Floats, held_HC: Floats, output_KOO: Floats | None = None, each: Each = map) -> float:
    """tr(G (E Xᵀ)(E Xᵀ)ᵀ) / n: the mean squared output error on n inputs, in G's metric."""
    error_RH = _times(error_RC, held_HC.T, each)
    if output_KOO is None:
        return _dot(error_RH, error_RH) / len(held_HC)
    return _paired(error_RH, error_RH, output_KOO, each) / len(held_HC)


def validated(found: Solved, method: str, w_RC: Floats, codec: Codec, evidence: Evidence, threads: int = 1) -> Solved:
    """What a solver `found`, or nearest rounding's bytes where these are better; `method` is named in the note.

    The record's objectives are tr(E H Eᵀ), or tr(G E H Eᵀ) with an output Hessian.
    """
    assert evidence.hessian_CC is not None
    hessian_CC, held_HC, output_KOO = evidence.hessian_CC, evidence.held_HC, evidence.output_KOO
    parts = portions(len(w_RC), _ROWS)
    record, judge = dict(found.record), "objective"
    with ThreadPoolExecutor(threads, thread_name_prefix="validation") as pool:

        def rows(of: Callable[[slice], Any]) -> Any:
            return np.concatenate(list(pool.map(of, parts))) if parts else found.raw_RN

        def errors(raw_RN: Bytes) -> Any:
            """What a decoder will read, not what the solver believes."""
            return rows(lambda at: w_RC[at] - codec.decode(raw_RN[at]))

        nearest_RN = rows(lambda at: codec.encode(w_RC[at], evidence.mean_square_C))
        for whose, raw_RN in (("", found.raw_RN), ("nearest_", nearest_RN)):
            error_RC = errors(raw_RN)
            record[f"{whose}objective"] = objective(error_RC, hessian_CC, output_KOO, pool.map)
            if held_HC is not None and len(held_HC):
                judge = "held"
                record[f"{whose}held"] = held_objective(error_RC, held_HC, output_KOO, pool.map)
    # Written so that NaN, which compares with nothing, keeps nearest rounding.
    if not record[judge] <= record[f"nearest_{judge}"]:
        where = "inputs held back" if judge == "held" else "the Hessian itself"
        worse = f"{method} was no better than nearest rounding on {where}: nearest kept"
        return Solved(nearest_RN, "nearest", record, (*found.notes, worse))
    return Solved(found.raw_RN, found.solver, record, found.notes)


def exact(w_RC: Floats, codec: Codec, importance_C: Floats) -> Bytes | None:
    """The bytes of nearest rounding where it changes no weight, as of a source that is quantized already."""
    found = []
    # A few rows first: of a source that is not quantized they already say no, at almost no cost.
    starts = [0, *range(_FIRST, len(w_RC), _ROWS)]
    for start, stop in zip(starts, [*starts[1:], len(w_RC)], strict=True):
        raw_RN = codec.encode(w_RC[start:stop], importance_C)
        if not np.array_equal(codec.decode(raw_RN), w_RC[start:stop]):
            return None
        found.append(raw_RN)
    return np.concatenate(found)


def _times(a_RC: Floats, b_CN: Floats, each: Each) -> Floats:
    return np.concatenate(
        [np.zeros((0, b_CN.shape[1]), np.float32), *each(lambda at: a_RC[at] @ b_CN, portions(len(a_RC), _ROWS))]
    )


def _form(error_RC: Floats, hessian_CC: Floats) -> float:
    """tr(E H Eᵀ) from what stands on and above H's diagonal: half of the products."""
    total = 0.0
    # H is symmetric: what stands beside the diagonal block counts twice, the block itself once.
    for at in portions(len(hessian_CC), _PANEL):
        error_RP, after_RC = error_RC[:, at], error_RC[:, at.start :]
        pulled_RC = error_RP @ hessian_CC[at, at.start :]
        total += 2 * _dot(pulled_RC, after_RC) - _dot(pulled_RC[:, : error_RP.shape[1]], error_RP)
    return total


def _paired(a_RN: Floats, b_RN: Floats, output_KOO: Floats, each: Each) -> float:
    """Σ (G A) ∘ B, block by block of G."""
    total, size = 0.0, output_KOO.shape[1]
    for k, output_OO in enumerate(output_KOO):
        a_ON, b_ON = a_RN[k * size : (k + 1) * size], b_RN[k * size : (k + 1) * size]

        def portion(at: slice, g_OO: Floats = output_OO, a_ON: Floats = a_ON, b_ON: Floats = b_ON) -> float:
            return _dot(g_OO[at] @ a_ON, b_ON[at])

        total += sum(each(portion, portions(size, _ROWS)))
    return total


def _dot(a_RN: Floats, b_RN: Floats) -> float:
    """Σ A ∘ B: each row in float32, their sum in float64; float64 throughout takes four times as long."""
    return float(np.einsum("rn,rn->r", a_RN, b_RN).sum(dtype=np.float64))
