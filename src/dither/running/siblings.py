"""Other quantizations of a model in the same folder: which file "Q4_K_M" means.

Two GGUFs are of one model if architecture, blocks, width and the list of tokens agree; names do not count, because
people change them.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from dither.containers.presets import preset_of
from dither.errors import DitherError, UsageError
from dither.formats.gguf import Header, read_header
from dither.system.text import shown

_MOST = 64  # files looked at in a folder


def find(current: Path, wanted: str) -> Path:
    """The file that `wanted` names: a path, a file's name beside `current`, or a type.

    Raises UsageError if there is none, if there are several, or if it is another model.
    """
    ours = _identity(read_header(current))
    named = [path for path in (Path(wanted), current.parent / wanted) if path.is_file()]
    if named:
        if _identity(read_header(named[0])) != ours:
            raise UsageError(wanted, "is another model", f"Start a new chat: dither chat {wanted}")
        return named[0]
    beside = _beside(current, ours)
    exact = [path for path, kind in beside.items() if kind.lower() == wanted.lower()]
    part = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9]|_[A-Z0-9])", re.IGNORECASE)
    found = exact or [path for path in beside if part.search(path.name)]
    listed = ", ".join(f"{shown(path.name)} ({kind or 'no type'})" for path, kind in beside.items())
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(wanted, "is the type of several files", f"Name one: {listed}.")
    way_out = f"There are: {listed}." if listed else "There is no other file of this model beside it."
    raise UsageError(shown(wanted), "is neither a file nor a type that is beside this one", way_out)


def _beside(current: Path, ours: tuple[object, ...]) -> dict[Path, str]:
    found = {}
    for path in sorted(current.resolve().parent.glob("*.gguf"))[:_MOST]:
        with suppress(DitherError):
            header = read_header(path)
            if _identity(header) == ours and not path.samefile(current):
                found[path] = preset_of(_value(header, "general.file_type")) or ""
    return found


def _identity(header: Header) -> tuple[object, ...]:
    arch = _value(header, "general.architecture")
    numbers = (_value(header, f"{arch}.{key}") for key in ("block_count", "embedding_length"))
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return (arch, *numbers, None if tokens is None else tuple(tokens.value))


def _value(header: Header, key: str) -> object:
    found = header.metadata.get(key)
    return None if found is None else found.value
