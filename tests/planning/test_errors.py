"""Ratios of errors against float64 sums over the same rows, taken from what the solver itself has written."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import BUNDLED
from dither.codecs import codec
from dither.formats.evidence import EvidenceStore
from dither.models.source import open_model
from dither.planning.error_ratios import EXPERTS, FEW_ROWS, ROWS, error_ratios
from dither.solvers.gptq import Gptq
from dither.solvers.nearest import Nearest
from dither.types import Evidence, EvidenceSource, Floats, Tensor

COLUMNS = 256
RNG = np.random.default_rng(5)
INPUTS = (RNG.standard_normal((600, COLUMNS)) @ RNG.standard_normal((COLUMNS, COLUMNS))).astype(np.float32)
INPUTS *= np.linspace(0.1, 3, COLUMNS, dtype=np.float32) / 16


def tensor(*shape: int, scale: float = 1.0) -> Tensor:
    w_RC = (scale * RNG.standard_normal((int(np.prod(shape[:-1])), shape[-1]))).astype(np.float32)
    return Tensor("w", shape, "F32", w_RC.nbytes, lambda start, stop: w_RC[start:stop])


def nothing(tensor: str, expert: int = 0) -> Evidence | None:
    return None


def mean_squares(tensor: str, expert: int = 0) -> Evidence | None:
    return Evidence(600, np.square(INPUTS).mean(axis=0))


def hessian(tensor: str, expert: int = 0) -> Evidence | None:
    return Evidence(600, np.square(INPUTS).mean(axis=0), hessian_CC=INPUTS.T @ INPUTS / len(INPUTS))


def spread(rows: int, count: int) -> list[int]:
    return [round(i * (rows - 1) / (count - 1)) for i in range(count)]


def weighted(error_RC: Floats, evidence: Evidence | None) -> float:
    e = error_RC.astype(np.float64)
    if evidence is None:
        return float((e**2).sum())
    if evidence.hessian_CC is None:
        return float((e**2 * evidence.mean_square_C.astype(np.float64)).sum())
    return float(np.trace(e @ evidence.hessian_CC.astype(np.float64) @ e.T))


@pytest.mark.parametrize("known", [nothing, mean_squares], ids=["without evidence", "mean squares"])
def test_nearest_rounding_is_weighed_by_the_mean_squares(known: EvidenceSource) -> None:
    w = tensor(200, COLUMNS)
    sample_RC = w.read(0, 200)[spread(200, ROWS)]
    evidence = known("w")
    importance_C = None if evidence is None else evidence.mean_square_C

    def error(kind: str) -> float:
        found = codec(kind)
        return weighted(sample_RC - found.decode(found.encode(sample_RC, importance_C)), evidence)

    kinds = ["F16", "Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"]
    found = error_ratios(w, kinds, "Q3_K", known, Nearest(), threads=2)
    assert list(found) == kinds
    assert found["Q3_K"] == 1  # exactly: a tensor's own divergence is what was measured
    plain = codec("F16")
    right = {kind: error(kind) for kind in kinds[1:]}
    right["F16"] = weighted(sample_RC - plain.decode(plain.encode(sample_RC)), evidence)
    assert found == {kind: pytest.approx(right[kind] / right["Q3_K"], rel=1e-5) for kind in kinds}


def test_error_feedback_is_weighed_by_the_hessian() -> None:
    w = tensor(100, COLUMNS)
    sample_RC = w.read(0, 100)[spread(100, ROWS)]
    evidence = hessian("w")

    def error(kind: str) -> float:
        solved = Gptq(threads=1)(sample_RC, codec(kind), evidence)
        return weighted(sample_RC - codec(kind).decode(solved.raw_RN), evidence)

    kinds = ["Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"]
    found = error_ratios(w, kinds, "Q3_K", hessian, Gptq(threads=1), threads=2)
    assert found["Q3_K"] == 1
    right = {kind: error(kind) for kind in kinds}
    assert found == {kind: pytest.approx(right[kind] / right["Q3_K"], rel=1e-3) for kind in kinds}


def test_error_feedback_without_a_hessian_is_nearest_rounding() -> None:
    w = tensor(64, COLUMNS)
    kinds = ["Q6_K", "Q4_K", "Q2_K"]
    for known in (nothing, mean_squares):
        assert error_ratios(w, kinds, "Q4_K", known, Gptq(threads=1), 2) == error_ratios(
            w, kinds, "Q4_K", known, Nearest(), 2
        )


@pytest.mark.parametrize("known", [nothing, mean_squares, hessian])
def test_two_more_bits_never_lose_more(known: EvidenceSource) -> None:
    kinds = ["F16", "Q8_0", "Q6_K", "Q4_K", "Q2_K"]
    found = error_ratios(tensor(64, COLUMNS), kinds, "Q4_K", known, Gptq(threads=1), threads=2)
    errors = [found[kind] for kind in kinds]
    assert all(more < fewer for more, fewer in pairwise(errors))


def test_types_searched_as_a_whole_are_held_against_the_probe_on_the_same_few_rows() -> None:
    w = tensor(100, COLUMNS)
    sample_RC = w.read(0, 100)[spread(100, FEW_ROWS)]
    evidence = mean_squares("w")
    assert evidence is not None

    def error(kind: str) -> float:
        found = codec(kind)
        return weighted(sample_RC - found.decode(found.encode(sample_RC, evidence.mean_square_C)), evidence)

    found = error_ratios(w, ["IQ3_S", "Q4_K"], "Q3_K", mean_squares, Nearest(), threads=2)
    assert found["IQ3_S"] == pytest.approx(error("IQ3_S") / error("Q3_K"), rel=1e-5)


def test_a_stack_is_sampled_in_its_first_and_last_expert_with_their_own_evidence() -> None:
    seen: list[tuple[int, int]] = []
    w_RC = RNG.standard_normal((8 * 50, COLUMNS)).astype(np.float32)

    def read(start: int, stop: int) -> Floats:
        seen.append((start, stop))
        return w_RC[start:stop]

    def known(tensor: str, expert: int = 0) -> Evidence | None:
        return Evidence(9, np.full(COLUMNS, expert + 1.0, np.float32))

    stack = Tensor("w", (8, 50, COLUMNS), "F32", w_RC.nbytes, read)
    found = error_ratios(stack, ["Q6_K", "Q4_K"], "Q4_K", known, Nearest(), threads=1)
    assert {start // 50 for start, _ in seen} == {0, 7}
    assert len(seen) == ROWS and EXPERTS == 2

    def error(kind: str) -> float:
        total = 0.0
        for expert in (0, 7):
            rows_RC = w_RC[expert * 50 : expert * 50 + 50][spread(50, ROWS // 2)]
            of = known("w", expert)
            assert of is not None
            total += weighted(rows_RC - codec(kind).decode(codec(kind).encode(rows_RC, of.mean_square_C)), of)
        return total

    assert found["Q6_K"] == pytest.approx(error("Q6_K") / error("Q4_K"), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_small_matrices_are_taken_whole(rows: int) -> None:
    found = error_ratios(tensor(rows, COLUMNS), ["Q6_K", "Q4_K"], "Q4_K", nothing, Nearest(), threads=2)
    assert found["Q4_K"] == 1 and 0 < found["Q6_K"] < 1


def test_a_matrix_of_zeros_costs_nothing_in_any_type() -> None:
    zeros = tensor(32, COLUMNS, scale=0)
    for known in (nothing, mean_squares, hessian):
        assert set(error_ratios(zeros, ["F16", "Q8_0", "Q2_K"], "Q3_K", known, Gptq(threads=1), 2).values()) == {0.0}


@pytest.mark.slow
def test_the_ratio_of_some_rows_is_nearly_that_of_all(learnt: Path) -> None:
    """64 rows of a matrix of 768 tell what all of them would; a token embedding's are less alike."""
    store, tensors = EvidenceStore.open(learnt), {t.name: t for t in open_model(BUNDLED).tensors}
    for name, tolerance in (("blk.1.ffn_up.weight", 0.05), ("token_embd.weight", 0.2)):
        evidence, w_RC = store(name), tensors[name].read(0, tensors[name].rows)
        importance_C = None if evidence is None else evidence.mean_square_C
        known = None if evidence is None else replace(evidence, hessian_CC=None)

        def error(kind: str, w_RC: Floats = w_RC, importance_C=importance_C, known=known) -> float:  # type: ignore[no-untyped-def]
            found = codec(kind)
            return weighted(w_RC - found.decode(found.encode(w_RC, importance_C)), known)

        def diagonal(tensor: str, expert: int = 0, known: Evidence | None = known) -> Evidence | None:
            return known

        found = error_ratios(tensors[name], ["Q6_K", "Q4_K", "Q2_K"], "Q3_K", diagonal, Nearest(), threads=2)
        for kind, ratio in found.items():
            assert ratio == pytest.approx(error(kind) / error("Q3_K"), rel=tolerance), (name, kind)
