"""Sizes are those of files: what `stat` says, headers, tokenizers and configurations included.

References: the file system; the smallest plan that evidence allows, for the size that is named without any.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from range_hub import range_hub
from sources_util import folder_bytes, run_python
from typer.testing import CliRunner

import dither
from conftest import BUNDLED, FEW_TYPES
from dither.cli import app
from dither.errors import UsageError
from dither.planning import plan as planning
from dither.units import parse_bytes


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_a_folder_s_bytes_are_those_of_its_files_but_the_card(checkpoint: Path, tmp_path: Path) -> None:
    result = dither.quantize(checkpoint, "w4a16", tmp_path / "q")
    made = files(tmp_path / "q")
    card = made.pop("README.md")
    assert card and {"config.json", "tokenizer.json", "dither.json", "model.safetensors"} <= made.keys()
    looked = dither.inspect(tmp_path / "q")
    assert result.bytes == sum(made.values()) == looked.bytes
    assert result.mix.tensor_bytes == looked.tensor_bytes < made["model.safetensors"] < result.bytes
    document = result.to_json()
    assert (document["bytes"], document["tensor_bytes"]) == (result.bytes, looked.tensor_bytes)


def test_a_preview_says_what_the_file_will_take(checkpoint: Path, tmp_path: Path) -> None:
    promised = dither.preview(checkpoint, "Q4_K_M")
    written = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "m.gguf")
    size = (tmp_path / "m.gguf").stat().st_size
    assert promised.file_bytes == written.bytes == size == promised.to_json()["bytes"]
    assert promised.tensor_bytes == written.to_json()["tensor_bytes"] < size
    folder = dither.preview(checkpoint, "gptq").file_bytes
    dither.quantize(checkpoint, "gptq", tmp_path / "q")
    taken = sum(files(tmp_path / "q").values())
    assert folder is not None and taken <= folder < 1.02 * taken  # an estimate that never says too little


# -------------------------------------------------------------------------- what cannot be is refused at once


def forbid(*_: Any, **__: Any) -> None:
    raise AssertionError("evidence was learnt before the budget was looked at")


@pytest.mark.parametrize("to", [None, "gptq"])
def test_an_impossible_size_is_refused_before_anything_is_learnt(
    to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "calibrate", forbid)
    monkeypatch.chdir(tmp_path)
    types = FEW_TYPES if to is None else None
    with pytest.raises(UsageError, match=r"a file of 100 KiB: is too small.*at least --size \d+") as caught:
        dither.plan(BUNDLED, size="100KiB", to=to, types=types)
    assert list(tmp_path.iterdir()) == []
    named = int(re.findall(r"--size (\d+)", str(caught.value))[0])
    with pytest.raises(UsageError, match="is too small"):
        dither.plan(BUNDLED, size=named - 9000, to=to, types=types)
    with pytest.raises(AssertionError, match="was learnt"):
        dither.plan(BUNDLED, size=named, to=to, types=types)


@pytest.mark.slow
def test_the_size_that_is_named_can_be_had(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        dither.plan(BUNDLED, size="100KiB", types=FEW_TYPES)
    named = int(re.findall(r"--size (\d+)", str(caught.value))[0])
    found = dither.plan(BUNDLED, size=named, evidence=learnt, solver="nearest", types=FEW_TYPES)
    assert named - 9000 < found.file_bytes <= named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "{m}", "--size", "4"], r"--size 4: has no unit.*Did you mean 4GiB\?"),
        (["plan", "{m}", "--memory", "16"], r"--memory 16: has no unit.*Did you mean 16GiB\?"),
        (["quantize", "{m}", "--size", "4.2"], r"--size 4\.2: has no unit.*Did you mean 4\.2GiB\?"),
        (["ladder", "{m}", "--sizes", "3,4"], r"--size 3: has no unit"),
        (["fit", "{m}", "--memory", "16"], r"Did you mean 16GiB\?"),
        (["fit", "{m}", "--vram", "8"], r"Did you mean 8GiB\?"),
        (["plan", "{m}", "--memory", "3MiB"], r"running takes .* beside them\. Give at least --memory \d+MiB"),
        (["plan", "{m}", "--bpw", "0.1"], r"at least --bpw 1\.\d+"),
        (["ladder", "{m}", "--sizes", "90KiB,4MiB"], r"a file of 90\.0 KiB: is too small"),
    ],
)
def test_a_slip_is_asked_about_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "calibrate", forbid)
    monkeypatch.chdir(tmp_path)
    found = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*(word.format(m=BUNDLED) for word in words), "--json"])
    assert found.exit_code == 2, found.output
    error = json.loads(found.stdout)["error"]
    assert re.search(said, f"{error['thing']}: {error['reason']}. {error['way_out']}")
    assert list(tmp_path.iterdir()) == []


def test_the_memory_that_is_named_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "calibrate", forbid)
    monkeypatch.chdir(tmp_path)
    words = ["plan", str(BUNDLED), "--context", "512", "--memory"]
    error = json.loads(CliRunner().invoke(app, [*words, "3MiB", "--json"]).stdout)["error"]
    named = int(re.findall(r"--memory (\d+)MiB", error["way_out"])[0])
    for memory, enough in ((named, True), (named - 2, False)):
        found = CliRunner().invoke(app, [*words, f"{memory}MiB"])
        assert isinstance(found.exception, AssertionError) == enough  # the next thing would be to learn evidence


def test_numbers_that_are_no_slip() -> None:
    assert parse_bytes("0") == 0 and parse_bytes("16B") == 16 and parse_bytes("70000") == 70_000
    assert parse_bytes(16) == 16  # of a program, which counts in bytes


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan {m} --size 100KiB", "quantize {m} --bpw 0.1", "ladder {m} --sizes 100KiB"])
def test_a_model_on_the_hub_is_not_fetched_for_it(command: str, tmp_path: Path) -> None:
    words = [*command.format(m="someone/a-model").split(), "--json"]
    run = f"print(CliRunner().invoke(app, {words}).stdout)"
    code = f"from typer.testing import CliRunner\nfrom dither.cli import app\n{run}"
    given = folder_bytes(BUNDLED)
    with range_hub("someone/a-model", given) as hub:
        said = run_python(code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert "is too small" in json.loads(said)["error"]["reason"]
    assert hub.sent < sum(map(len, given.values())) / 20


# ------------------------------------------------------------------------------------ budgets are met by files


@pytest.mark.slow
def test_a_folder_within_its_budget_all_files_counted(learnt: Path, tmp_path: Path) -> None:
    size = 4_000_000
    budget = dither.budget(size=size, parameters=dither.open_model(BUNDLED).parameters)
    settings = {"to": "gptq", "evidence": learnt, "solver": "nearest", "validate": False}
    found = dither.quantize_within(BUNDLED, budget, tmp_path / "q", **settings)
    taken = sum(files(tmp_path / "q").values())
    assert 0.97 * size < taken <= size
    assert found.result.bytes <= found.planned.file_bytes <= size
    document = json.loads(json.dumps(found.to_json()))
    assert document["plan"]["bytes"] == document["plan"]["file_bytes"] == found.planned.file_bytes
    assert document["plan"]["tensor_bytes"] == document["tensor_bytes"] < document["bytes"]


@pytest.mark.slow
def test_more_than_there_is_to_choose_is_said(learnt: Path) -> None:
    found = dither.plan(BUNDLED, size="1GiB", evidence=learnt, solver="nearest", types=FEW_TYPES)
    assert any(note.startswith("There is nothing larger to choose: a file of 1.00 GiB") for note in found.notes)
    assert found.plan.budget == 2**30
