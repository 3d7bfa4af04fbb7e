"""A conversation, and the time and energy it took; the model that answers can be exchanged.

A model with a chat template answers messages; a base model without one is given all the text so far and continues
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dither.engines.llamacpp import Generation, LlamaCpp
from dither.errors import DitherError
from dither.running.energy import EnergyMeter


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float
    seed: int


@dataclass
class Spent:
    """What the answers so far took."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of writing
    joules: float | None = None
    last_speed: float = 0.0  # tokens per second

    def add(self, reply: Generation, joules: float | None) -> None:
        self.answers += 1
        self.tokens += reply.tokens
        self.last_speed = reply.tokens_per_second
        if reply.tokens_per_second:
            self.seconds += reply.tokens / reply.tokens_per_second
        if joules is not None:
            self.joules = (self.joules or 0.0) + joules


@dataclass
class Conversation:
    """Turns are (question, answer); `engine` may be replaced between two of them."""

    engine: LlamaCpp
    sampling: Sampling
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    meter: EnergyMeter = field(default_factory=EnergyMeter)

    @property
    def messages(self) -> list[dict[str, str]]:
        told = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            told += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return told

    def say(self, line: str) -> Generation:
        """The model's reply to `line`; when it has been read, both belong into `turns`."""
        if self.engine.has_chat_template:
            asked = [*self.messages, {"role": "user", "content": line}]
            return self.engine.chat(asked, **asdict(self.sampling))
        text = "".join(question + answer for question, answer in self.turns) + line
        return self.engine.generate(text, reuse=True, **asdict(self.sampling))

    @contextmanager
    def accounted(self, reply: Generation) -> Iterator[None]:
        """Counts what `reply` took; it must be read inside the block."""
        before = self.meter.read()
        yield
        self.spent.add(reply, self.meter.between(before, self.meter.read()))

    def take_back(self) -> str | None:
        """Removes the last turn and returns its question, and changes the seed; None if nothing was asked."""
        if not self.turns:
            return None
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**31)
        return self.turns.pop()[0]

    def document(self) -> dict[str, Any]:
        """One line of a file that `dither calibrate --data` reads."""
        return {"model": self.engine.path.name, "messages": self.messages}


class Seat(AbstractContextManager["Seat"]):
    """Loads, replaces and closes the model that answers.  A context manager."""

    def __init__(self, path: Path, *, context: int, threads: int | None) -> None:
        self._context, self._threads = context, threads
        self.engine = self._open(path)

    def _open(self, path: Path) -> LlamaCpp:
        return LlamaCpp(path, context=self._context, threads=self._threads, gpu_layers=-1)

    def switch(self, path: Path) -> LlamaCpp:
        """Loads another file; the current one is closed first, so that only one of them is in memory.

        If the new one cannot be loaded, the old one is loaded again and the error is raised.
        """
        before = self.engine.path
        self.engine.close()
        try:
            self.engine = self._open(path)
        except DitherError:
            self.engine = self._open(before)
            raise
        return self.engine

    def __exit__(self, *exception: object) -> None:
        self.engine.close()
