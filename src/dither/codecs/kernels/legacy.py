"""The loops of Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: extremes of a block, rounding, and the packing of codes.

Each follows the reference encoder of ggml operation by operation, in single precision and without fast-math,
so that the bytes are equal.  Two devices let LLVM run them on vector lanes all the same:

- A float reduction has an order, an integer one has none: extremes are found on the bit patterns, mapped so
  that integers compare as the floats do.
- C's `roundf` rounds halves away from zero; adding the largest float below ½ with the sign of x and cutting
  off the fraction does the same without a branch.

Legend: N blocks, B = 32 weights of a block, raw_N one packed block per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dither.codecs.kernels.common import bits_float, f16_to_f32, f32_to_f16, f32_to_f16_finite, load_f16, store_f16

# Division by zero gives an infinity, as in C, rather than a branch to an exception.
ENTRY: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
# For functions that only kernels call: no way in from Python or C, which would be compiled for each.
INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

BELOW_HALF = np.float32(0.49999997)
MAGNITUDE = np.int32(0x7FFFFFFF)
ZERO, ONE = np.float32(0), np.float32(1)


@njit(**INNER)
def stored_scale(scale, grid_scale, grid_inverse, n):
    """Put the float16 that is stored for `scale`, and what weights are multiplied by, in the grid.

    The factor is 1 over the scale before it was rounded, as in ggml, unless the scale had to be clamped.
    """
    half = f32_to_f16(scale)
    if (half & np.uint16(0x7FFF)) == np.uint16(0x7C00):
        half = f32_to_f16_finite(scale)
        scale = f16_to_f32(half)
    grid_scale[n] = f16_to_f32(half)
    grid_inverse[n] = ONE / scale if scale != ZERO else ZERO


@njit(**INNER)
def largest(bits_NB, n):
    """max|w| of block n: without their sign, the bits of floats are in order."""
    most = np.int32(0)
    for j in range(bits_NB.shape[1]):
        most = max(most, bits_NB[n, j] & MAGNITUDE)
    return bits_float(np.uint32(most))


@njit(**ENTRY)
def fit_absmax(w_NB, divisor, scale_N, inverse_N):
    """max|w| / divisor: Q8_0 with 127, the ternary types with 1."""
    bits_NB = w_NB.view(np.int32)
    for n in range(w_NB.shape[0]):
        stored_scale(largest(bits_NB, n) / divisor, scale_N, inverse_N, n)


@njit(**INNER)
def key_float(key):
    """The float of an ordered integer."""
    return bits_float(np.uint32(key ^ ((key >> np.int32(31)) & MAGNITUDE)))


@njit(**INNER)
def extremes(bits_NB, n):
    """Least and greatest weight of block n, found as ordered integers."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(bits_NB.shape[1]):
        bits = bits_NB[n, j]
        # Negative floats fall as their bits rise: flipping all but the sign puts them in order.
        key = bits ^ ((bits >> np.int32(31)) & MAGNITUDE)
        low, high = min(low, key), max(high, key)
    return key_float(low), key_float(high)


@njit(**ENTRY)
def fit_signed(w_NB, levels, scale_N, inverse_N):
    """The weight of largest magnitude, sign included, becomes the most negative code: Q4_0 and Q5_0."""
    bits_NB = w_NB.view(np.int32)
    for n in range(w_NB.shape[0]):
        low, high = extremes(bits_NB, n)
        peak = high if high > -low else low
        if high == -low:  # the first of them decides
            peak = ZERO
            for j in range(w_NB.shape[1]):
                if abs(w_NB[n, j]) > abs(peak):
                    peak = w_NB[n, j]
        stored_scale(peak / -levels, scale_N, inverse_N, n)


@njit(**ENTRY)
def fit_affine(w_NB, steps, scale_N, inverse_N, minimum_N, origin_N):
    """The range from least to greatest weight in equal steps: Q4_1 and Q5_1."""
    bits_NB = w_NB.view(np.int32)
    for n in range(w_NB.shape[0]):
        low, high = extremes(bits_NB, n)
        if low == ZERO:  # of a zero's two signs, the first met is stored
            for j in range(w_NB.shape[1]):
                if w_NB[n, j] == ZERO:
                    low = w_NB[n, j]
                    break
        stored_scale((high - low) / steps, scale_N, inverse_N, n)
        # Weights are measured from the minimum before it is rounded, as in ggml, unless it had to be clamped.
        half = f32_to_f16_finite(low)
        minimum_N[n] = f16_to_f32(half)
        origin_N[n] = low if abs(low) <= np.float32(65504.0) else minimum_N[n]


