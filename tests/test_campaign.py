"""The campaign's figures come onto the page from what was kept, and every row has its place there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CAMPAIGN = ROOT / "tools" / "campaign"

pytestmark = pytest.mark.skipif(not CAMPAIGN.is_dir(), reason="the tools are in the repository alone")


def in_campaign(script: str) -> str:
    words = [sys.executable, "-c", script]
    return subprocess.run(words, cwd=CAMPAIGN, check=True, capture_output=True, text=True).stdout


def test_figures_go_between_their_rows_markers() -> None:
    line = {"what": "a thing", "tried": 1234, "broke": 2, "figures": {"worst": "3 ms"}}
    document = {"command": "python x.py", "seconds": 61.0, "processor": "a processor", "lines": [line]}
    shown = in_campaign(f"import render; print(render.rendered({document!r}))")
    assert "`python x.py`, 61 s on a processor:" in shown.replace("61.0", "61")
    assert "| a thing | 1,234 | 2 | worst 3 ms |" in shown


def test_what_is_kept_is_what_the_page_shows() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    for path in sorted((ROOT / "benchmarks" / "results" / "campaign").glob("*.json")):
        shown = re.search(rf"<!-- campaign: {path.stem} -->(.*?)<!-- /campaign: {path.stem} -->", page, re.DOTALL)
        assert shown, f"{path.name} has no place"
        document = json.loads(path.read_text())
        assert document["command"] in shown[1]
        assert document["tried"] == sum(line["tried"] for line in document["lines"])
        for line in document["lines"]:
            assert f"| {line['what']} | {line['tried']:,} | {line['broke']:,} |" in shown[1]
