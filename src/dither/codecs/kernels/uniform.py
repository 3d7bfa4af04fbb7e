"""Search for the scale of equally spaced codes that keeps Σ importance · (w − ŵ)² small.

For given codes q the best scale is a quotient of sums, d = Σ v·w·q / Σ v·q² with v the importance, and the
error left is Σ v·w² − (Σ v·w·q)² / Σ v·q²: so each candidate costs one pass over a block held in registers.
Candidates are multiples of the scale that spreads the largest weight over all codes.  The winner is polished
by rounding again under its own best scale (Lloyd's iteration, which cannot raise the error), and the plain
formula's result is kept where the search, after its scale is stored as float16, did not beat it.

Sums may be reordered here (fast-math), so `encode` and `fit` run these very functions, once compiled, and the
rounding that follows is exact.

Legend: N blocks, B weights of a block, P rows of importance that repeat down the blocks, K candidates.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import f16_to_f32, f32_to_f16_finite
from dither.codecs.kernels.legacy import ENTRY, INNER, ONE, ZERO, whole

SUMS = {"reassoc", "contract", "nsz", "arcp"}
INNER_SUMS = {**INNER, "fastmath": SUMS}
HALF = np.float32(0.5)
NOTHING = np.float32(1e-30)  # below it a block's numbers all round to zero as float16 scales do
POLISH = 2


@njit(**INNER_SUMS)
def load_block(w_NB, importance_PB, n, unit, x, v):
    """Weights in units of `unit`, and importance with mean 1; ones where it is all zero."""
    # In units of the largest weight or the spread, and with importance of mean 1, no square leaves float32's range,
    # and the same candidates serve every block.
    p = n % importance_PB.shape[0]
    # A sum has a loop of its own: in one that also writes, whether lanes are added side by side or one after the other
    # hangs on how far apart the arrays happen to lie, and with it the last bit.
    total = ZERO
    for j in range(x.size):
        total += importance_PB[p, j]
    for j in range(x.size):
        x[j] = w_NB[n, j] * unit
    norm = np.float32(x.size) / total if total > ZERO else ZERO
    for j in range(x.size):
        v[j] = importance_PB[p, j] * norm if total > ZERO else ONE


@njit(**INNER_SUMS)
def signed_sums(x, v, inverse, low, most):
    """Σ v·x·q and Σ v·q² of codes q = low … low + most rounded from x · inverse."""
    xq, qq = ZERO, ZERO
    shift = HALF - low
    for j in range(x.size):
        q = np.float32(whole(x[j] * inverse + shift, most)) + low
        xq += v[j] * x[j] * q
        qq += v[j] * q * q
    return xq, qq


@njit(**INNER_SUMS)
def signed_error(x, v, scale, inverse, low, most):
    error = ZERO
    shift = HALF - low
    for j in range(x.size):
        q = np.float32(whole(x[j] * inverse + shift, most)) + low
        error += v[j] * (x[j] - q * scale) ** 2
    return error


@njit(**ENTRY, fastmath=SUMS)
def search_signed(w_NB, importance_PB, candidates_K, low, most, scale_N, inverse_N):
    """Improve the plain grid in `scale_N`, `inverse_N`: codes low … low + most times a scale."""
    x = np.empty(w_NB.shape[1], np.float32)
    v = np.empty(w_NB.shape[1], np.float32)
    for n in range(w_NB.shape[0]):
        peak = ZERO
        for j in range(x.size):
            # The peak keeps its sign: a negative one turns the block around, so that candidates of both signs try
            # both ends of the codes.
            peak = w_NB[n, j] if abs(w_NB[n, j]) > abs(peak) else peak
        if abs(peak) < NOTHING:
            continue
        load_block(w_NB, importance_PB, n, ONE / peak, x, v)
        # `gain` is what the scale takes off Σ v·x²: comparing it crosswise needs no division, and codes that are all
        # zero gain nothing.
        best, gain = ZERO, ZERO
        for k in range(candidates_K.size):
            xq, qq = signed_sums(x, v, candidates_K[k], low, most)
            if xq * xq > gain * qq:
                best, gain = xq / qq, xq * xq / qq
        if best == ZERO:
            continue
        # Lloyd's iteration: codes under the scale found, and their own best scale. No step may lose.
        for _ in range(POLISH):
            xq, qq = signed_sums(x, v, ONE / best, low, most)
            if xq * xq > gain * qq:
                best, gain = xq / qq, xq * xq / qq
        scale = f16_to_f32(f32_to_f16_finite(best * peak))
        if scale == ZERO:
            continue
        # Both are judged as a decoder will compute them, the scale being a float16 by now: rounding it may have cost
        # more than the search won.
        plain = signed_error(x, v, scale_N[n] / peak, inverse_N[n] * peak, low, most)
        found = signed_error(x, v, scale / peak, peak / scale, low, most)
        if not plain <= found:  # also where the plain grid's factor overflowed
            scale_N[n], inverse_N[n] = scale, ONE / scale


@njit(**INNER_SUMS)
def affine_sums(x, v, inverse, origin, most):
    """Σ v·q, Σ v·q², Σ v·x·q of codes q = 0 … most rounded from (x − origin) · inverse."""
    q1, q2, xq = ZERO, ZERO, ZERO
    for j in range(x.size):
        q = np.float32(whole((x[j] - origin) * inverse + HALF, most))
        q1 += v[j] * q
        q2 += v[j] * q * q
        xq += v[j] * x[j] * q
    return q1, q2, xq


@njit(**INNER_SUMS)
def affine_error(x, v, scale, minimum, inverse, origin, most):
    error = ZERO
    for j in range(x.size):
        q = np.float32(whole((x[j] - origin) * inverse + HALF, most))
        error += v[j] * (x[j] - (q * scale + minimum)) ** 2
    return error


@njit(**ENTRY, fastmath=SUMS)
def search_affine(w_NB, importance_PB, candidates_K, most, scale_N, inverse_N, minimum_N, origin_N):
    """Improve the plain grid: codes 0 … most times a scale plus a minimum, both by least squares."""
    size = w_NB.shape[1]
    x = np.empty(size, np.float32)
    v = np.empty(size, np.float32)
    weight = np.float32(size)
    for n in range(w_NB.shape[0]):
        low, high = w_NB[n, 0], w_NB[n, 0]
        for j in range(1, size):
            low, high = min(low, w_NB[n, j]), max(high, w_NB[n, j])
        spread = high - low
        if not NOTHING < spread < np.float32(1e30):
            continue
        load_block(w_NB, importance_PB, n, ONE / spread, x, v)
        x1 = ZERO
        for j in range(size):
            x1 += v[j] * x[j]
        start = low / spread
        best, best_origin, gain = ZERO, ZERO, ZERO
        for k in range(candidates_K.size + POLISH):
            # Candidates start from the lowest weight; the last turns polish, from the best scale and minimum.
            if k < candidates_K.size:
                q1, q2, xq = affine_sums(x, v, candidates_K[k], start, most)
            else:
                q1, q2, xq = affine_sums(x, v, ONE / best, best_origin, most)
            # Least squares with a free minimum is a regression of weights on codes: the scale is covariance over
            # variance, and the minimum keeps the means equal.
            covariance = xq - x1 * q1 / weight
            variance = q2 - q1 * q1 / weight
            if variance > ZERO and covariance > ZERO and covariance * covariance > gain * variance:
                gain = covariance * covariance / variance
                best = covariance / variance
                best_origin = (x1 - best * q1) / weight
            if best == ZERO:
                break
        if best == ZERO:
            continue
        scale = f16_to_f32(f32_to_f16_finite(best * spread))
        minimum = f16_to_f32(f32_to_f16_finite(best_origin * spread))
        if scale == ZERO:
            continue
        plain = affine_error(
            x, v, scale_N[n] / spread, minimum_N[n] / spread, inverse_N[n] * spread, origin_N[n] / spread, most
        )
        found = affine_error(x, v, scale / spread, minimum / spread, spread / scale, minimum / spread, most)
        if not plain <= found:
            scale_N[n], minimum_N[n], inverse_N[n], origin_N[n] = scale, minimum, ONE / scale, minimum
