"""The numbers of one token, against their textbook formulas in float64.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dither.measuring.metrics import CHUNK_LOGITS, rows_per_chunk, score
from dither.measuring.per_token import scored_positions

Doubles = npt.NDArray[np.float64]


def softmax(z_V: Doubles) -> list[float]:
    largest = max(z_V)
    exponentials = [math.exp(z - largest) for z in z_V]
    total = math.fsum(exponentials)
    return [e / total for e in exponentials]


def logits(seed: int, n: int, v: int, spread: float) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, v)) * spread).astype(np.float32)


@pytest.mark.parametrize(("spread", "noise"), [(1.0, 1.0), (8.0, 0.01), (4.0, 1e-4), (20.0, 5.0)])
def test_the_five_numbers_equal_their_formulas(spread: float, noise: float) -> None:
    p_NV, next_N = logits(0, 40, 300, spread), np.random.default_rng(1).integers(0, 300, 40)
    q_NV = p_NV + logits(2, 40, 300, noise)
    found = score(torch.from_numpy(p_NV), torch.from_numpy(q_NV), torch.from_numpy(next_N))
    for n, token in enumerate(next_N):
        p_V, q_V = softmax(p_NV[n].astype(np.float64)), softmax(q_NV[n].astype(np.float64))
        kl = math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(p_V, q_V, strict=True) if p > 0)
        assert float(found.kl_N[n]) == pytest.approx(kl, rel=1e-6, abs=1e-13)
        assert float(found.delta_p_N[n]) == pytest.approx(q_V[token] - p_V[token], abs=1e-14)
        assert float(found.nll_reference_N[n]) == pytest.approx(-math.log(p_V[token]), rel=1e-12)
        assert float(found.nll_N[n]) == pytest.approx(-math.log(q_V[token]), rel=1e-12)
        assert bool(found.same_top_N[n]) == (p_V.index(max(p_V)) == q_V.index(max(q_V)))


def test_a_tiny_divergence_is_not_lost_in_rounding() -> None:
    """One logit of a uniform distribution moved by ε: KL = log(1 + (e^ε − 1)/V) − ε/V ≈ ε²(V − 1)/2V²."""
    v, epsilon = 50_000, 2.0**-10
    p_NV = torch.full((1, v), 7.0)
    q_NV = p_NV.clone()
    q_NV[0, 123] += epsilon
    found = score(p_NV, q_NV, torch.tensor([0]))
    expected = math.log1p(math.expm1(epsilon) / v) - epsilon / v
    assert expected < 1e-11
    assert float(found.kl_N[0]) == pytest.approx(expected, rel=1e-4)


def test_equal_logits_give_exactly_nothing() -> None:
    p_NV = torch.from_numpy(logits(3, 16, 1000, 10.0))
    found = score(p_NV, p_NV.clone(), torch.arange(16))
    assert found.kl_N.tolist() == [0.0] * 16
    assert found.delta_p_N.tolist() == [0.0] * 16
    assert found.same_top_N.all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    p_NV = torch.from_numpy(logits(4, 8, 100, 3.0))
    found = score(p_NV, p_NV + 64.0, torch.arange(8))
    assert float(found.kl_N.max()) < 1e-9  # adding 64 rounds the logits themselves, by 4e-6


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_stay_visible(broken: float) -> None:
    p_NV = torch.zeros(2, 5)
    q_NV = p_NV.clone()
    q_NV[1, 2] = broken
    found = score(p_NV, q_NV, torch.tensor([0, 0]))
    assert found.kl_N[0] == 0.0
    assert not torch.isfinite(found.kl_N[1])


def test_llama_perplexity_scores_the_second_half() -> None:
    """With a context of 512: positions 256 to 510, 255 of them, each predicting the next token."""
    sequence_N, position_N = scored_positions([512, 512], None)
    assert position_N.tolist() == [*range(256, 511), *range(256, 511)]
    assert sequence_N.tolist() == [0] * 255 + [1] * 255


def test_padding_and_last_positions_are_never_scored() -> None:
    sequence_N, position_N = scored_positions([4, 1, 2, 7], 1)
    assert list(zip(sequence_N.tolist(), position_N.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (3, 1),
        (3, 2),
        (3, 3),
        (3, 4),
        (3, 5),
    ]
    assert len(scored_positions([], None)[0]) == 0


def test_a_chunk_holds_at_least_one_position() -> None:
    assert rows_per_chunk(10**9) == 1
    assert rows_per_chunk(128_256) * 128_256 <= CHUNK_LOGITS
