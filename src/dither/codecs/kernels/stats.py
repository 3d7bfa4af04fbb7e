"""Sums over many weights, in double precision, in one pass each."""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"reassoc", "contract", "nsz"}  # lets the sum run on vector lanes; NaN and infinity stay visible


@njit(cache=True, nogil=True, fastmath=_FAST)
def sum_squares(x):
    """Σ x²; NaN or infinite exactly when some x is."""
    total = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value * value
    return total


@njit(cache=True, nogil=True, fastmath=_FAST)
def sum_squared_difference(x, y):
    """Σ (x − y)²."""
    total = 0.0
    for i in range(x.size):
        difference = np.float64(x[i]) - np.float64(y[i])
        total += difference * difference
    return total
