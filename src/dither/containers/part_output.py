"""What every output has in common that grows beside a journal (`journal.PartFile`): its unfinished work."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dither.containers.journal import PartFile
from dither.types import Output


class PartOutput(Output, AbstractContextManager["PartOutput"]):
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

    @property
    @abstractmethod
    def total(self) -> int:
        """Bytes of the finished file, or of a folder's weights, configuration and tokenizer together."""

    @abstractmethod
    def fill(self, key: str, text: str) -> bool:
        """Puts a JSON document into what the file says of itself, under `key`; False where there is no room."""

    @abstractmethod
    def keep_errors(self, key: str, errors: Mapping[str, float]) -> None:
        """Puts every tensor's relative error into what the file says of itself, under `key`."""

    def describe(self, card: str) -> None:
        """Puts text for people beside the weights, where the container has a place for it."""
        return

    def commit(self) -> None:
        self._file.commit()

    def discard(self) -> None:
        self._file.discard()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.__exit__(kind)
