"""The views into a file, in a real browser: the map of tensors, weights as pixels, palettes, answers.

Live they ask the server; exported they show what was recorded. What they say is held against Python.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dashboard.conftest import BUNDLED, Browser, Served
from dashboard.test_dashboard_page import becomes, overflow, point_at, serious
from dither.models.source import open_model
from dither.reporting import answers as job
from dither.reporting.answer_records import load, path_for
from dither.reporting.palette import palette
from dither.reporting.report import document, report
from dither.reporting.single_file import assemble
from dither.reporting.tiles import tile

pytestmark = pytest.mark.slow

TEXT = "The old man was quiet, and the boat was empty before the winter."
HOSTILE_TOKEN = "<b onmouseover=alert(1)>"


@pytest.fixture(scope="module")
def told(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one file with recorded answers, and its exported page."""
    folder = tmp_path_factory.mktemp("told")
    for path in made.glob("demo-Q4_0.gguf*"):
        shutil.copy2(path, folder / path.name)
    job.answers(
        folder / "demo-Q4_0.gguf", BUNDLED, prompts=["The old man", "Once upon a time"], text=TEXT, max_tokens=24
    )
    report([folder], folder / "report.html", against=BUNDLED)
    return folder


def sentence(page: Any, view: str) -> str:
    return str(page.locator(f"#{view} .answer").first.inner_text())


def csv_of(page: Any, view: str, button: str = "CSV") -> list[dict[str, str]]:
    with page.expect_download() as found:
        page.locator(f"#{view}").get_by_role("button", name=button).first.click()
    return list(csv.DictReader(io.StringIO(Path(found.value.path()).read_text("utf-8"))))


def by_layers(layers: int) -> dict[str, Any]:
    """A document of one run as deep as a large model: 9 kinds of matrix, one of which lost most."""
    kinds = ["attn_q", "attn_k", "attn_v", "attn_output", "ssm_in"]
    kinds += ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
    rows = [
        {
            "name": f"blk.{layer}.{kind}.weight",
            "layer": layer,
            "kind": kind,
            "type": "Q4_K",
            "bpw": 4.5,
            "bytes": 9,
            "shape": [32, 32],
            "relative_error": 0.05 + 0.001 * layer + 0.0001 * number,
            "error_tag": "measured",
            "kl_alone": None,
        }
        for layer in range(layers)
        for number, kind in enumerate(kinds)
    ]
    rows += [
        {**rows[0], "name": f"{kind}.weight", "layer": None, "kind": kind, "relative_error": error}
        for kind, error in (("token_embd", 0.02), ("output", 0.3))
    ]
    run = {
        "id": "deep",
        "file": "deep.gguf",
        "path": None,
        "type": "Q4_K_M",
        "container": "gguf",
        "bytes": 1,
        "parameters": 1,
        "bpw": 4.5,
        "metrics": {},
        "tensors": rows,
    }
    return {"title": "deep", "tool": "dither", "made": "2026-01-01T00:00:00Z", "runs": [run], "problems": []}


