"""What the page shows: the results document, and what is read of the files when a view asks.

Models are opened once and stay open: opening reads a header, a tile reads its rows.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
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
        self._document: dict[str, Any] | None = None
        self._text = b""
        self._sides: tuple[tuple[str, str], Sides] | None = None
        self._open: OrderedDict[tuple[str, int], Model] = OrderedDict()

    def renew(self) -> None:
        """Something has changed: the next `document` looks again."""
        with self._lock:
            self._document = None

    def document(self) -> dict[str, Any]:
        """The document as JSON has it, looked for once and kept."""
        with self._lock:
            return self._current()

    def text(self) -> bytes:
        with self._lock:
            self._current()
            return self._text

    def _current(self) -> dict[str, Any]:
        if self._document is None:
            self._document = self._collect()
            self._text = json.dumps(self._document, ensure_ascii=False, allow_nan=False).encode()
        return self._document

    def _collect(self) -> dict[str, Any]:
        from dither.reporting.report import document

        return document(self.paths, against=self.against, live=True).to_json()

    def tile(self, run: str, tensor: str, row: int, column: int, size: int) -> dict[str, Any]:
        from dither.reporting.tiles import tile

        original, quantized = self._pair(run)
        return tile(original, quantized, tensor, row=row, column=column, size=size).to_json()

    def palette(self, run: str, tensor: str, row: int, block: int) -> dict[str, Any]:
        from dither.reporting.palette import palette

        original, quantized = self._pair(run)
        return palette(original, quantized, tensor, row=row, block=block).to_json()

    def picture(self, types: list[str]) -> dict[str, Any]:
        from dither.reporting.picture import picture

        return (picture(types) if types else picture()).to_json()

    def answer(self, run: str, prompt: str, max_tokens: int) -> Iterator[dict[str, Any]]:
        """Pieces of both models' answers; both stay open for the next.  Raises as `dither.reporting.answers` does."""
        from dither.reporting.answers import Sides

        places = self.places(run)
        if self._sides is None or self._sides[0] != places:
            self.close()
            self._sides = (places, Sides(*places))
        yield from self._sides[1].stream(prompt, max_tokens)

    def forced(self, run: str, text: str) -> dict[str, Any]:
        from dither.reporting.answers import forced

        return forced(*self.places(run), text).model_dump(mode="json")

    def close(self) -> None:
        """Ends the models that answer."""
        if self._sides is not None:
            self._sides[1].close()
            self._sides = None

    def fit(self, context: int, kv: str, slots: int) -> dict[str, Any]:
        from dither.capacity.fit import fit

        return fit(self._reference(), context=context, kv=kv, slots=slots).to_json()

    def places(self, run: str) -> tuple[str, str]:
        """Where the original and a run's file lie.  Raises SourceError."""
        for known in self.document()["runs"]:
            if known["id"] == run:
                if not known.get("path"):
                    break
                return self._reference(), str(known["path"])
        raise SourceError(f"run {run[:80]}", "is not among these files", "Reload the page.")

    def _reference(self) -> str:
        reference = self.document().get("reference") or {}
        if not reference.get("path"):
            raise SourceError("the original", "was not found beside the files", "Start with --against MODEL.")
        return str(reference["path"])

    def _pair(self, run: str) -> tuple[Model, Model]:
        original, quantized = self.places(run)
        return self._model(original), self._model(quantized)

    def _model(self, path: str) -> Model:
        from dither.models.source import open_model

        try:
            key = (path, Path(path).stat().st_mtime_ns)
        except OSError as error:
            raise SourceError(path, f"cannot be read ({error.strerror})", "Reload the page.") from None
        with self._lock:
            if key not in self._open:
                self._open[key] = open_model(path)
                while len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]
