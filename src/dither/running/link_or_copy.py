"""Puts a file into a folder of another program, by a hard link if possible and otherwise by a copy.

LM Studio finds models as `publisher/model/file.gguf` below its models folder.  Ollama wants the file beside its
Modelfile.  A hard link takes no space and stays valid when the first name is deleted; across file systems the bytes
are copied, under a temporary name until they are complete.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dither.errors import OutputError, UsageError
from dither.system.files import replace, replacing, writing
from dither.units import format_bytes


def link_or_copy(source: Path, target: Path) -> str:
    """Makes `source` available as `target`: "linked", "copied", or "kept" if it is there already.

    Raises OutputError if another file has that name, or if it cannot be written.
    """
    with writing(target, "Check the folder."):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            ours, theirs = source.stat(), target.stat()
            alike = (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns) and target.is_file()
            if alike or target.samefile(source):  # a copy of this file, or this file itself
                return "kept"
            raise OutputError(str(target), "is another file", "Move it away, or name another folder.")
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            return _copy(source, target)
    return "linked"


def _copy(source: Path, target: Path) -> str:
    size, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if size > free:
        reason = f"has {format_bytes(free)} free; the file takes {format_bytes(size)}"
        raise OutputError(str(target.parent), reason, "Name a folder on a larger disk.")
    with replacing(target, "Check the folder.") as file:
        shutil.copyfile(source, file.name)  # by name, so that the system copies: its bytes pass no buffer of ours
        shutil.copystat(source, file.name)
    return "copied"


def write_text(text: str, path: Path, mark: str = "") -> None:
    """Writes a small text file.  An existing one is replaced only if it begins with `mark`.

    Without a mark it is never replaced, only kept if it has the same text.  Raises OutputError.
    """
    with writing(path, "Check the folder."):
        if path.exists():
            found = path.read_text(encoding="utf-8", errors="replace")
            if found == text:
                return
            if not (mark and found.startswith(mark)):
                reason = "is there already and says something else"
                raise OutputError(str(path), reason, "Move it away, or name another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text.encode(), "Check the folder.")


def one_name(text: str, thing: str) -> str:
    """Text as the name of one folder, on any system.

    >>> one_name("My Model 7B/v2", "name")
    'My-Model-7B-v2'
    """
    name = re.sub(r"[^\w.+-]+", "-", text).strip("-.")
    if not name:
        raise UsageError(f"{thing} {text!r}", "leaves no name for a folder", "Use letters and digits.")
    return name[:96]
