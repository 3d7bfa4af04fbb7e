"""Better scales for the sub-blocks of a block of scaled levels, in any metric of the residual.

    ŵ = unit · multiple_s · number_k − below · lower_s        (`codecs.base.Levels`)

With codes held, best scales are a matter of least squares; but codes were chosen under the old scale and
hide what a new one would be worth.  So for each sub-block the multiples next to its own are tried, each with
codes rounded anew by feedback within the sub-block, and the cheapest is kept.  Like `descend` in feedback.py,
this lowers r M rᵀ and keeps g = r M up to date; what does not lower it is not taken.

Legend: R rows, B the columns of a block in the order in which they are rounded, S sub-blocks, I members of a
sub-block, K levels, M multiples that a scale or an offset may be.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import inner
from dither.codecs.kernels.feedback import HALF, ZERO, inverse, nearest_number
from dither.codecs.kernels.k_stage import reciprocal, take_where
from dither.codecs.kernels.simd import LANES, aligned_floats, fma, less, load, smaller, splat, store

_BELOW_ONE = np.float32(0.9999)  # a new choice must cost less than this share of the old one
_NOWHERE = np.float32(3e38)  # an offset that no choice survives
_TRIALS = 9


@inner
def _closest(wanted, multiples_M):
    """The index of the multiple closest to `wanted`; multiples rise."""
    # Bisection over the borders midway between neighbors; on a border the lower one is taken.
    low, high = 0, multiples_M.size - 1
    while low < high:
        middle = (low + high) // 2
        if wanted > HALF * (multiples_M[middle] + multiples_M[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@inner
def _apply(r, members_I, p, scale, offset, g_RB, m_BB, value_RB):
    """New values of a sub-block under a new scale and offset, and the gradient with them."""
    columns = g_RB.shape[1]
    for i in range(members_I.size):
        k = members_I[i]
        value = scale * p[i] - offset
        step = value - value_RB[r, k]
        value_RB[r, k] = value
        # g = r M, so a value that moves takes its row of M with it; one that stays costs nothing.
        if step != ZERO:
            for j in range(columns):
                g_RB[r, j] -= step * m_BB[k, j]


@inner
def _wanted(g, value, inverse_II, x):
    """Where all other sub-blocks leave this one's minimum goes to `x`; returns what it costs as it is."""
    # With all other columns held, the form is a quadratic of this sub-block alone: least at value + g P⁻¹, where P is
    # its part of M, and g P⁻¹ gᵀ above that least as it is.
    now = splat(ZERO)
    for i in range(inverse_II.shape[0]):
        step = splat(ZERO)
        for j in range(inverse_II.shape[0]):
            step = fma(splat(inverse_II[i, j]), load(g, LANES * j), step)
        store(x, LANES * i, load(value, LANES * i) + step)
        now = fma(step, load(g, LANES * i), now)
    return now


@inner
def _feed_sub(x, t, forward_II, cost_I, numbers_K, even, scale, offset, level):
    """Feedback over one sub-block; returns what it costs."""
    loss = splat(ZERO)
    per_scale = reciprocal(scale)
    # t is where the weights already rounded have left each minimum; it starts at x.
    for k in range(cost_I.size):
        store(t, LANES * k, load(x, LANES * k))
    for k in range(cost_I.size):
        at = LANES * k
        here = load(t, at)
        number, chosen = nearest_number((here + offset) * per_scale, numbers_K, even)
        rounded = scale * number - offset
        store(level, at, chosen)
        # In the factor's coordinates each miss adds to the loss by itself, times its diagonal squared.
        loss = fma((here - rounded) * (here - rounded), splat(cost_I[k]), loss)
        # The columns that follow move by the whole residual, not by the last miss alone.
        residual = load(x, at) - rounded
        for j in range(k + 1, cost_I.size):
            store(t, LANES * j, fma(residual, splat(forward_II[k, j]), load(t, LANES * j)))
    return loss


@inner
def _candidate(trial, old_i, old_j, unit, below, mean, multiples_M, lowers_M):
    """The indices of trial 0 … 8: three multiples, and three offsets around that which keeps the mean."""
    # Three multiples, the one below, the same, the one above; with each of them three offsets.
    i = old_i + trial // 3 - 1
    if i < 0 or i >= multiples_M.size:
        return -1, -1
    # Without an offset only the middle trial of each three is a new choice.
    if lowers_M.size == 1 or below == ZERO:
        return (i, old_j) if trial % 3 == 1 else (-1, -1)
    # What a larger scale adds to the mean of the values, the offset takes off again: codes hardly move, and the two
    # can be judged as a pair.
    wanted = below * lowers_M[old_j] + unit * (multiples_M[i] - multiples_M[old_i]) * mean
    j = _closest(wanted * inverse(below), lowers_M) + trial % 3 - 1
    return (i, j) if 0 <= j < lowers_M.size else (-1, -1)


