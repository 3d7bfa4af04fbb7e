"""The difference of two models on the same questions, with its standard error.

Both answer every question, and most questions are easy or hard for both.  So the difference is taken question by
question, d = x − y, and its standard error is that of the mean of d:

    mean(d) ± sqrt(var(d) / n)

which is far smaller than the errors of both scores added, sqrt(var(x)/n + var(y)/n), wherever the models
agree.  Source: Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Difference:
    """`value` ± `stderr` (NaN-free: 0 for a single question), over `questions` that both answered."""

    value: float
    stderr: float
    questions: int
    changed: int  # how many were judged differently

    @property
    def told(self) -> bool:
        """Whether the difference is larger than chance makes it one time in twenty."""
        return abs(self.value) > 1.96 * self.stderr


def difference(ours: Mapping[object, float], theirs: Mapping[object, float]) -> Difference | None:
    """The mean difference of scores by question; None if there is no common question.

    >>> difference({1: 1.0, 2: 0.0}, {1: 1.0, 2: 1.0})
    Difference(value=-0.5, stderr=0.5, questions=2, changed=1)
    """
    apart = [ours[key] - theirs[key] for key in ours if key in theirs]
    count = len(apart)
    if not count:
        return None
    return Difference(fmean(apart), standard_error(apart) or 0.0, count, sum(d != 0 for d in apart))


def standard_error(values: Collection[float]) -> float | None:
    """The standard error of a mean over questions, sqrt(var / n); None for a single one."""
    count, mean = len(values), fmean(values or [0.0])
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1) / count) if count > 1 else None
