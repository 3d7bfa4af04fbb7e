"""Templates: every parameter is filled, every chart is drawn, and the page fills them by the same rule."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from page_util import PAGE, run_module

from dither.errors import UsageError
from dither.reporting import charts

ROWS: dict[str, Any] = {
    "frontier": {
        "points": [{
            "x": 3.0, "y": 0.02, "low": 0.018, "high": 0.022, "label": "Q4_K_M", "name": "m.gguf",
            "family": "GGUF",
            "pareto": True, "chosen": True, "named": True, "dx": 9, "dy": 0, "align": "left",
            "baseline": "middle",
            "size": "3 GiB", "shown": "0.02", "tag": "measured",
        }],
        "budget": [{"x": 4.0}],
    },
    "memory": {
        "parts": [{"type": "Q4_K_M", "part": "weights", "start": 0, "end": 4, "size": "4 GiB",
        "total": "5 GiB", "chosen": True}],
        "types": [{"type": "Q4_K_M", "total": 5, "word": "GPU", "chosen": True}],
        "lines": [{"x": 8, "name": "RAM", "dash": [4, 4], "dx": -4, "y": -4, "align": "right",
        "size": "8 GiB"}],
    },
    "speed": {"runs": [{"label": "Q4_K_M", "value": 50, "low": 48, "high": 52, "edge": 52, "text": "50",
    "shown": "50", "machine": "a CPU"}]},
    "arithmetic": {"bars": [{"label": "4 bits", "kind": "parameters × bits ÷ 8", "size": 3.5,
    "shown": "3.5 GB"}]},
}  # fmt: skip
PARAMS: dict[str, dict[str, Any]] = {
    "frontier": {"x_domain": [2, 5], "y_scale": {"type": "log", "domain": [0.01, 0.03]}},
    "memory": {"x_domain": [0, 10], "part_names": ["weights"]},
    "speed": {"x_domain": [0, 60]},
    "arithmetic": {"x_domain": [0, 30]},
}
MINE = sorted(ROWS)


@pytest.mark.parametrize("name", MINE)
def test_a_chart_is_drawn_with_its_words(name: str) -> None:
    pytest.importorskip("vl_convert", reason="draws the picture")
    spec = charts.spec(name, ROWS[name], **PARAMS[name])
    assert '"$' not in json.dumps({key: value for key, value in spec.items() if key != "$schema"})
    drawing = charts.svg(spec)
    assert "4 bits" in drawing or "Q4_K_M" in drawing
    assert "NaN" not in drawing and "undefined" not in drawing


@pytest.mark.parametrize("name", MINE)
def test_the_page_fills_a_template_alike(name: str) -> None:
    template = charts.template(name)
    meta = template.pop("usermeta")
    params = {**charts.LIGHT, **meta["defaults"], **PARAMS[name]}
    source = (PAGE / "js/template.js").read_text()
    body = re.search(r"^export (function fillTemplate.*?^})", source, re.MULTILINE | re.DOTALL)
    assert body
    program = f"(m, [part, params]) => {{ {body[1]}; return fillTemplate(part, params); }}"
    assert run_module("memory.js", program, [template, params]) == charts.fill(template, params)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match=r"(y_scale|x_domain)"):
        charts.spec("frontier", ROWS["frontier"])
    with pytest.raises(UsageError, match=r"chart \.\./x: is not one of"):
        charts.template("../x")


def test_the_colors_are_the_pages() -> None:
    css = (PAGE / "app.css").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w+);", css[: css.index('[data-theme="dark"]')]))
    assert {name: light[name] for name in charts.LIGHT} == charts.LIGHT
    assert tuple(light[f"series-{i}"] for i in range(1, 9)) == charts.SERIES
