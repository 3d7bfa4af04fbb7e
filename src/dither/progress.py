"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def note(self, text: str) -> None:
        """Something a person should know, once."""
        ...

    def start(self, total: int, done: int) -> None:
        """The amount of work, in whatever unit `advance` counts, and how much of it was done before.

        A second call begins another piece of work.
        """
        ...

    def advance(self, amount: int, what: str) -> None: ...


class Silent:
    def note(self, text: str) -> None:
        pass

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, amount: int, what: str) -> None:
        pass
