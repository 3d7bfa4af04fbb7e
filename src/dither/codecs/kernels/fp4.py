"""Loops of MXFP4 and NVFP4: four-bit floats under a shared scale that is itself a tiny float.

The eight magnitudes are 0, ½, 1, 1½, 2, 3, 4, 6, stored here doubled so that they are integers.  Finding the
nearest is seven comparisons that each add the step to the next magnitude: no branch, no table, and LLVM
keeps it on vector lanes.

Legend: N groups that share a scale, B weights of a group, P rows of importance that repeat down the groups,
raw_N packed codes of a group per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import float_bits
from dither.codecs.kernels.legacy import ENTRY, INNER
from dither.codecs.kernels.uniform import INNER_SUMS

ZERO, ONE = np.float32(0), np.float32(1)
TWO, FOUR = np.float32(2), np.float32(4)
HALF = np.float32(0.5)


@njit(**INNER)
def nearest_magnitude(a):
    """The doubled magnitude nearest to a ≥ 0."""
    low = (ONE if a > HALF else ZERO) + (ONE if a > np.float32(1.5) else ZERO)
    middle = (ONE if a > np.float32(2.5) else ZERO) + (ONE if a > np.float32(3.5) else ZERO)
    high = (TWO if a > np.float32(5) else ZERO) + (TWO if a > np.float32(7) else ZERO)
    return low + middle + high + (FOUR if a > np.float32(10) else ZERO)


@njit(**INNER_SUMS)
def group_error(w_NB, importance_PB, n, scale):
    # In units of the scale: the caller, who knows which units it compares, multiplies by the square.
    inverse = ONE / scale
    p = n % importance_PB.shape[0]
    error = ZERO
    for j in range(w_NB.shape[1]):
        a = abs(w_NB[n, j]) * inverse
        rest = a - nearest_magnitude(a)
        error += importance_PB[p, j] * rest * rest
    return error


@njit(**INNER)
def first_guess(amax, power_of_two):
    """The index of a scale at or just below the one that maps the largest weight to the largest code."""
    if power_of_two:  # E8M0: the exponent of amax, less the 2 of the magnitude 4
        return np.int32(float_bits(amax) >> np.uint32(23)) - np.int32(2)
    s = min(amax / np.float32(6), np.float32(448))
    if s < np.float32(2.0**-6):  # subnormal UE4M3: a whole number of 2⁻⁹
        return np.int32(s * np.float32(512))
    return np.int32(float_bits(s) >> np.uint32(20)) - np.int32((127 - 7) << 3)


@njit(**ENTRY)
def fit_scales(w_NB, importance_PB, scales, power_of_two, below, above, last, index_N):
    """The index into `scales` of least weighted error, among those near the first guess."""
    for n in range(w_NB.shape[0]):
        amax = ZERO
        for j in range(w_NB.shape[1]):
            amax = max(amax, abs(w_NB[n, j]))
        if amax == ZERO:
            # A group of zeros: codes are 0 under any scale.
            index_N[n] = 0
            continue
        # The guess rounds down, so the window reaches farther up than down where scales are dense.
        start = min(max(first_guess(amax, power_of_two), np.int32(1)), last)
        best, least = start, group_error(w_NB, importance_PB, n, scales[start])
        for k in range(max(start - below, 1), min(start + above, last) + 1):
            # Errors in units of this scale, brought to those of the first guess.
            ratio = scales[k] / scales[start]
            error = group_error(w_NB, importance_PB, n, scales[k]) * ratio * ratio
            if error < least:
                best, least = np.int32(k), error
        index_N[n] = best


@njit(**INNER)
def code_of(w, scale):
    a = nearest_magnitude(abs(w) / scale)
    # Doubled magnitude to index: 0 … 4 as they are, then 6, 8, 12 become 5, 6, 7.
    index = a - (ONE if a > np.float32(5) else ZERO) - (ONE if a > np.float32(7) else ZERO)
    index -= np.float32(3) if a > np.float32(10) else ZERO
    return np.uint8(np.int32(index)) | (np.uint8(8) if w < ZERO and a > ZERO else np.uint8(0))


@njit(**ENTRY)
def pack_codes(w_NB, scales, index_N, raw_N):
    """Byte j of a group: the code of weight j, and above it that of weight j + B / 2."""
    half = w_NB.shape[1] // 2
    codes = np.empty(2 * half, np.uint8)
    for n in range(w_NB.shape[0]):
        scale = scales[index_N[n]]
        if scale == ZERO:
            raw_N[n, :] = np.uint8(0)
            continue
        for j in range(2 * half):
            codes[j] = code_of(w_NB[n, j], scale)
        for j in range(half):
            raw_N[n, j] = codes[j] | (codes[half + j] << np.uint8(4))


@njit(**ENTRY)
def unpack_values(raw_N, scales, index_N, table, w_NB):
    half = raw_N.shape[1]
    for n in range(raw_N.shape[0]):
        scale = scales[index_N[n]]
        for j in range(half):
            w_NB[n, j] = table[raw_N[n, j] & np.uint8(15)] * scale
            w_NB[n, half + j] = table[raw_N[n, j] >> np.uint8(4)] * scale
