"""The factor by panels against LAPACK's, and preparations that are kept for whoever asks again."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dither.codecs import codec
from dither.solvers.feedback import factor_cache
from dither.solvers.feedback.cholesky import PANEL, upper_factor
from dither.solvers.gptq import Gptq
from dither.types import Evidence


def hessian(columns: int, seed: int = 0) -> np.ndarray:
    x_TC = np.random.default_rng(seed).standard_normal((columns + 64, columns))
    return (x_TC.T @ x_TC / len(x_TC) + 0.05 * np.eye(columns)).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 5, PANEL, PANEL + 1, 3 * PANEL - 7])
def test_equals_lapack(columns: int) -> None:
    m_CC = hessian(columns).astype(np.float64)
    expected = np.linalg.cholesky(m_CC[::-1, ::-1])[::-1, ::-1]
    m_CC[np.tril_indices(columns, -1)] = np.nan  # is not read
    np.testing.assert_allclose(upper_factor(m_CC), expected, rtol=1e-10, atol=1e-12)


def test_has_the_same_bits_on_any_number_of_threads() -> None:
    m_CC = hessian(700).astype(np.float64)
    alone = upper_factor(m_CC)
    with ThreadPoolExecutor(5) as pool:
        np.testing.assert_array_equal(upper_factor(m_CC, pool.map), alone)


@pytest.mark.parametrize("wrong", [0, PANEL + 5])
def test_refuses_what_is_not_definite(wrong: int) -> None:
    m_CC = hessian(2 * PANEL).astype(np.float64)
    m_CC[wrong, wrong] = -1
    with pytest.raises(np.linalg.LinAlgError):
        upper_factor(m_CC)


class Counted:
    """How often a Hessian was factored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, whole = 0, factor_cache.factor
        lock = threading.Lock()

        def factor(*args: object) -> object:
            with lock:
                self.times += 1
            return whole(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(factor_cache, "factor", factor)


def layer(hessian_CC: np.ndarray, rows: int, seed: int) -> tuple[np.ndarray, Evidence]:
    w_RC = np.random.default_rng(seed).standard_normal((rows, len(hessian_CC))).astype(np.float32)
    return w_RC, Evidence(1000, np.ascontiguousarray(np.diagonal(hessian_CC)), hessian_CC)


def test_layers_that_share_an_input_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, shared, solver = Counted(monkeypatch), hessian(512), Gptq(threads=2)
    for seed, kind in enumerate(("Q4_K", "Q4_K", "Q6_K", "IQ4_XS")):  # whose blocks are alike
        w_RC, known = layer(shared, 24, seed)
        again = solver(w_RC, codec(kind), known)
        alone = Gptq(threads=1)(w_RC, codec(kind), layer(shared.copy(), 24, seed)[1])
        np.testing.assert_array_equal(again.raw_RN, alone.raw_RN)
    assert counted.times == 1 + 4  # and each of the others for itself


def test_an_array_that_was_changed_is_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, changing, solver = Counted(monkeypatch), hessian(256), Gptq(threads=1)
    w_RC, known = layer(changing, 16, 1)
    solver(w_RC, codec("Q4_K"), known)
    changing[:] = hessian(256, seed=9)
    after = solver(w_RC, codec("Q4_K"), known)
    fresh = Gptq(threads=1)(w_RC, codec("Q4_K"), known)
    np.testing.assert_array_equal(after.raw_RN, fresh.raw_RN)
    assert counted.times == 3


def test_nothing_is_kept_beyond_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, solver = Counted(monkeypatch), Gptq(threads=1)
    solver.kept_bytes = 0
    first, second = hessian(256), hessian(256, seed=3)
    for hessian_CC, times in ((first, 1), (first, 1), (second, 2), (first, 3), (second, 4)):
        w_RC, known = layer(hessian_CC, 16, 1)
        solver(w_RC, codec("Q4_K"), known)
        assert counted.times == times
    held = weakref.ref(first)
    del first, hessian_CC
    assert held() is None


def test_many_threads_prepare_a_hessian_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, shared, solver = Counted(monkeypatch), hessian(512), Gptq(threads=2)
    layers = [layer(shared, 16, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda of: solver(of[0], codec("Q4_K"), of[1]).raw_RN, layers))
    assert counted.times == 1
    for (w_RC, known), raw_RN in zip(layers, found, strict=True):
        np.testing.assert_array_equal(Gptq(threads=1)(w_RC, codec("Q4_K"), known).raw_RN, raw_RN)
