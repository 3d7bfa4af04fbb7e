"""The results document: what it takes, what it refuses, and what leaves the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dither.errors import DitherError, FormatError, SourceError, UnsupportedError
from dither.reporting import document
from dither.reporting.document import Document, load, parse


def run(**changes: Any) -> dict[str, Any]:
    row = {
        "name": "blk.0.attn_q.weight",
        "layer": 0,
        "kind": "attn_q",
        "type": "Q4_K",
        "bpw": 4.5,
        "bytes": 144,
        "shape": [1, 256],
        "relative_error": 0.07,
        "kl_alone": None,
        "error_tag": "measured",
    }
    known = {
        "id": "a-1234",
        "file": "a.gguf",
        "path": "/home/somebody/a.gguf",
        "type": "Q4_K_M",
        "container": "gguf",
        "recipe": "nearest",
        "command": None,
        "measure_command": None,
        "bytes": 144,
        "parameters": 256,
        "bpw": 4.5,
        "mixed": [["Q4_K", 1, 144]],
        "metrics": {"kl_mean": {"value": 0.03, "low": 0.02, "high": 0.04, "tag": "measured"}},
        "measured_on": {"data": "t", "tokens": 10, "context": 5},
        "drift": [0.1],
        "notes": ["one"],
        "tensors": [row],
        "tiles": {},
        "palettes": {},
        "answers": [],
        "forced": [],
    }
    return {**known, **changes}


def whole(**changes: Any) -> dict[str, Any]:
    known = {
        "schema": "dither.results",
        "version": 1,
        "tool": "dither 0.1.0",
        "made": "2026-01-01T00:00:00Z",
        "live": True,
        "title": "a",
        "runs": [run()],
        "problems": [{"file": "/home/somebody/b", "reason": "no"}],
        "reference": {
            "name": "m",
            "architecture": "llama",
            "parameters": 256,
            "bytes": 512,
            "bits_per_weight": 16.0,
            "path": "/home/somebody/m",
        },
    }
    return {**known, **changes}


def test_what_was_written_is_read_again() -> None:
    found = parse(json.dumps(whole(new_field={"x": 1})), "x")
    again = parse(json.dumps(found.to_json(), allow_nan=False), "x")
    assert again == found
    assert found.to_json()["schema"] == "dither.results"
    assert found.runs[0].metric("kl_mean") == 0.03 and found.runs[0].metric("ppl") is None


def test_a_document_of_the_first_version_is_read() -> None:
    """A run's `bytes` were the tensors', its `file_bytes` the file's, where that was known."""
    old = {**run(), "bytes": 100}
    found = parse(json.dumps(whole(version=1, runs=[{**old, "file_bytes": 120}, {**old, "id": "b"}])), "x").runs
    assert [(each.bytes, each.tensor_bytes) for each in found] == [(120, 100), (100, 100)]


def test_an_exported_document_says_nothing_of_the_machine() -> None:
    found = parse(json.dumps(whole()), "x").exported()
    assert not found.live
    assert "somebody" not in json.dumps(found.to_json())


def test_what_was_typed_with_a_path_is_exported_with_a_name() -> None:
    secret = "/srv/ada lovelace/project x"
    quoted = f"dither measure '{secret}/a.gguf' --against ~/ada/m --data /srv/ada/t.txt --tokens 10"
    about = {"data": f"{secret}/t.txt", "tokens": 10, "context": 5}
    entry = run(
        path=f"{secret}/a.gguf",
        reference="/srv/ada/m",
        command=f"dither quantize {secret}/m --to Q4_K_M",
        measure_command=quoted,
        measured_on=about,
        notes=[f"Stale: {secret}/a.gguf; see /srv/ada/b (12 t/s)"],
    )
    timed = {"run": "a-1234", "command": "dither bench /srv/ada/a.gguf -r 3", "threads": 1}
    refused = [{"file": f"{secret}/b", "reason": f"{secret}/b: cannot be read"}]
    found = parse(json.dumps(whole(runs=[entry], speed=[timed], problems=refused)), "x").exported()
    text = json.dumps(found.to_json())
    assert "/srv" not in text and "ada" not in text and "project" not in text
    assert found.runs[0].measure_command == "dither measure 'a.gguf' --against m --data t.txt --tokens 10"
    assert found.runs[0].notes == ("Stale: a.gguf; see b (12 t/s)",)
    assert found.speed[0].command == "dither bench a.gguf -r 3"


def test_a_script_in_a_name_stays_text() -> None:
    name = "</script><script>alert(1)</script>\u202e"
    assert parse(json.dumps(whole(runs=[run(file=name)])), "x").runs[0].file == name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"runs": [run(type="x" * 2**20)]}, "runs.0.type"),
        ({"runs": [run(bytes=-1)]}, "runs.0.bytes"),
        ({"runs": [run(id="../../etc")]}, "runs.0.id"),
        ({"runs": [run(bpw=1e999)]}, ""),
        ({"runs": [run(metrics={"kl_mean": {"value": float("nan")}})]}, ""),
        ({"runs": [run(metrics={"kl_mean": {"value": "0.1; drop"}})]}, "runs.0.metrics.kl_mean.value"),
        ({"runs": [run(metrics={"kl_mean": {"value": 1, "tag": "guessed"}})]}, "runs.0.metrics.kl_mean.tag"),
        ({"runs": [run(tensors=[{"name": "x"}])]}, "runs.0.tensors.0.kind"),
        ({"runs": [run()] * 1025}, "runs"),
        ({"title": None}, "title"),
        ({"live": "perhaps"}, "live"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError) as error:
        parse(json.dumps(whole(**changes)), "doc.json")
    assert field in str(error.value) and "doc.json" in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"schema": "other"}', "\0", "1e999"])
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse(text, "x")


@pytest.mark.parametrize(
    ("version", "kind"),
    [(3, UnsupportedError), (0, FormatError), ("1", FormatError), (True, FormatError), (None, FormatError)],
)
def test_another_version_is_not_read(version: object, kind: type[DitherError]) -> None:
    with pytest.raises(kind):
        parse(json.dumps(whole(version=version)), "x")


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "d.json"
    place.write_text(json.dumps(whole()))
    assert isinstance(load(place), Document)
    monkeypatch.setattr(document, "LARGEST", 100)
    with pytest.raises(FormatError, match="more than the 100 bytes"):
        load(place)
    place.write_bytes(b"\xff\xfe{}")
    with pytest.raises(FormatError, match="not even text"):
        load(place)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError):
            load(missing)
