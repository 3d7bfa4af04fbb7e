"""What a measurement keeps of every token, and which tokens those are.

Apart from what computes it (`metrics`), so that statistics need no torch.

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

    A position is scored by the token after it, so the last one of a sequence never is; nor are the
    first `skip`, or, where that is None, the first half of each sequence (as llama-perplexity does).
    """
    sequences, positions = [], []
    for sequence, length in enumerate(np.asarray(lengths_S, dtype=np.int64)):
        first = int(length) // 2 if skip is None else skip
        position_N = np.arange(first, max(first, int(length) - 1), dtype=np.int64)
        positions.append(position_N)
        sequences.append(np.full(len(position_N), sequence, dtype=np.int64))
    if not positions:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(sequences), np.concatenate(positions)
