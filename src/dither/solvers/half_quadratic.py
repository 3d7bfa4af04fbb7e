"""Half-quadratic rounding: grids that fit most weights well and let a few outliers go.

Least squares lets the largest errors decide where a grid lies.  HQQ (Badri & Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models", https://mobiusml.github.io/hqq_blog) minimizes Σ |w − ŵ|^p
with p < 1 instead, under which an outlier costs little more than a middling error, and needs no data for it.
That sum has no slope to follow, so the error is split in two: e, which may be anything, and the rest, which
a grid must fit,

    min over e and ŵ of   Σ |e|^p + β/2 (w − ŵ − e)²

    e ← sign(x) · max(|x| − |x|^(p−1) / β, 0)  of x = w − ŵ     the error that is granted
    grid ← least squares fit of w − e, codes held; codes ← those nearest to w; β ← κβ

until a block gets no better.  Two things differ from the paper.  It takes weights as they are, and of a
language model's, which are about 0.02, β = 10 grants next to nothing: here x is measured in steps, √12 times
the root mean square error of an even grid, so that the answer does not depend on the weights' scale.  And it
moves only an integer grid's zero: here all that a grid of scaled levels stores (`codecs.base.Levels`) is
refitted, and any other grid is fitted anew to w − e.

With evidence, columns count by their mean square; without, all alike.  Nearest rounding is where it starts,
and is kept wherever it was better.

Legend: R rows, C columns, N blocks, B the weights of one, S sub-blocks, I the weights of one, M numbers to
choose among.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import LevelCodec, Levels, Scales, as_stored
from dither.codecs.blocks import blocks
from dither.types import Bytes, Codec, Evidence, Floats, Solved

FLAT = 1e-5  # a determinant this small, relative to its diagonal, tells two unknowns not apart
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
SHARED = "rows share scales, which are refitted row by row: nearest kept"


class HalfQuadratic:
    """Data-free and robust (see the module).  Safe to call from several threads."""

    name = "half-quadratic"
    needs: frozenset[str] = frozenset()

    def __init__(
        self, *, norm: float = 0.7, beta: float = 10.0, growth: float = 1.01, rounds: int = 20, threads: int = 1
    ) -> None:
        """`norm` is p, `beta` β, `growth` κ, all with the paper's values; at most so many `rounds`.

        `threads` change nothing: rows are independent, and the caller spreads them.
        """
        self.norm, self.beta, self.growth, self.rounds = norm, beta, growth, rounds

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        """Bytes of R rows.  The record's "lp" and "nearest_lp" are Σ importance · |w − ŵ|^p."""
        importance_C = None if evidence is None else evidence.mean_square_C
        nearest_RN = codec.encode(w_RC, importance_C)
        if codec.rows_together > 1:
            return Solved(nearest_RN, "nearest", notes=(SHARED,))
        importance_NB = None
        if importance_C is not None:  # of each block, beside it
            importance_NB = np.tile(blocks(importance_C, codec.block), (len(w_RC), 1))
        raw_RN = self._improved(blocks(w_RC, codec.block), importance_NB, codec).reshape(nearest_RN.shape)

        old_R, new_R = (self._cost(w_RC - codec.decode(raw), importance_C).sum(axis=1) for raw in (nearest_RN, raw_RN))
        better_R = new_R < old_R
        record = {"lp": float(np.minimum(old_R, new_R).sum()), "nearest_lp": float(old_R.sum())}
        if not better_R.any():
            return Solved(nearest_RN, "nearest", record)
        return Solved(np.where(better_R[:, None], raw_RN, nearest_RN), self.name, record)

    def _improved(self, w_NB: Floats, importance_NB: Floats | None, codec: Codec) -> Bytes:
        """The best bytes of each block that the iteration passed through."""
        kind = _LevelGrids if isinstance(codec, LevelCodec) else _AnyGrids
        grids: _LevelGrids | _AnyGrids = kind(codec, w_NB, importance_NB)
        raw_NN, value_NB = grids.start()
        best_N = self._cost(w_NB - value_NB, importance_NB).sum(axis=1)
        # An even grid of step s errs by s/√12 in the root mean square: the step that such errors would come from.
        step_N = np.sqrt(12 * np.square(w_NB - value_NB).mean(axis=1))
        at, beta = np.flatnonzero(step_N), self.beta
        for _ in range(self.rounds):
            if not len(at):
                break
            # Grant the largest errors, fit a grid to the rest, and see what the codes nearest to w now cost.
            error_NB = shrunk(w_NB[at] - value_NB[at], step_N[at, None], self.norm, beta)
            raw, value_NB[at] = grids.refit(w_NB[at] - error_NB, at)
            weight_NB = None if importance_NB is None else importance_NB[at]
            cost_N = self._cost(w_NB[at] - value_NB[at], weight_NB).sum(axis=1)
            better_N = cost_N < best_N[at]
            # A block that got no better is done; the others go on from where they are.
            at = at[better_N]
            raw_NN[at], best_N[at] = raw[better_N], cost_N[better_N]
            beta *= self.growth
        return raw_NN

    def _cost(self, error: Floats, importance: Floats | None) -> Doubles:
        cost = np.abs(error) ** np.float32(self.norm)
        return (cost if importance is None else cost * importance).astype(np.float64)


