"""Scales and zero points of integer codes, searched for under the type that stores the scale.

Around zero and with a zero point, ŵ = s · (q − z), the numbers are the same thing: whole multiples of s from
−z to most − z, with z fixed in the middle or free.  So one pass (`uniform.signed_sums`) judges any candidate
(s, z) by what its codes would cost under their own best scale; the winner is polished, rounded to the stored
type, and compared there with its neighbors and with the plain formulas, exactly as a decoder would compute.

Legend: N blocks, B weights of a block, P rows of importance that repeat down the blocks, K candidates,
raw_NN one packed block per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import inner, round_even
from dither.codecs.kernels.legacy import ENTRY, INNER, ONE, ZERO, extremes
from dither.codecs.kernels.stored import as_stored, get_codes, load_scale, neighbor, put_codes, scale_bytes, store_scale
from dither.codecs.kernels.uniform import INNER_SUMS, load_block, signed_error, signed_sums

SMALL, LARGE = np.float32(1e-30), np.float32(1e30)  # beyond these, sums of squares might leave float32
POLISH = 3


@njit(**INNER_SUMS)
def polished(x, v, scale, gain, low, most):
    """Lloyd's iteration: round under the scale, take those codes' best scale, while that gains."""
    for _ in range(POLISH):
        xq, qq = signed_sums(x, v, ONE / scale, low, most)
        if not xq * xq > gain * qq * np.float32(1.000001):
            break
        scale, gain = xq / qq, xq * xq / qq
    return scale, gain


@njit(**INNER_SUMS)
def best_scale(x, v, candidates_K, low, most):
    """The scale of least error among inverse candidates, polished, and what it gains over zeros."""
    best, gain = ZERO, ZERO
    for k in range(candidates_K.size):
        xq, qq = signed_sums(x, v, candidates_K[k], low, most)
        # A scale of the other sign than its candidate's would turn the codes around.
        if xq * xq > gain * qq and xq * candidates_K[k] > ZERO:
            best, gain = xq / qq, xq * xq / qq
    if best != ZERO:
        best, gain = polished(x, v, best, gain, low, most)
    return best, gain


@njit(**INNER)
def judge(x, v, scale, peak, low, most, kept, least):
    """The better of the stored scale kept so far and another one."""
    error = signed_error(x, v, scale / peak, peak / scale, low, most)
    return (scale, error) if error < least else (kept, least)


@njit(**INNER)
def plain_signed(peak, half, symmetric, choice, kind):
    """The plain formulas: the largest weight on the highest code, on the lowest one's size, on the lowest."""
    if symmetric or choice == 0:
        return as_stored(abs(peak) / (half - ONE), kind)
    return as_stored((abs(peak) if choice == 1 else -peak) / half, kind)


@njit(**ENTRY)
def fit_signed_integers(w_NB, importance_PB, candidates_K, half, symmetric, kind, scale_N):
    """Scales of either sign for codes −half … half − 1; `symmetric`: for 1 − half …, and positive."""
    low = ONE - half if symmetric else -half
    most = half - ONE - low
    x, v = np.empty(w_NB.shape[1], np.float32), np.empty(w_NB.shape[1], np.float32)
    for n in range(w_NB.shape[0]):
        least, most_w = extremes(w_NB.view(np.int32), n)
        peak = most_w if most_w >= -least else least
        # A block of zeros is exact under any scale; 1 can be divided by.
        if peak == ZERO:
            scale_N[n] = ONE
            continue
        # The plain formulas come first, so that a search that finds no better never costs anything.
        kept = plain_signed(peak, half, symmetric, 0, kind)
        if SMALL < abs(peak) < LARGE:
            load_block(w_NB, importance_PB, n, ONE / peak, x, v)
            error = signed_error(x, v, kept / peak, peak / kept, low, most)
            for choice in range(1, 1 if symmetric else 3):
                plain = plain_signed(peak, half, symmetric, choice, kind)
                kept, error = judge(x, v, plain, peak, low, most, kept, error)
            best, _ = best_scale(x, v, candidates_K, low, most)
            if symmetric:
                best = abs(best) * np.sign(peak)  # in units of the peak, so that the product is positive
            if best != ZERO:
                # Rounding the best scale need not give the best stored one: the numbers beside it are judged too.
                found = as_stored(best * peak, kind)
                for step in range(-1, 2):
                    kept, error = judge(x, v, neighbor(found, kind, step), peak, low, most, kept, error)
        scale_N[n] = kept