def test_the_map_names_the_worst_and_opens_it(
    served: Served, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(served.url + "#inside")
    document = served.get("/api/document")
    run = next(run for run in document["runs"] if run["file"] == "demo-Q4_0.gguf")
    page.locator("#inside select").select_option(run["id"])
    worst = max((t for t in run["tensors"] if len(t["shape"]) > 1), key=lambda t: t["relative_error"])
    becomes(page, "document.querySelector('#inside .answer').innerText.includes('demo-Q4_0')")
    assert f"{worst['kind']} of layer {worst['layer']}" in sentence(page, "inside")
    assert f"{100 * worst['relative_error']:.1f} %" in sentence(page, "inside")
    alone = page.locator("#inside").get_by_label("KL alone")
    assert alone.is_disabled() and "dither plan" in page.locator("#inside").inner_text()
    cell = page.locator("#inside svg path[aria-label*='blk.2.attn_v']")
    point_at(page, cell, "blk.2.attn_v.weight")  # over the number in it
    rows = csv_of(page, "inside")
    assert {row["tensor"] for row in rows} == {t["name"] for t in run["tensors"] if len(t["shape"]) > 1}
    page.locator("#inside .plot").focus()
    for key in ("Home", "ArrowDown", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#inside .readout").inner_text().startswith("blk.2.attn_k.weight: Q4_0")
    photograph(page, "inside")
    page.keyboard.press("Enter")
    becomes(page, "document.querySelector('#pictures select:nth-of-type(1)') !== null")
    tensors = page.locator("#pictures").get_by_label("Tensor", exact=True)
    becomes(page, f"document.getElementById('{tensors.get_attribute('id')}').value === 'blk.2.attn_k.weight'")


def test_pixels_are_the_weights_and_the_slider_takes_bits_away(
    served: Served, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(served.url + "#pictures")
    run = next(run for run in served.get("/api/document")["runs"] if run["file"] == "demo-Q4_0.gguf")
    page.locator("#pictures").get_by_label("File").select_option(run["id"])
    page.locator("#pictures").get_by_label("Tensor", exact=True).select_option("blk.3.ffn_down.weight")
    becomes(page, "document.querySelector('#pictures .answer')?.innerText.includes('Q4_0')")
    becomes(page, "document.querySelector('#pictures canvas').getAttribute('aria-label').includes('blk.3.ffn_down')")
    expected = tile(open_model(BUNDLED), open_model(served.runs / "demo-Q4_0.gguf"), "blk.3.ffn_down.weight")
    errors = {}
    for kind, w in expected.quantized.items():
        away = np.square(w.astype(np.float64) - expected.original_RW).sum()
        errors[kind] = float(np.sqrt(away / np.square(expected.original_RW, dtype=np.float64).sum()))
    found = {row["stored as"]: float(row["relative error"]) for row in csv_of(page, "pictures")}
    assert found == pytest.approx(errors, rel=0.01)
    assert f"{100 * errors['Q4_0']:.1f} %" in sentence(page, "pictures")
    reds = page.evaluate("""() => {
        const canvas = document.querySelector('#pictures canvas');
        const at = canvas.getContext('2d').getImageData(0, 0, 64, 64).data;
        return Array.from({length: 4096}, (_, i) => at[4 * i] - at[4 * i + 2]);
    }""")  # blue to orange: more red than blue is a positive weight
    assert np.corrcoef(np.array(reds), expected.original_RW.ravel())[0, 1] > 0.95
    slider = page.locator("#pictures").get_by_label("Stored as")
    slider.focus()
    page.keyboard.press("End")
    becomes(page, "document.querySelector('#pictures .answer').innerText.includes('Q2_K')")
    assert f"{100 * errors['Q2_K']:.1f} %" in sentence(page, "pictures")
    assert page.locator("#pictures").get_by_text("Through Q2_K").count() == 1
    page.locator("#pictures .pixel-stage").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#pictures .readout").inner_text().startswith("Row 0, column 1:")
    with page.expect_download() as picture:
        page.locator("#pictures").get_by_role("button", name="as PNG").click()
    assert Path(picture.value.path()).read_bytes()[:4] == b"\x89PNG"
    with page.expect_download() as drawing:
        page.locator("#pictures").get_by_role("button", name="as SVG").click()
    drawn = ElementTree.fromstring(Path(drawing.value.path()).read_text("utf-8"))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}image")) == 3
    photograph(page, "pictures")


def test_the_palette_says_how_many_levels_are_used(
    served: Served, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open(served.url + "#palette")
    view = page.locator("#palette")
    run = next(run for run in served.get("/api/document")["runs"] if run["file"] == "demo-Q4_0.gguf")
    view.get_by_label("File").select_option(run["id"])
    view.get_by_label("Tensor", exact=True).select_option("blk.0.ffn_up.weight")
    view.get_by_label("Row", exact=True).fill("9")
    view.get_by_label("Block of the row").fill("3")
    found = palette(open_model(BUNDLED), open_model(served.runs / "demo-Q4_0.gguf"), "blk.0.ffn_up.weight", 9, 3)
    used = sum(count > 0 for count in found.used)
    said = f"{used} of 16 levels used by the 32 weights of this Q4_0 block."
    becomes(page, f"document.querySelector('#palette .answer').innerText.startsWith({json.dumps(said)})")
    assert view.locator(".swatches li").count() == 16
    assert view.locator(".swatches .unused").count() == 16 - used
    rows = csv_of(page, "palette")
    assert [int(row["weights that take it"]) for row in rows] == list(found.used)
    twin = view.locator("details.twin").nth(1)
    assert all(name in (twin.text_content() or "") for name in ("equal steps", "IQ4_NL", "NF4"))
    photograph(page, "palette")


def test_both_models_are_asked_side_by_side(served: Served, browser: Browser) -> None:
    page = browser.open(served.url + "#answers")
    view = page.locator("#answers")
    run = next(run for run in served.get("/api/document")["runs"] if run["file"] == "demo-Q4_0.gguf")
    view.get_by_label("File").select_option(run["id"])
    view.get_by_label("Ask both models").fill("The old man")
    view.get_by_role("button", name="Ask both").click()
    becomes(page, "document.querySelectorAll('#answers ins, #answers del').length > 0", 60)
    (alone,) = job.answers(
        served.runs / "demo-Q4_0.gguf", BUNDLED, prompts=["The old man"], max_tokens=64, save=False
    ).answers
    assert alone.first_divergence is not None
    assert f"token {alone.first_divergence + 1}" in sentence(page, "answers")
    view.get_by_label("What they expect in a text").check()
    view.get_by_label("A text for both models to read").fill(TEXT)
    view.get_by_role("button", name="Let both read it").click()
    becomes(page, "document.querySelectorAll('#answers .forced-text .token').length > 5", 60)
    assert page.locator("#answers .forced-text").inner_text().strip() == TEXT


def test_the_report_replays_what_was_recorded(
    told: Path, browser: Browser, photograph: Callable[[Any, str], None]
) -> None:
    page = browser.open((told / "report.html").as_uri() + "#answers", reduced_motion="reduce")
    recorded = load(path_for(told / "demo-Q4_0.gguf"))
    answer = recorded.answers[0]
    assert answer.first_divergence is not None
    assert f"token {answer.first_divergence + 1}" in sentence(page, "answers")
    sides = page.locator("#answers .written")
    before = sides.nth(1).evaluate("""side => {
        const parting = side.querySelector('.parting');
        const range = document.createRange();
        range.setStart(side, 0); range.setEndBefore(parting);
        return range.toString();
    }""")
    assert before == "".join(answer.quantized.tokens[: answer.first_divergence])
    written = page.evaluate("""() => [...document.querySelectorAll('#answers .written')].map((side) => {
        const copy = side.cloneNode(true);
        copy.querySelectorAll('.parting').forEach((mark) => mark.remove());
        return copy.textContent;
    })""")
    assert written == ["".join(side.tokens) for side in (answer.original, answer.quantized)]
    assert page.locator("#answers").get_by_label("Ask both models").count() == 0
    page.locator("#answers").get_by_label("What they expect in a text").check()
    worst = max(recorded.forced[0].tokens, key=lambda token: token.kl or 0)
    token = page.locator("#answers .forced-text .token").nth(recorded.forced[0].tokens.index(worst))
    assert f"KL {worst.kl:.3g}"[:6] in (token.get_attribute("title") or "")
    token.hover()
    detail = page.locator("#answers .forced-detail")
    becomes(page, "document.querySelector('#answers .expected') !== null")
    assert all(word.strip() in detail.inner_text() for word, _ in worst.top_original if word.strip())
    first = page.locator("#answers .forced-text .token").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("likeliest") or "KL" in (
        page.evaluate("document.activeElement.getAttribute('aria-label')")
    )
    assert page.locator("#pictures canvas").count() == 5
    assert "levels" in sentence(page, "palette") and "away from the original" in sentence(page, "pictures")
    photograph(page, "answers")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_narrow_and_dark_everybody_gets_in(told: Path, browser: Browser, width: int, dark: bool) -> None:
    page = browser.open((told / "report.html").as_uri(), width=width, dark=dark)
    assert overflow(page) <= 0
    if not dark:  # axe takes seconds, and goes through the whole page in light colors elsewhere
        return
    page.locator("#answers").get_by_label("What they expect in a text").check()
    page.evaluate("""() => document.querySelectorAll('main > section').forEach((section) => {
        if (!['inside', 'pictures', 'palette', 'answers'].includes(section.id)) section.remove();
    })""")
    assert serious(page) == []


def test_eighty_layers_fit_and_what_stands_outside_them_is_named(browser: Browser, tmp_path: Path) -> None:
    place = tmp_path / "deep.html"
    place.write_text(assemble(by_layers(80)), "utf-8")
    page = browser.open(place.as_uri(), width=390)
    assert "output lost most, 30.0 %" in sentence(page, "inside")
    assert "token_embd lost least" in sentence(page, "inside")
    assert page.locator("#inside svg .layer_0_marks path").count() == 9 * 80 + 2
    assert overflow(page) <= 0
    page.locator("#inside .plot").focus()
    page.keyboard.press("End")
    assert page.locator("#inside .readout").inner_text().startswith("output.weight")


def test_what_a_stranger_recorded_is_text(made: Path, browser: Browser, tmp_path: Path) -> None:
    shown = document([made], against=BUNDLED).exported().to_json()
    side = {"tokens": ["a", HOSTILE_TOKEN], "seconds": 1.0}
    token = {
        "text": HOSTILE_TOKEN,
        "kl": 1.0,
        "top_original": [[HOSTILE_TOKEN, 0.5]],
        "top_quantized": [],
        "same_top": False,
    }
    shown["runs"][0]["answers"] = [
        {"prompt": HOSTILE_TOKEN, "original": side, "quantized": {**side, "tokens": ["a"]}, "first_divergence": 1}
    ]
    shown["runs"][0]["forced"] = [{"text": HOSTILE_TOKEN, "tokens": [token]}]
    place = tmp_path / "hostile.html"
    place.write_text(assemble(shown), "utf-8")
    page = browser.open(place.as_uri())
    assert HOSTILE_TOKEN in page.locator("#answers").inner_text()
    page.locator("#answers").get_by_label("What they expect in a text").check()
    page.locator("#answers .token").first.hover()
    assert page.locator("#answers b").count() == 0
