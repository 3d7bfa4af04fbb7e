"""How a long job reports its progress, without knowing who shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def note(self, text: str) -> None:
        """Shows a person a note."""
        ...

    def start(self, total: int, done: int) -> None:
        """Sets the amount of work, in the unit that `advance` counts in, and how much of it was done before.

        A second call begins another piece of work.
        """
        ...

    def advance(self, amount: int, what: str) -> None: ...


class Silent:
    def note(self, *_: object, **__: object) -> None:
        pass

    start = advance = note
