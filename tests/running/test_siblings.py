"""Which file a person means who says a type."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from llama_util import TinyLlama

from dither.errors import UsageError
from dither.running.siblings import find


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small (Q4_K_M by its metadata), large-Q8_0, twice-Q8_0-b, other (another model), noise."""
    folder = tmp_path_factory.mktemp("siblings")
    for name in ("small", "large-Q8_0", "x-Q4_K_S"):
        TinyLlama().write(folder / f"{name}.gguf")
    TinyLlama(layers=1).write(folder / "other-Q6_K.gguf")
    (folder / "noise-Q5_0.gguf").write_text("no model")
    raw = (folder / "small.gguf").read_bytes()
    key = b"general.architecture"
    field = len(b"general.file_type").to_bytes(8, "little") + b"general.file_type"
    field += int(gguf.GGUFValueType.UINT32).to_bytes(4, "little") + (15).to_bytes(4, "little")  # MOSTLY_Q4_K_M
    at = raw.index(key) - 8
    count = int.from_bytes(raw[16:24], "little") + 1
    head, tail = raw[:16] + count.to_bytes(8, "little") + raw[24:at] + field, raw[at:]
    # keep the data aligned: what was put in front is made up for by a second, empty field
    filler = -len(field) % 32
    while filler < 8 + 1 + 4 + 8:
        filler += 32
    empty = filler - (8 + 4 + 4 + 8)
    if empty > 0:
        pad = (4).to_bytes(8, "little") + b"pad." + (8).to_bytes(4, "little")
        pad += empty.to_bytes(8, "little") + b" " * empty
        head = head[:16] + (count + 1).to_bytes(8, "little") + head[24:] + pad
    (folder / "small.gguf").write_bytes(head + tail)
    return folder


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", "small"),
        ("q8_0", "large-Q8_0"),
        ("Q4_K_S", "x-Q4_K_S"),
        ("large-Q8_0.gguf", "large-Q8_0"),
        ("large", "large-Q8_0"),
    ],
)
def test_a_type_or_a_name_is_found(folder: Path, wanted: str, found: str) -> None:
    current = folder / ("x-Q4_K_S.gguf" if found != "x-Q4_K_S" else "small.gguf")
    assert find(current, wanted).name == f"{found}.gguf"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("Q6_K", "neither"),
        ("Q5_0", "neither"),
        ("Q4_K", "neither"),
        ("other-Q6_K.gguf", "another model"),
        ("gguf", "several"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(folder: Path, wanted: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        find(folder / "x-Q4_K_S.gguf", wanted)
    if reason == "neither":
        assert "small.gguf (Q4_K_M)" in error.value.way_out and "other" not in error.value.way_out