@inner
def zero_of(low, scale, most):
    """The zero point under which `low`, at most 0, is the number of code 0."""
    return min(max(round_even(min(-low / scale, np.float32(1e6))), ZERO), most)


@njit(**INNER)
def best_affine(x, v, candidates_K, start, reach, most):
    """The best scale, and the zero point found by walking from `start` while that gains, or up to `reach`."""
    # The error is taken to rise on both sides of its least: one side is walked, and the other only where the first
    # gained nothing.
    zero = start
    best, gain = best_scale(x, v, candidates_K, -start, most)
    for side in range(2):
        step = -ONE if side == 0 else ONE
        if side == 1 and zero != start:  # downwards was better
            break
        for _ in range(reach):
            z = zero + step
            if z < ZERO or z > most:
                break
            found, found_gain = best_scale(x, v, candidates_K, -z, most)
            if not found_gain > gain:
                break
            best, zero, gain = found, z, found_gain
    return best, zero


@njit(**ENTRY)
def fit_affine_integers(w_NB, importance_PB, candidates_K, reach, most, kind, scale_N, zero_N):
    """Scales and whole zero points for codes 0 … most; zero points are tried `reach` on either side."""
    x, v = np.empty(w_NB.shape[1], np.float32), np.empty(w_NB.shape[1], np.float32)
    for n in range(w_NB.shape[0]):
        low, high = extremes(w_NB.view(np.int32), n)
        # The range holds 0, so that some code stands for it exactly.
        low, high = min(low, ZERO), max(high, ZERO)
        if low == high:
            scale_N[n], zero_N[n] = ONE, np.uint8((most + ONE) / np.float32(2))
            continue
        # Divided before they are subtracted: high − low may be beyond float32.
        kept = as_stored(high / most - low / most, kind)
        zero = zero_of(low, kept, most)
        spread = high - low
        if SMALL < spread < LARGE:
            load_block(w_NB, importance_PB, n, ONE / spread, x, v)
            # With z held, numbers run from −z to most − z: the sums of codes around zero serve here as well.
            error = signed_error(x, v, kept / spread, spread / kept, -zero, most)
            best, best_zero = best_affine(x, v, candidates_K, zero, reach, most)
            if best > ZERO:
                found = as_stored(best * spread, kind)
                for step in range(-1, 2):
                    trial = neighbor(found, kind, step)
                    other = signed_error(x, v, trial / spread, spread / trial, -best_zero, most)
                    if other < error:
                        kept, zero, error = trial, best_zero, other
        scale_N[n], zero_N[n] = kept, np.uint8(zero)


@inner
def code_of(w, scale, low, high, zero):
    """The code of the number nearest to w / scale from `low` to `high`."""
    number = w / scale if scale != ZERO else ZERO
    return np.uint8(round_even(min(max(number, low), high)) + zero)


@njit(**ENTRY)
def pack_integers(w_NB, scale_N, zero_N, low, most, affine, kind, bits, raw_NN):
    """Round and pack whole blocks: scale, zero point where there is one, codes; `low` is the lowest code."""
    codes = np.empty(w_NB.shape[1], np.uint8)
    for n in range(w_NB.shape[0]):
        raw, start = raw_NN[n], scale_bytes(kind)
        store_scale(raw, scale_N[n], kind)
        if affine:
            raw[start] = zero_N[n]
            start += 1
        zero = np.float32(zero_N[n])
        for j in range(codes.size):
            codes[j] = code_of(w_NB[n, j], scale_N[n], low - zero, most - zero, zero)
        put_codes(codes, bits, raw, start)


@njit(**ENTRY)
def decode_integers(raw_NN, middle, affine, kind, bits, w_NB):
    codes = np.empty(w_NB.shape[1], np.uint8)
    for n in range(raw_NN.shape[0]):
        raw, start, zero = raw_NN[n], scale_bytes(kind), middle
        scale = load_scale(raw, kind)
        if affine:
            zero = np.int32(raw[start])
            start += 1
        get_codes(raw, start, bits, codes)
        for j in range(codes.size):
            w_NB[n, j] = np.float32(np.int32(codes[j]) - zero) * scale
