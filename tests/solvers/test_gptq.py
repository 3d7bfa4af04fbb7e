"""GPTQ against Optimal Brain Surgeon written out, and what must hold of refitting, damping and choosing.

Legend: R rows, C columns, T tokens, N bytes of a packed row.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dither.codecs import codec
from dither.errors import DitherError, UsageError
from dither.solvers.feedback import blocks
from dither.solvers.feedback.column_blocks import column_blocks
from dither.solvers.feedback.column_feedback import round_rows
from dither.solvers.feedback.hessian import column_order, factor
from dither.solvers.feedback.refit import refit_rows
from dither.solvers.gptq import Gptq
from dither.types import Codec, Evidence, Solved
from solvers.reference import Traced, objectives, parted_without_a_tie, slow_gptq, traced_gptq

ROWS, COLUMNS = 16, 512
PLAIN = {"fits": 1, "scale_rounds": 0, "refit_rounds": 0, "passes": 0, "threads": 1}
LEVELS = [
    "Q4_K", "Q3_K", "Q2_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4", "TQ2_0",
    "int4-g128", "int2-g64-bf16", "uint4-g128", "uint3-g32-f32", "nf4-g64", "fp4-g64", "fp8-e8", "nvfp4-e8",
]  # fmt: skip
ROW_LONG = ["int4-channel", "int8-channel-f32", "uint4-channel", "fp8-channel"]  # one scale per row


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.02 * random.standard_t(5, (rows, columns))).astype(np.float32)


def inputs(tokens: int = 2048, columns: int = COLUMNS, seed: int = 1) -> np.ndarray:
    """Correlated inputs whose columns differ in size: an autoregressive walk over the columns."""
    random = np.random.default_rng(seed)
    x_TC = random.standard_normal((tokens, columns))
    for column in range(1, columns):
        x_TC[:, column] += 0.7 * x_TC[:, column - 1]
    return (x_TC * random.lognormal(0, 0.7, columns)).astype(np.float32)


def evidence(x_TC: np.ndarray, held_HC: np.ndarray | None = None) -> Evidence:
    wide_TC = x_TC.astype(np.float64)
    hessian_CC = (wide_TC.T @ wide_TC / len(x_TC)).astype(np.float32)
    return Evidence(len(x_TC), np.ascontiguousarray(np.diagonal(hessian_CC)), hessian_CC, held_HC)


def decoded(name: str, solved: Solved) -> np.ndarray:
    return codec(name).decode(solved.raw_RN)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", [*LEVELS, "IQ3_S"])
def test_equals_optimal_brain_surgeon(name: str, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PARTS", 1)  # a lattice's block is encoded once, as in the reference
    c, w_RC, known = codec(name), weights(), evidence(inputs())
    order_C = np.arange(COLUMNS)
    if act_order:
        order_C = column_order(known.hessian_CC, c.block, within=c.snap_columns == 1)
        assert not (order_C == np.arange(COLUMNS)).all()
    solved = Gptq(damping=0.01, act_order=act_order, **PLAIN)(w_RC, c, known)
    slow = traced_gptq(w_RC, c, known.hessian_CC, 0.01, order_C)

    assert solved.solver == "gptq"
    assert_equal_but_for_ties(decoded(name, solved), slow, c, order_C)
    found, least = (objectives(w_RC, v_RC, known.hessian_CC).sum() for v_RC in (decoded(name, solved), slow.value_RC))
    assert found == pytest.approx(least, rel=2e-3)


def assert_equal_but_for_ties(found_RC: np.ndarray, slow: Traced, c: Codec, order_C: np.ndarray) -> None:
    """A tie that float32 breaks the other way changes what follows in its row; few rows meet one."""
    assert parted_without_a_tie(found_RC, slow, c, order_C) == []
    assert np.isclose(found_RC, slow.value_RC, rtol=1e-5, atol=0).mean() > 0.9


@pytest.mark.parametrize("columns", [COLUMNS, 768])
@pytest.mark.parametrize("name", ROW_LONG)
def test_a_scale_per_row_equals_optimal_brain_surgeon(name: str, columns: int) -> None:
    """Rows of 768 columns are rounded in panels of 128."""
    c, w_RC, known = codec(name, columns), weights(columns=columns), evidence(inputs(columns=columns))
    order_C = column_order(known.hessian_CC, columns, within=True)
    traced = traced_gptq(w_RC, c, known.hessian_CC, 0.01, order_C)
    plain, refitted = (Gptq(damping=0.01, **more)(w_RC, c, known) for more in (PLAIN, {"threads": 1}))
    assert_equal_but_for_ties(c.decode(plain.raw_RN), traced, c, order_C)
    slow = objectives(w_RC, traced.value_RC, known.hessian_CC).sum()
    assert plain.record["objective"] == pytest.approx(slow, rel=2e-3)
    assert refitted.record["objective"] < (1 if name.startswith("fp8") else 0.995) * slow
    assert refitted.record["objective"] < 0.5 * refitted.record["nearest_objective"]
    for solved in (plain, refitted):
        scales = c.split(solved.raw_RN)[1]
        assert (scales > 0).all() or name == "int4-channel"


@pytest.mark.parametrize("name", ["int2-g64", "int3-g128", "int4-g128", "uint2-g64", "uint4-g128", "nf4-g64"])
def test_codes_of_gpu_formats_are_far_better_than_nearest_and_better_than_gptq(name: str) -> None:
    c, w_RC, known = codec(name), weights(rows=48, seed=21), evidence(inputs(seed=22))
    order_C = column_order(known.hessian_CC, c.block, within=True)
    slow_RC = slow_gptq(w_RC, c, known.hessian_CC, 0.01, order_C)
    solved = Gptq(damping=0.01, threads=1)(w_RC, c, known)
    assert solved.record["objective"] < 0.97 * objectives(w_RC, slow_RC, known.hessian_CC).sum()
    assert solved.record["objective"] < 0.45 * solved.record["nearest_objective"]


def test_zero_points_are_chosen_anew() -> None:
    """Zero stays a whole number of the very steps that the weights are rounded to."""
    c, w_RC, known = codec("uint3-g64"), weights(rows=64) + np.float32(0.03), evidence(inputs())
    first, refitted = (Gptq(**{**PLAIN, "refit_rounds": rounds})(w_RC, c, known).raw_RN for rounds in (0, 3))
    zeros, anew = c.split(first)[2], c.split(refitted)[2]
    assert 0.01 < (zeros != anew).mean() < 0.9
    assert (np.abs(zeros.astype(int) - anew) <= 3).all()
    value_RC = c.decode(refitted)
    codes_RC, scale_RG, _ = c.split(refitted)
    steps_RC = value_RC / np.repeat(scale_RG, 64, axis=1)
    np.testing.assert_allclose(steps_RC, np.rint(steps_RC), atol=1e-5)
    assert codes_RC.max() == 7


def test_tiles_of_scales_are_rounded_to_nearest() -> None:
    c, w_RC, known = codec("fp8-128x128"), weights(rows=200), evidence(inputs())
    solved = Gptq()(w_RC, c, known)
    assert solved.solver == "nearest"
    assert solved.notes == ("scales are shared between rows: rounded to nearest",)
    np.testing.assert_array_equal(solved.raw_RN, c.encode(w_RC, known.mean_square_C))


class Opaque:
    """A codec that shows no more than the interface asks for."""

    def __init__(self, inner: Codec) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        if name in ("levels", "to_scales", "from_scales"):
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "MXFP4", "TQ2_0", "int4-g64", "uint3-g128"])
def test_compiled_loops_equal_fit_snap_and_value(name: str) -> None:
    c, w_RC, known = codec(name), weights(seed=2), evidence(inputs(seed=3))
    fast, slow = (Gptq(damping=0.01, **PLAIN)(w_RC, each, known).raw_RN for each in (c, Opaque(c)))
    order_C = column_order(known.hessian_CC, c.block, within=True)
    traced = traced_gptq(w_RC, c, known.hessian_CC, 0.01, order_C)
    for raw_RN in (fast, slow):
        assert_equal_but_for_ties(c.decode(raw_RN), traced, c, order_C)
    reference_R = [np.isclose(c.decode(raw), traced.value_RC, rtol=1e-5, atol=0).all(axis=1) for raw in (fast, slow)]
    assert (fast == slow)[np.logical_and(*reference_R)].all()


@pytest.mark.parametrize("name", [*LEVELS, "IQ3_S"])
def test_refitting_lowers_every_row(name: str) -> None:
    w_RC, known = weights(rows=40, seed=4), evidence(inputs(seed=5))
    assert known.hessian_CC is not None
    damped_CC = known.hessian_CC + 0.01 * np.diagonal(known.hessian_CC).mean() * np.eye(COLUMNS)
    losses = []
    for more in ({}, {"refit_rounds": 3}, {"refit_rounds": 3, "passes": 1}):
        solved = Gptq(damping=0.01, **{**PLAIN, **more})(w_RC, codec(name), known)
        losses.append(objectives(w_RC, decoded(name, solved), damped_CC))
    assert (losses[1] <= losses[0] * (1 + 1e-4)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-4)).all()
    assert losses[2].sum() < 0.995 * losses[0].sum() or name in ("Q8_0", "fp8-e8")


@pytest.mark.parametrize("columns", [256, 512])
def test_refitting_keeps_count_of_the_loss(columns: int) -> None:
    """The loss carried along through all moves is that of the numbers arrived at."""
    c, w_RC, known = codec("Q3_K"), weights(columns=columns), evidence(inputs(columns=columns))
    assert known.hessian_CC is not None
    factored, order_C = factor(known.hessian_CC, 0.05), np.arange(columns)
    here = column_blocks(factored, order_C, 256, 16)
    rounded = round_rows(w_RC, c, here, factored.upper_CC.astype(np.float32), 1, 0)
    loss_R = refit_rows(w_RC, rounded, here, factored.damped_CC, 4)
    value_RC = c.decode(np.concatenate([block.pack() for block in rounded], axis=1))
    np.testing.assert_allclose(loss_R, objectives(w_RC, value_RC, factored.damped_CC), rtol=1e-3)


@pytest.mark.parametrize("columns", [256, 512])
def test_refitted_codes_are_the_best_with_all_others_held(columns: int) -> None:
    """Hardly a code is left whose change alone would lower the damped objective."""
    c, w_RC, known = codec("Q4_K"), weights(columns=columns, seed=14), evidence(inputs(columns=columns))
    assert known.hessian_CC is not None
    solved = Gptq(damping=0.05)(w_RC, c, known)
    damped_CC = known.hessian_CC + 0.05 * np.diagonal(known.hessian_CC).mean() * np.eye(columns)
    value_RC = decoded("Q4_K", solved).astype(np.float64)
    best_RC = value_RC + (w_RC - value_RC) @ damped_CC / np.diagonal(damped_CC)
    _, grid = c.unpack(solved.raw_RN.reshape(-1, c.block_bytes))
    snapped = c.snap(best_RC.reshape(-1, 256).astype(np.float32), grid, slice(0, 256))
    again_RC = c.value(snapped, grid, slice(0, 256)).reshape(value_RC.shape)
    assert (again_RC == value_RC).mean() > 0.99


@pytest.mark.parametrize("name", [*LEVELS, "IQ3_S"])
def test_loses_less_than_nearest_and_reports_it(name: str) -> None:
    w_RC, x_TC = weights(seed=6), inputs(8192, seed=7)
    known = evidence(x_TC[:-512], held_HC=x_TC[-512:])
    solved = Gptq(damping=0.03)(w_RC, codec(name), known)
    nearest_RC = codec(name).decode(codec(name).encode(w_RC, known.mean_square_C))
    for key, value_RC in (("", decoded(name, solved)), ("nearest_", nearest_RC)):
        objective = objectives(w_RC, value_RC, known.hessian_CC).sum()
        held = np.square((w_RC.astype(np.float64) - value_RC) @ x_TC[-512:].T).sum() / 512
        assert solved.record[f"{key}objective"] == pytest.approx(objective, rel=1e-3)
        assert solved.record[f"{key}held"] == pytest.approx(held, rel=1e-3)
    assert solved.record["held"] < (0.95 if name == "IQ3_S" else 0.6) * solved.record["nearest_held"]
    assert solved.record["damping"] == 0.03
    assert solved.notes == ()


def test_keeps_nearest_where_inputs_held_back_say_so() -> None:
    """Neighbors that were equal in calibration are opposite in what was held back."""
    base_TC = np.random.default_rng(8).standard_normal((1024, 128)).astype(np.float32)
    alike_TC, opposite_TC = np.repeat(base_TC, 2, axis=1), np.repeat(base_TC, 2, axis=1)
    opposite_TC[:, 1::2] *= -1
    w_RC, known = weights(columns=256), evidence(alike_TC, held_HC=opposite_TC[:64])
    solved = Gptq()(w_RC, codec("Q4_K"), known)
    assert solved.solver == "nearest"
    assert solved.record["objective"] < 0.5 * solved.record["nearest_objective"]
    assert solved.record["held"] > solved.record["nearest_held"]
    np.testing.assert_array_equal(solved.raw_RN, codec("Q4_K").encode(w_RC, known.mean_square_C))
    assert "nearest kept" in solved.notes[0]


def test_fewer_tokens_than_columns() -> None:
    """A Hessian of rank 40 leaves 216 directions free, and feedback uses them."""
    w_RC, known = weights(columns=256), evidence(inputs(40, 256))
    solved = Gptq()(w_RC, codec("Q3_K"), known)
    assert solved.solver == "gptq" and solved.record["damping"] == 0.05
    assert solved.record["objective"] < 0.2 * solved.record["nearest_objective"]
    error = np.abs(w_RC - decoded("Q3_K", solved)).max()
    assert error <= 2 * np.abs(w_RC).max()


def test_damping_is_raised_where_none_was_asked_for_and_the_hessian_is_singular() -> None:
    solved = Gptq(damping=0.0)(weights(columns=256), codec("Q4_K"), evidence(inputs(40, 256)))
    assert solved.record["damping"] > 0
    assert "damping raised from 0 to 0.0001" in solved.notes[0]
    assert solved.record["objective"] < solved.record["nearest_objective"]


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_NL"])
def test_dead_columns_are_rounded_to_nearest(name: str) -> None:
    c, x_TC, w_RC = codec(name), inputs(columns=256), weights(columns=256)
    dead = [3, 40, 41, 200]
    x_TC[:, dead] = 0
    value_RC = decoded(name, solved := Gptq()(w_RC, c, evidence(x_TC)))
    _, grid = c.unpack(solved.raw_RN.reshape(-1, c.block_bytes))
    nearest_RB = c.value(codes := c.snap(w_RC.reshape(-1, c.block), grid, slice(0, c.block)), grid, slice(0, c.block))
    assert codes.shape == nearest_RB.shape
    np.testing.assert_array_equal(value_RC[:, dead], nearest_RB.reshape(w_RC.shape)[:, dead])
    assert (value_RC != nearest_RB.reshape(w_RC.shape)).any()


def test_inputs_that_were_never_seen() -> None:
    """A Hessian of zeros weighs all columns alike."""
    w_RC = weights(columns=256)
    nothing = Evidence(0, np.zeros(256, np.float32), np.zeros((256, 256), np.float32))
    error_RC = w_RC - decoded("Q6_K", Gptq()(w_RC, codec("Q6_K"), nothing))
    assert np.square(error_RC).sum() < 1e-3 * np.square(w_RC).sum()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "IQ3_S"])
def test_threads_and_neighbors_change_nothing(name: str) -> None:
    w_RC, known = weights(rows=150, columns=256), evidence(inputs(columns=256))
    one, three = (Gptq(threads=threads)(w_RC, codec(name), known).raw_RN for threads in (1, 3))
    np.testing.assert_array_equal(one, three)
    assert len(Gptq()(w_RC[:1], codec(name), known).raw_RN) == 1
    assert Gptq()(w_RC[:0], codec(name), known).raw_RN.shape == (0, one.shape[1])


def test_refuses_what_is_no_hessian() -> None:
    w_RC, known = weights(columns=256), evidence(inputs(columns=256))
    c, hessian_CC = codec("Q4_K"), known.hessian_CC
    assert hessian_CC is not None
    for missing in (None, Evidence(1, known.mean_square_C)):
        with pytest.raises(UsageError, match="needs a Hessian"):
            Gptq()(w_RC, c, missing)
    broken = {"not finite": np.nan, "negative mean square in column 7": -1.0, "not positive definite": 1e6}
    for reason, number in broken.items():
        damaged_CC = hessian_CC.copy()
        row, column = (7, 9) if number > 0 else (7, 7)
        damaged_CC[row, column] = damaged_CC[column, row] = number
        with pytest.raises(DitherError, match=reason):
            Gptq()(w_RC, c, Evidence(1, known.mean_square_C, damaged_CC))
    with pytest.raises(DitherError, match=r"\(256, 256\): does not fit weights of 512"):
        Gptq()(weights(), c, known)
    with pytest.raises(UsageError, match="multiple of 256"):
        Gptq()(w_RC[:, :64], c, known)


@settings(max_examples=25)
@given(st.data())
def test_never_worse_than_nearest_on_what_judges(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*LEVELS, "NVFP4", "Q5_K"]))
    seed, rows = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 5))
    tokens, held = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 20))
    w_RC, x_TC = weights(rows, 256, seed), inputs(tokens + held, 256, seed)
    w_RC *= np.float32(10.0 ** data.draw(st.integers(-6, 4)))
    x_TC *= np.float32(10.0 ** data.draw(st.integers(-6, 6)))
    known = evidence(x_TC[:tokens], x_TC[tokens:])
    solved = Gptq(threads=1)(w_RC, codec(name), known)
    value_RC = decoded(name, solved).astype(np.float64)
    assert np.isfinite(value_RC).all()
    error_RC = w_RC - value_RC
    nearest_RC = w_RC - codec(name).decode(codec(name).encode(w_RC, known.mean_square_C)).astype(np.float64)
    judges_HC = x_TC[tokens:] if held else x_TC[:tokens]
    found, nearest = (np.square(e @ judges_HC.T.astype(np.float64)).sum() for e in (error_RC, nearest_RC))
    assert found <= nearest * (1 + 1e-3)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "int4-g128"])
def test_what_a_type_holds_exactly_is_not_solved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c, known = codec(name), evidence(inputs())
    held_RC = c.decode(c.encode(weights(rows=300)))
    found = Gptq()(held_RC, c, known)
    assert found.solver == "nearest" and "holds these weights as they are" in found.notes[0]
    np.testing.assert_array_equal(decoded(name, found), held_RC)
    assert found.record == {"objective": 0, "nearest_objective": 0}
    held_RC[299, 5] += 1e-4  # one weight off the grid, in the last row
    assert not any("as they are" in note for note in Gptq(**PLAIN)(held_RC, c, known).notes)
