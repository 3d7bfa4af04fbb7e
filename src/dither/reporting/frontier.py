"""The frontier: which of the measured files nothing beats, which is best under a budget, and its picture.

A file is on the frontier (Pareto's) when none at most as large is better.  The page computes the same
(`page/js/frontier.js`); this side draws the picture of a model card and answers in Python.

Runs are those of the results document, as JSON.  Sizes in bytes; metrics as the document has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dither.formats.layouts.methods import methods
from dither.reporting import charts
from dither.units import format_bytes

Run = Mapping[str, Any]
Point = dict[str, Any]

# metric → name, title of its axis, whether less is better, its scale, the factor it is shown with
METRICS: dict[str, tuple[str, str, bool, str, float]] = {
    "kl_mean": ("mean KL", "KL divergence, nats per token (less is better)", True, "log", 1),
    "kl_p99": ("99 % KL", "KL divergence of the worst 1 %, nats (less is better)", True, "log", 1),
    "same_top": ("same top token", "same likeliest token, % (more is better)", False, "linear", 100),
    "delta_ppl": ("ΔPPL", "perplexity above the original's (less is better)", True, "linear", 1),
    "decode_tokens_per_second": ("tokens/s", "tokens per second, decoding (more is better)", False, "linear", 1),
    "joules_per_token": ("J/token", "energy, joules per token (less is better)", True, "linear", 1),
}
CONTAINERS = {"gguf": "GGUF", **{name: method.title for name, method in methods().items()}}
FAMILIES = 8  # as many shapes as can be told apart
# Where a label may stand beside its point: pixels to the right, pixels down, and which of its ends is there.
SIDES = (
    (11, 0, "left"), (11, -11, "left"), (11, 11, "left"), (-11, 0, "right"), (-11, -11, "right"),
    (-11, 11, "right"), (0, -17, "center"), (0, 17, "center"), (11, -22, "left"), (-11, 22, "right"),
)  # fmt: skip
_LETTER = 8.3  # pixels, of the width of a letter
_WIDTH, _HEIGHT = 560, 360  # pixels of the picture's plot


def points(runs: Iterable[Run], key: str = "kl_mean", unit: float = 2**30) -> list[Point]:
    """One point for each run that has the metric, the smallest first; `pareto` marks the frontier.

    `x` is the size in units of `unit` bytes, `y`, `low` and `high` the metric as the axis shows it.
    """
    _, _, less, scale, factor = METRICS[key]
    known = [run for run in runs if _known(run, key)]
    families = list(dict.fromkeys(family_of(run) for run in known))
    floor = _floor(known, key)

    def place(value: float) -> float:
        return (max(value, floor) if scale == "log" else value) * factor

    found = []
    for run in known:
        metric = run["metrics"][key]
        value, low, high = metric["value"], metric.get("low"), metric.get("high")
        both, family = low is not None and high is not None, family_of(run)
        if len(families) > FAMILIES and families.index(family) >= FAMILIES - 1:
            family = "others"
        found.append(
            {
                "id": run["id"],
                "name": run["file"],
                "label": run["type"],
                "family": family,
                "bytes": run["bytes"],
                "x": run["bytes"] / unit,
                "value": value,
                "tag": metric["tag"],
                "y": place(value),
                "low": place(low) if both else None,
                "high": place(high) if both else None,
                "pareto": False,
            }
        )
    found.sort(key=lambda point: (point["bytes"], point["value"] if less else -point["value"]))
    best: float | None = None
    for point in found:
        if best is None or _beats(point["value"], best, less):
            point["pareto"], best = True, point["value"]
    return found


def family_of(run: Run) -> str:
    """What shape and color tell apart: the container and how the numbers were chosen."""
    container = CONTAINERS.get(run["container"], run["container"])
    return f"{container}, {run['recipe']}" if run.get("recipe") else str(container)


def best_under(found: Iterable[Point], key: str, size: float) -> Point | None:
    """The best point of at most `size` bytes; of equals the smallest."""
    best: Point | None = None
    for point in found:
        if point["bytes"] <= size and (best is None or _beats(point["value"], best["value"], METRICS[key][2])):
            best = point
    return best


def sentence(runs: Sequence[Run], size: float) -> str:
    """ "Best under 4.4 GiB: …", as a person reads it aloud; empty where nothing so small is measured."""
    best = best_under(points(runs), "kl_mean", size)
    if best is None:
        return ""
    run = next(run for run in runs if run["id"] == best["id"])
    metric, same = run["metrics"]["kl_mean"], run["metrics"].get("same_top")
    interval = f" ({metric['low']:.2g}–{metric['high']:.2g})" if best["low"] is not None else ""
    top = f", and picks the original's likeliest word {100 * same['value']:.0f} % of the time" if same else ""
    return (
        f"Best under {format_bytes(size)}: {run['type']} ({family_of(run)}, {format_bytes(run['bytes'])}): "
        f"it loses {metric['value']:.2g} nats per token{interval}{top}."
    )


def domains(found: Sequence[Point], scale: str) -> tuple[list[float], list[float]]:
    """Where the axes end: room for intervals, points at the rim and labels beside them."""
    xs = [point["x"] for point in found]
    ys = [y for point in found for y in (point["y"], point["low"], point["high"]) if y is not None]
    left, right, bottom, top = min(xs), max(xs), min(ys), max(ys)
    wide = right - left or left or 1
    x = [max(0, left - 0.08 * wide), right + 0.12 * wide]
    if scale == "log":
        grown = max(1.25, (top / bottom) ** 0.08)
        return x, [bottom / grown, top * grown]
    tall = top - bottom or abs(top) * 0.2 or 1
    return x, [bottom - 0.1 * tall, top + 0.1 * tall]


def log_ticks(low: float, high: float) -> list[float] | None:
    """1, 2 and 5 times the powers of ten in a range; the powers alone where those would crowd.

    None for a range so narrow that it is the chart's own to divide.

    >>> log_ticks(0.004, 0.11)
    [0.005, 0.01, 0.02, 0.05, 0.1]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 300 else (1, 2, 5)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else None


