"""What a notebook is given: a chart that draws, tables in which a stranger's text stays text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from shelf_util import measured

import dither
from dither import display
from dither.containers.plan_file import PlanEntry, PlanFile
from dither.planning.plan import Planned
from dither.reporting.notebook import VEGALITE, Runs

EVIL = "<script>alert(1)</script>"


class Table(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def found(shelf: Path) -> Runs:
    return dither.runs(shelf)


def test_runs_are_a_sequence_that_answers(found: Runs) -> None:
    assert len(found) == 6 and found[0].type == "Q8_0" and [run.type for run in found][-1] == "Q2_K"
    sizes = {run.type: run.bytes for run in found}
    best = found.best_under(sizes["Q4_K_M"])
    assert best is not None and best.type == "Q4_K_M"
    assert found.best_under(sizes["Q2_K"] - 1) is None
    assert "Q4_K_M" in found.sentence(sizes["Q4_K_M"]) and found.sentence("1KiB") == ""
    assert repr(found) == "<Runs: 6 files of tiny-llama>"


def test_the_chart_has_the_data_and_draws(found: Runs) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    bundle = found._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", VEGALITE}
    spec = bundle[VEGALITE]
    assert spec["$schema"].endswith("/v6.json")
    assert {row["value"] for row in spec["datasets"]["points"]} == {0.0004, 0.004, 0.02, 0.03, 0.4}
    drawn = vl_convert.vegalite_to_svg(spec)
    for kind in ("Q8_0", "Q2_K"):
        assert kind in drawn


def test_the_table_has_every_file(found: Runs) -> None:
    table = Table(found._repr_html_())
    assert [row[0] for row in table.rows[1:]] == [run.file for run in found]
    assert table.rows[5][4] == "not measured"


@pytest.mark.parametrize("name", ["Measurement", "Plan", "Fit", "Result"])
def test_results_show_themselves(name: str, shelf: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = {
        "Measurement": lambda: measured(shelf / "tiny-Q2_K.gguf", reference=EVIL, notes=(EVIL,)),
        "Plan": lambda: dither.preview(checkpoint, "Q4_K_M"),
        "Fit": lambda: dither.fit(checkpoint, memory="1GiB", vram=0),
        "Result": lambda: dither.quantize(checkpoint, "Q8_0", tmp_path / f"{EVIL.replace('/', '-')}.gguf"),
    }[name]()
    shown = result._repr_html_()
    table = Table(shown)
    assert set(table.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    wanted = {"Measurement": "0.01 (95 %: 0.009 to 0.011)", "Plan": "Q4_K", "Fit": "RAM", "Result": "bits per weight"}[
        name
    ]
    assert any(wanted in cell for row in table.rows for cell in row)


def test_a_planned_mix_shows_its_types() -> None:
    tensors = {f"t{i}": PlanEntry(("Q4_K", "Q6_K")[i % 2], 100 + i, 0.01) for i in range(5)}
    plan = PlanFile(EVIL, "", "", "nearest", (), 1000, 510, 0.05, tensors, ())
    planned = Planned(plan, None, 1000, 2000, 0.0, 1.0, (EVIL,), (), 0, 0, "evidence", {})
    table = Table(planned._repr_html_())
    assert table.rows[1:] == [["Q4_K", "3", "306 B"], ["Q6_K", "2", "204 B"]]
    assert "script" not in table.tags


def test_tables_escape_and_cut() -> None:
    shown = display.table(EVIL, [EVIL], [[EVIL], ["x" * 10**6], ["\x1b[2J\u202e"]], [EVIL])
    assert "<script" not in shown and len(shown) < 3000 and "\x1b" not in shown
