"""Half-quadratic rounding against the iteration written out in float64, and what holds for every codec.

Legend: R rows, C columns, B the weights of a block, N bytes of a packed row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from dither.codecs import codec
from dither.codecs.base import BlockCodec, Scales, plain_levels, plain_scales
from dither.errors import UsageError
from dither.solvers import find_solver, solver_names
from dither.solvers.half_quadratic import HalfQuadratic
from dither.types import Evidence

ROWS, COLUMNS, NORM = 12, 512, 0.7
CODECS = [
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "IQ4_NL",
    "MXFP4",
    "Q2_K",
    "Q6_K",
    "Q8_0",
    "IQ3_S",
    "BF16",
    "int4-g64",
    "uint4-g64",
    "uint2-g32-bf16",
    "nf4-g64",
]


def weights(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.02 * random.standard_t(3, (ROWS, COLUMNS))).astype(np.float32)


def importance() -> Evidence:
    return Evidence(1, np.random.default_rng(1).lognormal(0, 1, COLUMNS).astype(np.float32))


def lp(w_RC: np.ndarray, value_RC: np.ndarray, importance_C: np.ndarray | float = 1.0) -> np.ndarray:
    return (importance_C * np.abs(w_RC.astype(np.float64) - value_RC) ** NORM).sum(axis=1)


class AffineGrid(NamedTuple):
    scale_R: np.ndarray
    below_R: np.ndarray


class Affine(BlockCodec):
    """ŵ = s·q − o, q = 0 … 15, from the least to the largest of 64 weights: what GPTQ's peers call int4."""

    name, block, block_bytes = "affine", 64, 64 + 4
    levels = plain_levels(range(16), np.arange(16, dtype=np.uint8), 64, lower=True)

    def to_scales(self, grid: AffineGrid) -> Scales:
        return plain_scales(grid.scale_R, -grid.below_R)

    def from_scales(self, scales: Scales) -> AffineGrid:
        return AffineGrid(scales.unit_R, scales.below_R)

    def fit(self, w_RB: np.ndarray, importance_B: np.ndarray | None) -> AffineGrid:
        least_R, most_R = w_RB.min(axis=1), w_RB.max(axis=1)
        parts = ((most_R - least_R) / 15, -least_R)
        return AffineGrid(*(part.astype(np.float16).astype(np.float32) for part in parts))

    def snap(self, w_RK: np.ndarray, grid: AffineGrid, at: slice) -> np.ndarray:
        steps_RK = (w_RK + grid.below_R[:, None]) / grid.scale_R[:, None]
        return np.clip(np.rint(steps_RK), 0, 15).astype(np.uint8)

    def value(self, codes_RK: np.ndarray, grid: AffineGrid, at: slice) -> np.ndarray:
        return codes_RK.astype(np.float32) * grid.scale_R[:, None] - grid.below_R[:, None]

    def pack(self, codes_RB: np.ndarray, grid: AffineGrid) -> np.ndarray:
        parts = np.stack([grid.scale_R, grid.below_R], axis=1).astype(np.float16).view(np.uint8)
        return np.concatenate([parts, codes_RB], axis=1)

    def unpack(self, raw_RN: np.ndarray) -> tuple[np.ndarray, AffineGrid]:
        parts = np.ascontiguousarray(raw_RN[:, :4]).view(np.float16).astype(np.float32)
        return raw_RN[:, 4:], AffineGrid(parts[:, 0], parts[:, 1])


def slow_block(w_B: np.ndarray, weight_B: np.ndarray, beta: float = 10.0, rounds: int = 20) -> np.ndarray:
    """One block by the paper's three steps, in float64 but for what is stored as float16."""
    w_B = w_B.astype(np.float64)
    scale, below = np.float16((w_B.max() - w_B.min()) / 15), np.float16(-w_B.min())
    best_B, least, step = None, np.inf, None
    for _ in range(rounds + 1):
        code_B = np.clip(np.rint((w_B + float(below)) / float(scale)), 0, 15)
        x_B = w_B - (code_B * float(scale) - float(below))
        now = float((weight_B * np.abs(x_B) ** NORM).sum())
        if now >= least:
            break
        best_B, least = w_B - x_B, now
        step = step or np.sqrt(12 * np.mean(x_B**2))
        size_B = np.abs(x_B) / step
        e_B = step * np.sign(x_B) * np.maximum(size_B - size_B ** (NORM - 1) / beta, 0)
        root_B = np.sqrt(weight_B)
        unknowns = np.stack([code_B, -np.ones_like(code_B)], axis=1) * root_B[:, None]
        scale, below = np.linalg.lstsq(unknowns, (w_B - e_B) * root_B, rcond=None)[0].astype(np.float16)
        beta *= 1.01
    return best_B


