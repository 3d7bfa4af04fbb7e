"""Nothing is lost: kill −9 at any moment leaves no half file, and the next run continues."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dither
from dither.containers.journal import PartFile
from dither.errors import OutputError

KILLED_AT = """
import os, signal, sys
import dither.containers.journal as journal
journal._SYNC_BYTES = 0  # every tensor is promised at once, so that each kill finds another state
from dither import quantize
class Killer:
    left = int(sys.argv[3])
    def note(self, text): pass
    def start(self, total, done): pass
    def advance(self, amount, what):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
quantize(sys.argv[1], "Q4_K_M", sys.argv[2], threads=2, progress=Killer())
"""


@pytest.mark.parametrize("moment", [1, 2, 9, 20])
def test_a_killed_run_resumes_to_identical_bytes(checkpoint: Path, tmp_path: Path, moment: int) -> None:
    whole = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "whole.gguf")
    target = tmp_path / "killed.gguf"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(checkpoint), str(target), str(moment)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    result = dither.quantize(checkpoint, "Q4_K_M", target)
    assert result.resumed >= moment - 1  # the kill comes before the last advance's tensor is noted
    assert target.read_bytes() == Path(whole.path).read_bytes()
    assert result.relative_error == whole.relative_error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]


def test_another_recipe_does_not_continue_the_first(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    subprocess.run([sys.executable, "-c", KILLED_AT, str(checkpoint), str(target), "9"], check=False)
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
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limited += "import sys; from dither.cli import main; sys.argv[0] = 'dither'; main()"
    process = subprocess.run(
        [sys.executable, "-c", limited, "quantize", str(checkpoint), "--to", "Q8_0", "-o", "model.gguf"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "cannot be written" in process.stderr
    assert not (tmp_path / "model.gguf").exists()
