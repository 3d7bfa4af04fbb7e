"""What is kept beside a model: one JSON object in a file of its own, and how such a file is read and written.

    model.gguf.measure.json     a measurement
    model.gguf.bench.json       a benchmark
    model.gguf.answers.json     recorded answers

Each carries a `schema_version`; what a newer Dither wrote is refused rather than half understood.  The files
are anybody's: sizes are held against a limit before anything is read, nothing but a regular file is opened,
and NaN is no number.  Writing goes to a temporary name, is synced and renamed, and replaces only its like.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from dither.errors import FormatError, OutputError, SourceError, UnsupportedError
from dither.system.files import read_bytes, replace
from dither.system.json_text import parse_json

Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Sidecar(Generic[Record]):
    """One kind of record; its methods are what the module of that kind offers."""

    model: type[Record]
    suffix: str  # ".measure.json"
    version: int  # of the schema
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
        return self.parse(read_bytes(Path(path), self.largest, self.again), str(path))

    def parse(self, text: str | bytes, thing: str) -> Record:
        """One from its JSON; `thing` names it in errors.  Raises as `load` does."""
        document = parse_json(text, thing, self.again, said=f"{self.refusal}: it is no JSON", finite=False)
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
            except (UnsupportedError, SourceError) as error:
                newer = isinstance(error, UnsupportedError)
                reason = "was written by a newer Dither" if newer else error.reason
                raise OutputError(str(path), reason, "Move it away, or pass --no-save.") from None
        if not os.access(path.parent, os.W_OK):
            raise OutputError(str(path.parent), "is no folder one may write to", "Pass --no-save.")


def first_fault(error: ValidationError) -> str:
    """The first field that breaks a rule, and how; nothing of what it holds."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"][:12]) or "the document"
    return f"{where}: {first['msg']}"
