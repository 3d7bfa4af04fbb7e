"""Small files, whole or not at all: how one is replaced, how a stranger's is read, and where ours are cached.

A file that is written in place can be left half done by a full disk or a lost process.  Here the bytes go to a
temporary name beside the target, reach the disk, and take the name in one step; whoever reads finds the old
file or the new one.  (What is large and may be continued has a journal instead: `containers.journal`.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dither.errors import FormatError, OutputError, SourceError
from dither.system import native
from dither.system.mistaken import refuse_pointer


@contextmanager
def writing(path: Path, way_out: str, failed: str = "cannot be written") -> Iterator[None]:
    """What the system refuses within becomes an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(str(path), f"{failed} ({error.strerror})", way_out) from None


@contextmanager
def replacing(
    path: Path, way_out: str = "Free some space and run it again.", *, sync: bool = True
) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends, and leaves nothing behind when it fails.

    Without `sync` a loss of power may cost the content: for what can be made again.  Raises OutputError.
    """
    # The process's number keeps two writers of one file apart: the last to finish wins, and both are whole.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with writing(path, way_out):
            _remove_abandoned(path)
            part.unlink(missing_ok=True)
            with part.open("xb") as file:  # never through a link that somebody left under this name
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def _remove_abandoned(path: Path) -> None:
    """Takes away what processes left beside `path` that were killed while they wrote it."""
    left = re.compile(re.escape(path.name) + r"\.(\d+)\.part")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        match = left.fullmatch(other.name)
        if match and not native.may_live(int(match[1])) and other.is_file():
            other.unlink(missing_ok=True)


def make_folder(path: Path, way_out: str) -> None:
    """A folder at `path`, with those above it, where there is none yet.  Raises OutputError."""
    with writing(path, way_out, "cannot be made a folder"):
        path.mkdir(parents=True, exist_ok=True)


def replace(path: Path, data: bytes, way_out: str) -> None:
    """Writes a whole file as `replacing` does.  Raises OutputError."""
    with replacing(path, way_out) as file:
        file.write(data)


def read_bytes(path: Path, limit: int, way_out: str) -> bytes:
    """A regular file of at most `limit` bytes; nothing larger is read, no pipe or device opened.

    Raises SourceError where there is none, FormatError where it is larger or a mere pointer of git-lfs.
    """
    try:
        if path.exists() and not path.is_file():
            raise SourceError(str(path), "is no regular file", way_out)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, limit) + 1)  # read() allocates what it is asked for before it reads
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", way_out) from None
    if len(raw) > limit:
        raise FormatError(str(path), f"is too large: more than the {limit} bytes that are read", way_out)
    refuse_pointer(raw, str(path))
    return raw


def bytes_of(files: Iterable[str | Path]) -> int:
    """Bytes of these files together; one that is gone by now has none."""
    return sum(path.stat().st_size for path in map(Path, files) if path.is_file())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/dither, or the system's own place for it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the specification says to ignore any other
        base = Path.home() / ("Library/Caches" if platform.system() == "Darwin" else ".cache")
    return base / "dither"
