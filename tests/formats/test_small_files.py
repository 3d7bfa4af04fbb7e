"""Small files that are whole or not there, and JSON of strangers that is read or named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dither.errors import FormatError, OutputError, SourceError
from dither.system.files import cache_folder, read_bytes, replace, replacing
from dither.system.json_text import parse_json, parse_object, read_object


def test_until_the_end_the_old_file_stands(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    place.write_bytes(b"old")
    with replacing(place) as file:
        file.write(b"new")
        file.flush()
        assert place.read_bytes() == b"old"
    assert place.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    place = tmp_path / "a.json"
    place.write_bytes(b"old")
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught, replacing(place, "Free some space.") as file:
        file.write(b"half")
        raise error
    if isinstance(error, OSError):
        assert str(caught.value) == f"{place}: cannot be written (No space left on device). Free some space."
    assert place.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [place]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither one under the temporary name, nor the target itself."""
    others = tmp_path / "others"
    others.write_bytes(b"theirs")
    place = tmp_path / "a.json"
    place.symlink_to(others)
    (tmp_path / f"a.json.{os.getpid()}.part").symlink_to(others)
    replace(place, b"ours", "")
    assert (others.read_bytes(), place.read_bytes(), place.is_symlink()) == (b"theirs", b"ours", False)


def test_pipes_and_what_is_too_large_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no regular file"):
        read_bytes(tmp_path / "pipe", 100, "")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # a hole: reading all of it would take terabytes
    with pytest.raises(FormatError, match="more than the 100 bytes"):
        read_bytes(tmp_path / "large", 100, "")
    (tmp_path / "exact").write_bytes(bytes(100))
    assert read_bytes(tmp_path / "exact", 100, "") == bytes(100)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "no readable JSON"),
        (b"[" * 100_000, "maximum recursion"),
        (b"\xff", "not even text"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no readable JSON"),
        (b"[1]", "a JSON list, not an object"),
    ],
)
def test_what_is_no_object_names_its_file(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(FormatError, match=reason) as caught:
        read_object(tmp_path / "x.json", 2**20)
    assert caught.value.thing == str(tmp_path / "x.json")


def test_a_key_that_occurs_twice_is_refused_where_that_matters() -> None:
    assert parse_object('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(FormatError, match="x, key a: occurs twice"):
        parse_object('{"a": 1, "a": 2}', "x", unique=True)
    assert parse_json("[NaN]", "x", finite=False)[0] != 1


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "dither"
    for unset in ("", "relative"):  # the specification says to ignore what is not absolute
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setattr("platform.system", lambda: "Linux")
        assert cache_folder() == tmp_path / ".cache" / "dither"
        monkeypatch.setattr("platform.system", lambda: "Darwin")
        assert cache_folder() == tmp_path / "Library" / "Caches" / "dither"


def test_what_a_killed_process_left_beside_a_file_goes(tmp_path: Path) -> None:
    """That of a living one, which is still writing it, stays; so does what only looks alike."""
    dead = 2**22 + 1  # more than any process's number
    place = tmp_path / "a.json"
    kept = [f"a.json.{os.getppid()}.part", "b.json.part", f"a.json.{dead}.part.txt", "a.json.x.part"]
    for name in (*kept, f"a.json.{dead}.part"):
        (tmp_path / name).write_bytes(b"half")
    replace(place, b"whole", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", *kept])
