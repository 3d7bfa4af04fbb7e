"""Answers of a file and of its original, recorded beside the file as `<file>.answers.json`.

Two records, because "does it answer differently?" is two questions:

    answers    both models continue the same prompt, always with the likeliest token.  From the first
               different token on they read different texts, so that what follows shows the taste of a
               difference, not its size
    forced     both models read the same text and predict each next token.  Nothing drifts apart, and the
               KL divergence of every position says where the file would have hesitated or chosen otherwise

The file is a stranger's like any other: it is bounded in every direction, and text is text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dither.errors import FormatError, OutputError, SourceError, UnsupportedError

SCHEMA_VERSION = 1
SUFFIX = ".answers.json"
TOP = 5  # of the likeliest tokens that are kept of each model
MOST_TOKENS = 4096  # of an answer, and of a text
LONGEST_TEXT = 65_536  # characters of a prompt or a text
_LARGEST_FILE = 64 * 2**20  # bytes; a text of 4096 tokens with ten candidates each is under 2 MiB
_MOST = 256  # answers, and texts, of one file
_AGAIN = "Record them again with `dither answers`."

Piece = Annotated[str, Field(max_length=1024)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Side(_Record):
    """What one model wrote, piece by piece as its tokens came."""

    tokens: tuple[Piece, ...] = Field(max_length=MOST_TOKENS)
    seconds: float = Field(ge=0)


class Answer(_Record):
    """Both continuations of a prompt, and the first piece that differs: None where none does."""

    prompt: str = Field(max_length=LONGEST_TEXT)
    original: Side
    quantized: Side
    first_divergence: int | None = Field(default=None, ge=0)


class ForcedToken(_Record):
    """One token of a text, and what both models expected in its place.

    `kl` in nats; None of the first token, which nothing precedes.  The lists are (token, probability).
    """

    text: Piece
    kl: float | None = Field(default=None, ge=0)
    top_original: tuple[tuple[Piece, Share], ...] = Field(default=(), max_length=2 * TOP)
    top_quantized: tuple[tuple[Piece, Share], ...] = Field(default=(), max_length=2 * TOP)
    same_top: bool = True


class Forced(_Record):
    """A text read by both models."""

    text: str = Field(max_length=LONGEST_TEXT)
    tokens: tuple[ForcedToken, ...] = Field(max_length=MOST_TOKENS)


class Recorded(_Record):
    """All that was recorded of one file."""

    schema_version: int = SCHEMA_VERSION
    tool: str = Field(default="", max_length=256)
    file: str = Field(max_length=4096)  # name without its folder
    file_sha256: str = Field(default="", max_length=64)
    reference: str = Field(max_length=4096)
    answers: tuple[Answer, ...] = Field(default=(), max_length=_MOST)
    forced: tuple[Forced, ...] = Field(default=(), max_length=_MOST)
    notes: tuple[Annotated[str, Field(max_length=4096)], ...] = Field(default=(), max_length=_MOST)


def first_divergence(original: Sequence[str], quantized: Sequence[str]) -> int | None:
    """The first piece in which two answers differ; None where they are the same throughout.

    >>> first_divergence(["A", " b"], ["A", " c"]), first_divergence(["A"], ["A", "."])
    (1, 1)
    """
    for place, (one, other) in enumerate(zip(original, quantized, strict=False)):
        if one != other:
            return place
    return None if len(original) == len(quantized) else min(len(original), len(quantized))


def path_for(file: str | Path) -> Path:
    """Where the answers of a file or a folder are kept: beside it.

    >>> path_for("models/a.gguf").name
    'a.gguf.answers.json'
    """
    path = Path(file) if Path(file).name else Path(file).resolve()
    return path.with_name(path.name + SUFFIX)


def load(path: str | Path) -> Recorded:
    """Reads and checks recorded answers.

    Raises SourceError where there are none, FormatError where the file is something else, UnsupportedError
    where a newer version of Dither wrote it.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise SourceError(str(path), "no such file", _AGAIN)
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", _AGAIN) from None
    if len(raw) > _LARGEST_FILE:
        raise FormatError(str(path), "is far too large for recorded answers", _AGAIN)
    return parse(raw, str(path))


def parse(raw: bytes | str, thing: str) -> Recorded:
    """Recorded answers from their JSON; `thing` names it in errors.  Raises as `load` does."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise FormatError(thing, "holds no recorded answers: it is no JSON", _AGAIN) from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(thing, "holds no recorded answers: it has no schema_version", _AGAIN)
    if version > SCHEMA_VERSION:
        reason = f"was written by a newer Dither (schema {version}; this one reads up to {SCHEMA_VERSION})"
        raise UnsupportedError(thing, reason, "Upgrade with: pip install -U dither")
    try:
        return Recorded.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        reason = f"holds no recorded answers: {where}: {first['msg']}"
        raise FormatError(thing, reason, _AGAIN) from None


def save(recorded: Recorded, path: Path) -> None:
    """Writes it under a temporary name, syncs, renames.  Raises OutputError where that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(recorded.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        reason = f"cannot be written ({error.strerror})"
        raise OutputError(str(path), reason, "Pass --no-save to print it alone.") from None


def check_writable(path: Path) -> None:
    """Before the work: the folder is there, and nothing but recorded answers would be replaced.

    Raises OutputError.
    """
    if path.exists() or path.is_symlink():
        try:
            load(path)
        except (SourceError, UnsupportedError) as error:
            raise OutputError(str(path), error.reason, "Move it away, or pass --no-save.") from None
    if not os.access(path.parent, os.W_OK):
        raise OutputError(str(path.parent), "is no folder one may write to", "Pass --no-save.")
