"""Nothing is lost: kill −9 at any moment leaves no half file, and the next run continues."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dither
from dither.containers.journal import PartFile
from dither.errors import OutputError
from killed import killed, killed_at_step

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not

QUANTIZE = """
import dither.containers.journal as journal
journal._SYNC_BYTES = 0  # every tensor is promised at once, so that each kill finds another state
from dither import quantize
quantize(sys.argv[2], "Q4_K_M", sys.argv[3], threads=2, progress=Killer())
"""


@pytest.mark.parametrize("moment", [1, 2, 9, 20])
def test_a_killed_run_resumes_to_identical_bytes(checkpoint: Path, tmp_path: Path, moment: int) -> None:
    whole = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "whole.gguf")
    target = tmp_path / "killed.gguf"
    killed(QUANTIZE, moment, checkpoint, target)
    assert not target.exists()
    result = dither.quantize(checkpoint, "Q4_K_M", target)
    assert result.resumed >= moment - 1  # the kill comes before the last advance's tensor is noted
    assert target.read_bytes() == Path(whole.path).read_bytes()
    assert result.relative_error == whole.relative_error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]


def test_another_recipe_does_not_continue_the_first(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    killed(QUANTIZE, 9, checkpoint, target)
    result = dither.quantize(checkpoint, "Q5_K_M", target)
    assert result.resumed == 0
    fresh = dither.quantize(checkpoint, "Q5_K_M", tmp_path / "fresh.gguf")
    assert target.read_bytes() == Path(fresh.path).read_bytes()


def test_a_torn_last_line_of_the_journal_is_ignored(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with pytest.raises(KeyboardInterrupt), PartFile(target, 8, "work") as file:
        file.write_at(0, b"abcd")
        file.finish("first", {"n": 1}, 4)
        file.sync()
        raise KeyboardInterrupt
    with file.journal.open("a") as journal:
        journal.write('00000000 {"tensor": "second", "n"')
    with PartFile(target, 8, "work") as file:
        assert file.finished == {"first": {"n": 1}}
        file.write_at(4, b"efgh")
        file.finish("second", {"n": 2}, 4)
        file.sync()
        lines = file.journal.read_text().splitlines()
        assert [json.loads(line[9:]).get("tensor") for line in lines] == [None, "first", "second"]
        file.commit()
    assert target.read_bytes() == b"abcdefgh"


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        PartFile(tmp_path / "file.bin", 4, "work"),
        pytest.raises(OutputError, match="another run"),
        PartFile(tmp_path / "file.bin", 4, "work"),
    ):
        pass


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free"):
        PartFile(tmp_path / "file.bin", 3 * shutil.disk_usage(tmp_path).free, "work")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_names_the_file_and_keeps_the_work(checkpoint: Path, tmp_path: Path) -> None:
    """The kernel refuses to let the file grow past a limit, as a full disk would."""
    dither.quantize(checkpoint, "Q8_0", tmp_path / "before.gguf")  # kernels are cached: their files have no room below
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limited += "import sys; from dither.cli import main; sys.argv[0] = 'dither'; main()"
    process = subprocess.run(
        [sys.executable, "-c", limited, "quantize", str(checkpoint), "--to", "Q8_0", "-o", "model.gguf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "cannot be written" in process.stderr
    assert not (tmp_path / "model.gguf").exists()


def stopped_halfway(target: Path, identity: str = "work") -> PartFile:
    """An interrupted run that finished its first tensor of two."""
    with pytest.raises(KeyboardInterrupt), PartFile(target, 8, identity) as file:
        file.write_at(0, b"abcdXXXX")
        file.finish("first", {"n": 1}, 4)
        raise KeyboardInterrupt
    return file


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda journal: b"", []),
        (lambda journal: bytes(range(256)) * 4, []),
        (lambda journal: journal.splitlines()[0] + b"\n[1, 2]\n", []),
        (lambda journal: journal.replace(b'"first"', b'"other"'), []),
        (lambda journal: journal.replace(b'"n": 1', b'"n": 2'), []),
        (lambda journal: journal[:-4], []),
        (lambda journal: journal + b"\xff\xfe", ["first"]),
        (lambda journal: journal, ["first"]),
    ],
)
def test_a_damaged_journal_promises_only_what_is_whole(tmp_path: Path, damage: object, kept: list) -> None:
    target = tmp_path / "file.bin"
    file = stopped_halfway(target)
    file.journal.write_bytes(damage(file.journal.read_bytes()))  # type: ignore[operator]
    with PartFile(target, 8, "work") as file:
        assert list(file.finished) == kept
        assert file.part.read_bytes() == (b"abcdXXXX" if kept else bytes(8))  # no old byte stays in a gap


def test_a_part_of_another_size_is_not_continued(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    file = stopped_halfway(target)
    file.part.write_bytes(b"ab")
    with PartFile(target, 8, "work") as file:
        assert not file.finished
        assert file.discarded


@pytest.mark.parametrize("ending", ["", ".part", ".part.journal"])
def test_what_is_no_regular_file_is_left_alone(tmp_path: Path, ending: str) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    place = tmp_path / f"file.bin{ending}"
    place.symlink_to(precious)
    with pytest.raises(OutputError, match="symbolic link"):
        PartFile(tmp_path / "file.bin", 8, "work")
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(OutputError, match="no regular file"):
        PartFile(tmp_path / "file.bin", 8, "work")
    assert place.is_fifo()
    assert precious.read_bytes() == b"kept"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_part_without_a_journal_is_somebody_elses(tmp_path: Path) -> None:
    download = tmp_path / "file.bin.part"
    download.write_bytes(b"half a download")
    with pytest.raises(OutputError, match="no journal"):
        PartFile(tmp_path / "file.bin", 8, "work")
    assert download.read_bytes() == b"half a download"
    assert list(tmp_path.iterdir()) == [download]


def test_a_lock_on_a_journal_that_was_taken_away_guards_nothing(tmp_path: Path) -> None:
    """Between opening and locking, the run that held the lock may finish and delete the journal."""
    import fcntl

    real, target = fcntl.flock, tmp_path / "file.bin"

    def late(file: object, how: int) -> None:
        (tmp_path / "file.bin.part.journal").unlink()
        real(file, how)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(OutputError, match="another run"):
            PartFile(target, 8, "work")
    assert not list(tmp_path.iterdir())


def steps_of(model: Path, to: str, target: Path, force: bool) -> list[str]:
    """What a run does to names on the disk, in order."""
    seen: list[str] = []

    def hook(event: str, given: object) -> None:
        if event in NAMES and watching and "__pycache__" not in str(given):  # kept kernels are no step
            seen.append(event)

    watching = True
    sys.addaudithook(hook)  # it cannot be taken away, but it may stop to look
    dither.quantize(model, to, target, force=force)
    watching = False
    return seen


@pytest.mark.parametrize(("to", "name", "old"), [("Q8_0", "m.gguf", None), ("fp8", "m", None), ("fp8", "m", "nf4")])
def test_killed_at_any_change_of_a_name_the_old_or_the_new_stands_whole(
    checkpoint: Path, tmp_path: Path, to: str, name: str, old: str | None
) -> None:
    """Before a rename, and before one of the last steps: the same command must end with nothing but its result."""
    whole = tmp_path / "whole"
    whole.mkdir()
    if old:
        dither.quantize(checkpoint, old, whole / name)
    steps = steps_of(checkpoint, to, whole / name, force=bool(old))
    renames = [number for number, event in enumerate(steps, 1) if event == "os.rename"]
    wanted = contents(whole)
    for step in sorted({*renames[-2:], len(steps) - 1, len(steps)}):
        folder = tmp_path / str(step)
        folder.mkdir()
        if old:
            dither.quantize(checkpoint, old, folder / name)
        before = contents(folder)
        killed_at_step(NAMES, step, STEPWISE, checkpoint, to, folder / name, bool(old))
        now = {path: data for path, data in contents(folder).items() if path.split("/")[0] == name}
        aside = {path for path in contents(folder) if path.startswith(f"{name}.replaced/")}
        assert now in (wanted, before) or (len(aside) == len(before) and not now)
        with contextlib.suppress(OutputError):  # "exists already", where all was done
            dither.quantize(checkpoint, to, folder / name, force=bool(old))
        assert contents(folder) == wanted


NAMES = ("os.rename", "os.remove", "os.rmdir")
STEPWISE = """
import dither
dither.quantize(sys.argv[2], sys.argv[3], sys.argv[4], force=sys.argv[5] == "True")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
