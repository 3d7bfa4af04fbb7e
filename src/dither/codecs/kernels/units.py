"""The scale and the offset of a whole block of scaled levels, by least squares with its codes held.

    ŵ = unit · u − below · v        u = multiple_s · number_k, v = lower_s   (`codecs.base.Levels`)

In the form r M rᵀ of the residual the best change (s, o) of (unit, below) solves two equations in the sums
u M uᵀ, u M vᵀ, v M vᵀ, g uᵀ and g vᵀ, and the same sums tell what it gains once both are rounded to what is
stored.  So no step has to be tried: M is met once, and sixteen rows go through it together.  g = r M is kept
up to date.

Legend: R rows, B the columns of a block in the order in which they are rounded, S sub-blocks, K levels,
M multiples.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import inner
from dither.codecs.kernels.simd import LANES, aligned_floats, fma, load, splat, store
from dither.codecs.kernels.stored import as_stored

ZERO, TWO = np.float32(0), np.float32(2)
FLAT = np.float32(1e-5)  # a determinant this small, of its diagonal's, tells two unknowns not apart


@inner
def _through(x, m_BB, columns, out):
    """x M for sixteen rows; four columns at a time, so that sums do not wait for each other."""
    for k in range(0, columns - columns % 4, 4):
        a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(columns):
            here = load(x, LANES * j)
            a = fma(splat(m_BB[k, j]), here, a)
            b = fma(splat(m_BB[k + 1, j]), here, b)
            c = fma(splat(m_BB[k + 2, j]), here, c)
            d = fma(splat(m_BB[k + 3, j]), here, d)
        store(out, LANES * k, a)
        store(out, LANES * (k + 1), b)
        store(out, LANES * (k + 2), c)
        store(out, LANES * (k + 3), d)
    for k in range(columns - columns % 4, columns):
        a = splat(ZERO)
        for j in range(columns):
            a = fma(splat(m_BB[k, j]), load(x, LANES * j), a)
        store(out, LANES * k, a)


@inner
def _dot(x, y, columns, out):
    total = splat(ZERO)
    for k in range(columns):
        total = fma(load(x, LANES * k), load(y, LANES * k), total)
    store(out, 0, total)


@inner
def _stored(x, kind):
    return ZERO if x == ZERO else as_stored(x, kind)


@inner
def _steps(a11, a12, a22, b1, b2):
    """(s, o) of least squares; o is 0 where the two cannot be told apart, s too where u is 0."""
    # Cramer's rule, where the determinant is more than rounding noise.
    determinant = a11 * a22 - a12 * a12
    if determinant > FLAT * a11 * a22:
        return (a22 * b1 - a12 * b2) / determinant, (a11 * b2 - a12 * b1) / determinant
    return (b1 / a11 if a11 > ZERO else ZERO), ZERO


@njit(cache=True, nogil=True)
def fit_units(
    g_RB,
    m_BB,
    numbers_K,
    level_RB,
    value_RB,
    sub_B,
    multiples_M,
    lowers_M,
    tied,
    positive,
    kind,
    unit_R,
    multiple_RS,
    below_R,
    lower_RS,
):
    """Takes each row's best `unit` and `below`, as `kind` stores them, where that lowers the form.

    `tied`: `below` is `unit` itself; `positive`: `unit` may not be negative.  M is symmetric.
    """
    rows, columns = g_RB.shape
    size = columns * LANES
    g, u, um = aligned_floats(size), aligned_floats(size), aligned_floats(size)
    v, vm = aligned_floats(size), aligned_floats(size)
    a11, a12, a22 = aligned_floats(LANES), aligned_floats(LANES), aligned_floats(LANES)
    b1, b2 = aligned_floats(LANES), aligned_floats(LANES)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        offsets = False
        for lane in range(LANES):
            r = first + min(lane, count - 1)
            for k in range(columns):
                # u and v say what one more of `unit`, and one more of `below`, does to this weight's value. Where
                # they are tied there is one number to find, and u has both effects.
                s, at = sub_B[k], LANES * k + lane
                by_unit = multiples_M[multiple_RS[r, s]] * numbers_K[level_RB[r, k]]
                by_below = -lowers_M[lower_RS[r, s]]
                g[at] = g_RB[r, k]
                u[at] = by_unit + by_below if tied else by_unit
                v[at] = ZERO if tied else by_below
                offsets = offsets or v[at] != ZERO
        # M is met once for each: the sums, what the step gains and the new g all come from um and vm.
        _through(u, m_BB, columns, um)
        _dot(um, u, columns, a11)
        _dot(g, u, columns, b1)
        store(a12, 0, splat(ZERO))
        store(a22, 0, splat(ZERO))
        store(b2, 0, splat(ZERO))
        if offsets:
            _through(v, m_BB, columns, vm)
            _dot(um, v, columns, a12)
            _dot(vm, v, columns, a22)
            _dot(g, v, columns, b2)
        for lane in range(count):
            r = first + lane
            s, o = _steps(a11[lane], a12[lane], a22[lane], b1[lane], b2[lane])
            # Rounded to what is stored first and judged after: a gain that rounding eats is none.
            unit = _stored(unit_R[r] + s, kind)
            below = unit if tied else _stored(below_R[r] + o, kind)
            if unit == ZERO or (positive and unit < ZERO):
                continue
            ds, do = unit - unit_R[r], ZERO if tied else below - below_R[r]
            # The form changes by curve − 2 · (ds·g uᵀ + do·g vᵀ), exactly, for any step.
            curve = ds * ds * a11[lane] + TWO * ds * do * a12[lane] + do * do * a22[lane]
            if not TWO * (ds * b1[lane] + do * b2[lane]) > curve:
                continue
            unit_R[r], below_R[r] = unit, below
            for k in range(columns):
                j, at = sub_B[k], LANES * k + lane
                # Values are computed as a decoder does, not moved by the step: so no rounding adds up over many
                # calls.
                scale = unit * multiples_M[multiple_RS[r, j]]
                value_RB[r, k] = scale * numbers_K[level_RB[r, k]] - below * lowers_M[lower_RS[r, j]]
                g_RB[r, k] -= ds * um[at]
                if offsets:
                    g_RB[r, k] -= do * vm[at]
