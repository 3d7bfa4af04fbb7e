"""What systems do each in their own way, in one place: locks, writing at an offset, syncing, ending processes.

Everything else of this program asks here and imports on any system.  POSIX is what is run and tested; for Windows
these functions hold what its C library offers instead, tested as far as it can be imitated
(tests/system/test_other_systems.py).

Sources: POSIX flock(2), pwrite(2), fdatasync(2); Microsoft's C runtime, `_locking`; CPython's documentation of
`os.kill`, which on Windows ends the process whatever the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_BYTE_OF_LOCKS = 2**31 - 2  # Windows locks ranges of bytes, against reading too: one that no file of ours has
_seeking = threading.Lock()


def lock(file: int) -> None:
    """Takes a file for this process until it is closed.  Raises OSError where another has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    before = os.lseek(file, 0, os.SEEK_CUR)
    os.lseek(file, _BYTE_OF_LOCKS, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    finally:
        os.lseek(file, before, os.SEEK_SET)


def open_folder(folder: Path) -> int:
    """A descriptor that can be locked and stands for a folder; Windows opens none, and gets a file beside it."""
    if fcntl is not None:
        return os.open(folder, os.O_RDONLY)
    return os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Writes all of some bytes at an offset, from any thread."""
    while data:
        written = _write_some(file, data, offset)
        data, offset = data[written:], offset + written


def _write_some(file: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def sync_data(file: int) -> None:
    """A file's bytes to the disk; its times, where that is cheaper, are not waited for."""
    getattr(os, "fdatasync", os.fsync)(file)


def sync_folder(folder: Path) -> None:
    """The names in a folder to the disk, where a system keeps them apart from files."""
    if fcntl is not None:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def bytes_on_disk(path: Path) -> int:
    """What a file takes, holes left out; its length where the system does not say."""
    found = path.stat()
    blocks: int | None = getattr(found, "st_blocks", None)
    return found.st_size if blocks is None else 512 * blocks


def claim(file: int, size: int) -> None:
    """Disk space for so many bytes, now, where the system can promise it; and the length in any case."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    os.truncate(file, size)


def may_live(process: int) -> bool:
    """Whether there may be a process of this number.  Nobody is signaled to find out."""
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def end(process: int, number: signal.Signals) -> None:
    """Signals a process and, where it leads a group of its own, those it started.  One that is gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and os.getpgid(process) == process:
            os.killpg(process, number)
        else:
            os.kill(process, number)


def processors() -> set[int]:
    """Those of this process's affinity mask; none where the system has no such thing (macOS, Windows)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def physical_memory() -> int:
    """Bytes of memory in the machine; 0 where the system does not say."""
    try:
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 0


def most_memory() -> int:
    """The most that this process ever had resident, in bytes; 0 where the system does not say."""
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
