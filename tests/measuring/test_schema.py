"""The measurement's file: what is written is read, and what is no measurement is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dither.errors import DitherError, FormatError, OutputError, SourceError, UnsupportedError
from dither.measuring import schema
from dither.measuring.schema import Measurement

STATISTICS = (
    "kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "same_top",
    "delta_p_mean", "delta_p_rms", "ppl", "ppl_reference", "ppl_ratio",
)  # fmt: skip


def fields(**changes: Any) -> dict[str, Any]:
    numbers = {f"{name}{end}": 0.1 for name in STATISTICS for end in ("", "_low", "_high")}
    about = {
        "tool": "dither 0.1.0",
        "file": "a.gguf",
        "file_sha256": "ab" * 32,
        "type": "Q4_K_M",
        "bytes": 1000,
        "tensor_bytes": 900,
        "bpw": 4.5,
        "reference": "model",
        "reference_sha256": "cd" * 32,
        "data": "text.txt",
        "data_sha256": "ef" * 32,
        "context": 512,
        "sequences": 2,
        "tokens": 510,
        "skipped": "half",
        "drift": (0.1, 0.2),
        "sequence_kl": (0.1, 0.2),
        "sequence_tokens": (255, 255),
        "seconds": 1.5,
        "notes": ("one",),
    }
    return {**about, **numbers, **changes}


def test_what_is_saved_is_loaded_and_flat(tmp_path: Path) -> None:
    written = Measurement(**fields())
    place = schema.path_for(tmp_path / "a.gguf")
    assert place == tmp_path / "a.gguf.measure.json"
    schema.save(written, place)
    assert schema.load(place) == written
    assert list(tmp_path.iterdir()) == [place]
    document = json.loads(place.read_text())
    assert (document["schema_version"], document["metric_version"]) == (2, 1)
    for name in STATISTICS:
        assert [type(document[f"{name}{end}"]) for end in ("", "_low", "_high")] == [float] * 3


def test_a_measurement_of_the_first_version_is_read(tmp_path: Path) -> None:
    """Its `bytes` were those of the tensors; of the file's nothing better is known."""
    old = {key: value for key, value in fields().items() if key != "tensor_bytes"}
    place = tmp_path / "a.gguf.measure.json"
    place.write_text(json.dumps({"schema_version": 1, "metric_version": 1, **old}))
    found = schema.load(place)
    assert (found.tensor_bytes, found.bytes, found.schema_version) == (1000, 1000, 2)
    with pytest.raises(FormatError, match="tensor_bytes"):
        schema.parse(json.dumps({"schema_version": 2, **old}), "x")


def test_one_sequence_has_no_ends_and_few_tokens_are_called_thin() -> None:
    """Also in a file of an earlier version, which gave the figure itself for both ends."""
    earlier = fields(sequences=1, sequence_kl=(0.1,), sequence_tokens=(255,), tokens=255)
    document = json.loads(Measurement(**earlier).model_dump_json())
    for name in STATISTICS:
        assert [document[f"{name}{end}"] for end in ("", "_low", "_high")] == [0.1, None, None]
    assert document["thin"] is True
    assert schema.parse(json.dumps(document), "it").kl_mean.both is None
    assert "thin" in Measurement(**earlier)._repr_html_() and "(95" not in Measurement(**earlier)._repr_html_()
    thin = [Measurement(**fields(tokens=tokens)).thin for tokens in (4095, 4096)]
    assert thin == [True, False]


def test_numbers_survive_to_the_last_digit(tmp_path: Path) -> None:
    exact = 0.1 + 0.2
    schema.save(Measurement(**fields(kl_mean=exact)), tmp_path / "m.json")
    assert schema.load(tmp_path / "m.json").kl_mean == exact


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("", FormatError, "no JSON"),
        ("[1, 2]", FormatError, "no schema_version"),
        ("{}", FormatError, "no schema_version"),
        ('{"schema_version": "1"}', FormatError, "no schema_version"),
        ("[" * 100_000, FormatError, "no JSON"),
        ('{"schema_version": 1}', FormatError, "tool: Field required"),
        ('{"schema_version": 99}', UnsupportedError, "newer Dither"),
        (json.dumps({**fields(), "schema_version": 1, "kl_mean": None}), FormatError, "kl_mean"),
        (json.dumps({**fields(), "schema_version": 1, "kl_p99": float("nan")}), FormatError, "kl_p99"),
        (json.dumps({**fields(), "schema_version": 1, "tokens": 0}), FormatError, "tokens"),
        (json.dumps({**fields(), "schema_version": 1, "skipped": "most"}), FormatError, "skipped"),
    ],
)
def test_junk_is_named(tmp_path: Path, text: str, kind: type[DitherError], said: str) -> None:
    path = tmp_path / "junk.measure.json"
    path.write_text(text)
    with pytest.raises(kind, match=said) as caught:
        schema.load(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        schema.load(tmp_path / "none.measure.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00GGUF")
    with pytest.raises(FormatError, match="not even text"):
        schema.load(tmp_path / "bytes")


def test_only_a_measurement_is_ever_replaced(tmp_path: Path) -> None:
    place = tmp_path / "a.gguf.measure.json"
    schema.check_writable(place)
    schema.save(Measurement(**fields()), place)
    schema.check_writable(place)
    place.write_text('{"somebody": "else\'s"}')
    with pytest.raises(OutputError, match="no measurement"):
        schema.check_writable(place)
    place.write_text('{"schema_version": 3}')
    with pytest.raises(OutputError, match="newer Dither"):
        schema.check_writable(place)
    with pytest.raises(OutputError, match="is no folder"):
        schema.check_writable(tmp_path / "nowhere" / "a.measure.json")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        schema.save(Measurement(**fields()), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
