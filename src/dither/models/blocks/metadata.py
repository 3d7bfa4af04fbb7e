"""An architecture's own keys of a GGUF's metadata, checked as they are read.

Metadata is a stranger's: every number is held against a limit before anything is made of it.  What has not been read
in the end is told, because nothing here takes it into account.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field
from dither.models.arch.recognize import WAY_OUT
from dither.system.text import shown

MAX_WHOLE = 2**24  # heads, widths, layers, experts; the longest contexts and vocabularies stay below
MAX_NUMBER = 1e30
# Said elsewhere in the file as well, or of no consequence to the result.
UNREAD = frozenset({"vocab_size", "rope.scaling.finetuned"})


@dataclass
class Metadata:
    """The keys, and which of them have been read."""

    arch: str
    fields: Mapping[str, Field]
    read: set[str] = field(default_factory=set)

    def value(self, key: str) -> Any:
        self.read.add(key)
        found = self.fields.get(f"{self.arch}.{key}")
        return None if found is None else found.value

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= MAX_WHOLE:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
            raise self.wrong(key, value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.value(key)
        return default if value is None else str(value)

    def wrong(self, key: str, value: Any) -> SourceError | UnsupportedError:
        thing = f"metadata {self.arch}.{key}"
        if value is None:
            return SourceError(thing, "is missing", WAY_OUT)
        if isinstance(value, list) or hasattr(value, "__array__"):
            reason = "differs from layer to layer, which nothing here can run"
            return UnsupportedError(thing, reason, "Take a model whose layers are alike.")
        return SourceError(thing, f"is {shown(repr(value))}", WAY_OUT)

    @property
    def unread(self) -> list[str]:
        known = {f"{self.arch}.{key}" for key in self.read | UNREAD}
        return [key for key in self.fields if key.startswith(f"{self.arch}.") and key not in known]
