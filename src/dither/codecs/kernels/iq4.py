"""Loops of IQ4_NL and IQ4_XS: scales for a codebook of sixteen unevenly spaced numbers.

The codebook's boundaries lie on multiples of one half, so the nearest entry is one look-up in a table of half
steps: exact, without a branch, and a vector gather where the processor has one.  Trying a scale costs one such
look-up per weight and two sums, Σ v·w·q and Σ v·q² (v the importance), of which the error follows:

    Σ v·(w − s·q)² = Σ v·w² − 2·s·Σ v·w·q + s²·Σ v·q²

Weights are divided by the largest of their 32 first: a candidate is then the codebook position on which that
weight lands.  The codebook reaches further down than up (−127, 113), so both signs are tried.

IQ4_XS stores sub-scales as whole multiples, −32 … 31, of one float16 d.  Rather than find the best scale of each
32 weights and round it, every multiple in reach is tried as it will be stored, so that rounding the scale and
choosing the codes are one decision.  d comes from the 32 weights with the largest peak, then twice by least
squares for the codes found.

The searches may reorder sums (fast-math); what is stored comes from the pack functions, which may not.

Legend: N blocks, B weights of a block, S sub-blocks of 32, P rows of importance that repeat down the blocks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import f16_to_f32, f32_to_f16, f32_to_f16_finite, load_f16, store_f16
from dither.codecs.kernels.uniform import NOTHING, SUMS

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
CENTER = np.float32(512)  # of the table of half steps, which reaches from −256 to 256
import os
P118=np.float32(os.environ.get('PP','118'))
REACH = np.float32(250)
INFINITY = np.float32(np.inf)
# Where the largest weight may land: on the long side of the codebook, and on the short one.
LONG, SHORT = (np.float32(107), np.float32(149)), (np.float32(96), np.float32(138))


@njit(nogil=True, fastmath=SUMS)
def load_group(w_NB, importance_PB, n, start, x, vx, v):
    """32 weights over their peak, importance, their product; returns the peak and Σ v·x²."""
    peak = ZERO
    for j in range(start, start + 32):
        peak = w_NB[n, j] if abs(w_NB[n, j]) > abs(peak) else peak
    if abs(peak) < NOTHING:
        return ZERO, ZERO
    inverse, p = ONE / peak, n % importance_PB.shape[0]
    energy = ZERO
    for j in range(start, start + 32):
        x[j] = w_NB[n, j] * inverse
        v[j] = importance_PB[p, j]
        vx[j] = v[j] * x[j]
        energy += vx[j] * x[j]
    return peak, energy


@njit(nogil=True, fastmath=SUMS)
def sums(x, vx, v, start, position, table):
    """Σ v·x·q and Σ v·q² when the peak lands on `position` of the codebook, |position| ≤ REACH."""
    xq, qq = ZERO, ZERO
    twice = position * TWO
    for j in range(start, start + 32):
        q = table[np.uint32(np.int32(x[j] * twice + CENTER))]
        xq += vx[j] * q
        qq += v[j] * q * q
    return xq, qq


@njit(nogil=True, fastmath=SUMS)
def best_scale(x, vx, v, start, candidates_K, table):
    """The real-valued scale, in units of the peak, of least error."""
    best, gain = ZERO, ZERO
    for k in range(candidates_K.size + 1):
        if k == candidates_K.size and best == ZERO:
            break
        position = candidates_K[k] if k < candidates_K.size else ONE / best
        position = min(max(position, -REACH), REACH)
        xq, qq = sums(x, vx, v, start, position, table)
        if xq * xq > gain * qq:
            best, gain = xq / qq, xq * xq / qq
    return best


@njit(nogil=True)
def total_importance(importance_PB, p):
    total = ZERO
    for j in range(importance_PB.shape[1]):
        total += importance_PB[p, j]
    return total


@njit(cache=True, nogil=True, fastmath=SUMS)
def fit_nl(w_NB, importance_PB, ones_1B, candidates_K, table, scale_N):
    x, vx, v = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32)
    for n in range(w_NB.shape[0]):
        live = total_importance(importance_PB, n % importance_PB.shape[0]) > ZERO
        peak, _ = load_group(w_NB, importance_PB if live else ones_1B, n, 0, x, vx, v)
        scale = best_scale(x, vx, v, 0, candidates_K, table) * peak if peak != ZERO else ZERO
        scale_N[n] = f16_to_f32(f32_to_f16_finite(scale))


@njit(nogil=True, fastmath=SUMS)
def try_multiple(x, vx, v, start, multiple, unit, energy, table):
    """Error and Σ v·x·q, Σ v·q² of a sub-scale multiple · unit, with unit = d / peak."""
    scale = np.float32(multiple) * unit
    position = ONE / scale if scale != ZERO else INFINITY
    if not abs(position) < REACH:
        return energy, ZERO, ZERO
    xq, qq = sums(x, vx, v, start, position, table)
    return energy - scale * (TWO * xq - scale * qq), xq, qq


@njit(nogil=True, fastmath=SUMS)
def reach(unit, positions):
    """The whole multiples of |unit| under which the peak lands between two positions."""
    return np.int32(ONE / (unit * positions[1]) + np.float32(0.5)), np.int32(
        ONE / (unit * positions[0]) + np.float32(0.5)
    )


@njit(nogil=True, fastmath=SUMS)
def search_multiples(x, vx, v, start, unit, energy, table):
    """The multiple of least error among all in reach, with its sums."""
    side = np.int32(1) if unit > ZERO else np.int32(-1)  # multiples of this sign put the peak on the short side
    best, error, best_xq, best_qq = np.int32(0), energy, ZERO, ZERO
    for sign in (np.int32(-1), np.int32(1)):
        low, high = reach(abs(unit), LONG if sign < 0 else SHORT)
        end = np.int32(32) if sign * side < 0 else np.int32(31)
        for size in range(max(min(low, end), np.int32(1)), min(high, end) + 1):
            multiple = np.int32(size) * sign * side
            found, xq, qq = try_multiple(x, vx, v, start, multiple, unit, energy, table)
            if found < error:
                best, error, best_xq, best_qq = multiple, found, xq, qq
    return best, best_xq, best_qq


@njit(nogil=True, fastmath=SUMS)
def neighbors(x, vx, v, start, middle, unit, energy, table):
    """The multiple of least error among `middle` and the two beside it, with its sums."""
    best, error, best_xq, best_qq = middle, INFINITY, ZERO, ZERO
    for multiple in range(max(middle - 1, -32), min(middle + 1, 31) + 1):
        found, xq, qq = try_multiple(x, vx, v, start, multiple, unit, energy, table)
        if found < error:
            best, error, best_xq, best_qq = np.int32(multiple), found, xq, qq
    return best, best_xq, best_qq


@njit(cache=True, nogil=True, fastmath=SUMS)
def fit_xs(w_NB, importance_PB, ones_1B, candidates_K, table, scale_N, multiple_NS):
    """float16 scale of each block, int8 multiple of each sub-block."""
    x, vx, v = np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32)
    peaks, energies = np.empty(8, np.float32), np.empty(8, np.float32)
    for n in range(w_NB.shape[0]):
        live = total_importance(importance_PB, n % importance_PB.shape[0]) > ZERO
        widest = 0
        for s in range(8):
            multiple_NS[n, s] = 0
            peaks[s], energies[s] = load_group(w_NB, importance_PB if live else ones_1B, n, s * 32, x, vx, v)
            widest = s if abs(peaks[s]) > abs(peaks[widest]) else widest
        scale_N[n] = ZERO
        if peaks[widest] == ZERO:
            continue
        best = best_scale(x, vx, v, widest * 32, candidates_K, table) * peaks[widest]
        floor = ZERO
        for s in range(8):
            floor = max(floor, abs(peaks[s]) / P118 if s != widest else ZERO)
        if abs(best) < floor:
            best = floor if best > ZERO else -floor
        d = f16_to_f32(f32_to_f16_finite(best / np.float32(-32)))
        for turn in range(2):
            if d == ZERO:
                break
            scale_N[n] = d
            top, bottom = ZERO, ZERO
            for s in range(8):
                if peaks[s] == ZERO:
                    continue
                unit = d / peaks[s]
                if turn == 0:
                    found = search_multiples(x, vx, v, s * 32, unit, energies[s], table)
                else:
                    found = neighbors(x, vx, v, s * 32, np.int32(multiple_NS[n, s]), unit, energies[s], table)
                multiple, xq, qq = found
                multiple_NS[n, s] = multiple
                size = np.float32(multiple) / np.float32(32)
                part = peaks[s] / peaks[widest]
                top += size * xq * part
                bottom += size * size * qq
            if bottom > ZERO and top != ZERO:
                d = f16_to_f32(f32_to_f16_finite(top / bottom * peaks[widest] / np.float32(32)))
        if d != ZERO:
            scale_N[n] = d


@njit(nogil=True)
def put_nibbles(w_NB, n, start, scale, codes, most, raw, at):
    """Nearest codes of 32 weights; byte j holds weight j below weight j + 16."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for j in range(16):
        low = min(max(w_NB[n, start + j] * inverse * TWO + CENTER, ZERO), most)
        high = min(max(w_NB[n, start + 16 + j] * inverse * TWO + CENTER, ZERO), most)
        pair = codes[np.uint32(np.int32(low))] | (codes[np.uint32(np.int32(high))] << np.int32(4))
        raw[at + j] = np.uint8(pair)


@njit(cache=True, nogil=True)
def pack_nl(w_NB, scale_N, codes, raw_N):
    most = np.float32(codes.size - 1)
    for n in range(w_NB.shape[0]):
        store_f16(raw_N[n], 0, f32_to_f16(scale_N[n]))
        put_nibbles(w_NB, n, 0, scale_N[n], codes, most, raw_N[n], 2)


@njit(cache=True, nogil=True)
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


@njit(nogil=True)
def get_nibbles(raw, at, scale, codebook, w_NB, n, start):
    for j in range(16):
        w_NB[n, start + j] = codebook[raw[at + j] & np.uint8(15)] * scale
        w_NB[n, start + 16 + j] = codebook[raw[at + j] >> np.uint8(4)] * scale


@njit(cache=True, nogil=True)
def decode_nl(raw_N, codebook, w_NB):
    for n in range(raw_N.shape[0]):
        get_nibbles(raw_N[n], 2, load_f16(raw_N[n], 0), codebook, w_NB, n, 0)


@njit(cache=True, nogil=True)
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
