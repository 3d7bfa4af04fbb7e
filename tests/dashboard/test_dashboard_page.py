"""The page in a real browser, live and exported.

Every page opened by `browser` also fails its test on a request to anyone else and on an error in the console.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dashboard.conftest import BUNDLED, HOSTILE, Browser, Served

pytestmark = pytest.mark.slow

SECTIONS = ["which", "fits", "inside", "pictures", "palette", "answers", "speed", "guide"]


def serious(page: Any) -> list[str]:
    """What axe finds that keeps people out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe looks for barriers")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]


def becomes(page: Any, expression: str, seconds: float = 15) -> None:
    """Waits until a script finds it true.  Playwright's own waiting would need 'unsafe-eval'."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def point_at(page: Any, mark: Any, text: str, seconds: float = 20) -> None:
    """Points at a mark until its tooltip says `text`: a chart that is drawn anew loses the pointer."""
    end = time.monotonic() + seconds
    mark.hover(force=True)
    while text not in page.evaluate("document.querySelector('.tooltip:not([hidden])')?.innerText ?? ''"):
        assert time.monotonic() < end, text
        page.mouse.move(0, 0)
        mark.hover(force=True)
        page.wait_for_timeout(200)


def overflow(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_the_live_page_shows_every_section(
    served: Served, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(served.url)
    ids = page.eval_on_selector_all("main > section", "all => all.map(one => one.id)")
    assert ids == [*SECTIONS, "work", "glossary"]
    assert page.locator("#state").inner_text() == "Live"
    assert page.locator(".view:empty").count() == 0
    assert "could not be shown" in page.locator("#problems summary").inner_text()
    assert "nan.gguf.measure.json" in page.locator("#problems").inner_text()
    assert page.locator("img").count() == 0  # the hostile name is text
    document = served.get("/api/document")
    assert HOSTILE in [run["file"].removesuffix(".gguf") for run in document["runs"]]
    assert serious(page) == []
    photograph(page, "dashboard")


def test_the_exported_page_is_the_same_and_asks_for_nothing(
    report: Path, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(report.as_uri())
    ids = page.eval_on_selector_all("main > section", "all => all.map(one => one.id)")
    assert ids == [*SECTIONS, "glossary"]
    assert page.locator("#state").inner_text() == "Report"
    assert page.locator(".view:empty").count() == 0
    assert str(report.parent.parent) not in report.read_text("utf-8")  # says nothing of where files lay
    assert serious(page) == []
    photograph(page, "report")


def test_on_a_telephone(served: Served, report: Path, browser: Browser, photograph: Callable[[Any, str], None]) -> None:
    for name, url in (("dashboard", served.url), ("report", report.as_uri())):
        page = browser.open(url, width=390, height=844, has_touch=True)
        assert overflow(page) == 0, name
        photograph(page, f"{name}-390")


def test_in_the_dark(report: Path, browser: Browser, photograph: Callable[[Any, str], None]) -> None:
    page = browser.open(report.as_uri(), dark=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    assert serious(page) == []
    photograph(page, "report-dark")
    page.click("#theme")
    assert page.evaluate(ground) != dark
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate(ground) != dark  # it remembers


def test_by_keyboard_alone(served: Served, browser: Browser) -> None:
    page = browser.open(served.url)
    focused = "document.activeElement.id || document.activeElement.textContent"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "theme"
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for _ in range(8):
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Which method"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    becomes(page, "document.getElementById('guide').getBoundingClientRect().top < innerHeight / 2")
    page.wait_for_selector('nav.sections a[href="#guide"][aria-current]')


# What a person may have set when a new document arrives, and how it is read again.
SETTINGS = {
    "budget": ("#which input[type=range]", "#which .control output"),
    "context": ("#fits input[type=range]", "#fits .control:has(input[type=range]) output"),
    "row": ("#pictures .control:has-text('From row') input", "#pictures .control:has-text('From row') output"),
}


def settings(page: Any) -> dict[str, str]:
    found = {name: page.locator(shown).first.inner_text() for name, (_, shown) in SETTINGS.items()}
    found["prompt"] = page.locator("#answers textarea").first.input_value()
    found["file"] = page.locator("#inside select").first.evaluate("node => node.selectedOptions[0].text")
    found["axis"] = page.locator("#which input[type=radio]:checked").get_attribute("value")
    found["guide"] = str(page.locator("#guide input:checked").evaluate_all("nodes => nodes.map(n => n.value)"))
    return found


def test_a_new_file_appears_by_itself_and_what_was_set_stays(served: Served, made: Path, browser: Browser) -> None:
    page = browser.open(served.url)
    before = len(served.get("/api/document")["runs"])
    untouched = settings(page)
    for control, _ in SETTINGS.values():
        page.locator(control).first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
    page.locator("#answers textarea").first.fill("Not yet asked")
    page.locator("#which .segments label", has_text="99 % KL").click()
    page.locator("#guide fieldset label").nth(1).click()
    page.locator("#inside select").first.select_option(label="demo-Q8_0.gguf")
    becomes(page, "document.querySelector('#pictures select').selectedOptions[0].text === 'demo-Q8_0.gguf'")
    page.locator(SETTINGS["row"][0]).focus()
    page.keyboard.press("ArrowRight")
    page.locator(SETTINGS["budget"][0]).first.focus()
    focused = "document.activeElement.closest('[data-view]')?.dataset.view"
    wanted = settings(page)
    assert not set(wanted.items()) & set(untouched.items())
    path = served.runs / "arrived-Q8_0.gguf"
    shutil.copy2(made / "demo-Q8_0.gguf", path)
    try:
        becomes(page, f"document.getElementById('summary').textContent.startsWith('{before + 1} ')")
        becomes(page, "[...document.querySelectorAll('#answers option')].some(o => /arrived/.test(o.text))")
        assert settings(page) == wanted and page.evaluate(focused) == "which"
    finally:
        path.unlink()
    becomes(page, f"document.getElementById('summary').textContent.startsWith('{before} ')")
    becomes(page, "![...document.querySelectorAll('#answers option')].some(o => /arrived/.test(o.text))")
    assert settings(page) == wanted and page.evaluate(focused) == "which"


CHART = """async (rows) => {
  const {mountChart} = await import("/static/js/chart.js");
  const root = document.createElement("section");
  root.id = "tried";
  document.querySelector("main").prepend(root);
  window.tried = await mountChart(root, {name: "tried", title: "the trial", label: "Two rows, tried",
    data: rows, columns: [{key: "name", label: "Name"}, {key: "size", label: "Size", number: true}],
    rowAction: "Open",
    onClick: (row) => { window.opened = row.name; },
    spec: {height: 120, mark: {type: "point", size: 900, tooltip: true}, params: [{name: "cut", value: 0}],
      transform: [{filter: "datum.size > cut"}],
      encoding: {x: {field: "size", type: "quantitative"},
        tooltip: [{field: "name", title: "file"}, {field: "size"}]}}});
}"""
CHARTED = [{"name": f'={HOSTILE},"x"', "size": 1.5}, {"name": "plain", "size": 4}]


def test_a_chart_has_a_label_a_tooltip_a_twin_and_three_files(served: Served, browser: Browser) -> None:
    page = browser.open(served.url)
    page.evaluate(CHART, CHARTED)
    chart = page.locator("#tried")
    assert chart.get_by_role("img", name="Two rows, tried").count() == 1
    marks = chart.locator(".mark-symbol path")
    assert marks.count() == 2
    point_at(page, marks.first, HOSTILE)
    assert page.locator(".tooltip img").count() == 0
    marks.nth(1).click()
    assert page.evaluate("window.opened") == "plain"

    chart.locator("summary").click()
    cells = chart.locator("tbody tr").first.locator("th, td").all_inner_texts()
    assert cells[:2] == [CHARTED[0]["name"], "1.50"]
    chart.get_by_role("button", name="Open plain").click()

    def saved(kind: str) -> bytes:
        with page.expect_download() as download:
            chart.get_by_role("button", name=f"Save the trial as {kind}").click()
        assert download.value.suggested_filename == f"tried.{kind.lower()}"
        return Path(download.value.path()).read_bytes()

    rows = list(csv.reader(io.StringIO(saved("CSV").decode(), newline="")))
    assert rows == [["Name", "Size"], [f"'{CHARTED[0]['name']}", "1.5"], ["plain", "4"]]  # no formula
    assert saved("PNG").startswith(b"\x89PNG\r\n\x1a\n")
    drawing = ElementTree.fromstring(saved("SVG"))
    assert drawing.tag.endswith("svg") and drawing.get("aria-label") == "Two rows, tried"

    page.evaluate("window.tried.param('cut', 2)")
    becomes(page, "document.querySelectorAll('#tried .mark-symbol path').length === 1")
    ink = "document.querySelector('#tried .role-axis-title text').getAttribute('fill')"
    light = page.evaluate(ink)
    page.click("#theme")
    becomes(page, f"{ink} !== {json.dumps(light)}")
    assert page.locator("#tried .mark-symbol path").count() == 1  # drawn anew, as it stood
    page.set_viewport_size({"width": 500, "height": 800})
    becomes(page, "document.querySelector('#tried svg').clientWidth < 480")


def test_a_job_runs_from_the_page_to_its_end(
    served: Served, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(served.url + "#work")
    work = page.locator("#work")
    work.get_by_role("button", name="Start").click()
    work.get_by_text("This is needed.").first.wait_for()  # nothing begins without a model
    work.get_by_label("Model", exact=True).fill(str(BUNDLED))
    work.get_by_label("Type", exact=True).fill("Q8_0")
    work.locator(".work-more summary").click()
    work.get_by_label("Write to").fill("from the page.gguf")
    command = f"dither quantize {BUNDLED} --to Q8_0 --output 'from the page.gguf'"
    becomes(page, f"document.querySelector('#work form code').textContent === {json.dumps(command)}")
    photograph(page, "work")
    work.get_by_role("button", name="Start").click()
    job = work.locator(".job").first
    job.wait_for()
    assert job.locator(".command code").inner_text() == command
    page.reload()  # it goes on without us
    done = page.locator(".job").first.locator(".job-state[data-state=done]")  # others may have been before it
    done.wait_for(timeout=60_000)
    made = served.runs / "from the page.gguf"
    assert made.stat().st_size > 1_000_000
    assert "from the page.gguf" in page.locator(".job h4").first.inner_text()
    becomes(page, "document.getElementById('summary').textContent.startsWith('4 ')")
    made.unlink()


def test_a_job_says_why_it_failed_and_another_is_cancelled(served: Served, browser: Browser) -> None:
    page = browser.open(served.url + "#work")
    work = page.locator("#work")
    work.get_by_label("Model", exact=True).fill("./no-such-model")
    work.get_by_label("Type", exact=True).fill("Q8_0")
    work.get_by_role("button", name="Start").click()
    page.locator(".job").first.locator(".job-state[data-state=failed]").wait_for(timeout=60_000)
    assert "no-such-model" in page.locator(".job .error").first.inner_text()
    assert serious(page) == []
    work.get_by_role("radio", name="Calibrate").check()
    work.get_by_label("Model", exact=True).fill(str(BUNDLED))
    work.get_by_label("Tokens", exact=True).fill("4000000")
    work.get_by_role("button", name="Start").click()
    job = page.locator(".job").first
    job.get_by_role("button", name="Cancel").click()
    job.locator(".job-state[data-state=cancelled]").wait_for(timeout=60_000)
    assert job.get_by_role("button", name="Cancel").count() == 0


def test_an_answer_that_comes_late_takes_nothing_back(served: Served, browser: Browser) -> None:
    page = browser.open(served.url + "#work")
    fields = {"model": str(BUNDLED), "tokens": "4000000"}
    begun = served.post("/api/jobs", {"kind": "calibrate", "fields": fields})
    asked: list[str] = []
    late: list[Any] = []

    def hold(route: Any) -> None:
        asked.append(route.request.method)
        if len(asked) == 1:  # the list that the page begins with
            route.continue_()
        else:  # the one it asks for when it listens
            late.append((route, route.fetch()))

    page.route("**/api/jobs", hold)
    page.reload()
    state = f"document.querySelector('[data-job=\"{begun['id']}\"] .job-state').dataset.state"
    page.wait_for_selector("html[data-ready]")
    while not late:
        page.wait_for_timeout(50)
    route, answer = late[0]
    assert answer.json()[0]["state"] == "running"
    served.post(f"/api/jobs/{begun['id']}/cancel", None)
    becomes(page, f"{state} === 'cancelled'", 60)
    with page.expect_response("**/api/jobs"):
        route.fulfill(response=answer)
    page.wait_for_timeout(200)
    assert page.evaluate(state) == "cancelled"
