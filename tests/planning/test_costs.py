"""What was measured outlives the run that measured it, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dither.errors import OutputError
from dither.planning.costs import Costs
from dither.progress import Silent


def filled(path: Path) -> Costs:
    costs = Costs(path, probe={"a": "Q3_K", "b": "Q6_K"})
    costs.ratios = {"a": {"Q4_K": 0.25, "Q3_K": 1.0}, "b": {"Q4_K": 0.0}}
    costs.found({"a": 0.0125})
    costs.found({"b": 3e-7})
    return costs


def test_what_is_kept_is_what_was_found(tmp_path: Path) -> None:
    costs = filled(tmp_path / "s.json")
    again = Costs.open(tmp_path / "s.json")
    assert again == costs
    assert again.predicted("a", "Q4_K") == 0.0125 * 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_every_finding_is_on_the_disk_at_once(tmp_path: Path) -> None:
    costs = Costs(tmp_path / "s.json")
    costs.found({"a": 1.0})
    assert Costs.open(tmp_path / "s.json").divergence == {"a": 1.0}
    costs.found({"b": 2.0})
    assert Costs.open(tmp_path / "s.json").divergence == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "spoilt",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "[" * 100_000,
        "{}",
        "\x00\x01",
        '{"version": 2, "probe": {}, "divergence": {}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": NaN}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": -1e-9}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": 1e999}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": "x"}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": null}, "ratios": {}}',
        '{"version": 1, "probe": [], "divergence": {}, "ratios": {}}',
        '{"version": 1, "probe": {}, "divergence": {}, "ratios": {"a": 1}}',
        '{"version": 1, "probe": {}, "divergence": {}}',
        '{"version": 1, "probe": {}, "divergence": {"a": ' + "9" * 1000 + '}, "ratios": {}}',
    ],
)
def test_a_file_that_cannot_be_understood_counts_as_none(tmp_path: Path, spoilt: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(spoilt)
    assert Costs.open(path) == Costs(path)


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_a_file_that_is_lost_is_said_to_be_and_a_missing_one_is_not(tmp_path: Path) -> None:
    """What it held may have taken hours, and is about to take them again."""
    progress = Listening()
    path = filled(tmp_path / "s.json").path
    assert Costs.open(path, progress).divergence and not progress.heard
    assert Costs.open(tmp_path / "none.json", progress) == Costs(tmp_path / "none.json") and not progress.heard
    path.write_bytes(path.read_bytes()[:-7])
    assert Costs.open(path, progress) == Costs(path)
    [said] = progress.heard
    assert str(path) in said and "lost" in said and "measured again" in said


def test_a_torn_file_counts_as_none(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.json").path
    path.write_bytes(path.read_bytes()[:-7])
    assert Costs.open(path) == Costs(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert Costs.open(path) == Costs(path)
    assert Costs.open(tmp_path) == Costs(tmp_path)


def test_a_write_that_is_refused_names_the_file_and_keeps_the_last_one(tmp_path: Path) -> None:
    costs = filled(tmp_path / "s.json")
    (tmp_path / f"s.json.{os.getpid()}.part").mkdir()  # so that it cannot be written
    with pytest.raises(OutputError, match=r"s\.json: cannot be written"):
        costs.found({"c": 1.0})
    assert set(json.loads(costs.path.read_text())["divergence"]) == {"a", "b"}
