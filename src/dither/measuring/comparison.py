"""Two measurements side by side: do they differ, or is it the text's luck?

Intervals that do not overlap differ; those that do may still differ, because both files were measured on the
same text.  Then the difference is taken sequence by sequence and has an interval of its own.

Legend: S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.formats.intervals import Interval
from dither.measuring.bootstrap import difference
from dither.measuring.schema import Measurement


@dataclass(frozen=True)
class Comparison:
    """B compared with A.  `a` is None if A is the reference itself: the original that B was made of."""

    a: Measurement | None
    b: Measurement
    difference: Interval | None  # B's kl_mean minus A's, if both were measured on the same text
    max_kld: float | None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether B's kl_mean is within the limit; true if there is none."""
        return self.max_kld is None or self.b.kl_mean <= self.max_kld

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals of both kl_mean overlap; None if they cannot be compared, or if one has none."""
        if self.a is None or other_terms(self.a, self.b):
            return None
        ours, theirs = self.a.kl_mean.both, self.b.kl_mean.both
        return None if ours is None or theirs is None else ours[0] <= theirs[1] and theirs[0] <= ours[1]

    @property
    def verdict(self) -> str:
        """One of "lower", "higher" (B's divergence, beyond chance), "same" (cannot be told), "" (no A)."""
        if self.a is None or other_terms(self.a, self.b):
            return ""
        apart, ends = self.difference, self.difference.both if self.difference is not None else None
        if self.overlap is None or (self.overlap if ends is None else ends[0] <= 0 <= ends[1]):
            return "same"
        return "lower" if (self.b.kl_mean - self.a.kl_mean if apart is None else apart) < 0 else "higher"

    def to_json(self) -> dict[str, Any]:
        return {
            "a": None if self.a is None else self.a.model_dump(mode="json"),
            "b": self.b.model_dump(mode="json"),
            "overlap": self.overlap,
            "difference": self.difference,
            "difference_low": getattr(self.difference, "low", None),
            "difference_high": getattr(self.difference, "high", None),
            "verdict": self.verdict,
            "max_kld": self.max_kld,
            "passed": self.passed,
            "notes": list(self.notes),
        }


def contrast(a: Measurement | None, b: Measurement, *, max_kld: float | None = None) -> Comparison:
    """Compares two measurements, pairwise by sequence if they share their text; notes say why not otherwise."""
    if a is None:
        return Comparison(None, b, None, max_kld)
    terms = other_terms(a, b)
    if terms:
        different = f"A and B were measured on different terms ({', '.join(terms)}): "
        different += "read their own intervals, not their difference."
        return Comparison(a, b, None, max_kld, (different,))
    found = None
    same_text = a.sequence_tokens == b.sequence_tokens
    if same_text and len(a.sequence_tokens) == len(a.sequence_kl) == len(b.sequence_kl) > 0:
        tokens_S = np.array(a.sequence_tokens, dtype=np.float64)
        found = difference(np.array(a.sequence_kl), np.array(b.sequence_kl), tokens_S)
    return Comparison(a, b, found, max_kld)


def other_terms(a: Measurement, b: Measurement) -> list[str]:
    """What differs between two measurements so that their numbers do not mean the same."""
    terms = {
        "reference": (a.reference_sha256, b.reference_sha256),
        "text": (a.data_sha256, b.data_sha256),
        "positions": (a.skipped, b.skipped),
        "definition": (a.metric_version, b.metric_version),
    }
    return [name for name, (ours, theirs) in terms.items() if ours != theirs]
