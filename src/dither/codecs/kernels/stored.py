"""Float types of stored scales and streams of codes, for the formats that GPUs read.

A scale is rounded to its stored type before anything is judged under it, so that what a search promises is
what a decoder finds.  It is finite, and never zero: a block too small for a scale of its own keeps the
smallest one, under which as much of it survives as can.

Codes of b bits lie one after another, each with its lowest bit first, as one stream of bits from the lowest
bit of the first byte on; the last byte is filled up with zeros.

Legend: N blocks, B weights of a block, raw_NN one packed block per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import (
    bits_float,
    f16_to_f32,
    f32_to_f16_finite,
    float_bits,
    inner,
    load_f16,
    store_f16,
)

F16, BF16, F32 = 0, 1, 2
ZERO = np.float32(0)
TINY_BF16 = np.float32(2.0**-133)
TINY_F32 = np.float32(2.0**-149)
MOST_BF16 = np.uint32(0x7F7F)
TINY_F16 = np.float32(2.0**-24)


@inner
def to_bf16(x):
    """The pattern of the finite bfloat16 nearest to x, ties to even."""
    bits = float_bits(x)
    # Half a last place, less one where the last bit is even: ties go to even.
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    pattern = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    # Rounding up may have reached infinity's pattern: cut back to the largest finite number.
    size, sign = pattern & np.uint32(0x7FFF), pattern & np.uint32(0x8000)
    return np.uint16(sign | min(size, MOST_BF16))


@inner
def as_stored(x, kind):
    """x as the type `kind` stores it, with its sign, and the smallest number where that would be zero."""
    if kind == F16:
        nearest, tiny = f16_to_f32(f32_to_f16_finite(x)), TINY_F16
    elif kind == BF16:
        nearest, tiny = bits_float(np.uint32(to_bf16(x)) << np.uint32(16)), TINY_BF16
    else:
        nearest, tiny = x, TINY_F32
    if nearest == ZERO:
        return -tiny if x < ZERO else tiny
    return nearest


@inner
def neighbor(scale, kind, step):
    """The stored number `step` places farther from zero; itself where that leaves the finite ones."""
    if kind == F16:
        # Patterns of one sign are in the order of their numbers: the next number is the next pattern.
        pattern = np.int32(f32_to_f16_finite(scale)) + np.int32(step)
        size = pattern & np.int32(0x7FFF)
        return f16_to_f32(np.uint16(pattern)) if np.int32(0) < size < np.int32(0x7C00) else scale
    if kind == BF16:
        bits = np.int64(float_bits(scale)) + (np.int64(step) << np.int64(16))
        size = (bits >> np.int64(16)) & np.int64(0x7FFF)
        return bits_float(np.uint32(bits)) if np.int64(0) < size < np.int64(0x7F80) else scale
    return scale


@inner
def scale_bytes(kind):
    return 4 if kind == F32 else 2


@inner
def store_scale(raw, scale, kind):
    """Write a scale, a number of its type already, to the first bytes."""
    if kind == F16:
        store_f16(raw, 0, f32_to_f16_finite(scale))
    elif kind == BF16:
        store_f16(raw, 0, to_bf16(scale))
    else:
        bits = float_bits(scale)
        for j in range(4):
            raw[j] = np.uint8((bits >> np.uint32(8 * j)) & np.uint32(255))


@inner
def load_scale(raw, kind):
    if kind == F16:
        return load_f16(raw, 0)
    if kind == BF16:
        return bits_float((np.uint32(raw[0]) << np.uint32(16)) | (np.uint32(raw[1]) << np.uint32(24)))
    bits = np.uint32(0)
    for j in range(4):
        bits |= np.uint32(raw[j]) << np.uint32(8 * j)
    return bits_float(bits)


@inner
def put_codes(codes_B, bits, raw, at):
    """Append codes of `bits` bits as one stream from byte `at` on."""
    held, count = np.uint32(0), np.uint32(0)
    for j in range(codes_B.size):
        # Whole bytes leave as soon as they are full, so that `held` never needs more than 15 bits.
        held |= np.uint32(codes_B[j]) << count
        count += np.uint32(bits)
        while count >= np.uint32(8):
            raw[at] = np.uint8(held & np.uint32(255))
            at += 1
            held >>= np.uint32(8)
            count -= np.uint32(8)
    if count > np.uint32(0):
        raw[at] = np.uint8(held & np.uint32(255))


@inner
def get_codes(raw, at, bits, codes_B):
    """The inverse of `put_codes`."""
    held, count = np.uint32(0), np.uint32(0)
    mask = np.uint32((1 << bits) - 1)
    for j in range(codes_B.size):
        if count < np.uint32(bits):
            held |= np.uint32(raw[at]) << count
            at += 1
            count += np.uint32(8)
        codes_B[j] = np.uint8(held & mask)
        held >>= np.uint32(bits)
        count -= np.uint32(bits)


@njit(cache=True, nogil=True)
def pack_all(codes_NB, bits, at, raw_NN):
    for n in range(codes_NB.shape[0]):
        put_codes(codes_NB[n], bits, raw_NN[n], at)


@njit(cache=True, nogil=True)
def unpack_all(raw_NN, bits, at, codes_NB):
    for n in range(raw_NN.shape[0]):
        get_codes(raw_NN[n], at, bits, codes_NB[n])