def shrunk(x_NB: Floats, step_N1: Floats, norm: float, beta: float) -> Floats:
    """The e of least |e|^p + β/2 (x − e)², nearly: the generalized soft threshold, measured in steps."""
    # In steps, so that p and β mean the same for weights of any size.
    size_NB = np.abs(x_NB) / step_N1
    with np.errstate(divide="ignore", over="ignore"):
        size_NB -= size_NB ** np.float32(norm - 1) / np.float32(beta)
    return np.copysign(np.maximum(size_NB, 0) * step_N1, x_NB)


class _AnyGrids:
    """Blocks whose grids only their codec knows: fitted anew, each time.

    `start` gives bytes and values of nearest rounding, `refit` those of the blocks `at` under grids fitted to
    `target_NB`.
    """

    def __init__(self, codec: Codec, w_NB: Floats, importance_NB: Floats | None) -> None:
        self.codec, self.w_NB, self.importance_NB = codec, w_NB, importance_NB

    def start(self) -> tuple[Bytes, Floats]:
        return self.refit(self.w_NB, np.arange(len(self.w_NB)))

    def refit(self, target_NB: Floats, at: Rows) -> tuple[Bytes, Floats]:
        importance_NB = None if self.importance_NB is None else self.importance_NB[at]
        grid, whole = self.codec.fit(target_NB, importance_NB), slice(0, self.codec.block)
        codes_NB = self.codec.snap(self.w_NB[at], grid, whole)
        raw_NN = np.array(self.codec.pack(codes_NB, grid))
        return raw_NN, self.codec.value(codes_NB, grid, whole)


class _LevelGrids:
    """The same for grids of scaled levels: what they store is refitted by least squares, codes held."""

    def __init__(self, codec: Any, w_NB: Floats, importance_NB: Floats | None) -> None:
        self.codec, self.levels = codec, codec.levels
        self.w_NB, self.importance_NB = w_NB, importance_NB
        self.scales: Scales = codec.to_scales(codec.fit(w_NB, importance_NB))
        self.level_NB = np.empty(w_NB.shape, np.intp)

    def start(self) -> tuple[Bytes, Floats]:
        return self._round(np.arange(len(self.w_NB)), self.scales)

    def refit(self, target_NB: Floats, at: Rows) -> tuple[Bytes, Floats]:
        weight_NB = None if self.importance_NB is None else self.importance_NB[at]
        sums = Sums.of(self.levels, self.levels.numbers_K[self.level_NB[at]], target_NB, weight_NB)
        scales = refitted(self.levels, Scales._make(part[at] for part in self.scales), sums)
        mine: tuple[npt.NDArray[Any], ...] = self.scales
        for old, new in zip(mine, scales, strict=True):
            old[at] = new
        return self._round(at, scales)

    def _round(self, at: Rows, scales: Scales) -> tuple[Bytes, Floats]:
        """Nearest levels, and what is stored for them."""
        levels = self.levels
        scale_NB, offset_NB = (np.repeat(part, levels.size, axis=1) for part in scales.of_sub_blocks(levels))
        self.level_NB[at] = nearest_levels(levels, self.w_NB[at] + offset_NB, scale_NB)
        value_NB = scale_NB * levels.numbers_K[self.level_NB[at]] - offset_NB
        return self.codec.pack(levels.codes_K[self.level_NB[at]], self.codec.from_scales(scales)), value_NB


def nearest_levels(levels: Levels, w_NB: Floats, scale_NB: Floats) -> Rows:
    numbers_K = levels.numbers_K
    x_NB = np.divide(w_NB, scale_NB, out=np.zeros_like(w_NB), where=scale_NB != 0)
    if (np.diff(numbers_K) == 1).all():
        steps_NB = np.clip(np.rint(x_NB - numbers_K[0]), 0, len(numbers_K) - 1)
        whole: Rows = steps_NB.astype(np.intp)
        return whole
    return np.searchsorted((numbers_K[1:] + numbers_K[:-1]) / 2, x_NB)


