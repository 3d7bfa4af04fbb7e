"""Scales and minima for Q2_K, Q4_K and Q5_K: ŵ = d·sc·q − dmin·m.

Legend: R super-blocks, B = 256 their weights, S their sub-blocks, I rows of importance.

A super-block of 256 weights has S sub-blocks (8 of 32, or 16 of 16 for Q2_K).  Each has a small integer
scale `sc` and minimum `m`; the float16 numbers `d` and `dmin` are common to all.  Wanted are the integers
that keep Σ importance · (w − ŵ)² small.  The search has three stages, all on sixteen super-blocks at once:

1. Per sub-block, scale s and offset o as real numbers.  Each start (s, o) is rounded to codes q; for fixed
   codes the best (s, o) solves a 2 × 2 system of weighted least squares, and the loss follows from the same
   five sums without a second look at the weights.  The best start is polished once by repeating this from
   where it ended.
2. d, dmin and the integers.  For fixed codes the loss is a quadratic around the optimum of stage 1, so
   several (d, dmin) and, for each, two neighboring sc with the best m, are judged without touching a weight.
3. Codes are rounded anew under what will be stored, and stage 2 is repeated from there, d and dmin now also
   from their own least squares.  Each step is kept only where it lowers the loss.

Starts matter more than refinement: moving the lower end of the range up a little finds optima that no
amount of polishing reaches from the extremes.  The least-squares step is that of ggml's K-quant encoders;
they start only from the smallest weight and do not look back once the sub-scales are rounded.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import ROUND_MAGIC, f32_to_f16_finite, inner
from dither.codecs.kernels.k_stage import (
    LEAST,
    nearest_f16,
    reciprocal,
    room,
    room_for,
    round_between,
    stage_importance,
    stage_weights,
    take_where,
    weighed,
)
from dither.codecs.kernels.simd import (
    LANES,
    aligned_floats,
    either,
    fma,
    larger,
    less,
    load,
    smaller,
    splat,
    store,
    where,
)

# A sub-block's record in `state`: for codes q and importance w, the sums A = Σw, B = Σwq, C = Σwq² and the
# optimum (s, o); `_slot` finds them.
_A, _B, _C, _SCALE, _OFFSET = range(5)
_MOST_SUBS = 16


@inner
def _slot(kind, sub):
    return (kind * _MOST_SUBS + sub) * LANES


@inner
def _code_sums(x, w, at, size, base, inverse, top):
    """Σwq, Σwq² and Σwqu over one sub-block for u = x − base and q = u · inverse rounded to 0 … top."""
    magic = splat(ROUND_MAGIC)
    ceiling = magic + splat(top)
    b = c = e = splat(0.0)
    for j in range(at, at + LANES * size, LANES):
        u = load(x, j) - base
        # One fma scales and rounds, for beside 1.5·2²³ there is no room for a fraction. Codes are cut to 0 … top
        # while the magic is still in them, where both bounds are exact.
        q = larger(smaller(fma(u, inverse, magic), ceiling), magic) - magic
        wq = weighed(w, j, q)
        b = b + wq
        c = fma(wq, q, c)
        e = fma(wq, u, e)
    return b, c, e


@inner
def _least_squares(a, b, c, d, e, base):
    """(s, o) that minimize Σw(u − s·q − o)² with base + o ≤ 0, from Σw, Σwq, Σwq², Σwu, Σwqu.

    A minimum is stored as −dmin·m, which cannot be positive: where the free optimum is, o is pinned to
    −base.  Where all codes are alike nothing tells scale from offset, and o stays 0.
    """
    # The normal equations of a scale and an offset. Their determinant is Σw times the codes' weighted variance: 0
    # where all codes are alike.
    determinant = a * c - b * b
    offset_share = c * d - b * e
    flat = less(determinant, splat(1e-5) * a * c + splat(LEAST))
    # base + o > 0, without the division: where this is used, the determinant is positive.
    bound = less(splat(0.0), base * determinant + offset_share)
    pinned = where(flat, splat(0.0), where(bound, splat(0.0) - base, splat(0.0)))
    # With o fixed, by the bound or for want of a second code, the scale alone is left: Σwq(u − o) / Σwq².
    fixed = either(flat, bound)
    share = splat(1.0) / where(fixed, larger(c, splat(LEAST)), determinant)
    scale = where(fixed, e - pinned * b, a * e - b * d) * share
    return larger(scale, splat(0.0)), where(fixed, pinned, offset_share * share)


@inner
def _span(x, w, at, size):
    """The lowest weight or 0, the distance to the highest, and Σw, Σwu, Σwu² of u = x − lowest."""
    # The range holds 0, for no minimum above 0 can be stored.
    low = splat(0.0)
    high = load(x, at)
    for j in range(at, at + LANES * size, LANES):
        low = smaller(low, load(x, j))
        high = larger(high, load(x, j))
    # Moments about the lowest weight; those about any other base follow without the weights.
    a = d = f = splat(0.0)
    for j in range(at, at + LANES * size, LANES):
        u = load(x, j) - low
        wu = weighed(w, j, u)
        a = a + weighed(w, j, splat(1.0))
        d = d + wu
        f = fma(wu, u, f)
    return low, larger(high - low, splat(0.0)), a, d, f


@inner
def _fit_sub_block(x, w, at, size, top, starts, sub, state):
    """Stage 1: the best (s, o) with o ≤ 0, s ≥ 0; the optimum's record goes to `state`."""
    zero, two = splat(0.0), splat(2.0)
    low, reach, a, d_low, f_low = _span(x, w, at, size)
    per_reach = reciprocal(reach)
    least = splat(3e38)
    scale = offset = best_b = best_c = zero
    for k in range(starts.shape[0] + 1):
        if k < starts.shape[0]:
            inverse, base = splat(starts[k, 0]) * per_reach, low + splat(starts[k, 1]) * reach
        else:
            # The last turn polishes: codes are rounded once more, under the best (s, o) so far.
            inverse, base = reciprocal(scale), offset
        b, c, e = _code_sums(x, w, at, size, base, inverse, top)
        # Σwu and Σwu² about this start's base instead of the lowest weight.
        moved = base - low
        d = d_low - moved * a
        f = f_low - moved * (two * d_low - moved * a)
        s, o = _least_squares(a, b, c, d, e, base)
        # Σw(u − s·q − o)², multiplied out: every term is in the sums at hand.
        loss = f - s * (two * (e - o * b) - s * c) - o * (two * d - o * a)
        better = less(loss, least)
        least = where(better, loss, least)
        scale, offset = where(better, s, scale), where(better, base + o, offset)
        best_b, best_c = where(better, b, best_b), where(better, c, best_c)
    store(state, _slot(_A, sub), a)
    _record(state, sub, best_b, best_c, scale, offset)
    return scale, offset


