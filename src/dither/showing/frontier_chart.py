"""The picture of a frontier: rows for the template `charts/frontier.json`, for notebooks and model cards.

Every point carries its name beside it, so the names must not cover each other: each goes to the first of six
places around its point that is free of names and points laid before, and to none where all are taken (the
table beside the picture has them all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dither.showing import charts
from dither.showing.document import Run
from dither.showing.frontier import AXES, Axis, Point, best_under, pareto, points, short
from dither.units import format_bytes

WIDTH, HEIGHT = 640, 380  # units of the drawing
_LETTER, _LINE, _MARK = 7.0, 15.0, 11.0  # of a name's letter and line; of a point
# dx, dy, align, baseline: right above, right below, left below, left above, above, below
_PLACES = (
    (9, -7, "left", "bottom"), (9, 7, "left", "top"), (-9, 7, "right", "top"), (-9, -7, "right", "bottom"),
    (0, -11, "center", "bottom"), (0, 11, "center", "top"),
)  # fmt: skip
_Box = tuple[float, float, float, float]  # left, top, right, bottom


def frontier_chart(runs: Sequence[Run], key: str = "kl_mean", budget: int | None = None) -> dict[str, Any]:
    """The Vega-Lite specification; with a budget in bytes, its line and the file to take."""
    axis, given = AXES[key], points(runs, key)
    unit, factor = _unit(given)
    log = axis.logarithmic and all(point.value > 0 for point in given)
    scale = 100 if axis.percent else 1
    x_domain = _domain([point.bytes / factor for point in given], False)
    y_domain = _domain([scale * value for point in given for value in _ends(point, log)], log)
    best = None if budget is None else best_under(given, budget, axis.lower_is_better)
    kept = {point.id for point in pareto(given, axis.lower_is_better)}
    ways = {run.id: family(run) for run in runs}
    places = _name_places(given, factor, scale, x_domain, y_domain, log)
    rows = [
        {
            "x": point.bytes / factor, "y": scale * point.value, "low": _scaled(point.low, scale, log),
            "high": _scaled(point.high, scale, log), "label": point.label, "name": point.label,
            "family": ways[point.id], "size": format_bytes(point.bytes), "shown": _shown(point, axis),
            "tag": "measured", "pareto": point.id in kept, "chosen": best is not None and point.id == best.id,
            **places[point.id],
        }
        for point in given
    ]  # fmt: skip
    lines = [] if budget is None else [{"x": budget / factor}]
    title = f"{axis.title}, {axis.unit}" if axis.unit else axis.title
    return charts.spec(
        "frontier", {"points": rows, "budget": lines}, x_title=f"size, {unit}", y_title=title,
        y_type="log" if log else "linear", x_domain=x_domain, y_domain=y_domain, plot_height=HEIGHT,
        families=list(dict.fromkeys(row["family"] for row in rows)),
    )  # fmt: skip


def family(run: Run) -> str:
    """How a file was made, in a legend."""
    words = [run.recipe, run.container if run.container != "gguf" else ""]
    return " · ".join(word for word in words if word) or run.container


def _unit(given: Sequence[Point]) -> tuple[str, float]:
    largest = max((point.bytes for point in given), default=0)
    return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)


def _ends(point: Point, log: bool) -> list[float]:
    ends = [value for value in (point.value, point.low, point.high) if value is not None]
    return [value for value in ends if value > 0] if log else ends


def _scaled(value: float | None, scale: float, log: bool) -> float | None:
    return None if value is None or (log and value <= 0) else scale * value


def _shown(point: Point, axis: Axis) -> str:
    def one(value: float) -> str:
        return f"{100 * value:.1f} %" if axis.percent else short(value)

    if point.low is None or point.high is None:
        return one(point.value)
    return f"{one(point.value)} ({one(point.low)} … {one(point.high)})"


def _domain(values: Sequence[float], log: bool) -> list[float]:
    """From the least to the most, with some air; on a logarithmic axis in factors."""
    if not values:
        return [1e-3, 1.0] if log else [0.0, 1.0]
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** 0.08, 1.25)
        return [low / air, high * air]
    air = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return [low - air, high + air]


def _name_places(
    given: Sequence[Point], factor: float, scale: float, x_domain: Sequence[float],
    y_domain: Sequence[float], log: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Id → where its name goes, in the template's fields."""

    def share(value: float, domain: Sequence[float], logarithmic: bool) -> float:
        low, at, high = (math.log(v) if logarithmic else v for v in (domain[0], value, domain[1]))
        return (at - low) / (high - low)

    spots = {
        point.id: (
            WIDTH * share(point.bytes / factor, x_domain, False),
            HEIGHT * (1 - share(scale * point.value, y_domain, log)),
        )
        for point in given
    }
    half = _MARK / 2
    taken: list[_Box] = [(x - half, y - half, x + half, y + half) for x, y in spots.values()]
    found: dict[str, dict[str, Any]] = {}
    for point in given:
        free = None
        for place in _PLACES:
            box = _box(spots[point.id], len(point.label) * _LETTER, *place)
            inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                free = place
                taken.append(box)
                break
        dx, dy, align, baseline = free or _PLACES[0]
        found[point.id] = {
            "named": free is not None, "dx": dx, "dy": dy, "align": align, "baseline": baseline,
        }  # fmt: skip
    return found


def _box(spot: tuple[float, float], width: float, dx: float, dy: float, align: str, baseline: str) -> _Box:
    x, y = spot[0] + dx, spot[1] + dy
    left = {"left": x, "right": x - width, "center": x - width / 2}[align]
    top = y - _LINE if baseline == "bottom" else y
    return left, top, left + width, top + _LINE


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
