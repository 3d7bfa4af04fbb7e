"""The model card, read by parsers that are not ours: the hub's, and one of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from dither.reporting.card import card
from dither.reporting.choice import prepared, short
from dither.reporting.document import Document, Reference, RunRecord, TaggedValue
from dither.reporting.report import document

EVIL = 'x"\n---\nlicense: evil\n# <script>alert(1)</script> | `` ``` [a](javascript:b) ![c](d) \u202e'


def made(*runs: RunRecord, reference: Reference | None = None) -> Document:
    return Document(
        tool="dither 0.1.0", made="", live=False, title="t", reference=reference, runs=tuple(prepared(runs))
    )


def run(name: str, size: int, kl: float | None, **changes: object) -> RunRecord:
    metrics = {} if kl is None else {"kl_mean": TaggedValue(value=kl, low=0.9 * kl, high=1.1 * kl)}
    known = {
        "id": name,
        "file": f"{name}.gguf",
        "type": name,
        "container": "gguf",
        "bytes": size,
        "parameters": 2 * size,
        "bpw": 4.0,
        "metrics": metrics,
    }
    return RunRecord.model_validate({**known, **changes})


def cells(text: str) -> list[list[str]]:
    """The rows of the first table, as a Markdown parser sees them: text alone, markup refused."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and len(rows[-1]) < 8 and token.level >= 4:
            assert {child.type for child in token.children or ()} <= {"text", "text_special"}
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


def kinds(text: str) -> set[str]:
    """Everything that Markdown makes of a text."""

    def below(tokens: Iterable[object]) -> Iterable[str]:
        for token in tokens:
            yield token.type  # type: ignore[attr-defined]
            yield from below(token.children or ())  # type: ignore[attr-defined]

    return set(below(MarkdownIt("commonmark").enable("table").parse(text)))


def test_the_hub_reads_the_front_matter(shelf: Path) -> None:
    text = card(document([shelf], fit=False).exported())
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "tiny-llama" and data["base_model_relation"] == "quantized"
    assert data["quantized_by"] == "dither" and "license" not in data
    assert data["tags"] == ["quantized", "dither", "gguf", "gptq"]


def test_the_table_has_every_file_with_its_numbers(shelf: Path) -> None:
    found = document([shelf], fit=False).exported()
    rows = cells(ModelCard(card(found)).text)
    assert rows[0][:5] == ["file", "type", "bytes", "size", "bits per weight"]
    assert [row[0] for row in rows[1:]] == [run.file for run in found.runs]
    for row, run in zip(rows[1:], found.runs, strict=True):
        place = shelf / run.file
        size = sum(f.stat().st_size for f in place.iterdir()) if place.is_dir() else place.stat().st_size
        own_card = (place / "README.md").stat().st_size if place.is_dir() else 0
        assert int(row[2]) == size - own_card
        kl = run.metric("kl_mean")
        assert row[5] == ("not measured" if kl is None else short(kl))
        assert (row[6] == "") == (kl is None)


def test_every_command_stands_in_a_block_of_its_own(shelf: Path) -> None:
    found = document([shelf], fit=False).exported()
    blocks = [t.content for t in MarkdownIt().parse(ModelCard(card(found)).text) if t.type == "fence"]
    for run in found.runs:
        assert any(run.command and run.command in block.splitlines() for block in blocks)


def test_advice_names_what_nothing_beats(shelf: Path) -> None:
    given = [run("a", 10, 0.4), run("b", 20, 0.1), run("c", 25, 0.2), run("d", 30, 0.1), run("e", 5, None)]
    advice = card(made(*given)).split("## Which should I take")[1].split("## Files")[0]
    taken = [line for line in advice.splitlines() if line.startswith("- **")]
    assert [line[4] for line in taken] == ["b", "a"]
    assert "c (b is no larger and loses no more)" in advice and "d (b is" in advice
    assert "Nobody can tell" not in advice
    assert "nobody can tell" in card(made(run("e", 5, None)))


def test_stale_numbers_are_not_advertised() -> None:
    text = card(made(run("a", 10, 0.4, stale=True), run("b", 20, 0.1)))
    assert [row[5] for row in cells(text)[1:]] == ["not measured", "0.100"]


def test_a_stranger_s_names_stay_names() -> None:
    reference = Reference(name=EVIL, architecture="x", parameters=1, bytes=1, bits_per_weight=8, license="mit")
    evil = run("a", 10, 0.1, file=EVIL, type=EVIL, recipe=EVIL, container="gguf\n- evil", command=f"dither\n{EVIL}")
    text = card(made(evil, run("b", 20, 0.2), reference=reference))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["base_model"].startswith('x"') and "alert(1)" in front["base_model"]
    assert len(front["tags"]) == 4
    body = ModelCard(text).text
    assert kinds(body) & {"html_inline", "html_block", "link_open"} == set()
    rows = cells(body)
    assert len(rows) == 3 and all(len(row) == 8 for row in rows)
    images = [t for t in MarkdownIt().parse(body) for c in t.children or () if c.type == "image"]
    assert len(images) == 1  # the frontier
    assert "\u202e" not in text


@pytest.mark.parametrize("picture", [None, "frontier.png"])
def test_the_picture_is_named_where_there_is_one(picture: str | None) -> None:
    text = card(made(run("a", 10, 0.4), run("b", 20, 0.1)), picture)
    assert ("](frontier.png)" in text) == (picture is not None)