@inner
def _record(state, sub, b, c, scale, offset):
    store(state, _slot(_B, sub), b)
    store(state, _slot(_C, sub), c)
    store(state, _slot(_SCALE, sub), scale)
    store(state, _slot(_OFFSET, sub), offset)


@inner
def _excess(state, sub, scale, offset):
    """How much worse than the optimum a scale and an offset are, the codes being fixed."""
    # Around its least the loss is this quadratic, with no linear terms.
    ds = scale - load(state, _slot(_SCALE, sub))
    do = offset - load(state, _slot(_OFFSET, sub))
    a, b, c = load(state, _slot(_A, sub)), load(state, _slot(_B, sub)), load(state, _slot(_C, sub))
    return ds * (c * ds + splat(2.0) * b * do) + a * do * do


@inner
def _total_excess(state, subs, d, dmin, sc, m):
    total = splat(0.0)
    for sub in range(subs):
        n = LANES * sub
        total = total + _excess(state, sub, d * load(sc, n), splat(0.0) - dmin * load(m, n))
    return total


@inner
def _choose_integers(state, subs, d, dmin, most, sc, m):
    """For given d and dmin the better of two neighboring sc, each with its best m; returns the excess."""
    zero, top = splat(0.0), splat(most)
    per_d, per_dmin = reciprocal(d), reciprocal(dmin)
    total = zero
    for sub in range(subs):
        scale, offset = load(state, _slot(_SCALE, sub)), load(state, _slot(_OFFSET, sub))
        # A scale that is ds off its optimum wants its offset −ds · Σwq / Σw off its own.
        slope = load(state, _slot(_B, sub)) / load(state, _slot(_A, sub))
        # The scale wanted lies between these two integers. Which is better depends on the minimum that each can have,
        # which is rounded too, so both are judged with theirs.
        low = round_between(scale * per_d - splat(0.5), zero, top)
        high = smaller(low + splat(1.0), top)
        low_m = round_between((slope * (d * low - scale) - offset) * per_dmin, zero, top)
        high_m = round_between((slope * (d * high - scale) - offset) * per_dmin, zero, top)
        low_excess = _excess(state, sub, d * low, zero - dmin * low_m)
        high_excess = _excess(state, sub, d * high, zero - dmin * high_m)
        up = less(high_excess, low_excess)
        store(sc, LANES * sub, where(up, high, low))
        store(m, LANES * sub, where(up, high_m, low_m))
        total = total + smaller(high_excess, low_excess)
    return total


