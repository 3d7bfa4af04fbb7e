"""Writes the campaign's figures into docs/trust.md, each row's between its markers, so that none is typed by hand.

python tools/campaign/render.py
"""

from __future__ import annotations

import json
import re
from typing import Any

from frame import RESULTS, ROOT, words

PAGE = ROOT / "docs" / "trust.md"


def rendered(document: dict[str, Any]) -> str:
    rows = [
        f"| {line['what']} | {line['tried']:,} | {line['broke']:,} | {words(line['figures']).removeprefix(', ')} |"
        for line in document["lines"]
    ]
    return "\n".join(
        [
            f"`{document['command']}`, {document['seconds']:,} s on {document['processor']}:",
            "",
            "| tried | times | broke | |",
            "|---|---:|---:|---|",
            *rows,
        ]
    )


def page(text: str) -> str:
    """The page with every kept row's figures; a row without markers on the page is an error."""
    for path in sorted(RESULTS.glob("*.json")):
        begin, end = f"<!-- campaign: {path.stem} -->", f"<!-- /campaign: {path.stem} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{PAGE.name} has no place for {path.stem}: add {begin} and {end}")
        found = f"{begin}\n{rendered(json.loads(path.read_text()))}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, new=found: new, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
