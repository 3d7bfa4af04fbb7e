"""The frontier against its definition, and what the page draws against the document."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from page_util import run_module

from dither.reporting import charts, frontier
from dither.reporting.document import Frontier, RunRecord, TaggedValue
from dither.reporting.frontier import (
    METRICS,
    VIEWS,
    Labels,
    best_under,
    chart,
    domains,
    label_at,
    points,
    sentence,
    shipped,
)

GIB = 2**30


def run(index: int, size: float, value: float | None, *, key: str = "kl_mean", spread: float = 0.1) -> RunRecord:
    metrics = {}
    if value is not None:
        ends = {"low": value * (1 - spread), "high": value * (1 + spread)} if spread else {"low": None, "high": None}
        metrics = {key: {"value": value, "tag": "measured", **ends}}
    return RunRecord(
        id=f"run-{index}",
        file=f"model-{index}.gguf",
        type=f"Q{index % 8}_K_M",
        container="gguf",
        recipe=("nearest", "gptq, calibrated")[index % 2],
        bytes=round(size * GIB),
        parameters=8 * round(size * GIB),
        bpw=1.0,
        metrics=metrics,
    )


def drawn(count: int, seed: int, key: str = "kl_mean") -> list[RunRecord]:
    draw = random.Random(seed)
    sizes = [draw.choice([2.0, 2.5, draw.uniform(1, 9)]) for _ in range(count)]
    return [
        run(
            i, size, draw.choice([draw.lognormvariate(-4, 1.5), 0.0, None, 0.01]), key=key, spread=draw.choice([0, 0.2])
        )
        for i, size in enumerate(sizes)
    ]


def label(found: list[dict[str, Any]], scale: str, width: float, height: float) -> tuple[list[float], list[float]]:
    """Gives each point its label; the ends of both axes."""
    axes = domains(found, scale)
    for point, place in zip(found, Labels(found, axes, scale, (width, height)).places(), strict=True):
        point.update(label_at(place))
    return axes


@pytest.mark.parametrize("key", METRICS)
def test_a_file_is_on_the_frontier_when_none_as_small_is_better(key: str) -> None:
    found = points(drawn(60, 1, key), key)
    less = METRICS[key][2]
    for i, point in enumerate(found):
        beaten = any(
            (
                other["bytes"] <= point["bytes"]
                and (other["value"] < point["value"] if less else other["value"] > point["value"])
            )
            or (other["bytes"] < point["bytes"] and other["value"] == point["value"])
            or (j < i and other["bytes"] == point["bytes"] and other["value"] == point["value"])
            for j, other in enumerate(found)
            if other is not point
        )
        assert point["pareto"] != beaten


def test_what_was_measured_on_another_text_is_left_out() -> None:
    runs = [run(1, 3, 0.5), run(2, 2, 0.001).model_copy(update={"comparable": False})]
    assert [point["id"] for point in points(runs)] == ["run-1"]
    assert [point.id for point in shipped(runs).metrics["kl_mean"].points] == ["run-1"]
    assert "Q1_K_M" in sentence(runs, 9 * GIB)


def test_the_sentence_follows_the_budget() -> None:
    runs = [run(2, 3.0, 0.09), run(4, 4.3, 0.021), run(8, 8.0, 0.001)]
    runs[1].metrics["same_top"] = TaggedValue(value=0.941)
    assert sentence(runs, 4.4 * GIB) == (
        "Best under 4.40 GiB: Q4_K_M (GGUF, nearest, 4.30 GiB): it loses 0.021 nats per token (0.019–0.023), "
        "and picks the original's likeliest word 94 % of the time."
    )
    assert "Q2_K_M" in sentence(runs, 4.2 * GIB) and "Q0_K_M" in sentence(runs, 99 * GIB)
    assert sentence(runs, GIB) == ""


@pytest.mark.parametrize("count", [1, 2, 9, 60])
def test_labels_touch_nothing(count: int) -> None:
    found = points([entry for entry in drawn(2 * count, 3) if entry.metrics][:count])
    x, y = label(found, "log", 600, 360)
    named = [point for point in found if point["named"]]
    assert named
    if count < 10:
        assert len(named) >= 0.7 * len(found)
    boxes: list[tuple[float, float, float, float]] = []
    for point in named:
        px = (point["x"] - x[0]) / (x[1] - x[0]) * 600
        py = 360 - math.log(point["y"] / y[0]) / math.log(y[1] / y[0]) * 360
        wide = 8.3 * len(point["label"])
        start = {"left": 0, "right": wide, "center": wide / 2}[point["align"]]
        left, middle = px + point["dx"] - start, py + point["dy"]
        assert left >= 0 and left + wide <= 600 and 8 <= middle <= 352
        boxes.append((left, middle - 8, left + wide, middle + 8))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_labels_keep_off_the_line_that_is_drawn() -> None:
    """Seven files of one falling curve: beside each there is room above or below the line."""
    kl = [0.116, 0.0262, 0.0119, 0.0032, 0.0026, 0.00089, 0.000093]
    sizes = [2.21, 2.66, 2.82, 3.07, 3.47, 3.91, 5.06]
    found = points([run(i, size, value, spread=0.1) for i, (size, value) in enumerate(zip(sizes, kl, strict=True))])
    x, y = label(found, "log", 800, 380)
    at = [
        ((p["x"] - x[0]) / (x[1] - x[0]) * 800, 380 - math.log(p["y"] / y[0]) / math.log(y[1] / y[0]) * 380)
        for p in found
    ]
    assert all(point["named"] and point["pareto"] for point in found)
    for point, (px, py) in zip(found, at, strict=True):
        wide = 8.3 * len(point["label"])
        left = px + point["dx"] - {"left": 0, "right": wide, "center": wide / 2}[point["align"]]
        for (x1, y1), (x2, y2) in pairwise(at):
            for step in range(101):
                lx, ly = x1 + (x2 - x1) * step / 100, y1 + (y2 - y1) * step / 100
                assert not (left < lx < left + wide and abs(ly - py - point["dy"]) < 8), point["label"]


def drawn_by_the_page(made: Frontier, runs: list[RunRecord], key: str, width: int, budget: float) -> Any:
    body = "(m, [made, runs, key, width, budget]) => m.drawnFrontier(made, runs, key, width, budget)"
    known = [entry.model_dump(mode="json") for entry in runs]
    return run_module("frontier.js", body, [made.model_dump(mode="json"), known, key, width, budget])


@pytest.mark.parametrize("size", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("key", METRICS)
def test_the_page_draws_what_the_document_says(key: str, size: float) -> None:
    runs = drawn(60, 4, key)
    made = shipped(runs)
    found = points(runs, key)
    best = best_under(found, size * GIB)
    less = METRICS[key].less
    fitting = [point["value"] for point in found if point["bytes"] <= size * GIB]
    assert (best and best["value"]) == ((min if less else max)(fitting) if fitting else None)
    theirs = drawn_by_the_page(made, runs, key, 700, size * GIB)
    assert (theirs["best"] or {}).get("id") == (best or {}).get("id") and theirs["height"] == 380
    axes = domains(found, METRICS[key].scale)
    labels = Labels(found, axes, METRICS[key].scale, (660 - 86, 380))
    places = labels.places()
    if best and places[found.index(best)] is None:
        places = labels.places(found.index(best))
    for point, place in zip(found, places, strict=True):
        point.update(label_at(place), chosen=point is best)
    assert theirs["points"] == found
    metric = made.metrics[key]
    assert (metric.x_domain, metric.y_domain) == tuple(pytest.approx(tuple(end)) for end in axes)
    assert metric.y_ticks == (tuple(frontier.log_ticks(*axes[1]) or ()) if METRICS[key].scale == "log" else None)
    assert tuple(getattr(metric, name) for name in METRICS[key]._fields) == METRICS[key]


def test_a_chosen_file_has_its_label_where_the_frontier_is_crowded() -> None:
    """Eight files beside each other and one far away: there is room for some labels, and for any one of them."""
    runs = [run(index, 4 + index / 10, 0.05 * 0.9**index, spread=0.02) for index in range(8)] + [run(9, 9, 0.0004)]
    made = shipped(runs)
    first = drawn_by_the_page(made, runs, "kl_mean", 330, 0)
    assert first["best"] is None and sum(not point["named"] for point in first["points"]) >= 3
    for entry in runs:
        found = drawn_by_the_page(made, runs, "kl_mean", 330, entry.bytes)
        assert found["best"]["id"] == entry.id and found["height"] == 300
        assert [point["id"] for point in found["points"] if point["chosen"]] == [entry.id]
        assert found["best"]["named"], entry.file


@pytest.mark.parametrize("width", [100, *VIEWS, 2000])
def test_every_width_of_a_view_has_its_places(width: int) -> None:
    runs = drawn(12, 2)
    made = shipped(runs)
    found = drawn_by_the_page(made, runs, "kl_mean", width, 99 * GIB)
    fitting = [one for one in made.metrics["kl_mean"].layouts if one.view <= max(width, VIEWS[0])]
    layout = max(fitting, key=lambda one: one.view)
    wanted = [None if place is None else list(frontier.SIDES[place]) for place in layout.places]
    given = [[p["dx"], p["dy"], p["align"]] if p["named"] else None for p in found["points"]]
    assert given == wanted


def test_the_picture_is_drawn_with_its_labels_and_intervals() -> None:
    pytest.importorskip("vl_convert", reason="draws the picture")
    runs = [run(i, 2 + i, 0.2 / (i + 1) ** 2) for i in range(6)]
    spec = chart(runs, size=4.4 * GIB)
    assert charts.png(spec, scale=1).startswith(b"\x89PNG")
    drawing = charts.svg(spec)
    for text in ("Q2_K_M", "GGUF, nearest", "size, GiB", "KL divergence"):
        assert text in drawing
    with pytest.raises(ValueError, match="no run"):
        frontier.chart([run(1, 1, None)])
