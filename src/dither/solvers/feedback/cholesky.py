"""M = F Fᵀ with F upper triangular, by panels, on all cores, with the same bits on any number of them.

LAPACK's factor is a lower one, and goes through threads as its library likes, its bits with them.  Here a
panel of columns is taken at a time, the last first: what the columns behind it explain is subtracted, part by
part of its rows, which are of fixed size and know nothing of each other; a small factor on the diagonal
follows, and its inverse brings the rows above into place.  All but that small factor is matrix products.

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


def upper_factor(m_CC: npt.NDArray[Any], each: Each = map, diagonal_C: npt.NDArray[Any] | None = None) -> Doubles:
    """F, for which what stands on and above M's diagonal is read.  `each` is `map`, or a pool's.

    `diagonal_C`: in place of M's own.  Raises numpy's LinAlgError where M is not positive definite.
    """
    upper_CC = np.array(m_CC, np.float64, order="C")
    if diagonal_C is not None:
        np.fill_diagonal(upper_CC, diagonal_C)
    # From the last panel to the first: F is upper triangular, so M's last columns depend on F's last alone.
    for stop in range(len(upper_CC), 0, -PANEL):
        start = max(stop - PANEL, 0)
        _subtract_explained(upper_CC, start, stop, each)
        diagonal = _small_factor(upper_CC[start:stop, start:stop])
        upper_CC[start:stop, start:stop] = diagonal
        upper_CC[stop:, start:stop] = 0
        _divide(upper_CC, start, stop, diagonal, each)
    return upper_CC


def _subtract_explained(upper_CC: Doubles, start: int, stop: int, each: Each) -> None:
    """What is left of a panel's columns once the columns behind them are done: M − F_behind F_behindᵀ."""

    def part(at: slice) -> None:
        upper_CC[at, start:stop] -= upper_CC[at, stop:] @ upper_CC[start:stop, stop:].T

    if stop < len(upper_CC):
        list(each(part, portions(stop, PART)))


def _small_factor(m: Doubles) -> Doubles:
    """Turned around, LAPACK's lower factor is an upper one."""
    # J M J = L Lᵀ gives M = (J L J)(J L J)ᵀ, J the reversal of all columns: J L J is upper triangular.
    lower: Doubles = np.linalg.cholesky(m[::-1, ::-1]).astype(np.float64, copy=False)
    return lower[::-1, ::-1]


def _divide(upper_CC: Doubles, start: int, stop: int, diagonal: Doubles, each: Each) -> None:
    if not start:
        return
    # F_above Dᵀ is what is left of the rows above, D the small factor: times D⁻ᵀ, they are F's.
    inverse = np.linalg.inv(diagonal).T

    def part(at: slice) -> None:
        upper_CC[at, start:stop] = upper_CC[at, start:stop] @ inverse

    list(each(part, portions(start, PART)))


def portions(count: int, step: int) -> list[slice]:
    """What `each` goes through: of fixed size, so that no bit depends on the number of threads."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
