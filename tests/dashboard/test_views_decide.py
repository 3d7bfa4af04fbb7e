"""The views that help to decide, in a real browser: which file, what fits, how fast, which method.

The page is exported from documents made here: an 8-billion-weight model that nobody has to download, judged
by `dither.fit` from its outline, with files whose numbers are known, so that what the page says can be held
against what Python says.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fitting_util import llama_31_8b

import dither
from dashboard.conftest import Browser
from dashboard.test_dashboard_page import overflow, point_at, serious
from dither.capacity.machine import Device, Machine
from dither.capacity.recommendation import LADDER
from dither.reporting.document import RunRecord
from dither.reporting.frontier import best_under, points, shipped
from dither.reporting.glossary import glossary
from dither.reporting.guide import guide
from dither.reporting.report import fit_input
from dither.reporting.single_file import assemble
from dither.units import format_bytes

pytestmark = pytest.mark.slow

GUIDE, GLOSSARY = guide(), glossary()
GIB, PARAMETERS = 2**30, 8_030_261_248
KL = {
    "Q8_0": 0.0013,
    "Q6_K": 0.0054,
    "Q5_K_M": 0.0107,
    "Q4_K_M": 0.0312,
    "IQ4_XS": 0.0363,
    "Q3_K_M": 0.102,
    "Q2_K": 0.445,
}
BITS = {"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.7, "Q4_K_M": 4.85, "IQ4_XS": 4.3, "Q3_K_M": 3.9, "Q2_K": 3.0}
HERE = Machine("a CPU", 8, Device("RAM", 32 * GIB, bandwidth=60e9), (Device("a card", 8 * GIB, bandwidth=288e9),))


def metric(value: float, spread: float = 0.08) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread), "tag": "measured"}


def run(kind: str, recipe: str = "nearest", loss: float = 1.0, index: int = 0) -> dict[str, Any]:
    size = int(BITS[kind] * (1 + 0.004 * index) * PARAMETERS / 8)
    kl = KL[kind] * loss
    return {
        "id": f"{kind}-{index}".lower().replace("_", "-"),
        "file": f"model-{kind}-{index}.gguf",
        "path": None,
        "type": kind,
        "container": "gguf",
        "recipe": recipe,
        "family": f"GGUF, {recipe}",
        "command": f"dither quantize MODEL --to {kind}",
        "measure_command": None,
        "bytes": size,
        "parameters": PARAMETERS,
        "bpw": 8 * size / PARAMETERS,
        "mixed": [[kind, 200, size]],
        "measured_on": None,
        "drift": [],
        "notes": [],
        "tensors": [],
        "tiles": {},
        "palettes": {},
        "answers": [],
        "forced": [],
        "metrics": {
            "kl_mean": metric(kl),
            "kl_p99": metric(14 * kl),
            "same_top": metric(1 - 0.3 * kl**0.5, 0.01),
            "delta_ppl": metric(6 * kl),
        },
    }


def records(runs: list[dict[str, Any]]) -> list[RunRecord]:
    return [RunRecord.model_validate(run) for run in runs]


def document(runs: list[dict[str, Any]], name: str = "Llama-3.1-8B", **parts: Any) -> dict[str, Any]:
    return {
        "schema": "dither.results",
        "version": 1,
        "tool": "dither 0.1.0",
        "made": "2026-01-01T00:00:00Z",
        "live": False,
        "title": name,
        "runs": runs,
        "frontier": shipped(records(runs)).model_dump(mode="json"),
        "fit": None,
        "speed": [],
        "guide": GUIDE,
        "glossary": GLOSSARY,
        "problems": [],
        "reference": {
            "name": name,
            "architecture": "llama",
            "parameters": PARAMETERS,
            "bytes": 2 * PARAMETERS,
            "bits_per_weight": 16.0,
            "path": None,
        },
        **parts,
    }


def fitted(**wish: Any) -> Any:
    return dither.fit(llama_31_8b(), machine=HERE, **wish)


def speed(kind: str, tokens: float) -> dict[str, Any]:
    return {
        "run": f"{kind}-0".lower().replace("_", "-"),
        "command": f"dither bench model-{kind}-0.gguf --threads 8",
        "threads": 8,
        "machine": "a CPU",
        "tag": "measured",
        "peak_memory_bytes": int(BITS[kind] * GIB),
        "prefill": {"value": 910, "low": 890, "high": 930},
        "decode": {"value": tokens, "low": tokens - 2, "high": tokens + 1},
        "joules_per_token": None,
        "joules_note": "not readable here: the counters need root",
    }


RUNS = [run(kind) for kind in BITS] + [run(kind, "gptq, calibrated", 0.4, 1) for kind in ("Q4_K_M", "Q3_K_M")]


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    folder = tmp_path_factory.mktemp("decide")

    def made(document: dict[str, Any], name: str) -> str:
        path = folder / f"{name}.html"
        path.write_text(assemble(json.loads(json.dumps(document, allow_nan=False))), "utf-8")
        return path.as_uri()

    return made


@pytest.fixture(scope="module")
def rich(page_of: Callable[..., str]) -> str:
    fit = fit_input(fitted()).model_dump(mode="json")
    next(weights for weights in fit["weights"] if weights["type"] == "Q8_0")["run"] = "q8-0-0"
    return page_of(document(RUNS, fit=fit, speed=[speed("Q8_0", 34.0), speed("Q4_K_M", 60.0)]), "rich")


def says(page: Any, view: str) -> str:
    return " ".join(page.locator(f"#{view} .answer").inner_text().split())


def settled(page: Any) -> None:
    """Until what a control changed is drawn: a frame for the view's turn, and one for the chart's."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 60))))"
    )


