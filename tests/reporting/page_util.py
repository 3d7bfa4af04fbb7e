"""The page's modules run outside a page: by node where it is, else by Debian's Chromium."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(str(files("dither") / "reporting" / "page"))
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def run_module(module: str, body: str, argument: Any) -> Any:
    """What `body`, a function of `m` (the module's exports) and `argument`, returns; JSON both ways."""
    source = (PAGE / "js" / module).read_text()
    url = "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()
    node = shutil.which("node")
    if node is None:
        return _in_chromium(url, body, argument)
    program = (
        "let text = ''; for await (const chunk of process.stdin) text += chunk;"
        f"const m = await import({json.dumps(url)});"
        f"console.log(JSON.stringify((({body}))(m, JSON.parse(text))));"
    )
    done = subprocess.run(
        [node, "--input-type=module", "-e", program],
        input=json.dumps(argument),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-1000:].replace(url, module)
    return json.loads(done.stdout)


def _in_chromium(url: str, body: str, argument: Any) -> Any:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("neither node nor chromium is here to run the page's arithmetic")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives chromium")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            script = f"async ([url, argument]) => (({body}))(await import(url), argument)"
            return browser.new_page().evaluate(script, [url, argument])
        finally:
            browser.close()
