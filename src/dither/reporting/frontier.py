"""The frontier: which of the measured files nothing beats, which is best under a budget, and its picture.

A file is on the frontier (Pareto's) when none at most as large is better.  All of it is computed here: the picture
of a model card, answers in Python, and what the page draws.  The page switches between metrics, moves a budget and
has any width, so the document carries every metric and the places of labels for several widths (`shipped`); the
page only looks them up.

Runs are those of the results document; the ones that are not comparable are left out.  Sizes in bytes.

Legend: P points, S places of a label beside its point, B boxes (left, top, right, bottom), in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dither.formats.layouts.methods import methods
from dither.reporting import charts
from dither.reporting.document import Frontier, RunRecord
from dither.units import format_bytes

Point = dict[str, Any]


class Axis(NamedTuple):
    """How a metric is shown: the button's name, the axis, whether less is better, a scale, a factor."""

    name: str
    title: str
    less: bool
    scale: str  # "log" or "linear"
    factor: float


METRICS: dict[str, Axis] = {
    "kl_mean": Axis("mean KL", "KL divergence, nats per token (less is better)", True, "log", 1),
    "kl_p99": Axis("99 % KL", "KL divergence of the worst 1 %, nats (less is better)", True, "log", 1),
    "same_top": Axis("same top token", "same likeliest token, % (more is better)", False, "linear", 100),
    "delta_ppl": Axis("ΔPPL", "perplexity above the original's (less is better)", True, "linear", 1),
    "decode_tokens_per_second": Axis("tokens/s", "tokens per second, decoding (more is better)", False, "linear", 1),
    "joules_per_token": Axis("J/token", "energy, joules per token (less is better)", True, "linear", 1),
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
# Widths of the page's view for which labels are placed ahead; one is used from its width up to the next.
VIEWS = (206, 290, 330, 420, 520, 580, 660, 760, 880)
_BESIDE_PLOT = 86  # pixels of a view's width that the vertical axis and its title take
_MOST_PLACED = 64  # labels of a view; more than a plot has room for
_MOST_FIRST = 8  # points of the frontier that get a placing of their own where the common one has no room for them


def points(runs: Iterable[RunRecord], key: str = "kl_mean", unit: float = 2**30, by_label: bool = True) -> list[Point]:
    """One point for each run that has the metric, the smallest first; `pareto` marks the frontier.

    `x` is the size in units of `unit` bytes, `y`, `low` and `high` the metric as the axis shows it; runs are named
    by their labels, or by their types alone.
    """
    _, _, less, scale, factor = METRICS[key]
    known = [run for run in runs if run.comparable and key in run.metrics]
    families = list(dict.fromkeys(map(family_of, known)))
    alone = families[: FAMILIES - 1] if len(families) > FAMILIES else families
    # A logarithm has no zero: what is equal to the original stands at the foot of the chart.
    ends = (end for run in known for end in (run.metrics[key].value, run.metrics[key].low))
    floor = min((end for end in ends if end is not None and end > 0), default=2e-6) / 2

    def place(value: float) -> float:
        return (max(value, floor) if scale == "log" else value) * factor

    found: list[Point] = []
    for run in known:
        metric, family = run.metrics[key], family_of(run)
        low, high = (None, None) if metric.low is None or metric.high is None else (metric.low, metric.high)
        found.append(
            {
                "id": run.id,
                "name": run.file,
                "label": (by_label and run.label) or run.type,
                "family": family if family in alone else "others",
                "bytes": run.bytes,
                "x": run.bytes / unit,
                "value": metric.value,
                "tag": metric.tag,
                "y": place(metric.value),
                "low": None if low is None else place(low),
                "high": None if high is None else place(high),
                "pareto": False,
            }
        )
    sign = 1 if less else -1
    found.sort(key=lambda point: (point["bytes"], sign * point["value"]))
    best = math.inf
    for point in found:
        if sign * point["value"] < best:
            point["pareto"], best = True, sign * point["value"]
    return found


def family_of(run: RunRecord) -> str:
    """What shape and color tell apart: the container and how the numbers were chosen."""
    name = CONTAINERS.get(run.container, run.container)
    return f"{name}, {run.recipe}" if run.recipe else name


def best_under(found: Iterable[Point], size: float) -> Point | None:
    """The best of `points` of at most `size` bytes; of equals the smallest.  That is the last of the frontier: along
    it, every larger point is better."""
    return max((p for p in found if p["pareto"] and p["bytes"] <= size), key=lambda p: int(p["bytes"]), default=None)


def sentence(runs: Sequence[RunRecord], size: float) -> str:
    """ "Best under 4.4 GiB: …", as a person reads it aloud; empty where nothing so small is measured."""
    best = best_under(points(runs), size)
    if best is None:
        return ""
    run = next(run for run in runs if run.id == best["id"])
    metric, same = run.metrics["kl_mean"], run.metrics.get("same_top")
    interval = f" ({metric.low:.2g}–{metric.high:.2g})" if best["low"] is not None else ""
    top = f", and picks the original's likeliest word {100 * same.value:.0f} % of the time" if same else ""
    return (
        f"Best under {format_bytes(size)}: {run.type} ({family_of(run)}, {format_bytes(run.bytes)}): "
        f"it loses {metric.value:.2g} nats per token{interval}{top}."
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


class Labels:
    """The places of labels on one plot of `size` (width and height in pixels): what points, intervals and the
    frontier's line leave free is found once, what labels leave to each other in `places`.

    Points on the frontier come first; labels of the first `most` are placed at all.
    """

    def __init__(
        self,
        found: Sequence[Point],
        axes: tuple[Sequence[float], Sequence[float]],
        scale: str,
        size: tuple[float, float],
        most: int | None = None,
    ) -> None:
        (left, right), ends = axes
        on_scale = math.log if scale == "log" else float
        bottom, top = map(on_scale, ends)

        def down(value: float) -> float:
            return size[1] - (on_scale(value) - bottom) / (top - bottom) * size[1]

        at = [((point["x"] - left) / (right - left) * size[0], down(point["y"])) for point in found]
        taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at]
        placed = list(zip(found, at, strict=True))
        taken += [(px - 2, down(p["high"]), px + 2, down(p["low"])) for p, (px, _) in placed if p["low"] is not None]
        line = _line([place for point, place in placed if point["pareto"]])
        self._count = len(found)
        self._order = sorted(range(len(found)), key=lambda index: not found[index]["pareto"])[:most]
        self._boxes = {index: _label_boxes(*at[index], _LETTER * len(found[index]["label"])) for index in self._order}
        every_B4 = np.concatenate([*self._boxes.values(), np.empty((0, 4))])
        inside_B = (every_B4[:, :2] >= 0).all(1) & (every_B4[:, 2:] <= size).all(1)
        self._free = dict(zip(self._order, (inside_B & _clear(every_B4, taken)).reshape(-1, len(SIDES)), strict=True))
        self._beside = dict(zip(self._order, _clear(every_B4, line).reshape(-1, len(SIDES)), strict=True))

    def places(self, first: int | None = None) -> list[int | None]:
        """For each point the index among `SIDES` of its label's place, None where none is free; the point
        `first` chooses before all others.  Places beside the line go before places on it."""
        places: list[int | None] = [None] * self._count
        taken: list[npt.NDArray[np.float64]] = []
        for index in sorted(self._order, key=lambda index: index != first):
            free_S = self._free[index] & _clear(self._boxes[index], taken)
            fitting = [*np.flatnonzero(free_S & self._beside[index]), *np.flatnonzero(free_S)]
            if fitting:
                places[index] = int(fitting[0])
                taken.append(self._boxes[index][fitting[0]])
        return places


def label_at(place: int | None) -> dict[str, Any]:
    """A place as the chart's template draws it."""
    dx, dy, align = (0, 0, "left") if place is None else SIDES[place]
    return {"named": place is not None, "dx": dx, "dy": dy, "align": align, "baseline": "middle"}


def shipped(runs: Sequence[RunRecord]) -> Frontier:
    """What the page draws of the frontier, for the results document."""
    unit, name = _unit(max((run.bytes for run in runs), default=0))
    metrics = {key: _shipped_metric(points(runs, key, unit, by_label=False), axis) for key, axis in METRICS.items()}
    return Frontier.model_validate({"unit": name, "unit_bytes": unit, "sides": SIDES, "metrics": metrics})


def _shipped_metric(found: Sequence[Point], axis: Axis) -> dict[str, Any]:
    if not found:
        return axis._asdict()
    x, y = domains(found, axis.scale)
    layouts = []
    for view in VIEWS:
        height = 300 if view < 520 else 380
        labels = Labels(found, (x, y), axis.scale, (max(120, view - _BESIDE_PLOT), height), _MOST_PLACED)
        places = labels.places()
        hidden = [index for index, point in enumerate(found) if point["pareto"] and places[index] is None]
        own = {index: labels.places(first=index) for index in hidden[:_MOST_FIRST]}
        chosen = {found[index]["id"]: given for index, given in own.items() if given[index] is not None}
        layouts.append({"view": view, "height": height, "places": places, "chosen": chosen})
    return {
        **axis._asdict(),
        "points": [{key: point[key] for key in ("id", "family", "x", "y", "low", "high", "pareto")} for point in found],
        "x_domain": x,
        "y_domain": y,
        "y_ticks": log_ticks(*y) if axis.scale == "log" else None,
        "layouts": layouts,
    }


def _unit(largest: int) -> tuple[int, str]:
    return (2**30, "GiB") if largest >= 2**29 else (2**20, "MiB")


def chart(runs: Sequence[RunRecord], key: str = "kl_mean", size: float | None = None) -> dict[str, Any]:
    """The Vega-Lite specification of the picture; `size` bytes, where given, are the budget.  Raises ValueError where
    no run has the metric."""
    sizes = [point["bytes"] for point in points(runs, key)]
    if not sizes:
        raise ValueError(f"no run has {key}")
    unit, name = _unit(max(sizes))
    found = points(runs, key, unit)
    _, title, _, scale, factor = METRICS[key]
    best = best_under(found, size) if size else None
    for point in found:
        point["chosen"] = point is best
        point["size"], point["shown"] = format_bytes(point["bytes"]), f"{point['value'] * factor:.3g}"
    x, y = domains(found, scale)
    places = Labels(found, (x, y), scale, (_WIDTH, _HEIGHT)).places(None if best is None else found.index(best))
    for point, place in zip(found, places, strict=True):
        point.update(label_at(place))
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


def _label_boxes(x: float, y: float, wide: float) -> npt.NDArray[np.float64]:
    """A label's box in each of its places, (S, 4)."""
    back = {"left": 0.0, "right": wide, "center": wide / 2}
    return np.array([(x + dx - back[a], y + dy - 8, x + dx - back[a] + wide, y + dy + 8) for dx, dy, a in SIDES])


def _line(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """The frontier's line as small boxes, closer than a label is high."""
    boxes = []
    for (x, y), (right, below) in pairwise(corners):
        steps = max(1, math.ceil(math.hypot(right - x, below - y) / 6))
        for step in range(steps + 1):
            px, py = x + (right - x) * step / steps, y + (below - y) * step / steps
            boxes.append((px - 1, py - 1, px + 1, py + 1))
    return boxes


def _clear(boxes_B4: npt.NDArray[np.float64], taken: Sequence[npt.ArrayLike]) -> npt.NDArray[np.bool_]:
    """Which of some boxes touch none of those that are taken."""
    left, top, right, bottom = np.array(taken, np.float64).reshape(-1, 4).T
    box = boxes_B4.T[:, :, None]
    touching = (box[0] < right) & (left < box[2]) & (box[1] < bottom) & (top < box[3])
    clear_B: npt.NDArray[np.bool_] = ~touching.any(1)
    return clear_B