def opened(page: Any, view: str) -> list[list[str]]:
    """The table twin's rows."""
    twin = page.locator(f"#{view} .twin").first
    if not twin.evaluate("node => node.open"):
        twin.locator("summary").click()
    return twin.evaluate(
        "node => [...node.querySelectorAll('tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )


def test_the_budget_moves_the_sentence_and_the_ring(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    slider = page.locator("#which input[type=range]")
    slider.focus()
    seen = set()
    found = points(records(RUNS))
    for key in ("Home", "PageUp", "PageUp", "PageUp", "PageUp", "End"):
        page.keyboard.press(key)
        settled(page)
        share = int(slider.input_value()) / 200
        sizes = [entry["bytes"] for entry in RUNS]
        least, most = min(sizes), max(sizes)
        budget = least - 0.03 * (most - least) + share * 1.08 * (most - least)
        best = best_under(found, budget)
        said = says(page, "which")
        if best is None:
            assert said.startswith(f"Nothing measured is as small as {format_bytes(budget)}")
            continue
        of = next(entry for entry in RUNS if entry["id"] == best["id"])
        assert said.startswith(
            f"Best under {format_bytes(budget)}: {best['label']} ({of['family']}, {format_bytes(best['bytes'])})"
        )
        assert f"it loses {best['value']:.3g}"[:16] in said and said.endswith("measured")
        seen.add(best["label"])
    assert len(seen) >= 3 and slider.get_attribute("aria-valuetext") == format_bytes(budget)


def test_every_axis_is_drawn_or_says_why_not(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    names = page.locator("#which .segments label")
    for index in range(names.count()):
        label = names.nth(index)
        if label.locator("input").is_disabled():
            assert "dither bench" in label.get_attribute("title")
            continue
        label.locator("input").check()
        settled(page)
        title = page.locator("#which .plot svg").text_content()
        assert ("less is better" in title) != ("more is better" in title)
        assert "NaN" not in title and "undefined" not in title
    assert "J/token (dither bench measures it)" in page.locator("#which .hint").first.inner_text()
    page.locator("#which .segments input").nth(2).check()  # same top token: more is better
    settled(page)
    assert re.search(r"it picks the original's likeliest word \d\d\.\d % of the time, and loses", says(page, "which"))
    assert "e+" not in page.locator("#which .plot svg").text_content()


def test_a_mark_tells_its_file_and_the_table_sorts(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    page.locator("#which").scroll_into_view_if_needed()
    mark = page.locator("#which .plot svg .mark-symbol path[aria-roledescription='point']").last
    point_at(page, mark, "model-")
    assert re.search(r"model-\w+-\d\.gguf", page.locator(".tooltip").inner_text())
    rows = opened(page, "which")
    assert len(rows) == len(RUNS)
    page.locator("#which .twin th button", has_text="value").click()
    page.locator("#which .twin th button", has_text="value").click()
    first = opened(page, "which")[0]
    assert first[1] == "Q2_K" and page.locator("#which th[aria-sort=descending]").count() == 1


def test_two_files_are_compared_in_a_sentence(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    first, second = page.locator("#which .which-compare select").all()
    first.select_option("q4-k-m-0")
    second.select_option("q4-k-m-1")
    verdict = page.locator("#which .which-verdict")
    assert "model-Q4_K_M-0.gguf loses 2.5 times as much" in verdict.inner_text()
    second.select_option("iq4-xs-0")
    second.select_option("q4-k-m-0")
    assert verdict.inner_text() == "That is the same file twice."


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_sixty_files_do_not_overlap(page_of: Callable[..., str], browser: Browser, width: int) -> None:
    many = [
        run(kind, recipe, loss * (1 + i / 30), i)
        for i, (kind, (recipe, loss)) in enumerate(
            product(BITS, [("nearest", 1), ("gptq, calibrated", 0.4), ("learned", 0.33)] * 3)
        )
    ][:60]
    for i, entry in enumerate(many):
        entry["id"] = f"run-{i}"
    page = browser.open(page_of(document(many), f"many-{width}"), width=width)
    assert overflow(page) <= 0
    boxes = page.evaluate("""() => [...document.querySelectorAll('#which .plot svg .mark-text text')]
        .filter(t => /^I?Q\\d/.test(t.textContent) && t.getAttribute('stroke-width') === null)
        .map(t => { const r = t.getBoundingClientRect();
                   return [r.left, r.top + 2, r.right, r.bottom - 2]; })""")
    assert len(boxes) >= 5
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_one_file_none_measured_and_no_file(page_of: Callable[..., str], browser: Browser) -> None:
    page = browser.open(page_of(document([run("Q4_K_M")]), "one"))
    assert "Q4_K_M" in says(page, "which") and page.locator("#which .which-compare").count() == 0
    assert "null" not in page.locator("#which").inner_text()
    page = browser.open(page_of(document([{**run("Q4_K_M"), "metrics": {}}]), "unmeasured"))
    assert "dither measure model-Q4_K_M-0.gguf --against Llama-3.1-8B" in page.locator("#which .empty").inner_text()
    page = browser.open(page_of(document([]), "empty"))
    assert "dither quantize" in page.locator("#which .empty").inner_text()
    assert "dither fit" in page.locator("#fits .empty").inner_text()
    assert "dither bench" in page.locator("#speed .empty").inner_text()
    assert page.locator("#guide .command").count() > 2


def judged(found: Any) -> dict[str, tuple[str, str]]:
    listed = [c for c in found.candidates if c.type in (*LADDER, "F16", "BF16")]
    return {c.type: (format_bytes(c.memory.total), c.verdict.word) for c in listed}


def test_what_fits_is_what_dither_fit_says(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    assert {row[0]: (row[5], row[6]) for row in opened(page, "fits")} == judged(fitted())
    assert fitted().chosen in says(page, "fits") and "8 K tokens of context" in says(page, "fits")
    context, slots = page.locator("#fits input[type=range]").all()
    context.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    slots.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#fits .segments input[value=q8_0]").check()
    settled(page)
    wanted = fitted(context=32768, kv="q8_0", slots=2)
    assert {row[0]: (row[5], row[6]) for row in opened(page, "fits")} == judged(wanted)
    assert wanted.chosen in says(page, "fits") and "2 conversations of 32 K tokens" in says(page, "fits")


def test_another_machine_gets_another_answer(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    memory, vram = page.locator("#fits input[type=number]").all()
    memory.fill("4")
    vram.fill("0")
    settled(page)
    told = Machine("a CPU", 8, Device("RAM", 4 * GIB, bandwidth=60e9))
    wanted = judged(dither.fit(llama_31_8b(), machine=told))
    assert {row[0]: (row[5], row[6]) for row in opened(page, "fits")} == wanted
    memory.fill("1")
    settled(page)
    assert says(page, "fits").startswith("Nothing fits")
    memory.fill("")
    assert memory.get_attribute("aria-invalid") == "true"
    page.locator("#fits select").select_option("Q8_0")
    settled(page)
    assert says(page, "fits").startswith("Q8_0 does not")


def test_speed_has_its_spread_and_the_command_that_repeats_it(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    assert (
        says(page, "speed") == "Q4_K_M writes fastest: 60.0 (58.0–61.0) tokens per second on a CPU, 8 threads. measured"
    )
    assert "not readable here: the counters need root" in page.locator("#speed").inner_text()
    page.locator("#fits select").select_option("Q8_0")
    settled(page)
    assert "Its peak while it was timed: 8.50 GiB measured" in page.locator("#fits").inner_text()
    assert {row[0]: row[10] for row in opened(page, "fits")}["Q2_K"] == "not measured"
    page.locator("#speed summary", has_text="Measure them again").click()
    assert "dither bench model-Q8_0-0.gguf --threads 8" in page.locator("#speed").inner_text()
    page.locator("#speed .segments input[value=memory]").check()
    settled(page)
    assert "takes the least memory at its peak: 4.85 GiB" in says(page, "speed")


def test_the_guide_has_no_dead_end_and_quotes_any_name(page_of: Callable[..., str], browser: Browser) -> None:
    name = 'it\'s $(a) "model"'
    page = browser.open(page_of(document([run("Q4_K_M")], name=name), "guide"))
    for path in product(*([option["id"] for option in question["options"]] for question in GUIDE["questions"])):
        for value in path:
            page.locator(f"#guide .guide-questions input[value={value}]").check()
        wanted = GUIDE["answers"]["/".join(path)]
        assert wanted["title"] in says(page, "guide")
        shown = page.locator("#guide .guide-steps code").all_inner_texts()
        assert len(shown) == len(wanted["steps"]) + len(wanted["better"])
        assert page.locator("#guide .guide-out > div").count() == 4
        for step, command in zip([*wanted["steps"], *wanted["better"]], shown, strict=True):
            if step["kind"] == "python":
                assert json.dumps(name) in command
            else:
                filled = [name if word == "MODEL" else word for word in shlex.split(step["command"])]
                assert shlex.split(command) == filled


def test_the_arithmetic_stands_beside_what_files_weigh(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    assert "28 GB at 32 bits, 14 GB at 16 bits, 7 GB at 8 bits, 3.5 GB at 4 bits" in page.locator("#guide").inner_text()
    rows = {row[0]: row[2] for row in opened(page, "guide")}
    assert rows["32 bits"] == "32.1 GB" and rows["4 bits"] == "4.02 GB"
    assert rows["Q4_K_M"] == "4.87 GB" or rows["Q4_K_M"] == "4.89 GB"


def test_words_lead_to_the_glossary_and_back_to_a_view(rich: str, browser: Browser) -> None:
    page = browser.open(rich)
    anchors = set(page.eval_on_selector_all("a.term", "all => all.map(one => one.hash)"))
    assert len(anchors) > 15
    for anchor in anchors:
        assert page.locator(anchor).count() == 1, anchor
    page.locator("#which a.term", has_text="KL divergence").first.click()
    page.wait_for_function("location.hash === '#term-kl-divergence'")
    find = page.locator("#glossary input[type=search]")
    find.fill("group size")
    assert page.locator("#glossary dt:visible").all_inner_texts() == ["group size"]
    find.fill("zzz")
    assert page.locator("#glossary [role=status]").inner_text() == "No term has that word."


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_nothing_overflows_and_nobody_is_kept_out(rich: str, browser: Browser, dark: bool, width: int) -> None:
    page = browser.open(rich, width=width, dark=dark)
    assert overflow(page) <= 0
    assert serious(page) == []


def test_screenshots(rich: str, browser: Browser, photograph: Callable[[Any, str], None]) -> None:
    photograph(browser.open(rich), "decide")
    assert Path(rich.removeprefix("file://")).stat().st_size < 4 * 2**20
