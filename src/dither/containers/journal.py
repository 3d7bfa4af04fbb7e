"""A file that is written in pieces and never seen half done.

Beside the target `model.gguf` a run keeps `model.gguf.part` (the bytes) and `model.gguf.part.journal`
(one JSON line per finished tensor, under a first line that identifies the work, each behind its
CRC-32).  Data reaches the disk before the line that promises it, so whatever kills the run, the journal
never lies; a run of the same work continues after the last line that is whole.  When all is written the
part is synced and renamed.

The journal's lock is held while a run lives, so that two runs cannot write one file.  A `.part` that
has no journal is somebody else's (browsers name their downloads so) and is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import OutputError
from dither.system import native
from dither.system.files import writing
from dither.units import format_bytes

_SYNC_BYTES = 64 * 2**20  # unfinished work that a crash may cost
_SYNC_SECONDS = 5.0
_LONGEST_LINE = 4096  # of a journal's first
CONTINUES = "Mend that and run the same command again: it continues where it can."


class PartFile:
    """The bytes of one output, placed by offset; a context manager that keeps unfinished work.

    `identity` is compared with an earlier run's: equal, and that run's finished tensors are kept in
    `finished` (name → the record given to `finish`); different, and `discarded` says so.
    """

    kind = "regular file"

    def __init__(self, target: Path, size: int, identity: str, pieces: Mapping[str, int] | None = None) -> None:
        """`pieces` are the files that bytes are placed in, by their names below the part: name → size."""
        self.target = target
        self.part, self.journal = unfinished(target)
        self._pieces = {
            name: (self.part / name, own) for name, own in ({"": size} if pieces is None else pieces).items()
        }
        self._files: dict[str, int] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        self.discarded = self._left = False
        self._waiting: list[str] = []
        self._unsynced, self._synced_at = 0, time.monotonic()
        with writing(target, "Choose another name with -o."):
            self._refuse_strangers()
        self._lines = self._lock()
        try:
            with writing(self.part, CONTINUES):
                self._open(size, identity)
        except BaseException:
            self._lines.close()
            if not self.part.exists():
                self.journal.unlink(missing_ok=True)
            raise

    def _is_ours(self, path: Path) -> bool:
        """Whether what stands at one of the three places is of the kind that this run puts there."""
        return path.is_file()

    def _refuse_strangers(self) -> None:
        """Nothing is truncated or replaced that an earlier run did not leave here."""
        way_out = "Move it away or choose another name with -o."
        for path in (self.target, self.part, self.journal):
            if path.is_symlink():  # writing would reach through it, or replace the link itself
                raise OutputError(str(path), "is a symbolic link", "Name the file it leads to.")
            if path.exists() and not self._is_ours(path):
                raise OutputError(str(path), f"exists and is no {self.kind}", way_out)
        if self.part.exists() and not self.journal.exists():
            raise OutputError(str(self.part), "has no journal, so it is not an unfinished run's", way_out)

    def _lock(self) -> Any:
        with writing(self.target, "Choose another place with -o."):
            lines = self.journal.open("a+", encoding="utf-8", errors="replace")
        try:
            native.lock(lines.fileno())
            # A run that ended between opening and locking took its journal away: this lock guards nothing.
            ours = os.fstat(lines.fileno()).st_ino == self.journal.stat().st_ino
        except OSError:
            ours = False
        if not ours:
            lines.close()
            reason = "is being written by another run"
            raise OutputError(str(self.target), reason, "Wait for it or choose another name.")
        return lines

    def _open(self, size: int, identity: str) -> None:
        self._read_journal(identity, size)
        held = sum(native.bytes_on_disk(path) for path, _ in self._pieces.values() if path.exists())
        free = shutil.disk_usage(self.target.parent).free + held
        if size > free:
            reason = f"needs {format_bytes(size)} and {self.target.parent} has {format_bytes(free)} free"
            raise OutputError(str(self.target), reason, "Free some space or choose another place with -o.")
        self._rewrite(identity, size)
        self._open_pieces()

    def _open_pieces(self) -> None:
        if not self.finished:  # nothing is worth keeping, and what stands there may be another recipe's
            self._remove_part()
        try:
            for name, (path, size) in self._pieces.items():
                path.parent.mkdir(exist_ok=True)
                self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
                os.truncate(self._files[name], size)
        except OSError:
            self._close_pieces()
            if not self.finished:
                self._remove_part()
            raise

    def _close_pieces(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_journal(self, identity: str, size: int) -> None:
        self._lines.seek(0)
        lines = self._lines.read().splitlines()
        same = bool(lines) and _parsed(lines[0]) == {"identity": identity, "size": size}
        # Whether the earlier run's pieces have the sizes that are planned.
        if not (same and all(path.is_file() and path.stat().st_size == own for path, own in self._pieces.values())):
            self.discarded = self.part.exists()
            return
        for line in lines[1:]:
            record = _parsed(line)
            if "tensor" not in record:
                break  # the line being written when the run was killed
            self.finished[record.pop("tensor")] = record

    def _rewrite(self, identity: str, size: int) -> None:
        """The first line and all that is finished: a torn last line must not be continued by the next."""
        self._lines.seek(0)
        self._lines.truncate()
        self._lines.write(_line({"identity": identity, "size": size}))
        for name, record in self.finished.items():
            self._lines.write(_line({"tensor": name, **record}))
        self._lines.flush()

    def write_at(self, offset: int, data: bytes | memoryview, piece: str = "") -> None:
        """Writes all of `data`; safe to call from several threads.  Raises OutputError."""
        with writing(self.part, CONTINUES):
            native.write_at(self._files[piece], memoryview(data).cast("B"), offset)

    def finish(self, tensor: str, record: Mapping[str, Any], size: int) -> None:
        """Notes that a tensor's bytes are all written; `record` comes back on resuming."""
        self.finished[tensor] = dict(record)
        self._waiting.append(_line({"tensor": tensor, **record}))
        self._unsynced += size
        if self._unsynced >= _SYNC_BYTES or time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bytes to the disk, then the lines that promise them.  Raises OutputError."""
        lines = "".join(self._waiting)
        self._waiting.clear()
        with writing(self.part, CONTINUES):
            for file in self._files.values():
                native.sync_data(file)
            # Past Python's buffer: what a full disk refuses must not be tried again on closing.
            os.write(self._lines.fileno(), lines.encode())
            os.fsync(self._lines.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def commit(self) -> None:
        """Gives the finished file its name; replaces what stood there.  Raises OutputError."""
        with writing(self.target, CONTINUES):
            for file in self._files.values():
                os.fsync(file)
            self._close_pieces()  # Windows renames no file that is open
            self._publish()
            native.sync_folder(self.target.parent)
        try:
            self.journal.unlink(missing_ok=True)
        except PermissionError:  # Windows takes no file away that is open: when the run lets it go
            self._left = True

    def _publish(self) -> None:
        """The part takes the target's place."""
        self.part.replace(self.target)

    def discard(self) -> None:
        """Takes the unfinished work away: where the source itself is at fault, nothing will continue it."""
        self._waiting.clear()
        self._remove_part()
        self.journal.unlink(missing_ok=True)

    def _remove_part(self) -> None:
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self.part.exists() and self._waiting:
                with contextlib.suppress(OutputError):  # the first error is the one to tell
                    self.sync()
        finally:
            self._close_pieces()
            self._lines.close()
            if self._left:
                self.journal.unlink(missing_ok=True)


def unfinished(target: Path) -> tuple[Path, Path]:
    """Where the bytes of an unfinished `target` and their journal are."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.journal")


def remove_left_over(target: Path) -> None:
    """Takes away the journal of a run that was killed when its result had its name already."""
    part, journal = unfinished(target)
    if target.exists() and not part.exists() and journal.is_file() and not journal.is_symlink():
        with journal.open(encoding="utf-8", errors="replace") as lines:
            ours = "identity" in _parsed(lines.readline(_LONGEST_LINE).rstrip("\n"))
        if ours:
            journal.unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _parsed(line: str) -> dict[str, Any]:
    """What `_line` was given, or nothing where the line is damaged."""
    text = line[9:]
    found: dict[str, Any] = json.loads(text) if line == f"{zlib.crc32(text.encode()):08x} {text}" else {}
    return found