@inner
def _gather(first, count, members_I, g_RB, value_RB, level_RB, numbers_K, g, value, mean):
    """A sub-block's gradients and values of sixteen rows into lanes, and its mean number."""
    for lane in range(LANES):
        r = first + min(lane, count - 1)
        total = ZERO
        for i in range(members_I.size):
            g[LANES * i + lane] = g_RB[r, members_I[i]]
            value[LANES * i + lane] = value_RB[r, members_I[i]]
            total += numbers_K[level_RB[r, members_I[i]]]
        mean[lane] = total / np.float32(members_I.size)


@njit(cache=True, nogil=True)
def rechoose(
    g_RB,
    m_BB,
    numbers_K,
    even,
    level_RB,
    value_RB,
    members_SI,
    forward_SII,
    cost_SI,
    inverse_SII,
    multiples_M,
    lowers_M,
    unit_R,
    multiple_RS,
    below_R,
    lower_RS,
):
    """Improve each sub-block's multiples and codes together, sixteen rows at once.

    `forward_SII`, `cost_SI`: the factor of M's part within each sub-block, as `feed` takes it;
    `inverse_SII`: that part's inverse.
    """
    rows, size = g_RB.shape[0], members_SI.shape[1]
    # All room is taken once: nothing is allocated between one sub-block and the next.
    g, value = aligned_floats(size * LANES), aligned_floats(size * LANES)
    x, t = aligned_floats(size * LANES), aligned_floats(size * LANES)
    level, kept = aligned_floats(size * LANES), aligned_floats(size * LANES)
    scale, offset, mean = aligned_floats(LANES), aligned_floats(LANES), aligned_floats(LANES)
    best, loss = aligned_floats(LANES), aligned_floats(LANES)
    p = np.empty(size, np.float32)
    trial_i, trial_j = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    best_i, best_j = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for s in range(members_SI.shape[0]):
            members_I = members_SI[s]
            _gather(first, count, members_I, g_RB, value_RB, level_RB, numbers_K, g, value, mean)
            # The present cost, a little lowered: a choice must be better by more than rounding noise, or the walk
            # might never come to rest.
            store(best, 0, _wanted(g, value, inverse_SII[s], x) * splat(_BELOW_ONE))
            for lane in range(LANES):
                best_i[lane] = -1
            for trial in range(_TRIALS):
                # Each lane is a row with scales of its own, so one trial is another candidate in each. One that is
                # impossible takes part with an offset far from every weight, and so never wins.
                possible = False
                for lane in range(LANES):
                    r = first + min(lane, count - 1)
                    unit, below = unit_R[r], below_R[r]
                    old_i, old_j = np.int64(multiple_RS[r, s]), np.int64(lower_RS[r, s])
                    i, j = _candidate(trial, old_i, old_j, unit, below, mean[lane], multiples_M, lowers_M)
                    trial_i[lane], trial_j[lane] = i, j
                    possible = possible or i >= 0
                    scale[lane] = unit * multiples_M[i] if i >= 0 else ZERO
                    offset[lane] = below * lowers_M[j] if i >= 0 else _NOWHERE
                if not possible:
                    continue
                s_16, o_16 = load(scale, 0), load(offset, 0)
                found = _feed_sub(x, t, forward_SII[s], cost_SI[s], numbers_K, even, s_16, o_16, level)
                store(loss, 0, found)
                # Levels of the lanes that improved are saved now, for the next trial writes over them.
                take_where(less(found, load(best, 0)), level, kept, size)
                for lane in range(count):
                    if loss[lane] < best[lane]:
                        best_i[lane], best_j[lane] = trial_i[lane], trial_j[lane]
                store(best, 0, smaller(found, load(best, 0)))
            for lane in range(count):
                # Only winners touch the rows, and g follows at once, so that the next sub-block sees what is left.
                if best_i[lane] < 0:
                    continue
                r, i, j = first + lane, best_i[lane], best_j[lane]
                multiple_RS[r, s], lower_RS[r, s] = i, j
                for k in range(size):
                    level_RB[r, members_I[k]] = np.uint8(kept[LANES * k + lane])
                    p[k] = numbers_K[level_RB[r, members_I[k]]]
                _apply(r, members_I, p, unit_R[r] * multiples_M[i], below_R[r] * lowers_M[j], g_RB, m_BB, value_RB)
