"""What every output has in common that grows beside a journal (`journal.PartFile`): its unfinished work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dither.containers.journal import PartFile

_Self = TypeVar("_Self", bound="PartOutput")


class PartOutput:
    """A context manager that keeps unfinished work; `commit` gives it its name."""

    _file: PartFile

    @property
    def part(self) -> Path:
        """Where the bytes are until `commit`: a whole model but for the tensors not written yet."""
        return self._file.part

    @property
    def finished(self) -> Mapping[str, Mapping[str, Any]]:
        return self._file.finished

    @property
    def discarded(self) -> bool:
        """Whether unfinished work of another recipe was thrown away."""
        return self._file.discarded

    def commit(self) -> None:
        self._file.commit()

    def discard(self) -> None:
        self._file.discard()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
