"""K-quants as bytes and as numbers: snapping, values, packing, unpacking.

Legend: R super-blocks, B = 256 their weights, K neighboring columns of them, S sub-blocks, N bytes.

A super-block as stored (ggml's `block_q2_K` … `block_q6_K`; offsets in bytes):

    Q2_K   84   scales 0 (sc | m << 4) · 2-bit codes 16 · d 80 · dmin 82
    Q3_K  110   high bits 0 · 2-bit codes 32 · 6-bit scales 96 · d 108
    Q4_K  144   d 0 · dmin 2 · 6-bit scales and minima 4 · 4-bit codes 16
    Q5_K  176   d 0 · dmin 2 · 6-bit scales and minima 4 · fifth bits 16 · 4-bit codes 48
    Q6_K  210   low 4 bits 0 · high 2 bits 128 · 8-bit scales 192 · d 208

Float16 scales arrive as their uint16 patterns.  `snap` and `value` are written without fast-math, in the
decoders' order of operations, so that a value equals what any decoder computes, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import ROUND_MAGIC, f16_to_f32, inner, round_even, store_f16
from dither.codecs.kernels.simd import LANES, larger, load, load_bytes, smaller, splat, store, store_bytes

ZERO, ONE = np.float32(0.0), np.float32(1.0)


@inner
def _inverse(scale):
    return ONE / scale if scale != ZERO else ZERO


@inner
def _nearest_codes(w, at, count, minimum, inverse, low, high, codes):
    """Items at … at + count of flat arrays: (w + minimum) · inverse, cut to low … high, rounded."""
    # Sixteen at a time, then the rest one by one with the same operations in the same order: a code may not depend on
    # where a slice of columns begins.
    whole = at + count // LANES * LANES
    magic = splat(ROUND_MAGIC)
    for i in range(at, whole, LANES):
        x = (load(w, i) + splat(minimum)) * splat(inverse)
        store_bytes(codes, i, (smaller(larger(x, splat(low)), splat(high)) + magic) - magic)
    for i in range(whole, at + count):
        x = (w[i] + minimum) * inverse
        x = x if x > low else low
        x = x if x < high else high
        codes[i] = np.int32(round_even(x))


@inner
def _numbers(codes, at, count, scale, minimum, w):
    """Items at … at + count of flat arrays: scale · code − minimum."""
    whole = at + count // LANES * LANES
    for i in range(at, whole, LANES):
        store(w, i, splat(scale) * load_bytes(codes, i) - splat(minimum))
    for i in range(whole, at + count):
        w[i] = scale * np.float32(codes[i]) - minimum


@inner
def _minimum(dmin_R, m_RS, r, sub):
    """dmin·m; numba compiles types without minima (None) apart."""
    if dmin_R is None:
        return ZERO
    return f16_to_f32(dmin_R[r]) * np.float32(m_RS[r, sub])


@njit(cache=True, nogil=True)
def snap(w_RK, start, size, low, top, d_R, dmin_R, sc_RS, m_RS, codes_RK):
    """Nearest codes low … top of columns start … start + K under ŵ = d·sc·q − dmin·m."""
    rows, columns = w_RK.shape
    w, codes = w_RK.reshape(-1), codes_RK.reshape(-1)
    for r in range(rows):
        d = f16_to_f32(d_R[r])
        at, sub = 0, start // size
        while at < columns:
            # Up to the end of this sub-block, or of the columns that were given: they may begin and end inside one.
            count = min(columns, (sub + 1) * size - start) - at
            inverse = _inverse(d * np.float32(sc_RS[r, sub]))
            minimum = _minimum(dmin_R, m_RS, r, sub)
            _nearest_codes(w, r * columns + at, count, minimum, inverse, low, top, codes)
            at, sub = at + count, sub + 1


@njit(cache=True, nogil=True)
def value(codes_RK, start, size, d_R, dmin_R, sc_RS, m_RS, w_RK):
    """The float32 numbers d·sc·q − dmin·m of columns start … start + K."""
    rows, columns = codes_RK.shape
    w, codes = w_RK.reshape(-1), codes_RK.reshape(-1)
    for r in range(rows):
        d = f16_to_f32(d_R[r])
        at, sub = 0, start // size
        while at < columns:
            count = min(columns, (sub + 1) * size - start) - at
            scale, minimum = d * np.float32(sc_RS[r, sub]), _minimum(dmin_R, m_RS, r, sub)
            _numbers(codes, r * columns + at, count, scale, minimum, w)
            at, sub = at + count, sub + 1


@inner
def _pack_six_bits(sc_RS, m_RS, r, raw_RN):
    """Q4_K's and Q5_K's eight scales and eight minima of 6 bits in 12 bytes from byte 4 on.

    The first four of each are whole, with the top two bits of the last four above them; the lower four
    bits of the last four share the third group of bytes.
    """
    for j in range(4):
        raw_RN[r, 4 + j] = sc_RS[r, j] | ((sc_RS[r, j + 4] >> 4) << 6)
        raw_RN[r, 8 + j] = m_RS[r, j] | ((m_RS[r, j + 4] >> 4) << 6)
        raw_RN[r, 12 + j] = (sc_RS[r, j + 4] & 15) | ((m_RS[r, j + 4] & 15) << 4)


@inner
def _unpack_six_bits(raw_RN, r, sc_RS, m_RS):
    for j in range(4):
        first, second, third = raw_RN[r, 4 + j], raw_RN[r, 8 + j], raw_RN[r, 12 + j]
        sc_RS[r, j], m_RS[r, j] = first & 63, second & 63
        sc_RS[r, j + 4] = (third & 15) | ((first >> 6) << 4)
        m_RS[r, j + 4] = (third >> 4) | ((second >> 6) << 4)


@inner
def _pack_pairs(codes_RB, r, raw_RN, at):
    """Low nibbles: the first 32 of each 64 codes below, the other 32 above."""
    for chunk in range(4):
        for j in range(32):
            low, high = codes_RB[r, 64 * chunk + j], codes_RB[r, 64 * chunk + 32 + j]
            raw_RN[r, at + 32 * chunk + j] = (low & 15) | ((high & 15) << 4)


@inner
def _unpack_pairs(raw_RN, r, at, codes_RB):
    for chunk in range(4):
        for j in range(32):
            both = raw_RN[r, at + 32 * chunk + j]
            codes_RB[r, 64 * chunk + j] = both & 15
            codes_RB[r, 64 * chunk + 32 + j] = both >> 4


@inner
def _pack_quarters(codes_RB, r, plus, shift, raw_RN, at):
    """Two bits of each code, those from `shift` on of code + `plus`: byte j has codes j, j + 32, j + 64, j + 96."""
    for half in range(2):
        for j in range(32):
            four = 0
            for quarter in range(4):
                four |= (((codes_RB[r, 128 * half + 32 * quarter + j] + plus) >> shift) & 3) << (2 * quarter)
            raw_RN[r, at + 32 * half + j] = four


@njit(cache=True, nogil=True)
def pack_q2_k(codes_RB, d_R, dmin_R, sc_RS, m_RS, raw_RN):
    for r in range(codes_RB.shape[0]):
        store_f16(raw_RN[r], 80, d_R[r])
        store_f16(raw_RN[r], 82, dmin_R[r])
        for j in range(16):
            raw_RN[r, j] = sc_RS[r, j] | (m_RS[r, j] << 4)
        _pack_quarters(codes_RB, r, 0, 0, raw_RN, 16)


@njit(cache=True, nogil=True)
def unpack_q2_k(raw_RN, codes_RB, d_R, dmin_R, sc_RS, m_RS):
    for r in range(codes_RB.shape[0]):
        d_R[r], dmin_R[r] = pattern(raw_RN, r, 80), pattern(raw_RN, r, 82)
        for j in range(16):
            sc_RS[r, j], m_RS[r, j] = raw_RN[r, j] & 15, raw_RN[r, j] >> 4
        for half in range(2):
            for quarter in range(4):
                for j in range(32):
                    four = raw_RN[r, 16 + 32 * half + j]
                    codes_RB[r, 128 * half + 32 * quarter + j] = (four >> (2 * quarter)) & 3


@njit(cache=True, nogil=True)
def pack_q4_k(codes_RB, d_R, dmin_R, sc_RS, m_RS, raw_RN):
    for r in range(codes_RB.shape[0]):
        store_f16(raw_RN[r], 0, d_R[r])
        store_f16(raw_RN[r], 2, dmin_R[r])
        _pack_six_bits(sc_RS, m_RS, r, raw_RN)
        _pack_pairs(codes_RB, r, raw_RN, 16)


@njit(cache=True, nogil=True)
def unpack_q4_k(raw_RN, codes_RB, d_R, dmin_R, sc_RS, m_RS):
    for r in range(codes_RB.shape[0]):
        d_R[r], dmin_R[r] = pattern(raw_RN, r, 0), pattern(raw_RN, r, 2)
        _unpack_six_bits(raw_RN, r, sc_RS, m_RS)
        _unpack_pairs(raw_RN, r, 16, codes_RB)


@njit(cache=True, nogil=True)
def pack_q5_k(codes_RB, d_R, dmin_R, sc_RS, m_RS, raw_RN):
    for r in range(codes_RB.shape[0]):
        store_f16(raw_RN[r], 0, d_R[r])
        store_f16(raw_RN[r], 2, dmin_R[r])
        _pack_six_bits(sc_RS, m_RS, r, raw_RN)
        _pack_pairs(codes_RB, r, raw_RN, 48)
        for j in range(32):
            # Bit s of byte j is the fifth bit of weight j of the s-th 32.
            fifth = np.uint8(0)
            for sub in range(8):
                fifth |= (codes_RB[r, 32 * sub + j] >> 4) << sub
            raw_RN[r, 16 + j] = fifth


@njit(cache=True, nogil=True)
def unpack_q5_k(raw_RN, codes_RB, d_R, dmin_R, sc_RS, m_RS):
    for r in range(codes_RB.shape[0]):
        d_R[r], dmin_R[r] = pattern(raw_RN, r, 0), pattern(raw_RN, r, 2)
        _unpack_six_bits(raw_RN, r, sc_RS, m_RS)
        _unpack_pairs(raw_RN, r, 48, codes_RB)
        for sub in range(8):
            for j in range(32):
                codes_RB[r, 32 * sub + j] |= ((raw_RN[r, 16 + j] >> sub) & 1) << 4


@njit(cache=True, nogil=True)
def pack_q3_k(codes_RB, d_R, sc_RS, raw_RN):
    """Codes are stored plus 4: two bits in the common layout, the third in a mask; scales plus 32."""
    for r in range(codes_RB.shape[0]):
        store_f16(raw_RN[r], 108, d_R[r])
        for j in range(32):
            # Bit s of byte j is the third bit of weight j of the s-th 32.
            third = 0
            for sub in range(8):
                third |= ((codes_RB[r, 32 * sub + j] + 4) >> 2) << sub
            raw_RN[r, j] = third
        _pack_quarters(codes_RB, r, 4, 0, raw_RN, 32)
        for j in range(8):
            # Scales j and j + 8 share a byte with their low four bits; the upper two bits of scales j, j + 4, j + 8
            # and j + 12 share another.
            raw_RN[r, 96 + j] = ((sc_RS[r, j] + 32) & 15) | (((sc_RS[r, j + 8] + 32) & 15) << 4)
        for j in range(4):
            four = 0
            for quarter in range(4):
                four |= ((sc_RS[r, 4 * quarter + j] + 32) >> 4) << (2 * quarter)
            raw_RN[r, 104 + j] = four


@njit(cache=True, nogil=True)
def unpack_q3_k(raw_RN, codes_RB, d_R, sc_RS):
    for r in range(codes_RB.shape[0]):
        d_R[r] = pattern(raw_RN, r, 108)
        for sub in range(8):
            for j in range(32):
                four = raw_RN[r, 32 + 32 * (sub // 4) + j]
                third = (raw_RN[r, j] >> sub) & 1
                codes_RB[r, 32 * sub + j] = ((four >> (2 * (sub % 4))) & 3) + 4 * third - 4
        for j in range(16):
            low = (raw_RN[r, 96 + j % 8] >> (4 * (j // 8))) & 15
            high = (raw_RN[r, 104 + j % 4] >> (2 * (j // 4))) & 3
            sc_RS[r, j] = (low | (high << 4)) - 32


@njit(cache=True, nogil=True)
def pack_q6_k(codes_RB, d_R, sc_RS, raw_RN):
    """Codes are stored plus 32, their low nibbles in pairs 64 apart."""
    for r in range(codes_RB.shape[0]):
        store_f16(raw_RN[r], 208, d_R[r])
        for j in range(16):
            raw_RN[r, 192 + j] = np.uint8(sc_RS[r, j])
        for half in range(2):
            for j in range(64):
                c = 128 * half + j
                low, high = codes_RB[r, c] + 32, codes_RB[r, c + 64] + 32
                raw_RN[r, 64 * half + j] = (low & 15) | ((high & 15) << 4)
        _pack_quarters(codes_RB, r, 32, 4, raw_RN, 128)


@njit(cache=True, nogil=True)
def unpack_q6_k(raw_RN, codes_RB, d_R, sc_RS):
    for r in range(codes_RB.shape[0]):
        d_R[r] = pattern(raw_RN, r, 208)
        for j in range(16):
            sc_RS[r, j] = np.int8(raw_RN[r, 192 + j])
        for half in range(2):
            for quarter in range(4):
                for j in range(32):
                    # Quarters 0 and 1 are the low nibbles of 64 bytes, quarters 2 and 3 their upper ones.
                    low = raw_RN[r, 64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter // 2))
                    high = raw_RN[r, 128 + 32 * half + j] >> (2 * quarter)
                    codes_RB[r, 128 * half + 32 * quarter + j] = ((low & 15) | ((high & 3) << 4)) - 32


@inner
def pattern(raw_RN, r, at):
    """Two little-endian bytes as a uint16."""
    return np.uint16(raw_RN[r, at]) | (np.uint16(raw_RN[r, at + 1]) << np.uint16(8))
