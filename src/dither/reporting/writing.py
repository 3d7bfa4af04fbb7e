"""Writing a page or a card: under a temporary name, synced, renamed; files of other programs are not replaced.

A file that carries Dither's mark may be replaced, since it can be made again; anything else stays unless
it is forced, and the models that are shown stay in any case.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dither.errors import OutputError, UsageError
from dither.reporting.document import Document
from dither.system.files import replace

_LOOKED_AT = 64 * 2**20  # bytes; the mark of a page stands behind its style


def check(path: Path, mark: str, document: Document, force: bool) -> None:
    """Raises UsageError or OutputError where `path` is not to be written."""
    shown = [run.path for run in document.runs] + [document.reference and document.reference.path]
    if any(other and path.absolute() == Path(other) for other in shown):
        raise UsageError(str(path), "is one of the files that are shown", "Choose another name.")
    if path.is_dir():
        raise OutputError(str(path), "is a folder", "Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(str(path.parent), "is no folder", "Make it first, or choose another place.")
    if path.exists() and not force and not _holds(path, mark):
        raise OutputError(str(path), "exists and was not written by Dither", "Choose another name, or pass --force.")


def _holds(path: Path, mark: str) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return mark.encode() in file.read(_LOOKED_AT)
    return False


def write(path: Path, data: bytes) -> None:
    """Raises OutputError where the disk refuses."""
    replace(path, data, "Choose another place.")
