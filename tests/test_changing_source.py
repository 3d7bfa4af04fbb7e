"""A model's files change while they are read: an error with the file's name, never SIGBUS, never half of each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dither
from dither.errors import SourceError, UnreadableError
from dither.models.source import open_model


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"12345678")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # a clock may be coarser than this test is fast


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b"another file")
    other.replace(path)


class Changing:
    """Progress that changes a file after so many pieces."""

    def __init__(self, change: Callable[[Path], object], path: Path, after: int) -> None:
        self.change, self.path, self.left = change, path, after

    def note(self, text: str) -> None: ...

    def start(self, total: int, done: int) -> None: ...

    def advance(self, amount: int, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.change(self.path)


@pytest.mark.parametrize("container", ["safetensors", "gguf", "gptq"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 4), "shrank from [0-9]+ to [0-9]+ bytes while it was"),
        (lambda path: os.truncate(path, 0), "shrank from [0-9]+ to 0 bytes"),
        (write_into, "was written to while it was being read"),
    ],
)
def test_what_changes_while_it_is_read_is_refused_by_name(
    own: Path, tmp_path: Path, container: str, change: Callable[[Path], object], said: str
) -> None:
    source, weights = own, own / "model.safetensors"
    if container == "gguf":
        source = weights = Path(dither.convert(own, tmp_path / "source.gguf").result.path)
    elif container == "gptq":
        source = Path(dither.quantize(own, "gptq", tmp_path / "source").path)
        (weights,) = source.glob("*.safetensors")
    target = tmp_path / "made.gguf"
    with pytest.raises(SourceError, match=f"{weights.name}: {said}"):
        dither.quantize(source, "Q4_K_M", target, threads=2, progress=Changing(change, weights, 3))
    assert not list(tmp_path.glob("made.gguf*"))  # half of two models is of no use to a later run


@pytest.mark.parametrize("change", [Path.unlink, replace])
def test_the_old_file_is_read_to_its_end_where_another_takes_its_name(
    own: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    whole = dither.quantize(own, "Q4_K_M", tmp_path / "whole.gguf")
    changing = Changing(change, own / "model.safetensors", 3)
    result = dither.quantize(own, "Q4_K_M", tmp_path / "made.gguf", threads=2, progress=changing)
    assert Path(result.path).read_bytes() == Path(whole.path).read_bytes()


@pytest.mark.slow
def test_a_packed_matrix_that_shrinks_while_it_is_mapped_kills_nobody(own: Path, tmp_path: Path) -> None:
    """A process of its own: were its mapped pages touched, it would end with SIGBUS."""
    source = Path(dither.quantize(own, "gptq", tmp_path / "source").path)
    (weights,) = source.glob("*.safetensors")
    script = "import os, sys; from dither.models.source import open_model; model = open_model(sys.argv[1]);"
    script += "os.truncate(sys.argv[2], 4096); model.tensors[-1].read(0, 1)"
    process = subprocess.run([sys.executable, "-c", script, source, weights], capture_output=True, text=True)
    assert process.returncode not in (-signal.SIGBUS, -signal.SIGSEGV)
    assert "SourceError" in process.stderr and "shrank" in process.stderr


def test_a_disk_that_goes_away_costs_nothing_that_was_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO of the first read behind the middle, as of a network's folder: the same command goes on where it stopped."""
    read, calls = os.preadv, []

    def failing(*given: object) -> int:
        calls.append(1)
        if len(calls) > 12:
            raise OSError(5, "Input/output error")
        return read(*given)  # type: ignore[arg-type]

    target = tmp_path / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(UnreadableError, match=r"safetensors: cannot be read any more \(Input/output"):
            dither.quantize(checkpoint, "Q4_K_M", target, threads=1)
    result = dither.quantize(checkpoint, "Q4_K_M", target)
    assert result.resumed > 0
    whole = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "whole.gguf")
    assert target.read_bytes() == Path(whole.path).read_bytes()


def test_rows_are_read_and_not_mapped(own: Path) -> None:
    """What was read stays as it was, whatever becomes of the file."""
    tensor = open_model(own).tensors[0]
    before = tensor.read(0, 4)
    kept = before.copy()
    os.truncate(own / "model.safetensors", 0)
    assert (before == kept).all()
