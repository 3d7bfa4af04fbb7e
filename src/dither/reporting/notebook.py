"""Runs in Python: a list of what is known of some files, that a notebook shows as a chart and a table."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dither import display
from dither.reporting import charts, frontier
from dither.reporting.document import Document, RunRecord
from dither.units import format_bytes, parse_bytes

VEGALITE = "application/vnd.vegalite.v6+json"


@dataclass(frozen=True)
class Runs:
    """Quantized files and what is known of them, the largest first; `document` is all of it.

    found = dither.runs("models")
    found.best_under("4.4GiB").file
    found                                  # in a notebook: size against loss, and a table
    """

    document: Document

    def __len__(self) -> int:
        return len(self.document.runs)

    def __iter__(self) -> Iterator[RunRecord]:
        return iter(self.document.runs)

    def __getitem__(self, at: int) -> RunRecord:
        return self.document.runs[at]

    def best_under(self, size: int | str, by: str = "kl_mean") -> RunRecord | None:
        """The best file of at most `size` ("4.4GiB" or bytes) by a metric of `frontier.METRICS`.

        None where nothing that was measured fits.
        """
        best = frontier.best_under(frontier.points(self, by), parse_bytes(size))
        return None if best is None else next(run for run in self if run.id == best["id"])

    def sentence(self, size: int | str) -> str:
        """The best of at most `size`, to be read aloud; empty where nothing so small is measured."""
        return frontier.sentence(self.document.runs, parse_bytes(size))

    def chart(self, by: str = "kl_mean", size: int | str | None = None) -> dict[str, Any]:
        """Size against a metric, as a Vega-Lite 6 specification with its data inside."""
        return frontier.chart(self.document.runs, by, None if size is None else parse_bytes(size))

    def to_json(self) -> dict[str, Any]:
        return self.document.to_json()

    def _repr_html_(self) -> str:
        heads = ("file", "type", "size", "bits per weight", "KL divergence", "same top")
        problems = [f"{problem.file}: {problem.reason}" for problem in self.document.problems]
        stale = [f"{run.file}: its numbers are of an earlier file." for run in self if run.stale]
        shown = display.table(self.document.title, heads, map(_row, self), [*stale, *problems])
        if not self._drawn():
            return shown
        svg = base64.b64encode(charts.svg(self.chart()).encode()).decode()
        return f'<img alt="Size against KL divergence" src="data:image/svg+xml;base64,{svg}">{shown}'

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        """A chart where the notebook draws Vega-Lite, a picture and a table where it does not."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if self._drawn():
            bundle[VEGALITE] = self.chart()
        return bundle

    def _drawn(self) -> bool:
        return len(frontier.points(self)) > 1

    def __repr__(self) -> str:
        return f"<Runs: {len(self)} files of {self.document.title}>"


def _row(run: RunRecord) -> tuple[object, ...]:
    kl, top = run.metrics.get("kl_mean"), run.metrics.get("same_top")
    return (
        run.file,
        run.type,
        format_bytes(run.bytes),
        f"{run.bpw:.2f}",
        display.interval(kl.value, kl.low, kl.high) if kl else "not measured",
        f"{100 * top.value:.1f} %" if top else "",
    )
