"""What a measurement keeps of every token, and which tokens those are.

Kept apart from the code that computes it (`metrics`), so that statistics need no torch.

Legend: S sequences, N scored positions of all sequences in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PerToken:
    """One value per scored position; float64 (N,) but for `same_top_N` (bool) and `sequence_N` (int64)."""

    kl_N: Doubles
    same_top_N: npt.NDArray[np.bool_]
    delta_p_N: Doubles
    nll_reference_N: Doubles
    nll_N: Doubles
    sequence_N: Integers  # which sequence each position belongs to
    drift: tuple[float, ...] = ()  # per block: mean of ‖h − ĥ‖ / ‖h‖ over the scored positions


def scored_positions(lengths_S: npt.ArrayLike, skip: int | None) -> tuple[Integers, Integers]:
    """Which positions are scored: (sequence_N, position_N), in order.

    A position is scored by the token after it, so the last one of a sequence is not scored; nor are the first
    `skip`, or, if that is None, the first half of each sequence (as in llama-perplexity).
    """
    length_S = np.asarray(lengths_S, dtype=np.int64)
    first_S = length_S // 2 if skip is None else np.full_like(length_S, skip)
    count_S = np.maximum(length_S - 1 - first_S, 0)
    positions = [np.arange(first, first + count) for first, count in zip(first_S, count_S, strict=True)]
    return np.repeat(np.arange(len(length_S)), count_S), np.concatenate([np.empty(0, np.int64), *positions])
