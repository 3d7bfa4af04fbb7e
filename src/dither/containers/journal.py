"""A file that is written in pieces and never seen half done.

Beside the target `model.gguf` a run keeps `model.gguf.part` (the bytes) and `model.gguf.part.journal`
(one JSON line per finished tensor, under a first line that identifies the work).  Data reaches the
disk before the line that promises it, so whatever kills the run, the journal never lies; a run of
the same work continues after the last line.  When all is written the part is synced and renamed.

The journal's lock is held while a run lives, so that two runs cannot write one file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dither.errors import OutputError
from dither.units import format_bytes

_SYNC_BYTES = 64 * 2**20  # unfinished work that a crash may cost
_SYNC_SECONDS = 5.0


_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter


class PartFile:
    """The bytes of one output, placed by offset; a context manager that keeps unfinished work.

    `identity` is compared with an earlier run's: equal, and that run's finished tensors are kept in
    `finished` (name → the record given to `finish`); different, and `discarded` says so.
    """

    def __init__(self, target: Path, size: int, identity: str) -> None:
        self.target = target
        self.part = target.with_name(target.name + ".part")
        self.journal = target.with_name(target.name + ".part.journal")
        self.finished: dict[str, dict[str, Any]] = {}
        self.discarded = False
        self._waiting: list[str] = []
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._lines = self._lock()
        try:
            self._open(size, identity)
        except BaseException as error:
            self._lines.close()
            if not self.part.exists():
                self.journal.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._unwritable(self.part, error) from None
            raise

    @staticmethod
    def _unwritable(path: Path, error: OSError) -> OutputError:
        return OutputError(
            str(path),
            f"cannot be written ({error.strerror})",
            "Mend that and run the same command again: finished tensors are kept.",
        )

    def _lock(self) -> Any:
        try:
            lines = self.journal.open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                str(self.target), f"cannot be written ({error.strerror})", "Choose another place with -o."
            ) from None
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lines.close()
            raise OutputError(
                str(self.target), "is being written by another run", "Wait for it or choose another name."
            ) from None
        return lines

    def _open(self, size: int, identity: str) -> None:
        kept = self._read_journal(identity, size)
        held = self.part.stat().st_blocks * 512 if self.part.exists() else 0
        free = shutil.disk_usage(self.target.parent).free + held
        if size > free:
            raise OutputError(
                str(self.target),
                f"needs {format_bytes(size)} and {self.target.parent} has {format_bytes(free)} free",
                "Free some space or choose another place with -o.",
            )
        if not kept:
            self._lines.seek(0)
            self._lines.truncate()
            self._lines.write(json.dumps({"identity": identity, "size": size}) + "\n")
            self._lines.flush()
        flags = os.O_RDWR | os.O_CREAT | (0 if kept else os.O_TRUNC)
        self._file = os.open(self.part, flags, 0o666)
        try:
            os.truncate(self._file, size)
        except OSError:
            os.close(self._file)
            self.part.unlink()
            raise

    def _read_journal(self, identity: str, size: int) -> bool:
        self._lines.seek(0)
        lines = self._lines.read().splitlines()
        if not lines:
            return False
        try:
            same = json.loads(lines[0]) == {"identity": identity, "size": size} and self.part.exists()
        except ValueError:
            same = False
        if not same:
            self.discarded = self.part.exists()
            return False
        for line in lines[1:]:
            try:
                record = json.loads(line)
            except ValueError:
                break  # the line being written when the run was killed
            self.finished[record.pop("tensor")] = record
        self._rewrite(lines[0])
        return True

    def _rewrite(self, first: str) -> None:
        """Drops a torn last line, so that later lines do not continue it."""
        self._lines.seek(0)
        self._lines.truncate()
        self._lines.write(first + "\n")
        for name, record in self.finished.items():
            self._lines.write(json.dumps({"tensor": name, **record}) + "\n")
        self._lines.flush()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes all of `data`; safe to call from several threads.  Raises OutputError."""
        view = memoryview(data).cast("B")
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._unwritable(self.part, error) from None

    def finish(self, tensor: str, record: Mapping[str, Any], size: int) -> None:
        """Notes that a tensor's bytes are all written; `record` comes back on resuming."""
        self.finished[tensor] = dict(record)
        self._waiting.append(json.dumps({"tensor": tensor, **record}))
        self._unsynced += size
        if self._unsynced >= _SYNC_BYTES or time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        _sync_data(self._file)
        for line in self._waiting:
            self._lines.write(line + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._waiting.clear()
        self._unsynced, self._synced_at = 0, time.monotonic()

    def commit(self) -> None:
        """Gives the finished file its name; replaces what stood there."""
        os.fsync(self._file)
        self.part.replace(self.target)
        folder = os.open(self.target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self.journal.unlink()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.part.exists() and self._waiting:
            self.sync()
        os.close(self._file)
        self._lines.close()
