"""Pictures of every view, as they stand in the README and in docs/.

    DITHER_SCREENSHOTS=docs/images pytest tests/dashboard/test_screenshots.py

Without the variable the pictures are taken and judged, and thrown away.  DITHER_REPORT names an exported page
to take them of, in place of the tests' own small one.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from .conftest import Browser

pytestmark = pytest.mark.slow
VIEWS = ("which", "fits", "inside", "pictures", "palette", "answers", "speed", "guide")
WIDTH = 1000
FOLD = "node => node.querySelectorAll('details.explain').forEach(one => { one.open = false; })"


def colors(png: bytes) -> tuple[int, int, int]:
    """Width, height, and how many different runs of four bytes the uncompressed picture holds."""
    width, height = struct.unpack(">II", png[16:24])
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    raw = zlib.decompress(data)
    return width, height, len({raw[i : i + 4] for i in range(0, len(raw), 4)})


def test_every_view_has_something_to_see(report: Path, browser: Browser, tmp_path: Path) -> None:
    place = Path(os.environ.get("DITHER_SCREENSHOTS") or tmp_path)
    place.mkdir(parents=True, exist_ok=True)
    page = browser.open(Path(os.environ.get("DITHER_REPORT") or report).absolute().as_uri(), width=WIDTH)
    page.wait_for_timeout(500)  # charts settle their labels
    for name in VIEWS:
        section = page.locator(f"#{name}")
        section.evaluate(FOLD)
        picture = section.screenshot(path=str(place / f"{name}.png"))
        width, height, found = colors(picture)
        assert width <= WIDTH and height > 200, name
        assert found > 100, f"{name} is blank"
