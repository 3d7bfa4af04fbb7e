"""The paired difference, against numpy and against what independent errors would claim."""

from __future__ import annotations

import numpy as np
import pytest

from dither.running.paired_difference import difference


def test_it_is_the_mean_of_the_differences_and_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    x, y = (hard + 0.1 * rng.standard_normal(400) > 0.5).astype(float), (hard > 0.5).astype(float)
    found = difference(dict(enumerate(x)), dict(enumerate(y)))
    assert found is not None
    d = x - y
    assert found.value == pytest.approx(d.mean()) and found.questions == 400
    assert found.stderr == pytest.approx(d.std(ddof=1) / 20)
    assert found.changed == int((d != 0).sum())
    apart = np.sqrt(x.var(ddof=1) / 400 + y.var(ddof=1) / 400)
    assert found.stderr < 0.6 * apart  # what pairing is for


def test_only_questions_that_both_answered_count() -> None:
    found = difference({1: 1.0, 2: 0.0, 3: 1.0}, {2: 1.0, 3: 1.0, 4: 0.0})
    assert found is not None and (found.value, found.questions) == (-0.5, 2)
    assert difference({1: 1.0}, {2: 1.0}) is None
    single = difference({1: 1.0}, {1: 0.0})
    assert single is not None and single.stderr == 0.0 and single.told


def test_equal_answers_are_no_difference() -> None:
    same = difference(dict.fromkeys(range(9), 1.0), dict.fromkeys(range(9), 1.0))
    assert same is not None and (same.value, same.stderr, same.told) == (0.0, 0.0, False)
