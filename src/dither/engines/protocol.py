"""What the HTTP server asks of whoever runs a model.

An engine takes requests in OpenAI's form, validated already, and gives back bytes in OpenAI's form: one
JSON document, or server-sent events that the server passes on as they are.  Nothing above this line knows
whether llama.cpp or transformers is behind it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dither.engines.settings import Settings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@dataclass(frozen=True)
class Reply:
    """An engine's answer.  Closing `pieces` (its `aclose`) stops the engine's work on it."""

    status: int
    pieces: AsyncGenerator[bytes, None]


class EngineGoneError(Exception):
    """The engine broke off in the middle of its work; it has to be loaded again."""


class Engine(Protocol):
    """A model in memory.  `ask` may be called `slots` times at once."""

    context: int  # tokens a conversation may have
    slots: int
    takes_tools: bool  # whether the model's chat template has a place for them
    takes_schemas: ClassVar[bool]  # whether answers can be forced into a JSON schema
    takes_embeddings: ClassVar[bool]  # whether it can be started with `Settings.embeddings`; asked before it is

    @classmethod
    async def start(cls, path: str | Path, settings: Settings) -> Engine:
        """Loads the model.  Raises a DitherError with the reason where it cannot."""
        ...

    @property
    def alive(self) -> bool: ...

    async def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        """`path` is one of CHAT, COMPLETIONS, EMBEDDINGS.  Raises EngineGoneError."""
        ...

    async def metrics(self) -> str:
        """Prometheus' text, or nothing."""
        ...

    async def close(self) -> None:
        """Gives the memory back."""
        ...
