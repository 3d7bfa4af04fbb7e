"""The search of scales against all candidates tried in float64, and what holds for every codec.

Legend: R rows, C columns, B the columns of a block, N bytes of a packed row.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_gptq import LEVELS, ROW_LONG, decoded, evidence, inputs, weights

from dither.codecs import codec
from dither.errors import DitherError, UsageError
from dither.solvers import find_solver, solver_names
from dither.solvers.scales import CLOSER, WIDER, ScaleSearch
from dither.types import Evidence
from solvers.reference import objectives

BLOCK, MOST = 128, 15


def affine(w_B: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """ŵ = s · (q − z), q the nearest of 0 … 15, as a reader computes it."""
    code_B = np.clip(np.rint(w_B.astype(np.float32) / np.float32(scale)), -zero, MOST - zero)
    return code_B * np.float64(scale)


def near(scale: float, zero: int, factors: tuple[float, ...]) -> list[tuple[float, int]]:
    """Scales as float16 keeps them, zero points that a code can be."""
    scales = [float(np.float16(np.float32(scale) * np.float32(factor))) for factor in factors]
    return [(s, min(max(zero + step, 0), MOST)) for s, step in product(scales, (-1, 0, 1))]


def slow_search(w_C: np.ndarray, known: Evidence, sweeps: int) -> np.ndarray:
    """One row: every candidate of every block judged by the whole e H eᵀ, in float64."""
    c, hessian_CC = codec("uint4-g128"), known.hessian_CC.astype(np.float64)
    error_C, value_C, chosen = np.zeros(len(w_C)), np.zeros(len(w_C)), {}

    def take_best(at: slice, candidates: list[tuple[float, int]]) -> None:
        def loss(candidate: tuple[float, int]) -> float:
            error_C[at] = w_C[at] - affine(w_C[at], *candidate)
            return float(error_C @ hessian_CC @ error_C)

        chosen[at.start] = min(candidates, key=loss)
        value_C[at] = affine(w_C[at], *chosen[at.start])
        error_C[at] = w_C[at] - value_C[at]

    spans = [slice(at, at + BLOCK) for at in range(0, len(w_C), BLOCK)]
    for at in spans:
        fits = [c.fit(w_C[None, at], v_B) for v_B in (known.mean_square_C[at], None)]
        take_best(at, [each for fit in fits for each in near(fit.scale_R[0], int(fit.zero_R[0]), WIDER)])
    for _, at in product(range(sweeps), spans):
        take_best(at, near(*chosen[at.start], CLOSER))
    return value_C


@pytest.mark.parametrize("sweeps", [0, 1])
def test_equals_trying_every_candidate(sweeps: int) -> None:
    w_RC, known = weights(rows=6), evidence(inputs())
    solved = ScaleSearch(sweeps=sweeps, threads=1)(w_RC, codec("uint4-g128"), known)
    value_RC = np.array([slow_search(w_C, known, sweeps) for w_C in w_RC])
    np.testing.assert_allclose(decoded("uint4-g128", solved), value_RC, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["uint4-g128", "int4-g128", "nf4-g64", "Q4_0", "Q4_K", "MXFP4", "NVFP4"])
def test_loses_less_than_nearest_and_reports_it(name: str) -> None:
    w_RC, x_TC = weights(seed=6), inputs(8192, seed=7)
    known = evidence(x_TC[:-512], held_HC=x_TC[-512:])
    solved = ScaleSearch()(w_RC, codec(name), known)
    nearest_RC = codec(name).decode(codec(name).encode(w_RC, known.mean_square_C))
    for key, value_RC in (("", decoded(name, solved)), ("nearest_", nearest_RC)):
        objective = objectives(w_RC, value_RC, known.hessian_CC).sum()
        held = np.square((w_RC.astype(np.float64) - value_RC) @ x_TC[-512:].T).sum() / 512
        assert solved.record[f"{key}objective"] == pytest.approx(objective, rel=1e-3)
        assert solved.record[f"{key}held"] == pytest.approx(held, rel=1e-3)
    assert solved.record["held"] < (0.95 if "int" in name else 1) * solved.record["nearest_held"]
    assert solved.solver == "scales" and solved.notes == ()


@pytest.mark.parametrize("name", ["uint4-g128", "int4-g128", "nf4-g64", "Q4_1", "MXFP4", "int4-channel"])
def test_every_code_is_the_nearest_of_its_grid(name: str) -> None:
    w_RC, known = weights(), evidence(inputs())
    c = codec(name, w_RC.shape[1])
    raw_RN = ScaleSearch()(w_RC, c, known).raw_RN
    codes_RB, grid = c.unpack(raw_RN.reshape(-1, c.block_bytes))
    snapped_RB = c.snap(w_RC.reshape(-1, c.block), grid, slice(0, c.block))
    np.testing.assert_array_equal(snapped_RB, codes_RB)


@pytest.mark.parametrize("name", ["IQ3_S", "fp8-128x128"])
def test_codecs_without_levels_of_a_row_are_rounded_to_nearest(name: str) -> None:
    w_RC, known = weights(), evidence(inputs())
    c = codec(name, w_RC.shape[1])
    solved = ScaleSearch()(w_RC, c, known)
    np.testing.assert_array_equal(solved.raw_RN, c.encode(w_RC, known.mean_square_C))
    assert solved.solver == "nearest" and "rounded to nearest" in solved.notes[0]


def test_keeps_nearest_where_inputs_held_back_say_so() -> None:
    base_TC = np.random.default_rng(8).standard_normal((1024, 128)).astype(np.float32)
    alike_TC, opposite_TC = np.repeat(base_TC, 2, axis=1), np.repeat(base_TC, 2, axis=1)
    opposite_TC[:, 1::2] *= -1
    w_RC, known = weights(columns=256), evidence(alike_TC, held_HC=opposite_TC[:64])
    solved = ScaleSearch()(w_RC, codec("uint4-g128"), known)
    assert solved.solver == "nearest" and solved.record["objective"] < solved.record["nearest_objective"]
    assert "the search of scales was no better" in solved.notes[0]
    np.testing.assert_array_equal(solved.raw_RN, codec("uint4-g128").encode(w_RC, known.mean_square_C))


def test_threads_and_neighbors_change_nothing() -> None:
    w_RC, known, c = weights(rows=150, columns=256), evidence(inputs(columns=256)), codec("uint4-g128")
    one, three = (ScaleSearch(threads=threads)(w_RC, c, known).raw_RN for threads in (1, 3))
    np.testing.assert_array_equal(one, three)
    assert ScaleSearch()(w_RC[:0], c, known).raw_RN.shape == (0, one.shape[1])


def test_refuses_what_is_no_hessian() -> None:
    w_RC, known, c = weights(columns=256), evidence(inputs(columns=256)), codec("uint4-g128")
    for missing in (None, Evidence(1, known.mean_square_C)):
        with pytest.raises(UsageError, match="needs a Hessian"):
            ScaleSearch()(w_RC, c, missing)
    with pytest.raises(DitherError, match=r"\(256, 256\): does not fit weights of 512"):
        ScaleSearch()(weights(), c, known)
    with pytest.raises(UsageError, match="multiple of 128"):
        ScaleSearch()(w_RC[:, :64], c, known)


@settings(max_examples=20)
@given(st.data())
def test_never_worse_than_nearest_on_what_judges(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*LEVELS, *ROW_LONG, "NVFP4"]))
    seed, rows = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 5))
    tokens, held = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 20))
    w_RC, x_TC = weights(rows, 256, seed), inputs(tokens + held, 256, seed)
    w_RC *= np.float32(10.0 ** data.draw(st.integers(-6, 4)))
    x_TC *= np.float32(10.0 ** data.draw(st.integers(-6, 6)))
    solved = ScaleSearch()(w_RC, codec(name, 256), evidence(x_TC[:tokens], x_TC[tokens:]))
    judge = "held" if held else "objective"
    assert np.isfinite(codec(name, 256).decode(solved.raw_RN)).all()
    if solved.solver == "scales":
        assert solved.record[judge] <= solved.record[f"nearest_{judge}"]


def test_is_found_by_name() -> None:
    assert "scales" in solver_names() and find_solver("scales", threads=2).needs == {"hessian"}
