"""Eight-bit floats, E4M3 without infinities: rounding as IEEE 754 does it, and scales per row of numbers.

Four exponent bits of bias 7 and three of mantissa: from 2⁻⁹ to 448, then one NaN (Micikevicius et al. 2022,
arXiv:2209.05433, section 3).  Rounding is to nearest, ties to even; what is beyond 448 becomes 448.

Legend: N blocks, B weights of a block, P rows of importance that repeat down the blocks, K candidates,
raw_NN one packed block per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import bits_float, exact, float_bits, inner
from dither.codecs.kernels.legacy import ENTRY, ONE, ZERO, largest
from dither.codecs.kernels.stored import as_stored, load_scale, scale_bytes, store_scale
from dither.codecs.kernels.uniform import INNER_SUMS

MOST = np.float32(448)
LEAST_NORMAL = np.float32(2.0**-6)
TO_NINTHS = np.float32(1.5 * 2**14)  # added to a float32, it leaves whole numbers of 2⁻⁹
SMALL, LARGE = np.float32(1e-30), np.float32(1e30)  # beyond these, sums of squares might leave float32


@exact
def rounded(x):
    """The E4M3 number nearest to x, as float32."""
    # Normal numbers keep 3 of 23 bits of mantissa: the rest is rounded as an integer, ties to even, and a carry into
    # the exponent is right as it is.
    size = min(abs(x), MOST)
    bits = float_bits(size)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    normal = bits_float((bits + np.uint32(0x7FFFF) + odd) & np.uint32(0xFFF00000))
    # Below 2⁻⁶ numbers are whole multiples of 2⁻⁹, whatever their size.
    near_zero = (size + TO_NINTHS) - TO_NINTHS
    nearest = near_zero if size < LEAST_NORMAL else normal
    return -nearest if x < ZERO else nearest


@inner
def to_e4m3(x):
    """The pattern of the number nearest to x; zero keeps its sign."""
    sign = (float_bits(x) >> np.uint32(24)) & np.uint32(0x80)
    size = abs(rounded(x))
    if size < LEAST_NORMAL:
        return np.uint8(sign | np.uint32(size * np.float32(512)))
    # Exponents are biased by 7 instead of 127, 120 less, and stand above three bits.
    return np.uint8(sign | ((float_bits(size) >> np.uint32(20)) - np.uint32(120 << 3)))


@njit(**INNER_SUMS)
def block_error(w_NB, importance_PB, n, scale, unit):
    """Σ v · ((w − ŵ) / unit)²."""
    p, error = n % importance_PB.shape[0], ZERO
    for j in range(w_NB.shape[1]):
        rest = (w_NB[n, j] - rounded(w_NB[n, j] / scale) * scale) * unit
        error += importance_PB[p, j] * rest * rest
    return error


@njit(**ENTRY)
def fit_largest(w_NB, importance_PB, targets_K, kind, scale_N):
    """Scales that send the largest weight to that of a few numbers, 448 first, with the least error."""
    bits_NB = w_NB.view(np.int32)
    for n in range(w_NB.shape[0]):
        peak = largest(bits_NB, n)
        if peak == ZERO:
            scale_N[n] = ONE
            continue
        # The plain scale first, which a block of extreme weights keeps: its errors could not be squared.
        scale_N[n] = as_stored(peak / targets_K[0], kind)
        if not SMALL < peak < LARGE:
            continue
        least = block_error(w_NB, importance_PB, n, scale_N[n], ONE / peak)
        for k in range(1, targets_K.size):
            scale = as_stored(peak / targets_K[k], kind)
            error = block_error(w_NB, importance_PB, n, scale, ONE / peak)
            if error < least:
                scale_N[n], least = scale, error


@njit(**ENTRY)
def pack_floats(w_NB, scale_N, kind, raw_NN):
    start = scale_bytes(kind)
    for n in range(w_NB.shape[0]):
        scale = scale_N[n]
        store_scale(raw_NN[n], scale, kind)
        for j in range(w_NB.shape[1]):
            raw_NN[n, start + j] = to_e4m3(w_NB[n, j] / scale if scale != ZERO else w_NB[n, j])


@njit(**ENTRY)
def decode_floats(raw_NN, kind, numbers_K, w_NB):
    """`numbers_K` by pattern."""
    start = scale_bytes(kind)
    for n in range(raw_NN.shape[0]):
        scale = load_scale(raw_NN[n], kind)
        for j in range(w_NB.shape[1]):
            w_NB[n, j] = numbers_K[raw_NN[n, start + j]] * scale


@njit(**ENTRY)
def patterns(x, out):
    for i in range(x.size):
        out[i] = to_e4m3(x[i])
