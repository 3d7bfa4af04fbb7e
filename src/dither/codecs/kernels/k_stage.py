"""Sixteen super-blocks side by side: what the searches for all K-quants share.

Legend: R super-blocks, B = 256 their weights, I rows of importance, V = 16 lanes.

A super-block's scales depend on no other super-block, so sixteen of them are laid into the sixteen lanes of
the vectors (`simd.py`): item `LANES · j + lane` of a staged array is weight `j` of super-block `lane`.  Every
sum over a block is then a plain chain of additions inside one lane, in the same order on every machine, and
every decision ("is this candidate better?") is one comparison for sixteen blocks at once.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from dither.codecs.kernels.common import F16_MAX, F16_TINY, ROUND_MAGIC, inner
from dither.codecs.kernels.simd import (
    LANES,
    aligned_floats,
    larger,
    less,
    load,
    magnitude,
    smaller,
    splat,
    store,
    store_transposed,
    where,
)

SUPER = 256  # weights of a super-block
# No K-quant reaches beyond 65504 · 128 · 32 < 2³⁰; cutting there changes no code and keeps squares finite.
REACH = np.float32(2.0**30)
# Importance is divided by its mean over the super-block, then this is added: where it is zero, the
# weights are still stored sensibly, at the price of one millionth of the objective.
FLOOR = np.float32(1e-6)
LEAST = np.float32(1e-30)  # what divides is larger than this


@inner
def reciprocal(x):
    """1 / x, and 0 where x is 0 or so small that no float16 scale could follow it."""
    usable = less(splat(LEAST), magnitude(x))
    return where(usable, splat(1.0) / where(usable, x, splat(1.0)), splat(0.0))


@inner
def round_between(x, low, high):
    """The whole number nearest to x from `low` to `high`; right for any x, however large."""
    magic = splat(ROUND_MAGIC)
    return larger(smaller(x + magic, high + magic), low + magic) - magic


@inner
def nearest_f16(x):
    """The float16 nearest to x, as float32; at most 65504 in size, and never 0 unless x is.

    Veltkamp's splitting keeps the leading 11 of 24 bits; below 2⁻¹⁴ float16's step is fixed at 2⁻²⁴, the
    last place of a float32 between ½ and 1.
    """
    size = smaller(magnitude(x), splat(F16_MAX))
    spread = size * splat(8193.0)  # 2¹³ + 1
    # The upper 11 bits of `size`: what the product shifts out is lost in the first difference.
    normal = spread - (spread - size)
    subnormal = (size + splat(0.5)) - splat(0.5)
    # Both ways meet at 2⁻¹⁴. What would round to nothing keeps the smallest float16, for a scale of 0 would erase its
    # weights.
    rounded = larger(where(less(size, splat(2.0**-14)), subnormal, normal), splat(F16_TINY))
    signed = where(less(x, splat(0.0)), splat(0.0) - rounded, rounded)
    return where(less(splat(0.0), magnitude(x)), smaller(signed, splat(F16_MAX)), splat(0.0))


@inner
def take_where(chosen, source, target, count):
    """Copy `count` vectors, only the lanes of the mask."""
    for i in range(count):
        at = LANES * i
        store(target, at, where(chosen, load(source, at), load(target, at)))


@inner
def _turn(rows, first, spare, target):
    """Lay sixteen rows of 256, from row `first` on and around the end, into lanes."""
    count = rows.shape[0]
    start = first % count
    # Sixteen rows in a row can be turned where they lie; around the end they are gathered first.
    if start + LANES <= count:
        flat, offset = rows.reshape(-1), start * SUPER
    else:
        for lane in range(LANES):
            row = (start + lane) % count
            for j in range(SUPER):
                spare[lane * SUPER + j] = rows[row, j]
        flat, offset = spare, 0
    for j in range(0, SUPER, LANES):
        store_transposed(flat, offset + j, SUPER, target, LANES * j)


@inner
def stage_weights(w_RB, first, spare, target):
    """Super-blocks first … first + 15 into lanes; past the end, the lanes repeat earlier ones."""
    _turn(w_RB, first, spare, target)
    for j in range(SUPER):
        x = load(target, LANES * j)
        store(target, LANES * j, larger(smaller(x, splat(REACH)), splat(-REACH)))


@inner
def stage_importance(importance_IB, first, spare, target):
    """The importance of super-blocks first … first + 15 (row number modulo I), its mean made 1.

    Without any (None) there is nothing to do; in a block where all is zero, all weights matter alike.
    """
    if importance_IB is None:
        return
    _turn(importance_IB, first, spare, target)
    # Cut to what leaves a sum of 256 finite: importance may be anything that a file holds.
    total = splat(0.0)
    for j in range(SUPER):
        total = total + smaller(larger(load(target, LANES * j), splat(0.0)), splat(1e30))
    known = less(splat(LEAST), total)
    scale = splat(np.float32(SUPER)) / where(known, total, splat(1.0))
    for j in range(SUPER):
        w = smaller(larger(load(target, LANES * j), splat(0.0)), splat(1e30)) * scale + splat(FLOOR)
        store(target, LANES * j, where(known, w, splat(1.0)))


@inner
def weighed(w, at, value):
    """value · importance; numba compiles kernels without importance (None) apart, free of this product."""
    if w is None:
        return value
    return load(w, at) * value


@inner
def room():
    """Space for a staged batch."""
    return aligned_floats(SUPER * LANES)


def room_for(importance_IB):
    """Space for staged importance; None without any.  Known inside kernels only, as `_room_for`."""


@overload(room_for)
def _room_for(importance_IB):
    if isinstance(importance_IB, types.NoneType):
        return lambda importance_IB: None
    return lambda importance_IB: room()
