"""What is kept beside a model: one JSON object in a file of its own, and how such a file is read and written.

    model.gguf.measure.json     a measurement
    model.gguf.bench.json       a benchmark
    model.gguf.answers.json     recorded answers

Each carries a `schema_version`; what a newer Dither wrote is refused rather than half understood.  The files
are anybody's: sizes are held against a limit before anything is read, nothing but a regular file is opened,
and NaN is no number.  Writing goes to a temporary name, is synced and renamed, and replaces only its like.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from dither.errors import FormatError, OutputError, SourceError, UnsupportedError

Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Sidecar(Generic[Record]):
    """One kind of record; its methods are what the module of that kind offers."""

    model: type[Record]
    suffix: str  # ".measure.json"
    version: int  # of the schema
    noun: str  # "a measurement"
    refusal: str  # "is no measurement"
    largest: int  # bytes that are read
    again: str  # the way out: how to make it anew

    def path_for(self, file: str | Path) -> Path:
        """Where the record of a file or a folder is kept: beside it."""
        path = Path(file) if Path(file).name else Path(file).resolve()
        return path.with_name(path.name + self.suffix)

    def load(self, path: str | Path) -> Record:
        """Reads and checks one.

        Raises SourceError where there is none, FormatError where it is something else, UnsupportedError
        where a newer version of Dither wrote it.
        """
        path = Path(path)
        try:
            if path.exists() and not path.is_file():
                raise SourceError(str(path), "is no regular file", self.again)
            with path.open("rb") as file:
                raw = file.read(self.largest + 1)
        except OSError as error:
            raise SourceError(str(path), f"cannot be read ({error.strerror})", self.again) from None
        if len(raw) > self.largest:
            raise FormatError(str(path), f"is far too large for {self.noun}", self.again)
        try:
            return self.parse(raw.decode("utf-8"), str(path))
        except UnicodeDecodeError:
            raise FormatError(str(path), f"{self.refusal}: it is not even text", self.again) from None

    def parse(self, text: str, thing: str) -> Record:
        """One from its JSON; `thing` names it in errors.  Raises as `load` does."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError(thing, f"{self.refusal}: it is no JSON", self.again) from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            raise FormatError(thing, f"{self.refusal}: it has no schema_version", self.again)
        if version > self.version:
            newer = f"was written by a newer Dither (schema {version}; this one reads up to {self.version})"
            raise UnsupportedError(thing, newer, "Upgrade with: pip install -U dither")
        try:
            return self.model.model_validate_json(text)
        except ValidationError as error:
            raise FormatError(thing, f"{self.refusal}: {first_fault(error)}", self.again) from None

    def save(self, record: Record, path: Path) -> None:
        """Raises OutputError where the disk refuses."""
        text = record.model_dump_json(indent=1) + "\n"
        replace(path, text.encode(), "Pass --no-save to print it alone.")

    def check_writable(self, path: Path) -> None:
        """Before the work: the folder is there, and nothing but a record of this kind would be replaced.

        Raises OutputError.
        """
        if path.exists() or path.is_symlink():
            try:
                self.load(path)
            except UnsupportedError:
                newer = "was written by a newer Dither"
                raise OutputError(str(path), newer, "Move it away, or pass --no-save.") from None
            except SourceError as error:
                raise OutputError(str(path), error.reason, "Move it away, or pass --no-save.") from None
        if not os.access(path.parent, os.W_OK):
            raise OutputError(str(path.parent), "is no folder one may write to", "Pass --no-save.")


def first_fault(error: ValidationError) -> str:
    """The first field that breaks a rule, and how; nothing of what it holds."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"][:12]) or "the document"
    return f"{where}: {first['msg']}"


def replace(path: Path, data: bytes, way_out: str) -> None:
    """Writes a whole file: under a temporary name, synced, renamed.  Raises OutputError where that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # never through a link that somebody left under this name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(str(path), f"cannot be written ({error.strerror})", way_out) from None
