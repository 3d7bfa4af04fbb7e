"""Loops of TQ1_0 and TQ2_0: rounding to −1, 0, 1 and the two ways of packing the digits.

Legend: N blocks, B = 256 weights of a block, raw_N one packed block per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import f32_to_f16, load_f16, store_f16
from dither.codecs.kernels.legacy import BELOW_HALF, ENTRY, INNER, ONE, ZERO


@njit(**INNER)
def digits_of(w_NB, n, inverse, digits):
    """0, 1 or 2 for each weight of block n, rounded as C's roundf does."""
    factor = inverse if np.isfinite(inverse) else ZERO
    for j in range(digits.size):
        t = w_NB[n, j] * factor
        t += BELOW_HALF if t >= ZERO else -BELOW_HALF
        digits[j] = np.uint8(np.int32(min(max(t, -ONE), ONE)) + np.int32(1))


@njit(**INNER)
def put_base3(digits, start, width, count, raw, at):
    """Bytes of `count` base-3 digits, `width` weights apart: digits / 3⁵ in units of 1/256, rounded up."""
    for m in range(width):
        # The digits as one number below 3⁵, the first the most significant. Rounding up to 256ths makes up for what a
        # decoder's products by 3 would fall short of.
        number = np.uint32(0)
        for k in range(5):
            digit = np.uint32(digits[start + m + k * width]) if k < count else np.uint32(0)
            number = number * np.uint32(3) + digit
        raw[at + m] = np.uint8((number * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@njit(**ENTRY)
def pack_tq1(w_NB, scale_N, inverse_N, raw_N):
    digits = np.empty(256, np.uint8)
    for n in range(w_NB.shape[0]):
        digits_of(w_NB, n, inverse_N[n], digits)
        # 5 · 32 + 5 · 16 + 4 · 4 = 256 weights.
        put_base3(digits, 0, 32, 5, raw_N[n], 0)
        put_base3(digits, 160, 16, 5, raw_N[n], 32)
        put_base3(digits, 240, 4, 4, raw_N[n], 48)
        store_f16(raw_N[n], 52, f32_to_f16(scale_N[n]))


@njit(**ENTRY)
def pack_tq2(w_NB, scale_N, inverse_N, raw_N):
    digits = np.empty(256, np.uint8)
    for n in range(w_NB.shape[0]):
        digits_of(w_NB, n, inverse_N[n], digits)
        for half in range(2):
            for m in range(32):
                at = half * 128 + m
                low = digits[at] | (digits[at + 32] << np.uint8(2))
                high = digits[at + 64] | (digits[at + 96] << np.uint8(2))
                raw_N[n, half * 32 + m] = low | (high << np.uint8(4))
        store_f16(raw_N[n], 64, f32_to_f16(scale_N[n]))


@njit(**INNER)
def get_base3(raw, at, width, count, scale, w_NB, n, start):
    """Digit k is the leading digit of the byte, as a fraction of 256, after k digits are shifted away."""
    for m in range(width):
        rest = np.uint32(raw[at + m])
        for k in range(count):
            # What a product by 3 carries beyond eight bits is the digit; the rest holds those that follow.
            tripled = rest * np.uint32(3)
            w_NB[n, start + m + k * width] = np.float32(np.int32(tripled >> np.uint32(8)) - np.int32(1)) * scale
            rest = tripled & np.uint32(255)


@njit(**ENTRY)
def decode_tq1(raw_N, w_NB):
    for n in range(raw_N.shape[0]):
        scale = load_f16(raw_N[n], 52)
        get_base3(raw_N[n], 0, 32, 5, scale, w_NB, n, 0)
        get_base3(raw_N[n], 32, 16, 5, scale, w_NB, n, 160)
        get_base3(raw_N[n], 48, 4, 4, scale, w_NB, n, 240)


@njit(**ENTRY)
def decode_tq2(raw_N, w_NB):
    for n in range(raw_N.shape[0]):
        scale = load_f16(raw_N[n], 64)
        for half in range(2):
            for k in range(4):
                for m in range(32):
                    digit = np.int32(raw_N[n, half * 32 + m] >> np.uint8(2 * k)) & np.int32(3)
                    w_NB[n, half * 128 + k * 32 + m] = np.float32(digit - np.int32(1)) * scale
