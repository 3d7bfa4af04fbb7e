"""The frontier against its definition, and the page's against Python's."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from page_util import run_module

from dither.reporting import charts, frontier
from dither.reporting.frontier import METRICS, best_under, chart, domains, place_labels, points, sentence

GIB = 2**30


def run(index: int, size: float, value: float | None, *, key: str = "kl_mean", spread: float = 0.1) -> dict[str, Any]:
    metrics = {}
    if value is not None:
        ends = {"low": value * (1 - spread), "high": value * (1 + spread)} if spread else {"low": None, "high": None}
        metrics = {key: {"value": value, "tag": "measured", **ends}}
    return {
        "id": f"run-{index}",
        "file": f"model-{index}.gguf",
        "type": f"Q{index % 8}_K_M",
        "container": "gguf",
        "recipe": ("nearest", "gptq, calibrated")[index % 2],
        "bytes": round(size * GIB),
        "metrics": metrics,
    }


def drawn(count: int, seed: int, key: str = "kl_mean") -> list[dict[str, Any]]:
    draw = random.Random(seed)
    sizes = [draw.choice([2.0, 2.5, draw.uniform(1, 9)]) for _ in range(count)]
    return [
        run(
            i, size, draw.choice([draw.lognormvariate(-4, 1.5), 0.0, None, 0.01]), key=key, spread=draw.choice([0, 0.2])
        )
        for i, size in enumerate(sizes)
    ]


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
    runs = [run(1, 3, 0.5), {**run(2, 2, 0.001), "comparable": False}]
    assert [point["id"] for point in points(runs)] == ["run-1"]
    ids = run_module("frontier.js", "(m, runs) => m.frontierPoints(runs, 'kl_mean', 1).map(p => p.id)", runs)
    assert ids == ["run-1"] and "Q1_K_M" in sentence(runs, 9 * GIB)


def test_the_sentence_follows_the_budget() -> None:
    runs = [run(2, 3.0, 0.09), run(4, 4.3, 0.021), run(8, 8.0, 0.001)]
    runs[1]["metrics"]["same_top"] = {"value": 0.941, "low": None, "high": None, "tag": "measured"}
    assert sentence(runs, 4.4 * GIB) == (
        "Best under 4.40 GiB: Q4_K_M (GGUF, nearest, 4.30 GiB): it loses 0.021 nats per token (0.019–0.023), "
        "and picks the original's likeliest word 94 % of the time."
    )
    assert "Q2_K_M" in sentence(runs, 4.2 * GIB) and "Q0_K_M" in sentence(runs, 99 * GIB)
    assert sentence(runs, GIB) == ""


@pytest.mark.parametrize("count", [1, 2, 9, 60])
def test_labels_touch_nothing(count: int) -> None:
    found = points([entry for entry in drawn(2 * count, 3) if entry["metrics"]][:count])
    x, y = domains(found, "log")
    place_labels(found, x, y, "log", 600, 360)
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
    x, y = domains(found, "log")
    place_labels(found, x, y, "log", 800, 380)
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


@pytest.mark.parametrize("key", METRICS)
def test_the_page_finds_the_same(key: str) -> None:
    runs = drawn(60, 4, key)
    scale = METRICS[key][3]
    found = points(runs, key)
    best = best_under(found, key, 4 * GIB)
    for point in found:
        point["chosen"] = point is best
    x, y = domains(found, scale)
    place_labels(found, x, y, scale, 610, 380)
    body = """(m, [runs, key, budget]) => {
        const points = m.frontierPoints(runs, key, 2 ** 30);
        const best = m.bestUnder(points, key, budget);
        for (const point of points) point.chosen = point === best;
        const type = m.FRONTIER_METRICS[key].type;
        const domains = m.frontierDomains(points, type);
        m.placeLabels(points, domains, type, 610, 380);
        const {name, title, factor, better} = m.FRONTIER_METRICS[key];
        return [points, best && best.id, domains, type === "log" ? m.logTicks(domains.y) : null,
                [name, title, better === "less", type, factor]];
    }"""
    theirs, their_best, ends, ticks, meta = run_module("frontier.js", body, [runs, key, 4 * GIB])
    assert theirs == found
    assert their_best == (best["id"] if best else None)
    assert [*ends["x"], *ends["y"]] == pytest.approx([*x, *y])
    assert ticks == (frontier.log_ticks(*y) if scale == "log" else None)
    assert tuple(meta) == METRICS[key]


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
