"""`dither report`: one file that holds everything, and a card; nobody's file is replaced."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from shelf_util import save
from typer.testing import CliRunner

import dither
from dither.cli import app
from dither.errors import OutputError, SourceError, UsageError
from dither.reporting import report as job
from dither.reporting.document import parse


class Scripts(HTMLParser):
    """The texts of script elements by their id, as a parser of HTML finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.elsewhere: list[str] = []
        self._at: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elsewhere += [str(known[key]) for key in ("src", "href") if known.get(key, "#")[:1] not in "#d"]
        if tag == "script":
            self._at = str(known.get("id") or len(self.found))
            self.found[self._at] = ""

    def handle_data(self, data: str) -> None:
        if self._at is not None:
            self.found[self._at] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._at = None


@pytest.fixture(scope="module")
def written(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    dither.report(shelf, folder / "report.html", card=folder / "README.md")
    return folder


def test_the_page_holds_the_document(shelf: Path, written: Path) -> None:
    page = (written / "report.html").read_text()
    scripts = Scripts(page)
    found = parse(scripts.found["dither-document"], "report")
    assert found.title == "tiny-llama" and not found.live and not found.problems
    assert [run.type for run in found.runs] == ["Q8_0", "int4-g128", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    assert found.fit is not None and found.guide and found.glossary
    assert scripts.elsewhere == []
    assert str(shelf.parent) not in page and str(Path.home()) not in json.dumps(found.to_json())


def test_the_card_stands_beside_its_picture(written: Path) -> None:
    assert "![Size against loss of each file](frontier.png)" in (written / "README.md").read_text()
    assert (written / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_page_takes_some_of_the_weights_along(shelf: Path, written: Path) -> None:
    scripts = Scripts((written / "report.html").read_text())
    found = parse(scripts.found["dither-document"], "report")
    stored = load_file(shelf.parent / "tiny-llama" / "model.safetensors")
    names = {"ffn_up": "up", "ffn_gate": "gate", "ffn_down": "down"}
    seen = 0
    for run in found.runs:
        assert len(run.tiles) == 2 and run.palettes, run.file
        for name, tile in run.tiles.items():
            _, layer, kind, _ = name.split(".")
            if kind not in names:
                continue
            w_RC = stored[f"model.layers.{layer}.mlp.{names[kind]}_proj.weight"]
            rows, columns = (slice(tile.row, tile.row + tile.rows), slice(tile.column, tile.column + tile.columns))
            given = np.frombuffer(base64.b64decode(tile.original), "<f2").reshape(tile.rows, tile.columns)
            np.testing.assert_array_equal(given, w_RC[rows, columns].astype(np.float16))
            assert tile.type in tile.quantized
            seen += 1
    assert seen == len(found.runs)
    assert found.picture is not None


def test_a_name_cannot_end_the_script(shelf: Path, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)><!--.gguf"
    evil = tmp_path / name.replace("/", "\N{DIVISION SLASH}")
    shutil.copy2(shelf / "tiny-Q8_0.gguf", evil)
    save(evil, reference=name, data=name, notes=[name])
    dither.report(evil, tmp_path / "r.html")
    scripts = Scripts((tmp_path / "r.html").read_text())
    assert parse(scripts.found["dither-document"], "r").runs[0].reference == name
    assert scripts.elsewhere == []


def test_a_report_is_written_anew_and_nothing_else_replaced(shelf: Path, tmp_path: Path) -> None:
    page, card = tmp_path / "r.html", tmp_path / "README.md"
    page.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="was not written by Dither"):
        dither.report(shelf, page)
    assert page.read_text() == "<p>mine</p>"
    dither.report(shelf / "tiny-Q8_0.gguf", page, force=True)
    card.write_text("# Mine")
    with pytest.raises(OutputError, match="README"):
        dither.report(shelf, page, card=card)
    assert card.read_text() == "# Mine"
    card.unlink()
    for _ in range(2):
        found = dither.report(shelf / "tiny-Q8_0.gguf", page, card=card)
    assert found.picture is None  # one file is no frontier
    own = tmp_path / "own.gguf"
    shutil.copy2(shelf / "tiny-Q8_0.gguf", own)
    with pytest.raises(UsageError, match="one of the files"):
        dither.report(own, own, force=True)
    for place in (tmp_path, tmp_path / "no" / "r.html"):
        with pytest.raises(OutputError):
            dither.report(own, place)


def test_without_a_run_there_is_no_report(tmp_path: Path) -> None:
    for named in (tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError):
            dither.report(named, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_command_line_writes_both_and_says_so(shelf: Path, tmp_path: Path) -> None:
    arguments = [
        "report",
        str(shelf / "tiny-Q4_K_M.gguf"),
        str(shelf / "tiny-Q2_K.gguf"),
        "-o",
        str(tmp_path / "r.html"),
        "--card",
        str(tmp_path / "C.md"),
        "--title",
        "Mine",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["title"] == "Mine" and found["runs"] == ["tiny-Q4_K_M.gguf", "tiny-Q2_K.gguf"]
    assert Path(found["path"]).stat().st_size == found["bytes"] and Path(found["card"]).exists()
    assert len(found["frontier"]) == 2 and found["problems"] == []
    said = CliRunner().invoke(app, arguments)
    assert re.search(r"Best under .*Q4_K_M.* 0\.03 nats", said.stdout)
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--json"])
    assert refused.exit_code == 1 and "no such file" in json.loads(refused.stdout)["error"]["reason"]


def test_the_fit_s_weights_are_the_files_and_what_could_be_made(shelf: Path) -> None:
    found = job.document([shelf]).fit
    assert found is not None
    made = [weights for weights in found.weights if weights.run]
    assert [weights.type for weights in made] == ["Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    assert all(weights.active + weights.embedding == weights.bytes for weights in made)
    by_type = {candidate.type: candidate for candidate in dither.fit(shelf.parent / "tiny-llama").candidates}
    for weights in found.weights:
        assert weights.bytes == by_type[weights.type].memory.weights, weights.type
        assert (weights.active, weights.embedding) == (by_type[weights.type].active, by_type[weights.type].embedding), (
            weights.type
        )


def test_looking_at_runs_imports_no_torch(shelf: Path) -> None:
    import subprocess

    code = (
        f"import sys, dither; assert len(dither.runs({str(shelf)!r})) == 6; "
        "assert not {'torch', 'transformers', 'vl_convert'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
