"""Every term that people are owed has its paragraph, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_util import PAGE, run_module

from dither.errors import FormatError
from dither.reporting import texts
from dither.reporting.glossary import Glossary, glossary

GLOSSARY = glossary()
OWED = (
    "perplexity", "KL divergence", "bits per weight", "importance matrix", "group size", "K-quant", "I-quant",
    "calibration", "GGUF", "AWQ", "GPTQ", "NF4", "MXFP4", "quantization", "outlier", "block", "scale",
    "zero point",
    "KV cache", "context", "token", "tokens per second", "prefill", "decode", "error feedback", "rotation",
    "QAT", "PTQ",
    "LoRA", "QLoRA",
)  # fmt: skip


def test_the_terms_that_are_owed_are_there_in_a_paragraph_each() -> None:
    terms = {entry["term"]: entry for entry in GLOSSARY}
    assert set(OWED) <= set(terms)
    for entry in GLOSSARY:
        assert 60 <= len(entry["text"]) <= 460, entry["term"]
        assert entry["text"].endswith((".", "?")) and "\n" not in entry["text"]


def test_no_word_leads_to_two_places() -> None:
    words = [word.lower() for entry in GLOSSARY for word in (entry["term"], *entry["aliases"])]
    assert len(words) == len(set(words))
    assert len({entry["id"] for entry in GLOSSARY}) == len(GLOSSARY)


def test_each_names_a_section_of_the_page() -> None:
    sections = set(re.findall(r'<section id="(\w+)"', (PAGE / "index.html").read_text()))
    assert {entry["view"] for entry in GLOSSARY} <= sections


def test_the_page_makes_the_same_anchors() -> None:
    terms = [entry["term"] for entry in GLOSSARY]
    assert run_module("text.js", "(m, terms) => terms.map(m.glossaryId)", terms) == [e["id"] for e in GLOSSARY]


def test_views_link_only_terms_that_exist() -> None:
    ids = {entry["term"].lower() for entry in GLOSSARY}
    used = set()
    for script in Path(PAGE / "js/views").glob("*.js"):
        used |= set(re.findall(r'glossaryTerm\("([^"]+)"', script.read_text()))
    assert {term.lower() for term in used} <= ids


def test_a_slip_of_the_pen_is_told_by_its_file_and_entry() -> None:
    text = '[[terms]]\nterm = "weight"\nview = "palette"\n'
    with pytest.raises(FormatError, match=r"texts/glossary\.toml: in the entry 'weight', terms\.0\.text"):
        texts.parse(text, "glossary.toml", Glossary)


def test_a_word_of_two_entries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = '[[terms]]\nterm = "{}"\naliases = ["bits"]\nview = "which"\ntext = "…"\n'
    found = texts.parse(two.format("nat") + two.format("weight"), "glossary.toml", Glossary)
    monkeypatch.setattr(texts, "load", lambda *_: found)
    with pytest.raises(FormatError, match="in the entry 'weight', 'bits' leads to two paragraphs"):
        glossary.__wrapped__()
