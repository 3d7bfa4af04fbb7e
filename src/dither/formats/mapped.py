"""Model files: headers as mapped memory, weights by reading.

A model file is larger than memory as often as not, so nothing here reads one whole.  Headers, and arrays too large to
keep, are mapped read-only: their pages belong to the page cache, can be dropped at any moment and never count as
memory of our own.  Everything else is read into buffers.  A file that somebody truncates, or a disk that goes away,
then is an error with the file's name; touching a mapped page of it would kill the process (SIGBUS).

A file that is replaced by renaming another over it stays readable as it was.  One that is written into is not
the model that was opened, and half of the old with half of the new is no model at all: every access
compares size and time of modification with those at opening, reading even afterwards.

Legend: N bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dither.errors import SourceError, UnreadableError
from dither.types import Bytes

Buffer: TypeAlias = mmap.mmap | bytes


KEPT_BYTES = 2**27  # of packed arrays that are in use
_kept: OrderedDict[tuple[int, int, int], Bytes] = OrderedDict()
_lock = threading.RLock()


class MappedFile:
    """A regular file, mapped read-only for as long as this object lives.

    `data` is the whole content (empty `bytes` for an empty file, which cannot be mapped).
    Raises SourceError where the path is missing, unreadable or no regular file: opening a pipe or a
    device would block or never end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise SourceError(str(path), "is not a regular file", "Name a model file.")
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, _close, self._file, id(self))
            status = os.fstat(self._file)
            self.size = status.st_size
            self.modified_ns = status.st_mtime_ns
            self.data: Buffer = mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ) if self.size else b""
        except FileNotFoundError:
            raise SourceError(str(path), "no such file", "Check the path.") from None
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error})"
            raise SourceError(str(path), reason, "Check the file and its permissions.") from None

    def view(self, offset: int, nbytes: int) -> Bytes:
        """Bytes of the file as a read-only uint8 (N,) array, for one that is used in places, again and again.

        The last few are kept, `KEPT_BYTES` of all files together.  A larger one is a piece of mapped memory; whoever
        touches it calls `check` afterwards.  Raises as `read` does.
        """
        if nbytes > KEPT_BYTES:
            self.check()
            return np.frombuffer(self.data, dtype=np.uint8, count=nbytes, offset=offset)
        with _lock:
            key = (id(self), offset, nbytes)
            found = _kept.pop(key, None)
            if found is None:
                while _kept and sum(raw_N.nbytes for raw_N in list(_kept.values())) + nbytes > KEPT_BYTES:
                    _kept.popitem(last=False)
                raw_N = self.read(offset, nbytes)
                raw_N.flags.writeable = False
                found = raw_N
            _kept[key] = found
        self.check()
        return found

    def read(self, offset: int, nbytes: int) -> Bytes:
        """Bytes of the file as a new uint8 (N,) array.

        Raises SourceError where the file has changed since it was opened, UnreadableError where the system
        cannot read it now.
        """
        raw_N, done = np.empty(nbytes, np.uint8), 0
        try:
            while done < nbytes and (count := os.preadv(self._file, [raw_N.data[done:]], offset + done)):
                done += count
        except OSError as error:
            reason, way_out = f"cannot be read any more ({error.strerror})", "Check the disk it is on."
            raise UnreadableError(str(self.path), reason, way_out) from None
        self.check()
        return raw_N

    def check(self) -> None:
        """Raises SourceError where the file is not the one that was opened any more."""
        try:
            now = os.fstat(self._file)
        except OSError as error:  # a network's file that its server does not know any more
            reason, way_out = f"cannot be read any more ({error.strerror})", "Check the disk it is on."
            raise UnreadableError(str(self.path), reason, way_out) from None
        way_out = "Leave the file alone, and start again."
        if now.st_size < self.size:
            reason = f"shrank from {self.size} to {now.st_size} bytes while it was being read"
            raise SourceError(str(self.path), reason, way_out)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise SourceError(str(self.path), "was written to while it was being read", way_out)


def _close(file: int, number: int) -> None:
    os.close(file)
    with _lock:
        for key in [key for key in _kept if key[0] == number]:
            del _kept[key]


def fingerprint(parts: Iterable[tuple[MappedFile, int]], others: Iterable[Path] = ()) -> str:
    """sha256 (hex) that changes when a model does, without reading its weights.

    Covers, for each mapped file, its first `header_bytes`, size and time of modification; for the
    others their names, sizes and times.
    """
    digest = hashlib.sha256()
    for file, header_bytes in parts:
        digest.update(f"{file.path.name}\0{file.size}\0{file.modified_ns}\0{header_bytes}\0".encode())
        digest.update(file.data[:header_bytes])
    for path in others:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
