"""Error feedback and coordinate descent inside one block of columns, for any codec of scaled levels.

Legend: R rows, B the columns of a block in the order in which they are rounded, S sub-blocks, K levels.

A weight becomes ŵ = scale_s · number_k − offset_s (`codecs.base.Levels`): what differs from codec to codec is
data.  Both loops minimize a quadratic form r M rᵀ in the residual r = x − ŵ of each row:

    feed      M = F Fᵀ with F upper triangular: columns one by one, each rounded where the columns before it
              have left the minimum (Babai's nearest plane, of which GPTQ is an instance)
    descend   a code moves wherever that alone lowers the form; g = r M, half the negative gradient with
              respect to ŵ, is kept up to date
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import inner
from dither.codecs.kernels.k_stage import reciprocal, round_between
from dither.codecs.kernels.simd import LANES, aligned_floats, fma, less, load, splat, store, where

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
GAIN = np.float32(1e-6)  # moves that gain less than this share of their own curvature are rounding noise


@inner
def nearest_level(position, numbers_K, even):
    """The index of the number nearest to `position`; `even` says that the numbers are one apart."""
    last = numbers_K.size - 1
    if even:
        # One apart: the level is the distance from the first, rounded by cutting off.
        steps = position - numbers_K[0] + HALF
        return np.int64(min(max(steps, ZERO), np.float32(last)))
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if position > HALF * (numbers_K[middle] + numbers_K[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@inner
def inverse(scale):
    return ONE / scale if scale != ZERO else ZERO


@inner
def nearest_number(position, numbers_K, even):
    """Lane by lane the number nearest to `position`, and its level."""
    number, level = splat(numbers_K[0]), splat(ZERO)
    if even:
        number = round_between(position, number, splat(numbers_K[numbers_K.size - 1]))
        level = number - splat(numbers_K[0])
    else:
        for k in range(1, numbers_K.size):
            # No search: every border is compared for all lanes, which costs no branch.
            above = less(splat(HALF * (numbers_K[k - 1] + numbers_K[k])), position)
            number = where(above, splat(numbers_K[k]), number)
            level = where(above, splat(np.float32(k)), level)
    return number, level


@inner
def stage(source_RJ, first, count, target):
    """Rows first … first + count − 1 into lanes, the last one repeated: row's item j to 16 · j + lane."""
    for lane in range(LANES):
        r = first + min(lane, count - 1)
        for j in range(source_RJ.shape[1]):
            target[LANES * j + lane] = source_RJ[r, j]


@inner
def _feed_lanes(x, t, forward_BB, cost_B, numbers_K, even, scale, offset, sub_B, level, value):
    """Sixteen rows at once; returns their losses.  All arrays but the first two of the factor are staged."""
    columns = cost_B.size
    loss = splat(ZERO)
    for k in range(columns):
        at, s = LANES * k, LANES * sub_B[k]
        # Where the columns before have left this one's minimum, in steps of its scale.
        here = load(t, at)
        number, chosen = nearest_number((here + load(offset, s)) * reciprocal(load(scale, s)), numbers_K, even)
        rounded = load(scale, s) * number - load(offset, s)
        store(level, at, chosen)
        store(value, at, rounded)
        # r F has F_kk · (t − ŵ) as coordinate k, so each column adds its own square to the loss.
        missed = here - rounded
        loss = fma(missed * missed, splat(cost_B[k]), loss)
        # Column j's minimum moves by F_kj / F_jj of the residual, for every k before it.
        residual = load(x, at) - rounded
        for j in range(k + 1, columns):
            store(t, LANES * j, fma(residual, splat(forward_BB[k, j]), load(t, LANES * j)))
    return loss


@njit(cache=True, nogil=True)
def feed(x_RB, forward_BB, cost_B, numbers_K, even, scale_RS, offset_RS, sub_B, level_RB, value_RB, loss_R):
    """Round columns in order; `forward_BB` is F with each column over its diagonal, `cost_B` that squared.

    Writes the level and the value of each weight, and each row's r M rᵀ.
    """
    rows, columns = x_RB.shape
    x, t = aligned_floats(columns * LANES), aligned_floats(columns * LANES)
    level, value = aligned_floats(columns * LANES), aligned_floats(columns * LANES)
    scale = aligned_floats(scale_RS.shape[1] * LANES)
    offset, loss = aligned_floats(scale_RS.shape[1] * LANES), aligned_floats(LANES)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        stage(x_RB, first, count, x)
        stage(scale_RS, first, count, scale)
        stage(offset_RS, first, count, offset)
        for k in range(columns):
            store(t, LANES * k, load(x, LANES * k))
        store(loss, 0, _feed_lanes(x, t, forward_BB, cost_B, numbers_K, even, scale, offset, sub_B, level, value))
        for lane in range(count):
            loss_R[first + lane] = loss[lane]
            for k in range(columns):
                level_RB[first + lane, k] = np.uint8(level[LANES * k + lane])
                value_RB[first + lane, k] = value[LANES * k + lane]


@njit(cache=True, nogil=True)
def descend(g_RB, m_BB, numbers_K, even, scale_RS, offset_RS, sub_B, level_RB, value_RB):
    """One sweep over the codes: each takes the level that is best with all others as they are.

    Returns how many codes moved.
    """
    rows, columns = g_RB.shape
    moved = 0
    for r in range(rows):
        for k in range(columns):
            s = sub_B[k]
            curve = m_BB[k, k]
            if curve <= ZERO:
                continue
            scale, offset = scale_RS[r, s], offset_RS[r, s]
            # The minimum along this one weight: half the negative gradient over the curvature.
            wanted = value_RB[r, k] + g_RB[r, k] / curve
            level = nearest_level((wanted + offset) * inverse(scale), numbers_K, even)
            if level == level_RB[r, k]:
                continue
            value = scale * numbers_K[level] - offset
            step = value - value_RB[r, k]
            # The form falls by step · (2g − step · curve). A move that gains as little as rounding noise is left, so
            # that sweeps come to an end.
            if step * (TWO * g_RB[r, k] - step * curve) <= GAIN * step * step * curve:
                continue
            level_RB[r, k], value_RB[r, k] = level, value
            moved += 1
            for j in range(columns):
                g_RB[r, j] -= step * m_BB[k, j]
    return moved
