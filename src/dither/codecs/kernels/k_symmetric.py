"""Scales for Q3_K and Q6_K: ŵ = d·sc·q, with signed codes and signed sub-scales.

Legend: R super-blocks, B = 256 their weights, S = 16 their sub-blocks of 16, I rows of importance.

Codes run from −half to half − 1 (half is 4 or 32), so the side that reaches one step further matters, the
more the fewer bits there are: a scale may be negative.  The search is that of `k_affine.py` with one unknown
less.  For fixed codes the best scale of a sub-block is Σwqx / Σwq², and what it removes from Σwx² is
(Σwqx)² / Σwq²: the start that removes most wins.  `d` and the integers follow from quadratics, and after
codes are rounded anew under what will be stored, d comes from its own least squares.  Repeating the step
for a sub-block gains next to nothing; more starts do, also such as leave a part of the codes unused.
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
    fma,
    larger,
    less,
    load,
    magnitude,
    smaller,
    splat,
    store,
    where,
)

SIZE, SUBS = 16, 16
# A sub-block's record in `state`: C = Σwq² for its codes q, and the scale that suits these codes best.
_C, _SCALE = 0, SUBS * LANES


@inner
def _code_sums(x, w, at, inverse, half):
    """Σwq² and Σwqx over one sub-block for q = x · inverse rounded to −half … half − 1."""
    magic = splat(ROUND_MAGIC)
    floor, ceiling = magic - splat(half), magic + splat(half) - splat(1.0)
    c = e = splat(0.0)
    for j in range(at, at + LANES * SIZE, LANES):
        v = load(x, j)
        q = larger(smaller(fma(v, inverse, magic), ceiling), floor) - magic
        wq = weighed(w, j, q)
        c = fma(wq, q, c)
        e = fma(wq, v, e)
    return c, e


@inner
def _fit_sub_block(x, w, at, half, starts, sub, state):
    """The best real scale among `starts` (codes for the largest weight)."""
    zero = splat(0.0)
    # The weight of largest size keeps its sign: a start is the code it is given, on the long side or the short.
    extreme = zero
    for j in range(at, at + LANES * SIZE, LANES):
        v = load(x, j)
        extreme = where(less(magnitude(extreme), magnitude(v)), v, extreme)
    per_extreme = reciprocal(extreme)
    best_e = zero
    # A scale e / c removes e² / c from the loss, so the start that removes most is the best; nothing else of a start
    # is kept.
    best_c = splat(LEAST)
    for k in range(starts.shape[0]):
        c, e = _code_sums(x, w, at, splat(starts[k]) * per_extreme, half)
        better = less(best_e * best_e * c, e * e * best_c)  # e²/c, without the division
        best_c, best_e = where(better, c, best_c), where(better, e, best_e)
    scale = best_e / best_c
    store(state, _C + LANES * sub, best_c)
    store(state, _SCALE + LANES * sub, scale)
    return scale


@inner
def _choose_integers(state, d, reach, sc):
    """The nearest integers for a given d, which for fixed codes are the best; returns the excess loss."""
    low, high = splat(-reach), splat(reach) - splat(1.0)
    per_d = reciprocal(d)
    total = splat(0.0)
    for n in range(0, LANES * SUBS, LANES):
        scale = load(state, _SCALE + n)
        # For fixed codes the loss rises by C · (d·sc − scale)²: rounding each ratio is the exact optimum.
        integer = round_between(scale * per_d, low, high)
        store(sc, n, integer)
        ds = d * integer - scale
        total = fma(load(state, _C + n) * ds, ds, total)
    return total


@inner
def _excess(state, d, sc):
    """How much worse than the optimum the stored scales are, the codes being fixed."""
    total = splat(0.0)
    for n in range(0, LANES * SUBS, LANES):
        ds = d * load(sc, n) - load(state, _SCALE + n)
        total = fma(load(state, _C + n) * ds, ds, total)
    return total


@inner
def _refit_super(state, d, sc):
    """The d of least squares for given integers and codes, as float16; the old one where there is none."""
    square = product = splat(0.0)
    for n in range(0, LANES * SUBS, LANES):
        # d·sc against the scales wanted, by least squares, each counted by its C.
        integer = load(sc, n)
        weight = load(state, _C + n) * integer
        square = fma(weight, integer, square)
        product = fma(weight, load(state, _SCALE + n), product)
    known = less(splat(LEAST), square)
    return nearest_f16(where(known, product / where(known, square, splat(1.0)), d))


@inner
def _resnap(x, w, half, d, sc, state):
    """Codes anew under the stored scales, and the record of each sub-block with them."""
    for n in range(0, LANES * SUBS, LANES):
        stored = d * load(sc, n)
        # Where all codes become 0 there is no better scale: the stored one stands for it, at no cost.
        c, e = _code_sums(x, w, n * SIZE, reciprocal(stored), half)
        store(state, _C + n, c)
        store(state, _SCALE + n, where(less(splat(LEAST), c), e / larger(c, splat(LEAST)), stored))


@inner
def _search(x, w, half, reach, starts, shares, rounds, state, sc, sc_try):
    """d is returned, the integers are left in `sc`."""
    zero = splat(0.0)
    extreme = zero
    for sub in range(SUBS):
        scale = _fit_sub_block(x, w, LANES * SIZE * sub, half, starts, sub, state)
        extreme = where(less(magnitude(extreme), magnitude(scale)), scale, extreme)
    # The largest scale gets −reach, which is one farther from zero than the highest integer.
    widest = (zero - extreme) / splat(reach)
    d = nearest_f16(widest)
    least = _choose_integers(state, d, reach, sc)
    # A smaller d cannot reach the largest scale, but may suit the other fifteen better.
    for k in range(shares.shape[0]):
        d_try = nearest_f16(widest * splat(shares[k]))
        excess = _choose_integers(state, d_try, reach, sc_try)
        better = less(excess, least)
        least, d = where(better, excess, least), where(better, d_try, d)
        take_where(better, sc_try, sc, SUBS)
    for _ in range(rounds):
        # Codes anew, hence another optimum: what is stored is judged by it before it is compared.
        _resnap(x, w, half, d, sc, state)
        least = _excess(state, d, sc)
        d_try = d
        for _ in range(2):
            excess = _choose_integers(state, d_try, reach, sc_try)
            better = less(excess, least)
            least, d = where(better, excess, least), where(better, d_try, d)
            take_where(better, sc_try, sc, SUBS)
            d_try = _refit_super(state, d, sc)
    return d


@njit(cache=True, nogil=True)
def fit_symmetric(w_RB, importance_IB, half, reach, starts, shares, rounds, d_R, sc_RS):
    """Fill d_R (float16 patterns, uint16) and sc_RS (int8) for R super-blocks.

    `w_RB` and `importance_IB` are float32; super-block r has importance r modulo I, None stands for equal
    importance.  Codes run from −half to half − 1, integer scales from −reach to reach − 1.
    `starts` (K,): the codes, whole or not, that the weight of largest size is given before rounding.
    `shares`: multiples of the largest d to try.  `rounds` of looking
    back once scales are stored.
    """
    x, w, spare = room(), room_for(importance_IB), room()
    state = aligned_floats(2 * SUBS * LANES)
    sc, sc_try = aligned_floats(SUBS * LANES), aligned_floats(SUBS * LANES)
    ends = aligned_floats(LANES)
    for first in range(0, w_RB.shape[0], LANES):
        stage_weights(w_RB, first, spare, x)
        stage_importance(importance_IB, first, spare, w)
        store(ends, 0, _search(x, w, half, reach, starts, shares, rounds, state, sc, sc_try))
        for lane in range(min(LANES, w_RB.shape[0] - first)):
            d_R[first + lane] = f32_to_f16_finite(ends[lane])
            for sub in range(SUBS):
                sc_RS[first + lane, sub] = np.int8(sc[LANES * sub + lane])
