"""Cholesky's factor by panels, on all cores, with the same bits on any number of them.

LAPACK's own goes through threads as its library likes, and its bits with them.  Here a panel of columns is
taken at a time: what the columns before it explain is subtracted, part by part of its rows, which are of
fixed size and know nothing of each other; a small factor on the diagonal follows, and its inverse brings the
rows below into place.  All but that small factor is matrix products.

Legend: C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Each = Callable[[Callable[[slice], Any], Iterable[slice]], Iterable[Any]]  # `map`, or a pool's

PANEL = 256  # columns: enough that products are long, few enough that the diagonal's factor is short
PART = 256  # rows


def lower_factor(m_CC: Doubles, each: Each = map) -> Doubles:
    """The lower triangular L with L Lᵀ = M, of which what stands on and below the diagonal is read.

    Raises numpy's LinAlgError where M is not positive definite.
    """
    lower_CC = np.tril(m_CC)
    columns = len(lower_CC)
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        _subtract_past(lower_CC, start, stop, each)
        diagonal = np.linalg.cholesky(lower_CC[start:stop, start:stop])
        lower_CC[start:stop, start:stop] = diagonal
        if stop < columns:
            _divide(lower_CC, start, stop, np.linalg.inv(diagonal).T, each)
    return lower_CC


def _subtract_past(lower_CC: Doubles, start: int, stop: int, each: Each) -> None:
    past_CK = lower_CC[:, :start]

    def part(at: slice) -> None:
        lower_CC[at, start:stop] -= past_CK[at] @ past_CK[start:stop].T

    if start:
        list(each(part, _parts(start, len(lower_CC))))


def _divide(lower_CC: Doubles, start: int, stop: int, inverse: Doubles, each: Each) -> None:
    def part(at: slice) -> None:
        lower_CC[at, start:stop] = lower_CC[at, start:stop] @ inverse

    list(each(part, _parts(stop, len(lower_CC))))


def _parts(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + PART, stop)) for at in range(start, stop, PART)]
