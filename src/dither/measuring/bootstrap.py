"""How sure the numbers are: bootstrap intervals over sequences.

Tokens of one text resemble each other: a sequence about chess is hard or easy as a whole.  Had the
tokens been drawn one by one, the interval would come out far too narrow, so whole *sequences* are
drawn, with replacement, as many as there were, a thousand times; every statistic is computed for every
draw, and the middle of its values is the interval (the percentile bootstrap: Efron, Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13; for clusters: Field, Welsh 2007).

How much of the middle: 95 % of many sequences, a little more of few, because draws from a small sample
spread less than the samples themselves would.  Hesterberg (What Teachers Should Know About the
Bootstrap, arXiv:1411.5279, "expanded percentile interval") widens it as Student's t widens the normal:
of 32 sequences the middle 95.9 %, of 16 the middle 97.2 %.

Drawing a sequence k times is giving its tokens the weight k.  Means then need per-sequence sums alone,
and a quantile is found by walking the tokens, sorted once, until their weights reach it.

What it cannot do: one sequence has no interval, and none is given.  With a handful of sequences (below eight) the
intervals mean little, and no resample ever exceeds the largest value seen, so the maximum's interval has no honest
upper end.

Legend: N tokens, S sequences, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from dither.errors import UsageError
from dither.formats.intervals import Interval
from dither.measuring.per_token import Doubles, Integers, PerToken

DRAWS = 1000
LEAST_SEQUENCES = 2  # one has no interval
FEW_SEQUENCES = 8
QUANTILES: Mapping[str, float] = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}


def summarize(per_token: PerToken, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Interval]:
    """Every statistic with its interval, by the name it has in a measurement.

    kl_mean, kl_median, kl_p90, kl_p99, kl_p999, kl_max (nats) · same_top (share, 0 to 1) ·
    delta_p_mean, delta_p_rms (probability, −1 to 1) · ppl, ppl_reference, ppl_ratio.
    Raises UsageError where nothing was scored.
    """
    if not len(per_token.kl_N):
        raise UsageError("the text", "left no position to score", "Take a longer text, or skip less of it.")
    # Sequences without a scored token are no part of the sample: the others are numbered from 0.
    present, sequence_N = np.unique(per_token.sequence_N, return_inverse=True)
    weight_DS = draw_sequences(len(present), draws, seed)
    found = {
        "kl_mean": _mean(per_token.kl_N, sequence_N, weight_DS),
        **_quantiles(per_token.kl_N, sequence_N, weight_DS),
        "kl_max": _maximum(per_token.kl_N, sequence_N, weight_DS),
        "same_top": _mean(per_token.same_top_N.astype(np.float64), sequence_N, weight_DS),
        "delta_p_mean": _mean(per_token.delta_p_N, sequence_N, weight_DS),
        "delta_p_rms": np.sqrt(_mean(per_token.delta_p_N**2, sequence_N, weight_DS)),
        "ppl": _exp(_mean(per_token.nll_N, sequence_N, weight_DS)),
        "ppl_reference": _exp(_mean(per_token.nll_reference_N, sequence_N, weight_DS)),
        "ppl_ratio": _exp(_mean(per_token.nll_N - per_token.nll_reference_N, sequence_N, weight_DS)),
    }
    return {name: _interval(values_D, len(present)) for name, values_D in found.items()}


def draw_sequences(sequences: int, draws: int, seed: int) -> npt.NDArray[np.int64]:
    """How often each draw holds each sequence: int64 (1 + D, S); the first row is the sample itself."""
    generator = np.random.default_rng(seed)
    drawn_DS = generator.multinomial(sequences, np.full(sequences, 1 / sequences), size=draws)
    return np.concatenate([np.ones((1, sequences), np.int64), drawn_DS])


def difference(a_S: Doubles, b_S: Doubles, tokens_S: Doubles, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of b − a over the tokens of the same sequences, from each sequence's own means.

    Both files met the same text, so most of what makes a sequence hard cancels: this interval is
    narrower than those of a and b, and decides where theirs overlap.
    """
    weight_DS = draw_sequences(len(tokens_S), draws, seed)
    return _interval((weight_DS @ ((b_S - a_S) * tokens_S)) / (weight_DS @ tokens_S), len(tokens_S))


def tail(sequences: int) -> float:
    """The share of draws left out at each end: Φ(−t·√(S/(S − 1))), t Student's 97.5 % point.

    t comes from the Cornish-Fisher expansion in 1/ν, ν = S − 1 (Abramowitz, Stegun, 26.7.5), which is right to
    0.1 % from ν = 5 on.  There must be two sequences.
    """
    z, nu = NormalDist().inv_cdf(0.975), sequences - 1
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return NormalDist().cdf(-t * (sequences / nu) ** 0.5)


def _interval(values_D: Doubles, sequences: int) -> Interval:
    if sequences < LEAST_SEQUENCES:
        return Interval(float(values_D[0]))  # every draw is the sample itself: nothing spreads
    outside = tail(sequences)
    low, high = np.quantile(values_D[1:], (outside, 1 - outside))
    return Interval(float(values_D[0]), float(low), float(high))


def _exp(values_D: Doubles) -> Doubles:
    """Perplexity; beyond e⁷⁰⁰, which only a ruined model reaches, 1e304 is given instead of infinity."""
    return np.exp(np.minimum(values_D, 700.0))


def _mean(values_N: Doubles, sequence_N: Integers, weight_DS: Integers) -> Doubles:
    sums_S = np.bincount(sequence_N, weights=values_N)
    return (weight_DS @ sums_S) / (weight_DS @ np.bincount(sequence_N))


def _maximum(values_N: Doubles, sequence_N: Integers, weight_DS: Integers) -> Doubles:
    largest_S = np.full(weight_DS.shape[1], -np.inf)
    np.maximum.at(largest_S, sequence_N, values_N)
    maxima_D: Doubles = np.where(weight_DS > 0, largest_S, -np.inf).max(axis=1)
    return maxima_D


def _quantiles(values_N: Doubles, sequence_N: Integers, weight_DS: Integers) -> dict[str, Doubles]:
    """Each draw's quantiles, interpolated between neighbors as numpy and llama.cpp do by default."""
    # Sorted once for all draws: a draw only changes how often each token counts.
    order_N = np.argsort(values_N, kind="stable")
    sorted_N, sequence_N = values_N[order_N], sequence_N[order_N]
    fractions_Q = np.array(list(QUANTILES.values()))
    found_DQ = np.empty((len(weight_DS), len(fractions_Q)))
    for draw, weight_S in enumerate(weight_DS):
        # The draw's own sorted list holds token n at the places up to reached_N[n]: the quantile's place in it,
        # a fraction, lies between two whole places, which are looked up.
        reached_N = np.cumsum(weight_S[sequence_N])
        at_Q = fractions_Q * (reached_N[-1] - 1)
        below_Q = np.floor(at_Q).astype(np.int64)
        above_Q = np.minimum(below_Q + 1, reached_N[-1] - 1)
        left_Q, right_Q = (sorted_N[np.searchsorted(reached_N, k, side="right")] for k in (below_Q, above_Q))
        found_DQ[draw] = left_Q + (at_Q - below_Q) * (right_Q - left_Q)
    return {name: found_DQ[:, column] for column, name in enumerate(QUANTILES)}
