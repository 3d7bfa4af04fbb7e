"""Which file to take: size against loss, the files that nothing beats, the best under a budget, in a sentence.

A file *beats* another that is no smaller and no better, where it is smaller or better; what nothing beats is
the Pareto line.  Files are compared by one metric at a time and only where it was measured alike: on the same
text, against the same original.  All of it is arithmetic on plain numbers, because the page computes it too:
`tests/showing/golden_frontier.json` holds inputs and answers for both.

Units: bytes; each metric's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dither.showing.document import Run
from dither.units import format_bytes


@dataclass(frozen=True)
class Axis:
    """A metric to choose by.  `says` is what a sentence says of a file, with {} for the number."""

    key: str
    title: str
    unit: str
    lower_is_better: bool
    says: str
    percent: bool = False
    logarithmic: bool = False


AXES = {
    axis.key: axis
    for axis in (
        Axis("kl_mean", "mean KL divergence", "nats per token", True, "loses {} nats per token", False, True),
        Axis("kl_p99", "99 % KL divergence", "nats", True,
             "loses no more than {} nats at 99 of 100 tokens", False, True),
        Axis("same_top", "same top token", "%", False, "finds the same token likeliest {} of the time", True),
        Axis("delta_ppl", "ΔPPL", "", True, "adds {} to the perplexity"),
        Axis("decode_tokens_per_second", "decode speed", "tokens/s", False, "writes {} tokens per second"),
        Axis("prefill_tokens_per_second", "prefill speed", "tokens/s", False, "reads {} tokens per second"),
        Axis("joules_per_token", "energy", "J/token", True, "takes {} joules per token"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A file on an axis; `low` and `high` are the ends of its interval where there is one."""

    id: str
    label: str
    bytes: int
    value: float
    low: float | None = None
    high: float | None = None


def points(runs: Sequence[Run], key: str) -> list[Point]:
    """The runs that have the metric and may be compared by it: no stale ones, one text, one original."""
    names = labels(runs)
    kept = [run for run in comparable(runs) if key in run.metrics]
    return [
        Point(run.id, names[run.id], run.bytes, found.value, found.low, found.high)
        for run in kept
        for found in (run.metrics[key],)
    ]


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs of the text and the original that most were measured on (ties: the first); no stale ones."""
    sound = [run for run in runs if run.metrics and not run.stale]
    groups = Counter(_ground(run) for run in sound)
    if not groups:
        return []
    most = max(groups, key=lambda ground: groups[ground])
    return [run for run in sound if _ground(run) == most]


def _ground(run: Run) -> tuple[str, ...]:
    on = run.measured_on
    if on is None:
        return ("",)
    return (run.reference or "", on.sha256 or on.data, str(on.context), str(on.tokens))


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Id → what people call the file: its type, with the recipe, or its name, where types repeat.

    A folder's type is named after the format: `gptq int4-g128`.
    """
    named = {run.id: run.type if run.container == "gguf" else f"{run.container} {run.type}" for run in runs}
    types = Counter(named.values())
    recipes = Counter((named[run.id], run.recipe) for run in runs)
    found = {}
    for run in runs:
        name = named[run.id]
        if types[name] == 1:
            found[run.id] = name
        elif run.recipe and recipes[name, run.recipe] == 1:
            found[run.id] = f"{name} ({run.recipe})"
        else:
            found[run.id] = run.file
    return found


def pareto(given: Sequence[Point], lower_is_better: bool = True) -> list[Point]:
    """The points that nothing beats, the smallest first; of those alike in both, all."""
    sign = 1 if lower_is_better else -1
    in_order = sorted(given, key=lambda point: (point.bytes, sign * point.value, point.id))
    kept: list[Point] = []
    for point in in_order:
        last = kept[-1] if kept else None
        alike = last is not None and (last.bytes, last.value) == (point.bytes, point.value)
        if last is None or alike or sign * point.value < sign * last.value:
            kept.append(point)
    return kept


def best_under(given: Sequence[Point], budget: int, lower_is_better: bool = True) -> Point | None:
    """The best of at most `budget` bytes, None where none fits; of equals the smallest, the first by id."""
    sign = 1 if lower_is_better else -1
    fitting = [point for point in given if point.bytes <= budget]
    return min(fitting, key=lambda point: (sign * point.value, point.bytes, point.id), default=None)


def as_good(given: Sequence[Point], best: Point, lower_is_better: bool = True) -> Point | None:
    """The smallest file below `best` whose interval reaches into its: the text does not tell them apart."""
    if best.low is None or best.high is None:
        return None
    near = [
        point
        for point in given
        if point.bytes < best.bytes
        and point.low is not None
        and point.high is not None
        and (point.low <= best.high if lower_is_better else point.high >= best.low)
    ]
    return min(near, key=lambda point: (point.bytes, point.id), default=None)


def next_better(given: Sequence[Point], budget: int, lower_is_better: bool = True) -> Point | None:
    """The smallest file above the budget that is better than the best under it."""
    best = best_under(given, budget, lower_is_better)
    sign = 1 if lower_is_better else -1
    better = [
        point
        for point in given
        if point.bytes > budget and (best is None or sign * point.value < sign * best.value)
    ]
    return min(better, key=lambda point: (point.bytes, sign * point.value, point.id), default=None)


def sentence(given: Sequence[Point], budget: int, key: str = "kl_mean") -> str:
    """`Best under 4.40 GiB: Q4_K_M (4.10 GiB), which loses 0.0310 nats per token (95 %: 0.0300 to 0.0321).`

    Then, where it is so, which smaller file is as good as far as the text tells, and the next better.
    """
    axis = AXES[key]
    best = best_under(given, budget, axis.lower_is_better)
    if not given:
        return "Nothing is measured yet. `dither measure FILE --against MODEL` measures a file."
    if best is None:
        least = min(given, key=lambda point: (point.bytes, point.id))
        return (
            f"Nothing that was measured fits under {format_bytes(budget)}: the smallest, {least.label}, "
            f"has {format_bytes(least.bytes)}."
        )
    said = axis.says.format(_number(best.value, axis))
    if best.low is not None and best.high is not None:
        said += f" (95 %: {_number(best.low, axis)} to {_number(best.high, axis)})"
    parts = [f"Best under {format_bytes(budget)}: {best.label} ({format_bytes(best.bytes)}), which {said}."]
    alike = as_good(given, best, axis.lower_is_better)
    if alike is not None:
        less = format_bytes(best.bytes - alike.bytes)
        parts.append(f"{alike.label} is {less} smaller, and this text does not tell the two apart.")
    above = next_better(given, budget, axis.lower_is_better)
    if above is not None:
        parts.append(f"The next better, {above.label}, has {format_bytes(above.bytes)}.")
    return " ".join(parts)


def _number(value: float, axis: Axis) -> str:
    return f"{100 * value:.1f} %" if axis.percent else short(value)


def short(value: float) -> str:
    """Three digits that count, as the page writes them.

    >>> short(0.0095419), short(9.42e-05), short(1.5), short(0.0), short(1234.6), short(-0.25)
    ('0.00954', '9.4e-5', '1.50', '0', '1235', '-0.250')
    """
    if value == 0:
        return "0"
    if abs(value) < 0.0005:
        text = f"{value:.1e}"
    elif abs(value) >= 1000:
        text = f"{value:.4g}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return re.sub(r"e([+-])0*", r"e\1", text)
