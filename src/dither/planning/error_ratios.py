"""The error each type makes of a tensor, with the solver that will really be used, on some of its rows.

What a type costs in divergence is measured once per tensor, at one type, the probe's; how that scales to
another type is a matter of the weights and the evidence alone.  So a sample of rows goes through the solver
in every type that comes into question, and the error is counted in the solver's own metric: tr(E H Eᵀ) where
there is a Hessian, Σ E[x²]·E² with mean squares, Σ E² without evidence.  A ratio of two types' errors on the
same rows needs few of them: what makes a row hard makes it hard in every type.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from dither.codecs import codec as find_codec
from dither.codecs.base import LevelCodec
from dither.formats.ggml import FLOAT_TYPES
from dither.solvers.nearest import Nearest
from dither.types import Evidence, EvidenceSource, Floats, Solver, Tensor

ROWS = 64  # of each tensor
FEW_ROWS = 16  # for codecs that are searched as a whole, which takes a hundred times as long
EXPERTS = 2  # of a stack share these rows


def error_ratios(
    tensor: Tensor, types: Sequence[str], probe: str, evidence: EvidenceSource, solver: Solver, threads: int
) -> dict[str, float]:
    """type → its error over the probe type's, on the same rows; 0 where the probe makes none.

    Float types are rounded; every other goes through the solver, or through nearest rounding where the
    evidence lacks what the solver needs.
    """
    many = [k for k in types if k in FLOAT_TYPES or isinstance(find_codec(k, tensor.columns), LevelCodec)]
    found: dict[str, float] = {}
    for rows, kinds in ((ROWS, many), (FEW_ROWS, [kind for kind in types if kind not in many])):
        if not kinds:
            continue
        # Read once for all types: the same rows, so that what makes a row hard cancels in the ratio.
        samples = list(_samples(tensor, evidence, rows))
        # One type per thread and one thread inside each, or BLAS's threads would multiply with ours.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads, thread_name_prefix="errors") as pool:
            errors = list(pool.map(lambda kind, of=samples: _error(of, kind, solver), (probe, *kinds)))
        # The probe's own error on these rows is the unit; what it gives back exactly has no ratios.
        unit = errors[0]
        found |= {k: e / unit if unit > 0 else 0.0 for k, e in zip(kinds, errors[1:], strict=True)}
    return found


def relative_error(tensor: Tensor, kind: str, evidence: EvidenceSource, solver: Solver) -> float:
    """The error of a type on some rows, over what losing these rows altogether would be."""
    samples = list(_samples(tensor, evidence, FEW_ROWS))
    lost = sum(_measured(w_RC, seen) for w_RC, seen in samples)
    return _error(samples, kind, solver) / lost if lost > 0 else 0.0


def _samples(tensor: Tensor, evidence: EvidenceSource, rows: int) -> Iterator[tuple[Floats, Evidence | None]]:
    """Rows spread over the tensor, or over some of its experts, with their evidence.

    Output Hessians are left out: a few rows say nothing of how all go together.
    """
    experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
    # Spread evenly, so that every part of the tensor has a say and another run takes the same rows.
    chosen = sorted({round(at) for at in np.linspace(0, experts - 1, min(experts, EXPERTS))})
    own = tensor.rows // experts
    for expert in chosen:
        count = min(own, max(1, rows // len(chosen)))
        at_R = expert * own + np.unique(np.linspace(0, own - 1, count).round().astype(int))
        w_RC = np.concatenate([tensor.read(int(row), int(row) + 1) for row in at_R])
        seen = evidence(tensor.name, expert)
        yield w_RC, None if seen is None else replace(seen, output_KOO=None, held_HC=None)


def _error(samples: Sequence[tuple[Floats, Evidence | None]], kind: str, solver: Solver) -> float:
    codec, error = find_codec(kind, samples[0][0].shape[1]), 0.0
    for w_RC, seen in samples:
        able = seen is not None and (seen.hessian_CC is not None or "hessian" not in solver.needs)
        if codec.name in FLOAT_TYPES:
            raw_RN = codec.encode(w_RC)
        else:
            raw_RN = (solver if able else Nearest())(w_RC, codec, seen).raw_RN
        error += _measured(w_RC - codec.decode(raw_RN), seen)
    return error


def _measured(error_RC: Floats, seen: Evidence | None) -> float:
    if seen is None:
        return float(np.square(error_RC, dtype=np.float64).sum())
    if seen.hessian_CC is None:
        return float(np.square(error_RC, dtype=np.float64).sum(axis=0) @ seen.mean_square_C)
    return float(np.einsum("rc,rc->", error_RC @ seen.hessian_CC, error_RC, dtype=np.float64))