@njit(**INNER)
def whole(t, most):
    """`t` without its fraction, clamped to 0 … most, as an integer."""
    return np.int32(min(max(t, ZERO), most))


@njit(**ENTRY)
def pack_q8(w_NB, scale_N, inverse_N, raw_N):
    for n in range(w_NB.shape[0]):
        store_f16(raw_N[n], 0, f32_to_f16(scale_N[n]))
        inverse = inverse_N[n] if np.isfinite(inverse_N[n]) else ZERO
        for j in range(32):
            t = w_NB[n, j] * inverse
            t += BELOW_HALF if t >= ZERO else -BELOW_HALF
            t = min(max(t, np.float32(-127.0)), np.float32(127.0))
            raw_N[n, 2 + j] = np.uint8(np.int32(t))


@njit(**ENTRY)
def pack_low_bits(w_NB, scale_N, inverse_N, minimum_N, origin_N, half, bits, affine, raw_N):
    """Round and pack every type below 8 bits: scale, minimum if affine, fifth bits, nibbles."""
    most = np.float32((1 << bits) - 1)
    start = 4 if affine else 2
    nibbles = start + (4 if bits == 5 else 0)
    codes = np.empty(32, np.uint8)
    for n in range(w_NB.shape[0]):
        raw = raw_N[n]
        store_f16(raw, 0, f32_to_f16(scale_N[n]))
        if affine:
            store_f16(raw, 2, f32_to_f16(minimum_N[n]))
        # An infinite inverse belongs to a scale whose float16 is 0: codes mean nothing, and are 0 in ggml's files.
        finite = np.isfinite(inverse_N[n])
        inverse = inverse_N[n] if finite else ZERO
        shift = half if finite else ZERO
        origin = origin_N[n]
        for j in range(32):
            codes[j] = np.uint8(whole((w_NB[n, j] - origin) * inverse + shift, most))
        for j in range(16):
            raw[nibbles + j] = (codes[j] & np.uint8(15)) | (codes[16 + j] << np.uint8(4))
        if bits == 5:
            # Fifth bits in one word, that of weight j at bit j.
            high = np.uint32(0)
            for j in range(32):
                high |= np.uint32(codes[j] >> np.uint8(4)) << np.uint32(j)
            for j in range(4):
                raw[start + j] = np.uint8(high >> np.uint32(8 * j))


@njit(**ENTRY)
def decode_q8(raw_N, w_NB):
    for n in range(raw_N.shape[0]):
        scale = load_f16(raw_N[n], 0)
        for j in range(32):
            w_NB[n, j] = np.float32(np.int8(raw_N[n, 2 + j])) * scale


@njit(**ENTRY)
def decode_low_bits(raw_N, bits, affine, w_NB):
    start = 4 if affine else 2
    nibbles = start + (4 if bits == 5 else 0)
    middle = np.int32(0) if affine else np.int32(1 << (bits - 1))
    codes = np.empty(32, np.int32)
    for n in range(raw_N.shape[0]):
        raw = raw_N[n]
        scale = load_f16(raw, 0)
        minimum = load_f16(raw, 2) if affine else ZERO
        for j in range(16):
            codes[j] = np.int32(raw[nibbles + j] & np.uint8(15)) - middle
            codes[16 + j] = np.int32(raw[nibbles + j] >> np.uint8(4)) - middle
        if bits == 5:
            high = np.uint32(0)
            for j in range(4):
                high |= np.uint32(raw[start + j]) << np.uint32(8 * j)
            for j in range(32):
                codes[j] += np.int32((high >> np.uint32(j)) & np.uint32(1)) << np.int32(4)
        if affine:
            for j in range(32):
                w_NB[n, j] = np.float32(codes[j]) * scale + minimum
        else:
            for j in range(32):
                w_NB[n, j] = np.float32(codes[j]) * scale
