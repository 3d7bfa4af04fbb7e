"""The folder of a calibration: what killed runs left half written is known as ours, and goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dither.errors import OutputError
from dither.measuring.calibration_folder import RUN, Folder

HALF_WRITTEN = ("blk.0.npz.4711.part", "tokens.npz.part", "imatrix.gguf.12.part", "evidence.json.12.part")


def left_by_killed_runs(folder: Path) -> Path:
    folder.mkdir()
    for name in HALF_WRITTEN:
        (folder / name).write_bytes(b"half")
    (folder / "blk.0.npz").write_bytes(b"whole")
    return folder


def test_starting_over_takes_it_away(tmp_path: Path) -> None:
    with Folder(left_by_killed_runs(tmp_path / "e"), force=False) as folder:
        assert not folder.continues({"tokens": 1})
        assert list(folder.path.iterdir()) == []


def test_ending_takes_it_away(tmp_path: Path) -> None:
    with Folder(left_by_killed_runs(tmp_path / "e"), force=False) as folder:
        folder.state = {"request": {}, "files": {}, "few": {}}
        folder.save()
        assert (folder.path / RUN).is_file()
        folder.tidy()
        assert [path.name for path in folder.path.iterdir()] == ["blk.0.npz"]


def test_what_a_run_left_that_was_killed_after_its_last_line_goes(tmp_path: Path) -> None:
    """The manifest says that the evidence is whole: states to go on from are gigabytes for nothing."""
    folder = left_by_killed_runs(tmp_path / "e")
    for name in ("evidence.json", RUN, "hidden.2.npy", "back.0.npy"):
        (folder / name).write_bytes(b"{}")
    with pytest.raises(OutputError, match="holds evidence already"):
        Folder(folder, force=False)
    assert sorted(path.name for path in folder.iterdir()) == ["blk.0.npz", "evidence.json"]