class Sums(NamedTuple):
    """Σ v n², Σ v n, Σ v, Σ v t n and Σ v t over targets t, numbers n and weights v: all that the squared
    error Σ v (t − s n + o)² needs to know of them."""

    nn: Doubles
    n: Doubles
    one: Doubles
    tn: Doubles
    t: Doubles

    @staticmethod
    def of(levels: Levels, number_NB: Floats, target_NB: Floats, weight_NB: Floats | None) -> Sums:
        """Of each sub-block, (N, S)."""
        shape = (len(number_NB), -1, levels.size)
        n, t = number_NB.reshape(shape).astype(np.float64), target_NB.reshape(shape)
        v = np.ones_like(n) if weight_NB is None else weight_NB.reshape(shape).astype(np.float64)
        vn, vt = v * n, v * t
        return Sums((vn * n).sum(-1), vn.sum(-1), v.sum(-1), (vt * n).sum(-1), vt.sum(-1))

    def scaled(self, m_NS: Floats, l_NS: Floats) -> Sums:
        """Of each block, (N,), with numbers multiplied by m and ones by l."""
        parts = (self.nn * m_NS * m_NS, self.n * m_NS * l_NS, self.one * l_NS * l_NS, self.tn * m_NS, self.t * l_NS)
        return Sums(*(part.sum(axis=1) for part in parts))

    def scale_and_offset(self, subtracts: bool) -> tuple[Doubles, Doubles]:
        """The s and o of least error; o is 0 where nothing is subtracted or the two cannot be told apart."""
        # The normal equations of t ≈ s n − o.  Where all numbers are one, a scale and an offset do the same.
        determinant = self.nn * self.one - self.n * self.n
        apart = subtracts & (determinant > FLAT * self.nn * self.one)
        safe = np.where(apart, determinant, 1)
        alone = np.divide(self.tn, self.nn, out=np.zeros_like(self.tn), where=self.nn > 0)
        s = np.where(apart, (self.one * self.tn - self.n * self.t) / safe, alone)
        o = np.where(apart, (self.n * self.tn - self.nn * self.t) / safe, 0)
        return s, o


def refitted(levels: Levels, scales: Scales, sums: Sums) -> Scales:
    """Least squares by turns: each sub-block's multiples under the units as they are, then the units."""
    if levels.tied:
        return _refitted_zeros(levels, scales, sums)
    unit_R, multiple_RS, below_R, lower_RS = scales
    subtracts = bool(levels.lowers_M.any())
    scale_NS, offset_NS = sums.scale_and_offset(subtracts)
    # First what each sub-block would like best, rounded to the multiples of the units that there are now …
    if len(levels.multiples_M) > 1:
        multiple_RS = _chosen(levels.multiples_M, scale_NS, unit_R[:, None], multiple_RS)
        # The offset that is best with the scale that was really chosen.
        scale_NS[:] = unit_R[:, None] * levels.multiples_M[multiple_RS]
        offset_NS[:] = np.divide(scale_NS * sums.n - sums.t, sums.one, out=np.zeros_like(sums.t), where=sums.one > 0)
    if len(levels.lowers_M) > 1:
        lower_RS = _chosen(levels.lowers_M, offset_NS, below_R[:, None], lower_RS)
    # … then, multiples held, the units that are best for all sub-blocks of the block together.
    if levels.free_unit:
        of_blocks = sums.scaled(levels.multiples_M[multiple_RS], levels.lowers_M[lower_RS])
        unit, below = of_blocks.scale_and_offset(subtracts)
        if levels.positive:
            unit = np.where(unit > 0, unit, unit_R)
        unit_R, below_R = (as_stored(part.astype(np.float32), levels.unit_type) for part in (unit, below))
    return Scales(unit_R, multiple_RS, below_R, lower_RS)


def _refitted_zeros(levels: Levels, scales: Scales, sums: Sums) -> Scales:
    """The same where what is subtracted is a whole number of steps: zero points first, then the step."""
    scale_NS, offset_NS = sums.scale_and_offset(True)
    lower_RS = _chosen(levels.lowers_M, offset_NS, scale_NS, scales.lower_RS)
    # Zero points fixed, ŵ = unit · (n − z) has one unknown left per block: least squares over all its weights.
    zero_NS = levels.lowers_M[lower_RS].astype(np.float64)
    of_step_N = (sums.nn - 2 * zero_NS * sums.n + zero_NS**2 * sums.one).sum(axis=1)
    with_target_N = (sums.tn - zero_NS * sums.t).sum(axis=1)
    now_N = scales.unit_R.astype(np.float64)
    step_N = np.divide(with_target_N, of_step_N, out=now_N, where=of_step_N > 0)
    unit_R = as_stored(step_N.astype(np.float32), levels.unit_type)
    return Scales(unit_R, scales.multiple_RS, unit_R, lower_RS)


def _chosen(
    numbers_M: Floats, wanted_NS: Doubles, unit_NS: npt.NDArray[np.floating], now_NS: npt.NDArray[np.int16]
) -> npt.NDArray[np.int16]:
    """The multiples of the unit nearest to what is wanted; those of now where the unit is 0."""
    unit_NS = np.broadcast_to(unit_NS, wanted_NS.shape)
    with np.errstate(over="ignore"):
        ratio_NS = np.divide(wanted_NS, unit_NS, out=np.zeros_like(wanted_NS), where=unit_NS != 0)
    index_NS = np.searchsorted((numbers_M[1:] + numbers_M[:-1]) / 2, ratio_NS)
    return np.where(unit_NS != 0, index_NS, now_NS).astype(np.int16)


SOLVER = HalfQuadratic
