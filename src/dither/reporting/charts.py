"""Charts: Vega-Lite templates filled with rows, for the model card, notebooks and files.

A template (`charts/NAME.json`) is a Vega-Lite v6 specification without data.  A string that is nothing but
`$name` stands for a parameter: a title, a domain, a color of the theme; `usermeta.defaults` holds those that
may be left out.  The page fills the same templates with the same rule (`page/js/template.js`), so that a
chart looks alike on the page, in a notebook and in a README.

Rows are written into the specification before it is drawn (data that comes later finds axes that were cut for
none), and `png` and `svg` draw it without a browser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

from dither.errors import UsageError

Rows = Sequence[Mapping[str, Any]]
TEMPLATES = files("dither") / "reporting" / "charts"

# The page's light colors (page/app.css): pictures are mostly looked at on white.
LIGHT = {
    "ink": "#1b1d21", "muted": "#5a5e66", "accent": "#2a54c4", "surface": "#ffffff", "line": "#d9d9d2",
    "grid": "#e4e4de", "good": "#14704a", "warn": "#8a5000", "bad": "#b0261d",
}  # fmt: skip
_SIZED = {"width": 640}  # of a picture, which has no page to take it from
SERIES = ("#2a54c4", "#c2501a", "#0e7c72", "#8442b8", "#946200", "#b52a69", "#55606e", "#1f7fa8")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")


def names() -> list[str]:
    """The charts there are a template of."""
    return sorted(entry.name.removesuffix(".json") for entry in TEMPLATES.iterdir() if entry.name.endswith(".json"))


def template(name: str) -> dict[str, Any]:
    """The Vega-Lite specification of a chart, without data."""
    if name not in names():
        raise UsageError(f"chart {name}", f"is not one of {', '.join(names())}")
    return cast(dict[str, Any], json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8")))


def spec(name: str, rows: Rows | Mapping[str, Rows], **params: Any) -> dict[str, Any]:
    """A whole specification: a template, its parameters, its rows; {"points": rows, …} where it names several.

    Raises UsageError for an unknown chart and for a missing parameter.
    """
    made = template(name)
    defaults = made.pop("usermeta", {}).get("defaults", {})
    found: dict[str, Any] = fill(made, {**LIGHT, **defaults, **params}, name)
    if isinstance(rows, Mapping):
        found["datasets"] = {key: [dict(row) for row in value] for key, value in rows.items()}
    else:
        found["data"] = {"values": [dict(row) for row in rows]}
    return {**found, "config": config()}


def fill(part: Any, params: Mapping[str, Any], name: str = "chart") -> Any:
    """`part` of a template with every "$parameter" replaced.

    >>> fill({"title": "$x", "size": [1, "$y"]}, {"x": "size, GiB", "y": None})
    {'title': 'size, GiB', 'size': [1, None]}
    """
    if isinstance(part, dict):
        return {key: fill(value, params, name) if key != "$schema" else value for key, value in part.items()}
    if isinstance(part, list):
        return [fill(value, params, name) for value in part]
    if not isinstance(part, str) or not part.startswith("$"):
        return part
    if part[1:] not in params:
        raise UsageError(f"chart {name}", f"needs a value for {part[1:]}")
    return params[part[1:]]


def config() -> dict[str, Any]:
    """The theme: the same as the page's in its light colors."""
    text = {"labelColor": LIGHT["muted"], "titleColor": LIGHT["ink"], "labelFontSize": 12, "titleFontSize": 12.5}
    return {
        "font": "DejaVu Sans, Liberation Sans, Arial, sans-serif",
        "background": LIGHT["surface"],
        "padding": 12,
        "view": {"stroke": None},
        "axis": {
            **text,
            "gridColor": LIGHT["grid"],
            "domainColor": LIGHT["line"],
            "tickColor": LIGHT["line"],
            "gridDash": [2, 3],
            "labelPadding": 6,
            "titlePadding": 12,
            "titleFontWeight": 500,
        },
        "legend": {**text, "symbolSize": 90, "orient": "bottom"},
        "range": {"category": list(SERIES), "symbol": list(SHAPES)},
        "mark": {"color": SERIES[0]},
        "rule": {"color": LIGHT["muted"]},
        "text": {"color": LIGHT["ink"]},
    }


def png(found: Mapping[str, Any], scale: float = 2.0) -> bytes:
    """The chart as a PNG picture, `scale` pixels to a unit."""
    import vl_convert

    return vl_convert.vegalite_to_png({**_SIZED, **found}, scale=scale, allowed_base_urls=[])


def svg(found: Mapping[str, Any]) -> str:
    """The chart as SVG."""
    import vl_convert

    return vl_convert.vegalite_to_svg({**_SIZED, **found}, allowed_base_urls=[])
