"""Blocks at the length that their weights had: the last step of encoding.

The scale of least squared error shortens a block.  Where Σ v·ŵ·(w − ŵ) = 0, as it is under every such scale, the
part of w that ŵ keeps, Σ v·w·ŵ / Σ v·w², is 1 − ε, with ε the relative error itself: 7 % at two bits.  Errors
that are noise average out over a network's layers; shortenings all point the same way and add up, attention
grows flat and thresholds are missed.  So the codes, which fix a block's direction, are those of least
squared error, and the scale is then raised for this direction to have the length of w:

    d ← d · (Σ v·w² / Σ v·w·ŵ)^share

ŵ being proportional to the float16 scales that a whole block shares, those are all that changes.

Sums run in sixteen lanes, in one order on every machine, in units of the block's largest weight.

Legend: N blocks, B weights of a block, P rows of importance that repeat down the blocks, raw_NN one packed
block per row, O places in it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import f32_to_f16_finite, load_f16, store_f16
from dither.codecs.kernels.simd import LANES, aligned_floats, fma, larger, load, magnitude, smaller, splat, store

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = np.float32(1e-30)
MOST_IMPORTANCE = np.float32(1e30)
# A block whose codes kept less than half of it, or more than twice, was not merely shortened: its scale met an end
# of float16's range.  Nor is a scale of few steps of 2⁻²⁴ lengthened, for the next step is too far.
LEAST_KEPT, MOST_KEPT = np.float32(0.5), np.float32(2)
COARSE = np.float32(2.0**-20)


@njit(cache=True, nogil=True)
def restore(w_NB, value_NB, importance_PB, share, places_O, raw_NN):
    """Multiplies the float16s at bytes `places_O` of every block by (Σ v·w² / Σ v·w·ŵ) to the power `share`."""
    columns = w_NB.shape[1]
    w, value, importance = w_NB.reshape(-1), value_NB.reshape(-1), importance_PB.reshape(-1)
    lanes = aligned_floats(3 * LANES)
    for n in range(w_NB.shape[0]):
        at, p = n * columns, n % importance_PB.shape[0] * columns
        peak = total = splat(ZERO)
        for j in range(0, columns, LANES):
            peak = larger(peak, magnitude(load(w, at + j)))
            total = total + smaller(larger(load(importance, p + j), splat(ZERO)), splat(MOST_IMPORTANCE))
        store(lanes, 0, peak)
        store(lanes, LANES, total)
        largest, weight = ZERO, ZERO
        for lane in range(LANES):
            largest, weight = max(largest, lanes[lane]), weight + lanes[LANES + lane]
        if not largest > NOTHING:
            continue
        # Where nothing is important all is alike, as in the searches.
        unit, known = splat(ONE / largest), weight > NOTHING
        per_weight, alike = splat(ONE / weight if known else ZERO), splat(ZERO if known else ONE)
        own = kept = splat(ZERO)
        for j in range(0, columns, LANES):
            v = smaller(larger(load(importance, p + j), splat(ZERO)), splat(MOST_IMPORTANCE))
            x = load(w, at + j) * unit
            vx = fma(v, per_weight, alike) * x
            own = fma(vx, x, own)
            kept = fma(vx, load(value, at + j) * unit, kept)
        store(lanes, 0, own)
        store(lanes, LANES, kept)
        length, left = ZERO, ZERO
        for lane in range(LANES):
            length, left = length + lanes[lane], left + lanes[LANES + lane]
        if not LEAST_KEPT * length < left < MOST_KEPT * length:
            continue
        if abs(load_f16(raw_NN[n], places_O[0])) < COARSE:
            continue
        factor = np.float32((length / left) ** share)
        for place in places_O:
            scale = load_f16(raw_NN[n], place)
            store_f16(raw_NN[n], place, f32_to_f16_finite(scale * factor))
