"""Windows, as far as it can be imitated here: no fcntl, no pwrite, no groups of processes, and no file that is open
can be renamed, replaced or taken away.  What this cannot show (the real C runtime, drives, long paths) is untested."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import types
from functools import cache
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest

import dither
from dither.containers.journal import PartFile
from dither.errors import OutputError
from dither.measuring.calibration_folder import Folder
from dither.quantizing.paths import file_stem
from dither.system import native
from dither.types import Model

SOURCES = Path(dither.__file__).parent
ONLY_POSIX = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "syslog"}
CALLS = {
    "fork", "killpg", "getpgid", "setsid", "pwrite", "pread", "fdatasync", "posix_fallocate", "sysconf", "getuid",
    "sched_getaffinity", "mkfifo", "SIGKILL", "SIGHUP", "st_blocks", "kill",
}  # fmt: skip
OF_OTHERS = {"process.kill", "self._process.kill", "worker.kill"}  # subprocess has these everywhere
TELLS = {  # who reads /proc or /sys, each with an answer for systems without
    "capacity/machine.py", "capacity/speed.py", "dashboard/processes.py", "running/memory.py", "running/energy.py",
    "system/cores.py", "system/memory.py", "engines/worker.py",
}  # fmt: skip


@cache
def modules() -> list[tuple[str, ast.Module]]:
    return [(path.relative_to(SOURCES).as_posix(), ast.parse(path.read_text())) for path in SOURCES.rglob("*.py")]


def test_what_only_posix_has_is_behind_one_module() -> None:
    for name, tree in modules():
        if name == "system/native.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not ONLY_POSIX & set(names), f"{name}:{node.lineno} imports {names}"
            if isinstance(node, ast.Attribute) and node.attr in CALLS:
                owner = ast.unparse(node.value)
                assert owner not in ("os", "signal") and node.attr != "st_blocks", f"{name}:{node.lineno}"


def test_only_these_read_what_linux_tells() -> None:
    for name, tree in modules():
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found = [text for text in texts if text.startswith(("/proc/", "/sys/"))]
        assert not found or name in TELLS, f"{name}: {found}"


class Imitation:
    """Byte ranges as Microsoft's `_locking` locks them: one holder each, whoever asks."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: dict[tuple[int, int, int], int] = {}

    def locking(self, file: int, how: int, count: int) -> None:
        found = os.fstat(file)
        place = (found.st_dev, found.st_ino, os.lseek(file, 0, os.SEEK_CUR))
        assert (how, count) == (self.LK_NBLCK, 1)
        holder = self.held.get(place)
        if holder is not None and holder != file and _is_open(holder, found):
            raise PermissionError(13, "Permission denied")
        self.held[place] = file


def _is_open(file: int, as_what: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(file), as_what)
    except OSError:
        return False


def open_here(path: str) -> bool:
    """Whether this process has a file open, maps left out: Python on Windows opens files to be shared by readers."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(entry.readlink()))
        except OSError:
            continue
    return os.path.realpath(path) in names


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Imitation:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are read from Linux's /proc")
    imitation = Imitation()
    real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink")}

    def opened(path: Any, *arguments: Any, **more: Any) -> int:
        if not isinstance(path, int) and "dir_fd" not in more and Path(path).is_dir():  # not shutil's way on POSIX
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return int(real["open"](path, *arguments, **more))

    def refusing(name: str) -> Any:
        def call(*paths: Any, **more: Any) -> Any:
            for path in paths:
                if isinstance(path, (str, Path)) and open_here(os.fspath(path)):
                    raise PermissionError(32, "The process cannot access the file because it is being used", str(path))
            return real[name](*paths, **more)

        return call

    monkeypatch.setattr(native, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(**{
        name: getattr(imitation, name) for name in ("LK_NBLCK", "locking")
    }))  # fmt: skip
    for name in ("pwrite", "fdatasync", "posix_fallocate", "killpg", "sched_getaffinity", "sysconf"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "open", opened)
    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(os, name, refusing(name))
    return imitation


def test_the_imitation_refuses_what_windows_refuses(windows: Imitation, tmp_path: Path) -> None:
    with (tmp_path / "open").open("wb"):
        for attempt in ((tmp_path / "open").unlink, lambda: (tmp_path / "open").replace(tmp_path / "other")):
            with pytest.raises(PermissionError):
                attempt()
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this system makes of the bundled model, a file and a folder."""
    folder = tmp_path_factory.mktemp("right")
    for to in ("Q4_K", "int8"):
        dither.quantize(str(files("dither") / "demo_model"), to, folder / to)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("to", ["Q4_K", "int8"])
