"""Llama 3.1's rotary parameters, found again in the factors that a GGUF keeps of them.

A Llama 3.x checkpoint scales its frequencies by four numbers: short wavelengths stay as they are, long ones are
stretched `factor` times, a ramp lies between.  Its GGUF has only what comes out, one factor f for each rotated pair
(`rope_freqs.weight`).  With u = 1/wavelength the ramp is a straight line,

    1/f = (1 − k)/factor + k,    k = (original · u − low) / (high − low),    cut off at 0 and 1,

so two pairs on it give its slope and offset.  Multiplying original, low and high by one number changes nothing: of the
equivalent answers the one that Llama has (low 1, high 4, a power of two) is taken where it fits, otherwise that with
low at 1.  What is found counts only if it makes the same factors again.

Factors of any other origin are a LongRoPE whose lists for short and long contexts are the same (`rotary.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dither.errors import SourceError
from dither.models.arch.rope import llama3_factors
from dither.models.json_object import JsonObject
from dither.types import Floats

Parameters = dict[str, Any]
LOW, HIGH = 1.0, 4.0  # of every Llama 3.x
_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0, 64.0)  # where no pair is slow enough to show it; Llama's own first
_POWERS = range(5, 21)
# Of 1/f, which lies between 0 and 1: llama.cpp's converter takes powers of the base in float32.
_CLOSE = 2e-6


def llama3_parameters(factor_P: Floats, base: float) -> Parameters | None:
    """The parameters of rope type "llama3" that make these factors, or None where none do."""
    for found in _candidates(np.asarray(factor_P, np.float64), base):
        try:
            again_P = llama3_factors(JsonObject({**found, "rope_theta": base}, "factors"), 2 * len(factor_P))
        except SourceError:
            continue
        if np.abs(1 / again_P.astype(np.float64) - 1 / factor_P).max() <= _CLOSE:
            return {"rope_type": "llama3", **found}
    return None


def _candidates(factor_P: np.ndarray, base: float) -> Iterator[Parameters]:
    smallest, largest = float(factor_P.min()), float(factor_P.max())
    if not (np.isfinite(factor_P).all() and 0.99 < smallest < largest):
        return
    rounded = (float(f"{largest:.{digits}g}") for digits in (2, 4, 6, 9))
    factors = [*dict.fromkeys((*rounded, *(factor for factor in _FACTORS if factor > largest)))]
    for factor in factors:
        for power in reversed(_POWERS):
            yield _named(factor, LOW, HIGH, 2**power)
    for factor in factors:
        yield from _solved(factor_P, base, factor)


def _solved(factor_P: np.ndarray, base: float, factor: float) -> Iterator[Parameters]:
    """k = slope · u − offset through the pairs on the ramp."""
    turn_P = base ** -(np.arange(len(factor_P)) / len(factor_P)) / (2 * np.pi)
    kept_P = (1 / factor_P - 1 / factor) / (1 - 1 / factor)
    on_ramp_P = (kept_P > 1e-4) & (kept_P < 1 - 1e-4)
    if on_ramp_P.sum() < 2:
        return
    slope, offset = np.polyfit(turn_P[on_ramp_P], kept_P[on_ramp_P], 1)
    if slope > 0 > offset:
        original = max(1, round(slope / -offset))  # with low at 1, where that is whole
        low, high = (original * part / slope for part in (-offset, 1 - offset))
        for digits in (4, 7):
            yield _named(factor, float(f"{low:.{digits}g}"), float(f"{high:.{digits}g}"), original)


def _named(factor: float, low: float, high: float, original: int) -> Parameters:
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
