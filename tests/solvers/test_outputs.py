"""Feedback between rows against its minimum written out, and what must hold of any output Hessian.

Legend: R rows, C columns, N bytes of a packed row, K diagonal blocks of O rows each.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_gptq import PLAIN, decoded, evidence as evidence_of, inputs, weights

from dither.codecs import codec
from dither.errors import DitherError
from dither.solvers.feedback import row_feedback
from dither.solvers.feedback.hessian import column_order
from dither.solvers.feedback.row_feedback import portion_rows, solve_in_turn
from dither.solvers.gptq import Gptq
from dither.types import Bytes, Evidence, Floats
from solvers.reference import joint_objective, slow_gptq, slow_in_turn

ROWS, COLUMNS = 96, 256
FAST = {"fits": 1, "scale_rounds": 0, "refit_rounds": 1, "passes": 0}


def correlated(rows: int = ROWS, seed: int = 20, strength: float = 3.0) -> np.ndarray:
    """An output Hessian whose outputs share few causes and differ in size: float32 (1, R, R)."""
    random = np.random.default_rng(seed)
    mixing = strength * random.standard_normal((rows, max(1, rows // 16)))
    g_TR = random.standard_normal((4 * rows, max(1, rows // 16))) @ mixing.T
    g_TR += random.standard_normal((4 * rows, rows))
    g_TR *= random.lognormal(0, 0.5, rows)
    return (g_TR.T @ g_TR / len(g_TR)).astype(np.float32)[None]


@pytest.fixture(scope="module")
def known() -> Evidence:
    return evidence_of(inputs(columns=COLUMNS))


def nearest(name: str) -> row_feedback.SolveRows:
    c = codec(name)

    def solve(w_PC: Floats) -> tuple[Bytes, Floats]:
        raw_PN = c.encode(w_PC, None)
        return raw_PN, c.decode(raw_PN)

    return solve


@pytest.mark.parametrize("together", [1, 7, 16])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K"])
def test_each_row_is_moved_to_where_the_rest_leaves_least(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_feedback, "FEWEST", together)
    monkeypatch.setattr(row_feedback, "MOST", together)
    w_RC, output_KOO = weights(40, COLUMNS), correlated(40)
    assert portion_rows(40) == together
    assert (np.argsort(-np.diagonal(output_KOO[0])) != np.arange(40)).any()
    found_RC = codec(name).decode(solve_in_turn(w_RC, output_KOO, nearest(name)))
    slow_RC = slow_in_turn(w_RC, output_KOO[0], row_feedback.DAMPING, together, lambda w: nearest(name)(w)[1])
    # A tie that float32 breaks the other way changes a little of all rows after it.
    assert (found_RC == slow_RC).mean() > 0.98
    np.testing.assert_allclose(found_RC, slow_RC, atol=0.02 * np.abs(w_RC).max())
    hessian_CC = np.eye(COLUMNS)
    found, slow = (joint_objective(w_RC, v_RC, hessian_CC, output_KOO) for v_RC in (found_RC, slow_RC))
    assert found == pytest.approx(slow, rel=1e-3)
    plain = joint_objective(w_RC, nearest(name)(w_RC)[1], hessian_CC, output_KOO)
    assert found < 0.7 * plain


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_with_feedback_along_columns_it_equals_both_written_out(
    name: str, known: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_feedback, "FEWEST", 1)
    monkeypatch.setattr(row_feedback, "MOST", 1)
    c, w_RC, output_KOO, hessian_CC = codec(name), weights(12, COLUMNS), correlated(12), known.hessian_CC
    assert hessian_CC is not None
    order_C = column_order(hessian_CC, c.block, within=True)
    solved = Gptq(damping=0.01, **PLAIN)(w_RC, c, replace(known, output_KOO=output_KOO))
    slow_RC = slow_in_turn(
        w_RC, output_KOO[0], row_feedback.DAMPING, 1, lambda w: slow_gptq(w, c, hessian_CC, 0.01, order_C)
    )
    assert solved.solver == "gptq"
    # A tie broken the other way in one row changes a little of all rows after it: what counts is the loss.
    assert (decoded(name, solved) == slow_RC).mean() > 0.6
    slow = joint_objective(w_RC, slow_RC, hessian_CC, output_KOO)
    assert joint_objective(w_RC, decoded(name, solved), hessian_CC, output_KOO) == pytest.approx(slow, rel=0.01)
    alone = Gptq(damping=0.01, **PLAIN)(w_RC, c, known)
    assert joint_objective(w_RC, decoded(name, alone), hessian_CC, output_KOO) > 1.2 * slow


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K", "IQ4_XS", "Q4_0", "IQ3_S"])
def test_errors_that_cancel_cost_less(name: str, known: Evidence) -> None:
    w_RC, output_KOO = weights(ROWS, COLUMNS, seed=3), correlated()
    assert known.hessian_CC is not None
    held_HC = inputs(64, COLUMNS)
    both = replace(known, output_KOO=output_KOO, held_HC=held_HC)
    alone, together = (Gptq(**FAST)(w_RC, codec(name), e) for e in (known, both))
    without, found = (
        joint_objective(w_RC, decoded(name, solved), known.hessian_CC, output_KOO) for solved in (alone, together)
    )
    assert found < 0.75 * without
    nearest_RC = codec(name).decode(codec(name).encode(w_RC, known.mean_square_C))
    for key, value_RC in (("", decoded(name, together)), ("nearest_", nearest_RC)):
        expected = joint_objective(w_RC, value_RC, known.hessian_CC, output_KOO)
        assert together.record[f"{key}objective"] == pytest.approx(expected, rel=1e-3)
        moments_CC = held_HC.astype(np.float64).T @ held_HC / len(held_HC)
        expected = joint_objective(w_RC, value_RC, moments_CC, output_KOO)
        assert together.record[f"{key}held"] == pytest.approx(expected, rel=1e-3)
    assert together.solver == "gptq" and together.record["held"] < together.record["nearest_held"]


def diagonal(rows: int, equal: bool) -> np.ndarray:
    size_R = np.ones(rows) if equal else np.random.default_rng(4).lognormal(0, 1, rows)
    return np.diag(size_R).astype(np.float32)[None]


@pytest.mark.parametrize(
    "output_KOO",
    [
        diagonal(ROWS, equal=True),
        1e-9 * diagonal(ROWS, equal=True),
        diagonal(ROWS, equal=False),  # another order of rows
        np.zeros((1, ROWS, ROWS), np.float32),
        np.diagonal(diagonal(ROWS, equal=False)[0])[:, None, None],  # as kept of the output matrix
    ],
    ids=["identity", "small identity", "diagonal", "zero", "apart"],
)
@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS"])
def test_outputs_that_nothing_connects_are_rounded_alone(name: str, output_KOO: np.ndarray, known: Evidence) -> None:
    w_RC = weights(ROWS, COLUMNS, seed=5)
    alone, found = (Gptq(**FAST)(w_RC, codec(name), e).raw_RN for e in (known, replace(known, output_KOO=output_KOO)))
    assert share_of_equal_rows(alone, found) > 0.95


def share_of_equal_rows(a_RN: np.ndarray, b_RN: np.ndarray) -> float:
    """Rows that go through a matrix product in another company may be rounded otherwise where it is a tie."""
    assert a_RN.shape == b_RN.shape
    return float((a_RN == b_RN).all(axis=1).mean())


def test_diagonal_blocks_are_solved_apart(known: Evidence) -> None:
    w_RC = weights(ROWS, COLUMNS, seed=6)
    first_KOO, second_KOO = correlated(ROWS // 2, seed=1), correlated(ROWS // 2, seed=2)
    both = replace(known, output_KOO=np.concatenate([first_KOO, second_KOO]))
    whole = Gptq(**FAST)(w_RC, codec("Q4_K"), both)
    halves = [
        Gptq(**FAST)(half_OC, codec("Q4_K"), replace(known, output_KOO=part_KOO))
        for half_OC, part_KOO in zip(np.split(w_RC, 2), (first_KOO, second_KOO), strict=True)
    ]
    np.testing.assert_array_equal(whole.raw_RN, np.concatenate([half.raw_RN for half in halves]))
    assert known.hessian_CC is not None
    value_RC = decoded("Q4_K", whole)
    expected = joint_objective(w_RC, value_RC, known.hessian_CC, np.concatenate([first_KOO, second_KOO]))
    assert whole.record["objective"] == pytest.approx(expected, rel=1e-3)


def test_an_output_hessian_of_low_rank(known: Evidence) -> None:
    """Ninety of 96 directions cost nothing but damping; weights stay near what they were."""
    g_TR = np.random.default_rng(8).standard_normal((6, ROWS))
    output_KOO = (g_TR.T @ g_TR).astype(np.float32)[None]
    w_RC = weights(ROWS, COLUMNS, seed=7)
    alone = Gptq(**FAST)(w_RC, codec("Q4_K"), known)
    solved = Gptq(**FAST)(w_RC, codec("Q4_K"), replace(known, output_KOO=output_KOO))
    assert known.hessian_CC is not None
    found, without = (joint_objective(w_RC, decoded("Q4_K", s), known.hessian_CC, output_KOO) for s in (solved, alone))
    assert found < 0.35 * without
    assert np.abs(w_RC - decoded("Q4_K", solved)).max() < np.abs(w_RC).max()


@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_few_rows_and_portions_that_are_not_whole(rows: int, known: Evidence) -> None:
    """One portion hears of nothing; the second starts at row 16."""
    w_RC, output_KOO = weights(rows, COLUMNS, seed=9), correlated(rows)
    solved = Gptq(**FAST)(w_RC, codec("Q4_0"), replace(known, output_KOO=output_KOO))
    alone = Gptq(**FAST)(w_RC, codec("Q4_0"), known)
    first = np.argsort(-np.diagonal(output_KOO[0]))[:16]
    later = np.setdiff1d(np.arange(rows), first)
    assert share_of_equal_rows(solved.raw_RN[first], alone.raw_RN[first]) > 0.9
    assert not (solved.raw_RN[later] == alone.raw_RN[later]).all(axis=1).any()
    assert len(later) == max(0, rows - 16)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0"])
def test_threads_change_nothing(name: str, known: Evidence) -> None:
    w_RC, both = weights(ROWS, COLUMNS, seed=10), replace(known, output_KOO=correlated())
    one, three = (Gptq(threads=threads, **FAST)(w_RC, codec(name), both).raw_RN for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_portions_are_a_share_of_the_rows() -> None:
    assert [portion_rows(rows) for rows in (1, 512, 1024, 4096, 8192)] == [16, 16, 32, 128, 128]


def test_refuses_what_is_no_output_hessian(known: Evidence) -> None:
    w_RC, good_KOO = weights(32, COLUMNS), correlated(32)
    for shape in ((1, 31, 31), (32, 32), (2, 32, 32), (1, 32, 31), (3, 11, 11)):
        with pytest.raises(DitherError, match=r"output Hessian of shape .* does not fit weights of 32 rows"):
            Gptq()(w_RC, codec("Q4_0"), replace(known, output_KOO=np.ones(shape, np.float32)))
    for reason, number in {"not finite": np.nan, "not positive definite": 1e6}.items():
        damaged_KOO = good_KOO.copy()
        damaged_KOO[0, 7, 9] = damaged_KOO[0, 9, 7] = number
        with pytest.raises(DitherError, match=f"output Hessian.*{reason}"):
            Gptq()(w_RC, codec("Q4_0"), replace(known, output_KOO=damaged_KOO))
