"""Loops of IQ4_NL and IQ4_XS: scales for a codebook of sixteen unevenly spaced numbers.

The codebook's boundaries lie on multiples of one half, so the nearest entry is one look-up in a table of
half steps: exact, without a branch, and a vector gather where the processor has one.  Trying a scale costs
one such look-up per weight and two sums, Σ v·w·q and Σ v·q² (v the importance), of which the error follows:

    Σ v·(w − s·q)² = Σ v·w² − 2·s·Σ v·w·q + s²·Σ v·q²

Weights are divided by the largest of their 32 first: a candidate is then the codebook position on which that
weight lands.  The codebook reaches further down than up (−127, 113), so both signs are tried.

IQ4_XS stores sub-scales as whole multiples, −32 … 31, of one float16 d.  Rather than find the best scale of
each 32 weights and round it, every multiple in reach is tried as it will be stored, so that rounding the
scale and choosing the codes are one decision.  d comes from the 32 weights with the largest peak, then twice
by least squares for the codes found.

The small functions are inlined by numba itself and have one exit each: numba counts references to the arrays
of a call it does not inline, or of one with several exits, and that counting took longer than the search.

The searches may reorder sums (fast-math); what is stored comes from the pack functions, which may not.

Legend: N blocks (of 32 weights where 32 is the next letter), S sub-blocks of 32, K candidates, P lines of
importance that repeat down the blocks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import F16_TINY, f16_to_f32, f32_to_f16, f32_to_f16_finite, load_f16, store_f16
from dither.codecs.kernels.legacy import ENTRY, INNER, extremes
from dither.codecs.kernels.uniform import INNER_SUMS, NOTHING, SUMS

INLINE_SUMS = {**INNER_SUMS, "inline": "always"}

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
HALF = np.float32(0.5)
UNSEEN = np.float32(1e-20)  # importance of weights whose 32 have none: their scale must still fit
CENTER = np.float32(512)  # of the table of half steps, which reaches from −256 to 256
REACH = np.float32(250)
INFINITY = np.float32(np.inf)
# Where the largest weight may land: on the long side of the codebook, and on the short one.
LONG, SHORT = (np.float32(107), np.float32(149)), (np.float32(96), np.float32(138))


@njit(**INLINE_SUMS)
def load_group(w_N32, bits_N32, importance_P32, n, p, start, x, vx, v):
    """32 weights over their peak, importance, their product; returns the peak and Σ v·x²."""
    low, high = extremes(bits_N32, n)
    peak = high if high > -low else low
    peak = peak if abs(peak) > NOTHING else ZERO
    inverse = ONE / peak if peak != ZERO else ZERO
    # Where all importance is zero the weights still want a scale that fits: a trace of it decides.
    total, energy = ZERO, ZERO
    for j in range(32):
        total += importance_P32[p, j]
    least = ZERO if total > ZERO else UNSEEN
    for j in range(32):
        size = w_N32[n, j] * inverse
        weight = importance_P32[p, j] + least
        x[start + j] = size
        v[start + j] = weight
        vx[start + j] = weight * size
        energy += weight * size * size
    return peak, energy


@njit(**INLINE_SUMS)
def sums(x, vx, v, start, position, table):
    """Σ v·x·q and Σ v·q² when the peak lands on `position` of the codebook, |position| ≤ REACH."""
    xq, qq = ZERO, ZERO
    twice = position * TWO
    for j in range(start, start + 32):
        q = table[np.uint32(np.int32(x[j] * twice + CENTER))]
        xq += vx[j] * q
        qq += v[j] * q * q
    return xq, qq


@njit(**INLINE_SUMS)
def best_scale(x, vx, v, start, candidates_K, table):
    """The real-valued scale, in units of the peak, of least error."""
    # The scale that takes most off Σ v·x², as in `uniform.search_signed`.
    best, gain = ZERO, ZERO
    for k in range(candidates_K.size):
        xq, qq = sums(x, vx, v, start, candidates_K[k], table)
        if xq * xq > gain * qq:
            best, gain = xq / qq, xq * xq / qq
    # One more look-up under the scale that is best for the codes just found.
    position = ONE / best if abs(best) > ONE / REACH else ZERO
    xq, qq = sums(x, vx, v, start, position, table)
    return xq / qq if xq * xq > gain * qq else best


@njit(**ENTRY, fastmath=SUMS)
def fit_nl(w_N32, importance_P32, candidates_K, table, scale_N):
    """The float16 scale of each 32 weights, as float32."""
    x, vx, v = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32)
    bits_N32 = w_N32.view(np.int32)
    p = -1
    for n in range(w_N32.shape[0]):
        p = p + 1 if p + 1 < importance_P32.shape[0] else 0
        peak, _ = load_group(w_N32, bits_N32, importance_P32, n, p, 0, x, vx, v)
        scale = best_scale(x, vx, v, 0, candidates_K, table) * peak
        scale_N[n] = f16_to_f32(f32_to_f16_finite(scale))


@njit(**INLINE_SUMS)
def try_multiple(x, vx, v, start, multiple, unit, energy, table):
    """Error, Σ v·x·q and Σ v·q² of sub-scale multiple · d, where unit = peak / d."""
    reachable = abs(unit) < REACH * abs(np.float32(multiple))
    position = unit / np.float32(multiple) if reachable else ZERO
    scale = np.float32(multiple) / unit if reachable and unit != ZERO else ZERO  # in units of the peak
    xq, qq = sums(x, vx, v, start, position, table)
    return energy - scale * (TWO * xq - scale * qq), xq, qq


@njit(**INLINE_SUMS)
def search_multiples(x, vx, v, start, unit, energy, table):
    """The multiple of least error among all under which the peak lands in reach, with its sums."""
    best, error, best_xq, best_qq = np.int32(0), energy, ZERO, ZERO
    for side in (np.int32(-1), np.int32(1)):  # of the codebook
        sign = side if unit > ZERO else -side
        # The peak is worth having only on the outer part of the codebook: these multiples send it there.
        near, far = LONG if side < 0 else SHORT
        end = np.float32(32) if sign < 0 else np.float32(31)
        low = np.int32(min(abs(unit) / far + HALF, end))
        high = np.int32(min(abs(unit) / near + HALF, end))
        for size in range(max(low, np.int32(1)), high + 1):
            multiple = np.int32(size) * sign
            found, xq, qq = try_multiple(x, vx, v, start, multiple, unit, energy, table)
            if found < error:
                best, error, best_xq, best_qq = multiple, found, xq, qq
    return best, best_xq, best_qq


@njit(**INLINE_SUMS)
def neighbors(x, vx, v, start, middle, unit, energy, table):
    """The multiple of least error among `middle` and the two beside it, with its sums."""
    best, error, best_xq, best_qq = middle, INFINITY, ZERO, ZERO
    for multiple in range(max(middle - 1, -32), min(middle + 1, 31) + 1):
        found, xq, qq = try_multiple(x, vx, v, start, multiple, unit, energy, table)
        if found < error:
            best, error, best_xq, best_qq = np.int32(multiple), found, xq, qq
    return best, best_xq, best_qq


@njit(**INLINE_SUMS)
def first_scale(x, vx, v, one, peaks, candidates_K, table):
    """d as the 32 weights with the largest peak want it, but large enough to reach every other peak."""
    widest = 0
    for s in range(8):
        widest = s if abs(peaks[s]) > abs(peaks[widest]) else widest
    for j in range(32):  # a copy, so that the search runs at a fixed address
        one[j], one[32 + j], one[64 + j] = x[widest * 32 + j], vx[widest * 32 + j], v[widest * 32 + j]
    # The widest 32 weights decide, with the lowest multiple, −32, for their scale.
    best = best_scale(one[:32], one[32:64], one[64:], 0, candidates_K, table) * peaks[widest]
    # Other groups must still be able to reach their peak, and d must not vanish as a float16.
    least = ZERO
    for s in range(8):
        least = max(least, abs(peaks[s]) / LONG[0] if s != widest else ZERO)
    least = max(least, F16_TINY * np.float32(32) if peaks[widest] != ZERO else ZERO)
    if abs(best) < least:
        best = least if best > ZERO else -least
    return f16_to_f32(f32_to_f16_finite(best / np.float32(-32)))


@njit(**ENTRY, fastmath=SUMS)
def fit_xs(w_N32, importance_P32, candidates_K, table, scale_N, multiple_NS):
    """float16 scale of each block as float32, int8 multiple of each sub-block."""
    x, vx, v = np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32)
    peaks, energies, one = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(96, np.float32)
    bits_N32 = w_N32.view(np.int32)
    p = -1
    for n in range(scale_N.size):
        for s in range(8):
            p = p + 1 if p + 1 < importance_P32.shape[0] else 0
            peaks[s], energies[s] = load_group(w_N32, bits_N32, importance_P32, n * 8 + s, p, s * 32, x, vx, v)
        d = first_scale(x, vx, v, one, peaks, candidates_K, table)
        # First every multiple in reach, under d as the widest group wants it; then, under d of least squares for all
        # codes, only those beside the ones chosen.
        for turn in range(2):
            top, bottom = ZERO, ZERO
            for s in range(8):
                unit = peaks[s] / d if d != ZERO else ZERO
                if turn == 0:
                    found = search_multiples(x, vx, v, s * 32, unit, energies[s], table)
                else:
                    found = neighbors(x, vx, v, s * 32, np.int32(multiple_NS[n, s]), unit, energies[s], table)
                multiple, xq, qq = found
                multiple_NS[n, s] = multiple
                # Least squares for d: Σ multiple·xq over Σ multiple²·qq, sub-block by sub-block.
                top += np.float32(multiple) * xq * unit
                bottom += np.float32(multiple) ** 2 * qq
            scale_N[n] = d
            d = f16_to_f32(f32_to_f16_finite(top / bottom * d)) if top > ZERO else d
        scale_N[n] = d if d != ZERO else scale_N[n]


@njit(**INNER)
def put_nibbles(w_NB, n, start, scale, codes, most, raw, at):
    """Nearest codes of 32 weights; byte j holds weight j below weight j + 16."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for j in range(16):
        low = min(max(w_NB[n, start + j] * inverse * TWO + CENTER, ZERO), most)
        high = min(max(w_NB[n, start + 16 + j] * inverse * TWO + CENTER, ZERO), most)
        pair = codes[np.uint32(np.int32(low))] | (codes[np.uint32(np.int32(high))] << np.int32(4))
        raw[at + j] = np.uint8(pair)


