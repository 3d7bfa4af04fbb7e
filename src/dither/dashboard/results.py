"""What the page shows: the results document, and what is read of the files when a view asks.

Models are opened once and stay open: opening reads a header, a tile reads its rows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.errors import SourceError

if TYPE_CHECKING:
    from dither.reporting.answers import Sides
    from dither.types import Model

_MOST_OPEN = 8


class Results:
    """The runs under `paths`; `against` names their original, which is found where it lies beside them."""

    def __init__(self, paths: Iterable[str | Path], against: str | None = None) -> None:
        self.paths = [Path(path).expanduser() for path in paths]
        self.against = against
        self._lock = threading.Lock()
        self._document: tuple[dict[str, Any], bytes] | None = None  # and its text
        self._sides: tuple[tuple[str, str], Sides] | None = None
        self._opened = lru_cache(_MOST_OPEN)(_open)

    def renew(self) -> None:
        """Something has changed: the next `document` looks again."""
        with self._lock:
            self._document = None

    def document(self) -> dict[str, Any]:
        """The document as JSON has it, looked for once and kept."""
        return self._current()[0]

    def text(self) -> bytes:
        return self._current()[1]

    def _current(self) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            if self._document is None:
                from dither.reporting.report import document

                found = document(self.paths, against=self.against, live=True).to_json()
                self._document = found, json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            return self._document

    def answer(self, run: str, prompt: str, max_tokens: int) -> Iterator[dict[str, Any]]:
        """Pieces of both models' answers; both stay open for the next.  Raises as `dither.reporting.answers` does."""
        from dither.reporting.answers import Sides

        paths = self.paths_of(run)
        if self._sides is None or self._sides[0] != paths:
            self.close()
            self._sides = (paths, Sides(*paths))
        yield from self._sides[1].stream(prompt, max_tokens)

    def close(self) -> None:
        """Ends the models that answer."""
        if self._sides is not None:
            self._sides[1].close()
            self._sides = None

    def paths_of(self, run: str) -> tuple[str, str]:
        """Where the original and a run's file lie.  Raises SourceError."""
        for known in self.document()["runs"]:
            if known["id"] == run and known.get("path"):
                return self.original(), str(known["path"])
        raise SourceError(f"run {run[:80]}", "is not among these files", "Reload the page.")

    def original(self) -> str:
        """Where the original lies.  Raises SourceError."""
        reference = self.document().get("reference") or {}
        if not reference.get("path"):
            raise SourceError("the original", "was not found beside the files", "Start with --against MODEL.")
        return str(reference["path"])

    def models(self, run: str) -> tuple[Model, Model]:
        """The original and a run's file, opened.  Raises SourceError."""
        original, quantized = self.paths_of(run)
        return self._model(original), self._model(quantized)

    def _model(self, path: str) -> Model:
        try:
            changed = Path(path).stat().st_mtime_ns
        except OSError as error:
            raise SourceError(path, f"cannot be read ({error.strerror})", "Reload the page.") from None
        with self._lock:
            return self._opened(path, changed)


def _open(path: str, _changed: int) -> Model:
    from dither.models.source import open_model

    return open_model(path)