def place_labels(
    found: Sequence[Point], x: Sequence[float], y: Sequence[float], scale: str, width: float, height: float
) -> None:
    """Gives each point a place for its label that touches no label, point or interval, or none (`named`).

    Places beside the frontier's line go before places on it.  The chosen one and those on the frontier
    come first; `width` and `height` are the plot's, in pixels.
    """
    on_scale = math.log if scale == "log" else float
    bottom, top = on_scale(y[0]), on_scale(y[1])

    def at(point: Point, value: float) -> tuple[float, float]:
        return (
            (point["x"] - x[0]) / (x[1] - x[0]) * width,
            height - (on_scale(value) - bottom) / (top - bottom) * height,
        )

    taken = []
    for point in found:
        px, py = at(point, point["y"])
        taken.append((px - 6, py - 6, px + 6, py + 6))
        if point["low"] is not None:
            taken.append((px - 2, at(point, point["high"])[1], px + 2, at(point, point["low"])[1]))
    line = _line([at(point, point["y"]) for point in found if point["pareto"]])
    for point in sorted(found, key=lambda point: 0 if point.get("chosen") else 1 if point["pareto"] else 2):
        px, py = at(point, point["y"])
        wide = _LETTER * len(point["label"])
        boxes = {side: _box(side, px, py, wide) for side in SIDES}
        fitting = [s for s, box in boxes.items() if _inside(box, width, height) and _clear(box, taken)]
        free = next((s for s in fitting if _clear(boxes[s], line)), fitting[0] if fitting else None)
        dx, dy, align = free or (0, 0, "left")
        point.update(named=free is not None, dx=dx, dy=dy, align=align, baseline="middle")
        if free:
            taken.append(boxes[free])


def chart(runs: Sequence[Run], key: str = "kl_mean", size: float | None = None) -> dict[str, Any]:
    """The Vega-Lite specification of the picture; `size` bytes, where given, are the budget.

    Raises ValueError where no run has the metric.
    """
    largest = max((run["bytes"] for run in runs if _known(run, key)), default=0)
    if not largest:
        raise ValueError(f"no run has {key}")
    unit, name = (2**30, "GiB") if largest >= 2**29 else (2**20, "MiB")
    found = points(runs, key, unit)
    _, title, _, scale, factor = METRICS[key]
    best = best_under(found, key, size) if size else None
    for point in found:
        point["chosen"] = point is best
        point["size"], point["shown"] = format_bytes(point["bytes"]), f"{point['value'] * factor:.3g}"
    x, y = domains(found, scale)
    place_labels(found, x, y, scale, _WIDTH, _HEIGHT)
    spec = charts.spec(
        "frontier",
        {"points": found, "budget": [{"x": size / unit}] if size else []},
        x_title=f"size, {name}",
        y_title=title,
        x_domain=x,
        plot_height=_HEIGHT,
        y_scale={**({"type": "log"} if scale == "log" else {"zero": False}), "domain": y, "nice": False},
        y_values=log_ticks(*y) if scale == "log" else None,
        families=list(dict.fromkeys(point["family"] for point in found)),
    )
    return {"width": _WIDTH, **spec}


def _known(run: Run, key: str) -> bool:
    """Whether it has the metric, measured on the same text and against the same original as most."""
    return run.get("comparable") is not False and run.get("metrics", {}).get(key) is not None


def _floor(runs: Iterable[Run], key: str) -> float:
    """A logarithm has no zero: what is equal to the original stands at the foot of the chart."""
    metrics = [run["metrics"][key] for run in runs]
    ends = [metric[part] for metric in metrics for part in ("value", "low") if metric.get(part) is not None]
    above = [value for value in ends if value > 0]
    return min(above) / 2 if above else 1e-6


def _beats(value: float, other: float, less: bool) -> bool:
    return value < other if less else value > other


Box = tuple[float, float, float, float]


def _box(side: tuple[int, int, str], x: float, y: float, wide: float) -> Box:
    dx, dy, align = side
    left = x + dx if align == "left" else x + dx - wide if align == "right" else x - wide / 2
    return left, y + dy - 8, left + wide, y + dy + 8


def _line(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """The frontier's line as small boxes, closer than a label is high."""
    boxes = []
    for (x, y), (right, below) in pairwise(corners):
        steps = max(1, math.ceil(math.hypot(right - x, below - y) / 6))
        for step in range(steps + 1):
            px, py = x + (right - x) * step / steps, y + (below - y) * step / steps
            boxes.append((px - 1, py - 1, px + 1, py + 1))
    return boxes


def _inside(box: Box, width: float, height: float) -> bool:
    return box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height


def _clear(box: Box, taken: Iterable[Box]) -> bool:
    return not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )
