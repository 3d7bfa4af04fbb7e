"""Scales that are chosen by what they do to the outputs; every weight takes the nearest level under them.

Nearest rounding fits a block's scale as if inputs were uncorrelated.  They are not: a range that is cut a
little moves all large weights of a block toward zero, and what that does to the output depends on the inputs
that these weights meet together.  A layer's expected squared output error is tr(E H Eᵀ), with E = W − Ŵ and
H = E[x xᵀ].  Of one row's error e, with all blocks but B held, it is

    e_B H_BB e_Bᵀ + 2 e_B g_Bᵀ + …,    g_B = Σ_{A≠B} e_A H_AB

AWQ's reference implementation (Lin et al. 2023, arXiv:2306.00978) searches how far to clip each group by the
first term alone, on sampled inputs.  Here the whole quadratic decides, the zero point is tried on either
side as well, and blocks are visited again once all are rounded, since each g_B depends on the others:

    first    in turn, around two fits of the codec, columns weighed by E[x²] and all alike; blocks that are
             not rounded yet have no error
    again    around what was chosen, in smaller steps, while that lowers the sum

Weights are not moved to make up for each other's errors, as `gptq` does, so that codes remain plain nearest
rounding.  The codec must tell its levels (`codecs.base.Levels`); any other is rounded by its own search.

Rows are independent given H, so they go through threads in chunks of fixed size: bytes do not depend on the
number of threads.

Legend: R rows, C columns, B the columns of a block, S sub-blocks, N bytes of a packed block or row.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from dither.codecs.base import LevelCodec, Levels, Scales, as_stored
from dither.solvers.feedback.blocks import is_wide
from dither.solvers.feedback.hessian import check_layer, needed_hessian
from dither.solvers.feedback.refit import ENOUGH
from dither.solvers.feedback.validation import SHARED, validated
from dither.solvers.gptq import ROWS
from dither.system.cores import available_cores
from dither.types import Bytes, Codec, Evidence, Floats, Solved, Working

WIDER = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08)  # of a fitted scale: the first look
CLOSER = (0.94, 0.97, 1.0, 1.03, 1.06)  # of a chosen one
SWEEPS = 2  # over all blocks, after the first
UNKNOWN = "its levels are its codec's own affair: rounded to nearest"
Indices = npt.NDArray[np.int16]


class ScaleSearch:
    """Nearest rounding under scales of least output error.  Each call uses `threads`."""

    name = "scales"
    needs: frozenset[str] = frozenset({"hessian"})
    working = Working(3.5, 2, 4.5)

    def __init__(self, *, sweeps: int = SWEEPS, threads: int | None = None) -> None:
        """`sweeps` over all blocks after the first, at most.  `threads`: this process's cores by default."""
        self.sweeps = sweeps
        self.threads = threads or available_cores()

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        """Bytes of R rows, nearest rounding's where these are better on inputs held back.

        Raises UsageError without a Hessian or where columns are no whole blocks, DitherError for a Hessian
        that is none.
        """
        hessian_CC = needed_hessian(evidence, self.name)
        assert evidence is not None
        if not isinstance(codec, LevelCodec) or codec.rows_together > 1:
            raw_RN = codec.encode(w_RC, evidence.mean_square_C)
            return Solved(raw_RN, "nearest", notes=(SHARED if codec.rows_together > 1 else UNKNOWN,))
        columns = w_RC.shape[1]
        check_layer(columns, codec, hessian_CC)
        w_RC = np.ascontiguousarray(w_RC, dtype=np.float32)
        known = (codec, hessian_CC, evidence.mean_square_C)
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as pool:
            chunks = (w_RC[start : start + ROWS] for start in range(0, len(w_RC), ROWS))
            parts = pool.map(lambda rows_RC: _Rows(rows_RC, *known).solved(self.sweeps), chunks)
            empty = np.empty((0, columns // codec.block * codec.block_bytes), np.uint8)
            raw_RN = np.concatenate([empty, *parts])
            solved = Solved(raw_RN, self.name)
            return validated(solved, "the search of scales", w_RC, codec, evidence, self.threads)


@dataclass
class _Chosen:
    """A block's scales so far and what they round it to, row by row."""

    scales: Scales
    value_RB: Floats
    cost_R: Floats  # the quadratic above: what the block adds to the loss, the others held

    def take(self, scales: Scales, value_RB: Floats, cost_R: Floats) -> None:
        """Another choice, in the rows where it costs less."""
        better_R = cost_R < self.cost_R
        old: tuple[npt.NDArray[Any], ...] = (*self.scales, self.value_RB, self.cost_R)
        new: tuple[npt.NDArray[Any], ...] = (*scales, value_RB, cost_R)
        for mine, other in zip(old, new, strict=True):
            mine[better_R] = other[better_R]


class _Rows:
    """Some rows of a layer, block by block."""

    def __init__(self, w_RC: Floats, codec: LevelCodec, hessian_CC: Floats, mean_square_C: Floats) -> None:
        self.w_RC, self.codec, self.levels = w_RC, codec, codec.levels
        self.hessian_CC, self.mean_square_C = hessian_CC, mean_square_C
        self.error_RC = np.zeros_like(w_RC)  # of blocks that are rounded
        self.wide = is_wide(codec)
        self.spans = [slice(at, at + codec.block) for at in range(0, w_RC.shape[1], codec.block)]

    def solved(self, sweeps: int) -> Bytes:
        # Blocks not rounded yet have no error, so the first look at one counts only those before it.
        blocks = [self._first(at) for at in self.spans]
        loss = self._loss()
        for _ in range(0 if self.wide else sweeps):
            for at, block in zip(self.spans, blocks, strict=True):
                self._again(at, block)
            # Each choice lowered the sum, or was not taken; a sweep that hardly did is the last.
            before, loss = loss, self._loss()
            if loss >= (1 - ENOUGH) * before:
                break
        return np.concatenate([self._pack(at, b) for at, b in zip(self.spans, blocks, strict=True)], axis=1)

    def _loss(self) -> float:
        return float(((self.error_RC @ self.hessian_CC) * self.error_RC).sum(dtype=np.float64))

    def _first(self, at: slice) -> _Chosen:
        """Around the codec's fits.  A block of thousands of columns, where each look is costly, has one."""
        pull_RB = self._pull(at)
        x_RB = np.ascontiguousarray(self.w_RC[:, at])
        importance_B = np.ascontiguousarray(self.mean_square_C[at], np.float32)
        # Columns weighed by E[x²] suit rows whose errors stay apart, all alike those whose errors add up.
        starts = [
            self.codec.to_scales(self.codec.fit(x_RB, weighting_B))
            for weighting_B in (importance_B, np.ones_like(importance_B))[: 1 if self.wide else 2]
        ]
        value_RB = self._rounded(x_RB, starts[0])
        cost_R = self._cost(x_RB - value_RB, at, pull_RB)
        block = _Chosen(starts[0].copied(), value_RB, cost_R)
        for start in starts:
            self._try(block, at, around(start, self.levels, WIDER), pull_RB)
        return block

    def _again(self, at: slice, block: _Chosen) -> None:
        """Around what it has, now that the others have moved."""
        pull_RB = self._pull(at)
        # What it costs now depends on errors that have changed since it was chosen.
        block.cost_R[:] = self._cost(self.error_RC[:, at], at, pull_RB)
        self._try(block, at, around(block.scales.copied(), self.levels, CLOSER), pull_RB)

    def _try(self, block: _Chosen, at: slice, candidates: Iterator[Scales], pull_RB: Floats) -> None:
        x_RB = np.ascontiguousarray(self.w_RC[:, at])
        for scales in candidates:
            value_RB = self._rounded(x_RB, scales)
            block.take(scales, value_RB, self._cost(x_RB - value_RB, at, pull_RB))
        self.error_RC[:, at] = x_RB - block.value_RB

    def _rounded(self, x_RB: Floats, scales: Scales) -> Floats:
        grid, whole = self.codec.from_scales(scales), slice(0, self.codec.block)
        return self.codec.value(self.codec.snap(x_RB, grid, whole), grid, whole)

    def _pull(self, at: slice) -> Floats:
        """2 g_B: how the errors of all other blocks bear on this one."""
        if len(self.spans) == 1:
            return np.zeros_like(self.error_RC)
        others_RC = self.error_RC.copy()
        others_RC[:, at] = 0
        return 2 * (others_RC @ self.hessian_CC[:, at])

    def _cost(self, error_RB: Floats, at: slice, pull_RB: Floats) -> Floats:
        cost_R: Floats = ((error_RB @ self.hessian_CC[at, at] + pull_RB) * error_RB).sum(axis=1)
        return cost_R

    def _pack(self, at: slice, block: _Chosen) -> Bytes:
        grid, whole = self.codec.from_scales(block.scales), slice(0, self.codec.block)
        codes_RB = self.codec.snap(np.ascontiguousarray(self.w_RC[:, at]), grid, whole)
        return self.codec.pack(codes_RB, grid)


def around(start: Scales, levels: Levels, factors: tuple[float, ...]) -> Iterator[Scales]:
    """Scales near `start`, itself among them: its unit times each factor, its zero points one to either side.

    Where the unit is fixed, sub-blocks take the multiples one to either side instead.
    """
    if not levels.free_unit:
        for step in (-1, 0, 1):
            yield start._replace(multiple_RS=_stepped(start.multiple_RS, step, len(levels.multiples_M)))
        return
    # Only scales that can be stored are tried, so that what is judged is what a decoder will compute.
    for factor in map(np.float32, factors):
        unit_R = as_stored(start.unit_R * factor, levels.unit_type)
        below_R = unit_R if levels.tied else as_stored(start.below_R * factor, levels.unit_type)
        for step in (-1, 0, 1) if levels.tied else (0,):
            lower_RS = _stepped(start.lower_RS, step, len(levels.lowers_M))
            yield start._replace(unit_R=unit_R, below_R=below_R, lower_RS=lower_RS)


def _stepped(index_RS: Indices, step: int, count: int) -> Indices:
    return np.clip(index_RS + step, 0, count - 1).astype(np.int16)


SOLVER = ScaleSearch
