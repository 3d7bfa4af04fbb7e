"""Files as mapped memory: the operating system pages in what is touched and nothing else.

A model file is larger than memory as often as not.  Mapped read-only, its pages belong to the page
cache: they can be dropped at any moment and never count as memory of our own.  The price is that a
file truncated by somebody else while it is mapped would kill the process on the next touch, so every
access first asks the file for its present size.

Legend: N bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dither.errors import SourceError
from dither.types import Bytes

Buffer: TypeAlias = mmap.mmap | bytes


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
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.size = status.st_size
                self.modified_ns = status.st_mtime_ns
                self.data: Buffer = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ) if self.size else b""
        except FileNotFoundError:
            raise SourceError(str(path), "no such file", "Check the path.") from None
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error})"
            raise SourceError(str(path), reason, "Check the file and its permissions.") from None

    def view(self, offset: int, nbytes: int) -> Bytes:
        """Bytes of the file as a read-only uint8 (N,) array that copies nothing.

        Raises SourceError where the file has been truncated since it was opened.
        """
        present = self.data.size() if isinstance(self.data, mmap.mmap) else self.size
        if present < self.size:
            reason = f"shrank from {self.size} to {present} bytes while it was being read"
            raise SourceError(str(self.path), reason, "Leave the file alone, and start again.")
        return np.frombuffer(self.data, dtype=np.uint8, count=nbytes, offset=offset)


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