@inner
def _refit_super(state, subs, d, dmin, sc, m):
    """The d and dmin of least squares for given integers and codes, as float16; else the old ones."""
    zero = splat(0.0)
    aa = ab = bb = ra = rb = zero
    for sub in range(subs):
        # This sub-block's quadratic in d and dmin rather than in its own scale and offset; their sum is a 2 × 2
        # system for the super-block.
        n, k = load(sc, LANES * sub), load(m, LANES * sub)
        a, b, c = load(state, _slot(_A, sub)), load(state, _slot(_B, sub)), load(state, _slot(_C, sub))
        scale, offset = load(state, _slot(_SCALE, sub)), load(state, _slot(_OFFSET, sub))
        aa = aa + c * n * n
        ab = ab - b * n * k
        bb = bb + a * k * k
        ra = ra + n * (c * scale + b * offset)
        rb = rb - k * (b * scale + a * offset)
    determinant = aa * bb - ab * ab
    flat = less(determinant, splat(1e-5) * aa * bb + splat(LEAST))
    share = splat(1.0) / where(flat, splat(1.0), determinant)
    new_d, new_dmin = (bb * ra - ab * rb) * share, (aa * rb - ab * ra) * share
    # Where the two cannot be told apart, or come out negative, what was stays.
    keep_d = where(flat, zero, new_d)
    keep_dmin = where(flat, zero, new_dmin)
    return (
        nearest_f16(where(less(zero, keep_d), keep_d, d)),
        nearest_f16(where(less(zero, keep_dmin), keep_dmin, dmin)),
    )


@inner
def _resnap(x, w, size, subs, top, d, dmin, sc, m, state):
    """Codes anew under the stored scales, and the record of each sub-block with them."""
    for sub in range(subs):
        at = LANES * size * sub
        # The base is the minimum as it will be stored, about which no earlier sum was taken.
        base = splat(0.0) - dmin * load(m, LANES * sub)
        inverse = reciprocal(d * load(sc, LANES * sub))
        b, c, e = _code_sums(x, w, at, size, base, inverse, top)
        wu = splat(0.0)
        for j in range(at, at + LANES * size, LANES):
            wu = wu + weighed(w, j, load(x, j) - base)
        scale, offset = _least_squares(load(state, _slot(_A, sub)), b, c, wu, e, base)
        _record(state, sub, b, c, scale, base + offset)


