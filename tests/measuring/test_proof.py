"""A better measurement takes the place of the one inside a file; whatever stops that, a whole one is left."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import dither
from conftest import BUNDLED
from dither.formats.gguf import read_header
from dither.measuring import schema
from dither.measuring.proof import embedded_text, read, renew
from dither.measuring.schema import Measurement
from dither.system import native

pytestmark = pytest.mark.slow  # models run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF and a folder, each with a measurement on few tokens inside."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text("One day the bees of the valley went out all the same, and came home late. " * 120)
    for to, name in (("Q4_0", "a.gguf"), ("gptq", "a-gptq")):
        dither.quantize(BUNDLED, to, folder / name, measure=text, pure=to == "Q4_0")
    return folder


def better(inside: Measurement, tokens: int = 20_000, **changes: Any) -> Measurement:
    return inside.model_copy(update={"tokens": tokens, "data": "more.txt", "notes": (), **changes})


def inside(path: Path) -> Measurement:
    found = dither.open_model(path).metadata["dither.measure"].value
    return read(str(found), "it")


def tensors(path: Path) -> dict[str, bytes]:
    """As llama.cpp's own package reads them."""
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_measure_renews_and_keeps_by_tokens(made: Path, tmp_path: Path) -> None:
    """End to end: fewer tokens leave the file alone, unless somebody insists; more take its place."""
    path = Path(shutil.copy(made / "a.gguf", tmp_path / "a.gguf"))
    shutil.copytree(made / "a-gptq", tmp_path / "a-gptq")
    before, weights = path.read_bytes(), tensors(path)
    few: dict[str, Any] = {"data": made / "text.txt", "tokens": 512, "context": 256}
    found = dither.measure([path, tmp_path / "a-gptq"], BUNDLED, **few)
    assert [one.proof for one in found] == ["kept", "kept"] and path.read_bytes() == before
    assert all("is kept: it is on more tokens" in one.notes[-1] for one in found)
    found = dither.measure([path, tmp_path / "a-gptq"], BUNDLED, replace_proof=True, **few)
    assert [one.proof for one in found] == ["renewed", "renewed"]
    assert len(path.read_bytes()) == len(before) and tensors(path) == weights
    for one, place in zip(found, (path, tmp_path / "a-gptq"), strict=True):
        assert (inside(place).tokens, inside(place).kl_mean) == (one.tokens, one.kl_mean)
        kept = schema.load(schema.path_for(place))
        assert kept == one and kept.proof == "renewed"
    assert schema.load(schema.path_for(path)).file_sha256 == dither_sha256(path)
    assert f"{found[1].kl_mean:.4f} nats" in (tmp_path / "a-gptq" / "README.md").read_text()
    assert dither.inspect(path).measurement == inside(path).model_dump()


def dither_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_more_tokens_on_the_same_original_take_its_place(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made / "a.gguf", tmp_path / "a.gguf"))
    for count in range(1, 5):  # from one half of the room to the other and back
        model = dither.open_model(path)
        assert renew(model, better(inside(path), 20_000 + count))[0] == "renewed"
        assert (inside(path).tokens, inside(path).data) == (20_000 + count, "more.txt")
    model, known = dither.open_model(path), inside(path)
    assert renew(model, better(known, known.tokens))[0] == "kept"
    outcome, note = renew(model, better(known, 90_000, reference_sha256="0" * 64))
    assert outcome == "kept" and "against another original" in note
    os.link(path, tmp_path / "same.gguf")
    outcome, note = renew(model, better(known, 90_000))
    assert outcome == "kept" and "other names lead to the same bytes" in note


def test_an_empty_room_is_filled_and_none_is_no_place(made: Path, tmp_path: Path) -> None:
    plain = Path(dither.quantize(BUNDLED, "Q4_0", tmp_path / "plain.gguf").path)
    assert renew(dither.open_model(plain), better(inside(made / "a.gguf"))) == ("", "")
    folder = Path(dither.quantize(BUNDLED, "gptq", tmp_path / "plain").path)
    assert renew(dither.open_model(folder), better(inside(made / "a-gptq")))[0] == "renewed"
    assert inside(folder).tokens == 20_000
    card = (folder / "README.md").read_text()
    assert re.search(r"^\| measured on \| \S+( k)? tokens of more.txt \|$", card, re.MULTILINE), card


def test_every_moment_of_a_renewal_leaves_a_whole_measurement(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is written in pieces of any length, and the machine stops after each of them."""
    original = (made / "a.gguf").read_bytes()
    known, weights = inside(made / "a.gguf"), tensors(made / "a.gguf")
    new = better(known)
    writes: list[tuple[int, bytes]] = []
    write = native.write_at
    monkeypatch.setattr(native, "write_at", lambda file, data, at: writes.append((at, bytes(data))) or len(data))
    assert renew(dither.open_model(made / "a.gguf"), new)[0] == "renewed"
    monkeypatch.setattr(native, "write_at", write)
    assert (made / "a.gguf").read_bytes() == original  # nothing was written yet
    header = read_header(made / "a.gguf").data_offset
    assert all(at + len(data) < header for at, data in writes)
    whole = [(at + start, data[start : start + 97]) for at, data in writes for start in range(0, len(data), 97)]
    path, seen = tmp_path / "torn.gguf", set()
    bytes_now = bytearray(original)
    for step, (at, data) in enumerate(whole):
        bytes_now[at : at + len(data)] = data
        if step % 7 == 0 or step == len(whole) - 1:
            path.write_bytes(bytes_now)
            seen.add(inside(path).tokens)
            assert inside(path) in (known, read(embedded_text(new), "new"))
            assert tensors(path) == weights
    assert seen == {known.tokens, new.tokens}
    # A renewal that was stopped is followed by another.
    half = bytearray(original)
    for at, data in whole[: len(whole) // 2 + 3]:
        half[at : at + len(data)] = data
    path.write_bytes(half)
    assert renew(dither.open_model(path), better(known, 30_000))[0] == "renewed"
    assert json.loads(str(dither.open_model(path).metadata["dither.measure"].value).strip())["tokens"] == 30_000