@pytest.mark.parametrize("known", [None, importance()], ids=["plain", "weighed"])
def test_equals_the_papers_iteration(known: Evidence | None) -> None:
    w_RC = weights()
    weight_C = np.ones(COLUMNS) if known is None else known.mean_square_C
    slow_RC = np.array(
        [
            np.concatenate([slow_block(*block) for block in zip(np.split(w_C, 8), np.split(weight_C, 8), strict=True)])
            for w_C in w_RC
        ]
    )
    solved = HalfQuadratic()(w_RC, Affine(), known)
    value_RC = Affine().decode(solved.raw_RN)
    close_RN = (np.abs(value_RC - slow_RC) < 1e-6).reshape(ROWS, 8, 64).all(axis=2)

    # A float16 on the edge may fall the other way in float32, and send its block another way.
    assert close_RN.mean() > 0.95
    assert lp(w_RC, value_RC, weight_C).sum() == pytest.approx(lp(w_RC, slow_RC, weight_C).sum(), rel=1e-3)
    assert solved.solver == "half-quadratic"
    assert solved.record["lp"] < 0.98 * solved.record["nearest_lp"]  # the extremes no longer set the grid


@pytest.mark.parametrize("known", [None, importance()], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", CODECS)
def test_no_row_is_worse_than_nearest(name: str, known: Evidence | None) -> None:
    c, w_RC = codec(name), weights()
    weight_C = 1.0 if known is None else known.mean_square_C
    solved = HalfQuadratic()(w_RC, c, known)
    nearest_RN = c.encode(w_RC, None if known is None else known.mean_square_C)
    found_R, nearest_R = (lp(w_RC, c.decode(raw), weight_C) for raw in (solved.raw_RN, nearest_RN))

    assert (found_R <= nearest_R * (1 + 1e-6)).all()
    assert solved.record["lp"] == pytest.approx(found_R.sum(), rel=1e-5)
    assert solved.record["nearest_lp"] == pytest.approx(nearest_R.sum(), rel=1e-5)
    assert solved.solver in ("half-quadratic", "nearest")


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "Q2_K", "int4-g64", "uint4-g64", "uint2-g32-bf16", "nf4-g64"]
)
def test_scaled_levels_gain(name: str) -> None:
    record = HalfQuadratic()(weights(), codec(name), None).record
    assert record["lp"] < 0.999 * record["nearest_lp"]


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "IQ4_NL"])
def test_the_weights_scale_does_not_matter(name: str) -> None:
    c, w_RC = codec(name), weights()
    small, large = (HalfQuadratic()(w_RC * np.float32(factor), c, None) for factor in (1, 16))
    assert large.record["lp"] == pytest.approx(16**NORM * small.record["lp"], rel=1e-3)


@pytest.mark.parametrize("name", CODECS)
def test_extremes_stay_finite(name: str) -> None:
    w_RC = np.zeros((4, COLUMNS), np.float32)
    w_RC[1, 7], w_RC[2], w_RC[3] = 1e4, 1e-30, 0.5
    c = codec(name)
    solved = HalfQuadratic()(w_RC, c, None)
    value_RC = c.decode(solved.raw_RN)
    assert np.isfinite(value_RC).all()
    assert (value_RC[0] == 0).all()
    assert (lp(w_RC, value_RC) <= lp(w_RC, c.decode(c.encode(w_RC))) * (1 + 1e-6)).all()


def test_rows_that_share_scales_are_left_to_nearest() -> None:
    c = codec("fp8-128x128", COLUMNS)
    solved = HalfQuadratic()(weights(), c, None)
    assert (solved.raw_RN == c.encode(weights())).all()
    assert solved.solver == "nearest"
    assert "share scales" in solved.notes[0]


def test_rows_are_independent() -> None:
    w_RC, c = weights(), codec("Q4_K")
    whole_RN = HalfQuadratic()(w_RC, c, None).raw_RN
    parts = [HalfQuadratic()(w_RC[start : start + 4], c, None).raw_RN for start in range(0, ROWS, 4)]
    assert (np.concatenate(parts) == whole_RN).all()


def test_the_name_has_a_dash_and_either_spelling_is_taken() -> None:
    assert "half-quadratic" in solver_names()
    assert isinstance(find_solver("half-quadratic"), HalfQuadratic)
    assert isinstance(find_solver("half_quadratic", 2), HalfQuadratic)
    with pytest.raises(UsageError, match="half-quadratic"):
        find_solver("half")