def test_a_file_comes_out_the_same(right: Path, windows: Imitation, tmp_path: Path, to: str) -> None:
    dither.quantize(str(files("dither") / "demo_model"), to, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == [to]
    found = [path for path in (tmp_path / to, *tmp_path.rglob("*")) if path.is_file()]
    assert found
    for path in found:
        assert path.read_bytes() == (right / path.relative_to(tmp_path)).read_bytes(), path.name


def test_a_lock_is_one_s_alone(windows: Imitation, tmp_path: Path) -> None:
    with PartFile(tmp_path / "f", 8, "work") as first:
        with pytest.raises(OutputError, match="another run"):
            PartFile(tmp_path / "f", 8, "work")
        first.write_at(4, b"5678")
        first.write_at(0, b"1234")
        first.commit()
    assert (tmp_path / "f").read_bytes() == b"12345678" and not (tmp_path / "f.part.journal").exists()
    assert all(offset == 2**31 - 2 for _, _, offset in windows.held)  # beyond every byte of a journal


def test_a_calibration_s_folder_is_one_s_alone(windows: Imitation, tmp_path: Path) -> None:
    with Folder(tmp_path / "e", force=False), pytest.raises(OutputError, match="another run"):
        Folder(tmp_path / "e", force=False)


def test_nobody_is_ended_by_asking_whether_he_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.kill(pid, 0) ends the process on Windows."""
    signaled = []
    monkeypatch.setattr(os, "kill", lambda *arguments: signaled.append(arguments))
    monkeypatch.setattr(native.os, "name", "nt")
    try:
        assert native.may_live(1)
    finally:
        monkeypatch.undo()
    assert not signaled and native.KILL in (signal.SIGKILL, signal.SIGTERM)


@pytest.mark.slow
def test_every_module_imports_without_what_windows_lacks() -> None:
    script = f"""
import os, pkgutil, sys
import huggingface_hub, numba, uvicorn, xllamacpp
sys.modules.update(torch=None, transformers=None)  # theirs, and slow
sys.modules.update(dict.fromkeys({sorted(ONLY_POSIX - {"pwd", "grp", "resource"})!r}))
for name in ("killpg", "pwrite", "fdatasync", "posix_fallocate", "sched_getaffinity", "getpgid", "setsid"):
    delattr(os, name)
import signal
del signal.SIGKILL, signal.SIGHUP
import dither
for found in pkgutil.walk_packages(dither.__path__, "dither."):
    if not found.name.endswith("__main__"):
        try:
            __import__(found.name)
        except ModuleNotFoundError as error:
            assert error.name.split(".")[0] in ("torch", "transformers"), error
print(sum(name.startswith("dither.") for name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize(
    "origin", ["org/name", "org/name@rev:x", "org/con", "/models/aux.gguf", "hf://o/n:Q4_K_M", "nul"]
)
def test_names_that_nobody_chose_are_names_on_windows(origin: str) -> None:
    stem = file_stem(Model("x", "llama", {}, (), origin, "gguf", (), ""))
    for name in (f"{stem}-Q4_K_M.gguf", f"{stem}-gptq", f"{stem}-Q4_K_M.gguf.part.journal"):
        path = PureWindowsPath(name)
        assert path.name == name and not path.drive and not path.is_reserved()
        assert not set('<>:"|?*\\/') & set(name) and not name.endswith((".", " "))
