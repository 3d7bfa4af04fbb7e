"""The measurement that a file carries, renewed by a better one.

A file measured while it was made carries that measurement: in a GGUF as a string with room to spare, in a folder in
its dither.json and on its card.  A later one takes its place where it is against the same original and on more
tokens; a thinner one only where somebody insists.

A GGUF's weights stand behind its header, so that nothing in it may move: the text is overwritten where it stands.
Whatever stops that must leave a whole measurement behind.  The new one is written into the half of the room that is
free and reaches the disk, then the old one is blanked; `read` finds whichever is whole.  The string's length never
changes, so that every engine can load the file at every moment.
"""

from __future__ import annotations

import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from dither.containers.card import renewed_card
from dither.containers.provenance import MEASUREMENT
from dither.errors import DitherError, FormatError
from dither.formats.ggml import ValueType
from dither.formats.gguf import packed_text, read_header
from dither.measuring import schema
from dither.measuring.schema import Measurement
from dither.models.checkpoint import ABOUT
from dither.system import native
from dither.system.files import read_bytes, replace, writing
from dither.system.json_text import parse_json
from dither.types import Model
from dither.units import format_count

Outcome = Literal["", "renewed", "kept"]
_INSIST = "--replace-proof puts this one in its place"
_LARGEST = 2**26  # bytes of a folder's dither.json
_AGAIN = "Measure it with --no-save."


def read(text: str, thing: str) -> Measurement:
    """A measurement from a file's metadata.  Where its renewal was interrupted, a half of the room holds a whole one.

    Raises as `schema.parse` does.
    """
    try:
        return schema.parse(text, thing)
    except FormatError:
        raw = text.encode("utf-8", "surrogateescape")
        found = []
        for half in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            with suppress(DitherError):
                found.append(schema.parse(half.decode("utf-8", "replace").strip(), thing))
        if not found:
            raise
        return max(found, key=lambda one: one.tokens)


def embedded_text(found: Measurement) -> str:
    """What a file carries of its measurement; a value per block or sequence would take too much room.

    How long it took stands in the JSON file alone: the same work shall give the same bytes, however it went.
    """
    lists: dict[str, Any] = {"drift": (), "sequence_kl": (), "sequence_tokens": (), "notes": ()}
    update = {"file_sha256": "", "proof": "", "seconds": 0.0, **lists}
    return json.dumps(json.loads(found.model_copy(update=update).model_dump_json()))


def carries(model: Model) -> bool:
    """Whether a file has a place for a measurement inside it."""
    path = Path(model.origin)
    return path.exists() and (MEASUREMENT in model.metadata or (path / ABOUT).is_file())


def renew(model: Model, found: Measurement, insist: bool = False) -> tuple[Outcome, str]:
    """Puts a measurement of `model` into its file, where that carries one that this one is better than; what was
    done, and a note on it.  Nothing is touched where nothing is carried.  Raises OutputError.
    """
    path, field = Path(model.origin), model.metadata.get(MEASUREMENT)
    if not carries(model):
        return "", ""
    text = "{}" if field is None else str(field.value)
    known, why_not = _known(text, str(path)), ""
    if known is not None and not insist:
        why_not = _why_not(known, found)
    if not why_not and path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
        why_not = "other names lead to the same bytes"
    if not why_not and not (_into_folder(path, found) if path.is_dir() else _into_gguf(path, text, found)):
        why_not = "the header has no room for this one"
    if why_not:
        return "kept", f"The measurement inside {path.name} is kept: {why_not}."
    before = f", on {format_count(found.tokens)} tokens instead of {format_count(known.tokens)}" if known else ""
    return "renewed", f"The measurement inside {path.name} is this one now{before}."


def _known(text: str, thing: str) -> Measurement | None:
    with suppress(DitherError):
        return read(text, thing)
    return None  # an empty room, or what nobody can read


def _why_not(known: Measurement, found: Measurement) -> str:
    if known.reference_sha256 != found.reference_sha256:
        return f"it is against another original, {known.reference}; {_INSIST}"
    if known.metric_version < found.metric_version or known.tokens < found.tokens:
        return ""
    less = "as many" if known.tokens == found.tokens else "more"
    return f"it is on {less} tokens ({format_count(known.tokens)}); {_INSIST}"


def _into_gguf(path: Path, text: str, found: Measurement) -> bool:
    """False where there is no room, or no place that is surely the text's."""
    room, new = text.encode("utf-8", "surrogateescape"), embedded_text(found).encode()
    halves = (0, len(room) // 2), (len(room) // 2, len(room))
    kept = _half_to_keep(room)
    if kept is None or len(new) > len(room) // 2:
        return False
    free, old = halves[1 - kept], halves[kept]
    with writing(path, _AGAIN), path.open("r+b") as file:
        with mmap.mmap(file.fileno(), read_header(path).data_offset, access=mmap.ACCESS_READ) as header:
            before = packed_text(MEASUREMENT) + ValueType.STRING.to_bytes(4, "little") + len(room).to_bytes(8, "little")
            at = header.find(before + room)
        if at < 0:
            return False
        at += len(before)
        _put(file.fileno(), at + free[0], new.ljust(free[1] - free[0]))
        _put(file.fileno(), at + old[0], b" " * (old[1] - old[0]))
    return True


def _half_to_keep(room: bytes) -> int | None:
    """The half, 0 or 1, in which the measurement stands until another is written; None where it takes both."""
    halves = room[: len(room) // 2], room[len(room) // 2 :]
    if not halves[1].strip():
        return 0
    if not halves[0].strip():
        return 1
    return None if _is_whole(room) else int(_is_whole(halves[1]))  # of an interrupted renewal


def _is_whole(raw: bytes) -> bool:
    with suppress(DitherError):
        schema.parse(raw.decode("utf-8", "replace").strip(), MEASUREMENT)
        return True
    return False


def _put(file: int, at: int, data: bytes) -> None:
    """All of it, on the disk."""
    native.write_at(file, memoryview(data), at)
    os.fsync(file)


def _into_folder(path: Path, found: Measurement) -> bool:
    """Small files take the place of the old ones whole."""
    about = parse_json(read_bytes(path / ABOUT, _LARGEST, _AGAIN), str(path / ABOUT))
    if not isinstance(about, dict):
        return False
    about[MEASUREMENT.rpartition(".")[2]] = json.loads(embedded_text(found))
    replace(path / ABOUT, (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode(), _AGAIN)
    card = path / "README.md"
    if card.is_file():
        with suppress(UnicodeDecodeError):
            text = read_bytes(card, _LARGEST, _AGAIN).decode()
            replace(card, renewed_card(text, found).encode(), _AGAIN)
    return True