@inner
def _search(x, w, size, top, most, starts, shares, rounds, state, sc, m, sc_try, m_try):
    """All three stages; d and dmin are returned, the integers left in `sc` and `m`."""
    # Stage 1. The super-block's d must reach the largest of these scales, its dmin the lowest offset.
    subs = 256 // size
    scale_max = lowest = splat(0.0)
    for sub in range(subs):
        scale, offset = _fit_sub_block(x, w, LANES * size * sub, size, top, starts, sub, state)
        scale_max, lowest = larger(scale_max, scale), smaller(lowest, offset)
    widest, deepest = scale_max / splat(most), (splat(0.0) - lowest) / splat(most)
    # Stage 2. First the largest scale on the largest integer, then d a little larger and smaller: some other d may
    # suit all the integers together better.
    d, dmin = nearest_f16(widest), nearest_f16(deepest)
    least = _choose_integers(state, subs, d, dmin, most, sc, m)
    for k in range(shares.shape[0]):
        d_try, dmin_try = nearest_f16(widest * splat(shares[k])), nearest_f16(deepest)
        excess = _choose_integers(state, subs, d_try, dmin_try, most, sc_try, m_try)
        better = less(excess, least)
        least, d = where(better, excess, least), where(better, d_try, d)
        take_where(better, sc_try, sc, subs)
        take_where(better, m_try, m, subs)
    for _ in range(rounds):
        # Stage 3. New codes have another optimum, so what is stored is judged anew before anything is compared with
        # it.
        _resnap(x, w, size, subs, top, d, dmin, sc, m, state)
        least = _total_excess(state, subs, d, dmin, sc, m)
        d_try, dmin_try = d, dmin
        # First new integers under d and dmin as they are, then once more under those of least squares.
        for _ in range(2):
            excess = _choose_integers(state, subs, d_try, dmin_try, most, sc_try, m_try)
            better = less(excess, least)
            least = where(better, excess, least)
            d, dmin = where(better, d_try, d), where(better, dmin_try, dmin)
            take_where(better, sc_try, sc, subs)
            take_where(better, m_try, m, subs)
            d_try, dmin_try = _refit_super(state, subs, d, dmin, sc, m)
    return d, dmin


@njit(cache=True, nogil=True)
def fit_affine(w_RB, importance_IB, size, top, most, starts, shares, rounds, d_R, dmin_R, sc_RS, m_RS):
    """Fill d_R, dmin_R (float16 patterns, uint16) and sc_RS, m_RS (uint8) for R super-blocks.

    `w_RB` and `importance_IB` are float32; super-block r has importance r modulo I, None stands for equal
    importance.  `size` weights share an integer scale; codes go to `top`, integers to `most`.
    `starts` (K, 2): code steps over the range, and how far the lower end moves up, as shares of the range.
    `shares`: multiples of the largest d to try.  `rounds` of stage 3.
    """
    x, w, spare = room(), room_for(importance_IB), room()
    state = aligned_floats(5 * _MOST_SUBS * LANES)
    sc, m = aligned_floats(_MOST_SUBS * LANES), aligned_floats(_MOST_SUBS * LANES)
    sc_try, m_try = aligned_floats(_MOST_SUBS * LANES), aligned_floats(_MOST_SUBS * LANES)
    ends = aligned_floats(2 * LANES)
    for first in range(0, w_RB.shape[0], LANES):
        stage_weights(w_RB, first, spare, x)
        stage_importance(importance_IB, first, spare, w)
        d, dmin = _search(x, w, size, top, most, starts, shares, rounds, state, sc, m, sc_try, m_try)
        store(ends, 0, d)
        store(ends, LANES, dmin)
        # Lanes beyond the last super-block repeat earlier ones, and are dropped here.
        for lane in range(min(LANES, w_RB.shape[0] - first)):
            d_R[first + lane] = f32_to_f16_finite(ends[lane])
            dmin_R[first + lane] = f32_to_f16_finite(ends[LANES + lane])
            for sub in range(256 // size):
                sc_RS[first + lane, sub] = np.uint8(sc[LANES * sub + lane])
                m_RS[first + lane, sub] = np.uint8(m[LANES * sub + lane])