@njit(**ENTRY)
def pack_nl(w_NB, scale_N, codes, raw_N):
    most = np.float32(codes.size - 1)
    for n in range(w_NB.shape[0]):
        store_f16(raw_N[n], 0, f32_to_f16(scale_N[n]))
        put_nibbles(w_NB, n, 0, scale_N[n], codes, most, raw_N[n], 2)


@njit(**ENTRY)
def pack_xs(w_NB, scale_N, multiple_NS, codes, raw_N):
    most = np.float32(codes.size - 1)
    for n in range(w_NB.shape[0]):
        raw = raw_N[n]
        store_f16(raw, 0, f32_to_f16(scale_N[n]))
        high = np.uint32(0)
        for s in range(8):
            biased = np.uint32(np.int32(multiple_NS[n, s]) + np.int32(32))
            high |= (biased >> np.uint32(4)) << np.uint32(2 * s)
            low = np.uint8(biased & np.uint32(15))
            raw[4 + s // 2] = low if s % 2 == 0 else raw[4 + s // 2] | (low << np.uint8(4))
            put_nibbles(w_NB, n, s * 32, scale_N[n] * np.float32(multiple_NS[n, s]), codes, most, raw, 8 + s * 16)
        raw[2], raw[3] = np.uint8(high & np.uint32(255)), np.uint8(high >> np.uint32(8))


@njit(**INNER)
def get_nibbles(raw, at, scale, codebook, w_NB, n, start):
    for j in range(16):
        w_NB[n, start + j] = codebook[raw[at + j] & np.uint8(15)] * scale
        w_NB[n, start + 16 + j] = codebook[raw[at + j] >> np.uint8(4)] * scale


@njit(**ENTRY)
def decode_nl(raw_N, codebook, w_NB):
    for n in range(raw_N.shape[0]):
        get_nibbles(raw_N[n], 2, load_f16(raw_N[n], 0), codebook, w_NB, n, 0)


@njit(**ENTRY)
def decode_xs(raw_N, codebook, w_NB):
    for n in range(raw_N.shape[0]):
        raw = raw_N[n]
        d = load_f16(raw, 0)
        high = np.uint32(raw[2]) | (np.uint32(raw[3]) << np.uint32(8))
        for s in range(8):
            low = np.uint32(raw[4 + s // 2] >> np.uint8(4 * (s % 2))) & np.uint32(15)
            biased = low | (((high >> np.uint32(2 * s)) & np.uint32(3)) << np.uint32(4))
            multiple = np.float32(np.int32(biased) - np.int32(32))
            get_nibbles(raw, 8 + s * 16, d * multiple, codebook, w_NB, n, s * 32)
