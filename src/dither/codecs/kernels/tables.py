"""Codes that index a short table of numbers under one float32 scale per block: NF4 and FP4.

Finding the nearest number is counting the borders, midway between neighbors, that lie below: fifteen
comparisons without a branch.  A number on a border goes down, as in bitsandbytes.

Legend: N blocks, B weights of a block, P rows of importance that repeat down the blocks, K entries of the
rising table, raw_NN one packed block per row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import inner
from dither.codecs.kernels.legacy import ENTRY, ONE, ZERO, largest
from dither.codecs.kernels.simd import LANES, aligned_floats, fma, less, load, splat, store, where
from dither.codecs.kernels.stored import F32, get_codes, load_scale, put_codes, store_scale
from dither.codecs.kernels.uniform import load_block

LEAST = np.float32(1e-38)  # what bitsandbytes divides by at least
SMALL, LARGE = np.float32(1e-30), np.float32(1e30)  # beyond these, sums of squares might leave float32
POLISH = 3


@inner
def level_of(x, borders_K):
    """How many borders lie below x."""
    level = np.int32(0)
    for k in range(borders_K.size):
        level += np.int32(1) if borders_K[k] < x else np.int32(0)
    return level


@inner
def nearest(x, table_K, borders_K):
    """Lane by lane the table's number nearest to x."""
    number = splat(table_K[0])
    for k in range(borders_K.size):
        number = where(less(splat(borders_K[k]), x), splat(table_K[k + 1]), number)
    return number


@inner
def lane_sum(x, room):
    store(room, 0, x)
    total = ZERO
    for lane in range(LANES):
        total += room[lane]
    return total


@inner
def number_sums(x, v, inverse, table_K, borders_K, room):
    """Σ v·x·t and Σ v·t² of the table's numbers t nearest to x · inverse."""
    xt, tt = splat(ZERO), splat(ZERO)
    for at in range(0, x.size, LANES):
        here = load(x, at)
        t = nearest(here * splat(inverse), table_K, borders_K)
        weighed = load(v, at) * t
        xt, tt = fma(weighed, here, xt), fma(weighed, t, tt)
    return lane_sum(xt, room), lane_sum(tt, room)


@inner
def number_error(x, v, scale, table_K, borders_K, room):
    error = splat(ZERO)
    for at in range(0, x.size, LANES):
        t = nearest(load(x, at) * splat(ONE / scale), table_K, borders_K)
        rest = load(x, at) - splat(scale) * t
        error = fma(load(v, at) * rest, rest, error)
    return lane_sum(error, room)


@njit(**ENTRY)
def fit_largest(w_NB, scale_N):
    """max|w|."""
    bits_NB = w_NB.view(np.int32)
    for n in range(w_NB.shape[0]):
        scale_N[n] = largest(bits_NB, n)


@njit(**ENTRY)
def search_scale(w_NB, importance_PB, candidates_K, table_K, borders_K, scale_N):
    """Improve max|w| in `scale_N`: inverse candidates in units of one over it, then Lloyd's iteration."""
    x, v = aligned_floats(w_NB.shape[1]), aligned_floats(w_NB.shape[1])
    room = aligned_floats(LANES)
    for n in range(w_NB.shape[0]):
        peak = scale_N[n]
        if not SMALL < peak < LARGE:
            continue
        load_block(w_NB, importance_PB, n, ONE / peak, x, v)
        best, gain = ZERO, ZERO
        # The last turns are Lloyd's iteration, from the best scale so far.
        for k in range(candidates_K.size + POLISH):
            inverse = candidates_K[k] if k < candidates_K.size else ONE / best
            xt, tt = number_sums(x, v, inverse, table_K, borders_K, room)
            # A negative scale is none of these formats'.
            if xt > ZERO and xt * xt > gain * tt:
                best, gain = xt / tt, xt * xt / tt
            if best == ZERO:
                break
        if best == ZERO:
            continue
        # The plain scale is kept unless the search is better by the error itself, not by its own estimate.
        plain = number_error(x, v, ONE, table_K, borders_K, room)
        if number_error(x, v, best, table_K, borders_K, room) < plain:
            scale_N[n] = best * peak


@njit(**ENTRY)
def pack_numbers(w_NB, scale_N, borders_K, codes_K, raw_NN):
    codes = np.empty(w_NB.shape[1], np.uint8)
    for n in range(w_NB.shape[0]):
        store_scale(raw_NN[n], scale_N[n], F32)
        inverse = ONE / max(scale_N[n], LEAST)
        for j in range(codes.size):
            position = min(max(w_NB[n, j] * inverse, -ONE), ONE)
            codes[j] = codes_K[level_of(position, borders_K)]
        put_codes(codes, 4, raw_NN[n], 4)


@njit(**ENTRY)
def decode_numbers(raw_NN, numbers_K, w_NB):
    """`numbers_K` by code."""
    codes = np.empty(w_NB.shape[1], np.uint8)
    for n in range(raw_NN.shape[0]):
        scale = load_scale(raw_NN[n], F32)
        get_codes(raw_NN[n], 4, 4, codes)
        for j in range(codes.size):
            w_NB[n, j] = numbers_K[codes[j]] * scale
