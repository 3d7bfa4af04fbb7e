"""One server and one browser for all tests of the page, both real.

The browser is Debian's chromium, driven by Playwright; where there is none, tests are skipped and say so.
Every page opened here is watched: a request to anything but its own server, or an error in its console, fails
the test that opened it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from dither.cli import app
from dither.cli.forms import forms
from dither.dashboard.forms import Forms

FORMS = Forms(lambda: forms(get_command(app)))
BUNDLED = Path(str(files("dither") / "demo_model"))
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>"


@dataclass
class Served:
    """A running `dither dashboard`."""

    url: str
    port: int
    runs: Path
    state: Path
    process: subprocess.Popen[str]

    def ask(
        self, method: str, path: str, body: object = None, raw: bytes | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """One request as curl would send it, with an honest Origin unless `headers` say otherwise.

        Names of `headers` have _ for -; an empty value leaves the header out.
        """
        told = {"host": f"127.0.0.1:{self.port}"}
        if method != "GET":
            told |= {"origin": f"http://127.0.0.1:{self.port}", "content-type": "application/json"}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in told.items():
                if value:
                    connection.putheader(name, value)
            if "content-length" not in told and method != "GET":
                connection.putheader("content-length", str(len(sent)))
            connection.endheaders(sent)
            answer = connection.getresponse()
            text = answer.read()
        is_json = (answer.getheader("content-type") or "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text, answer.headers

    def get(self, path: str) -> Any:
        status, answer, _ = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def post(self, path: str, body: object) -> Any:
        status, answer, _ = self.ask("POST", path, body)
        assert status == 200, answer
        return answer


def start_server(runs: Path, state: Path, *options: str) -> Served:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dither",
            "dashboard",
            str(runs),
            "--against",
            str(BUNDLED),
            "--no-open",
            "--json",
            "--port",
            "0",
            "--state",
            str(state),
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # one JSON document, over several lines
        lines.append(line)
        with contextlib.suppress(json.JSONDecodeError):
            url = json.loads("".join(lines))["url"]
            return Served(url, int(url.split(":")[2].split("/")[0]), runs, state, process)
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


def stop_server(served: Served) -> str:
    """Ctrl-C, and what it said."""
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=20)
    return said


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of the bundled model, measured on a few tokens; not to be changed."""
    import dither

    folder = tmp_path_factory.mktemp("made")
    paths = [folder / f"demo-{kind}.gguf" for kind in ("Q8_0", "Q4_0")]
    for path in paths:
        dither.quantize(BUNDLED, path.stem.removeprefix("demo-"), path)
    text = folder / "text.txt"
    text.write_text("The old man looked at the sea, and the sea said nothing that he had not heard. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a measurement keeps the name of its text as it was given
        dither.measure([str(path) for path in paths], BUNDLED, data=text.name, tokens=256, context=64)
    return folder


@pytest.fixture(scope="session")
def runs(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server shows: those, one with a hostile name, and measurements that must be refused."""
    folder = tmp_path_factory.mktemp("runs")
    for path in made.glob("demo-*"):
        shutil.copy2(path, folder / path.name)
    shutil.copy2(made / "demo-Q4_0.gguf", folder / f"{HOSTILE}.gguf")
    (folder / "nan.gguf.measure.json").write_text('{"schema_version": 1, "kl_mean": NaN}')
    (folder / "script.gguf.measure.json").write_text('{"file": "</script><script>alert(1)</script>"}')
    return folder


@pytest.fixture(scope="package")
def served(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = start_server(runs, tmp_path_factory.mktemp("state"))
    try:
        yield found
        said = stop_server(found)
        assert found.process.returncode == 0, said
        assert "Traceback" not in said
    finally:
        if found.process.poll() is None:
            found.process.kill()
            found.process.communicate()


@pytest.fixture(scope="session")
def report(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported page of the same files."""
    from dither.reporting.report import document
    from dither.reporting.single_file import assemble

    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(assemble(document([made], against=BUNDLED).exported().to_json()), "utf-8")
    return path


@dataclass
class Browser:
    """Opens pages and remembers what they did that they should not have."""

    chromium: Any
    faults: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, **options: Any) -> Any:
        context = self.chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
            **options,
        )
        self.contexts.append(context)
        page = context.new_page()
        own = url.split("#")[0].split("?")[0]

        def asked(request: Any) -> None:
            if not request.url.startswith((own, "data:", "blob:")):
                self.faults.append(f"asked for {request.url}")

        page.on("request", asked)
        page.on("pageerror", lambda error: self.faults.append(f"threw {error}"))
        page.on("console", lambda said: said.type == "error" and self.faults.append(f"said {said.text}"))
        page.on("dialog", lambda dialog: (self.faults.append(f"opened {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        self.contexts.clear()


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """Of this folder alone: while it runs, no other test could start an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    found = Browser(chromium)
    yield found
    found.close()
    assert found.faults == []


@pytest.fixture(scope="session")
def photograph() -> Callable[[Any, str], None]:
    """Keeps a picture of a page where DITHER_SCREENSHOTS names a folder; documentation is made so."""
    place = os.environ.get("DITHER_SCREENSHOTS")

    def keep(page: Any, name: str) -> None:
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(Path(place) / f"{name}.png"), full_page=True)

    return keep
