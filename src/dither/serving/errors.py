"""Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, `code` a text or null.

Clients show `message` to their user as it is, so it names the thing, the reason and the way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

INVALID, NOT_FOUND, SERVER = "invalid_request_error", "not_found_error", "server_error"
UNSUPPORTED = "unsupported_value"
RETRY = 1  # seconds; a place in the queue comes free within that on most machines


@dataclass(eq=False)
class ApiError(Exception):
    """What a client gets instead of an answer."""

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """A refusal ends the connection where the body may not have been read."""
        made = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        made |= {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return made | ({"connection": "close"} if self.status in (408, 413, 503) else {})

    def encoded(self) -> bytes:
        inner = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": inner}).encode()


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, INVALID, code, param)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, INVALID, UNSUPPORTED, param)


def wrong(reason: str, code: str = "invalid_value") -> PydanticCustomError:
    """Raised in a field's own check; `requests.py` makes an ApiError of it, with the field's name before the reason."""
    return PydanticCustomError(code, "{reason}", {"reason": reason})


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", SERVER, "shutting_down", retry_after=5)


def broken(reason: str) -> ApiError:
    return ApiError(502, f"the engine broke off: {reason}. The next request loads it anew.", SERVER, "engine")


def from_event(event: Mapping[str, Any]) -> ApiError:
    """An error in the middle of a stream."""
    inner = event.get("error", event)
    return from_engine(int(inner.get("code") or 500), inner)


def from_engine(status: int, found: Mapping[str, Any]) -> ApiError:
    """llama.cpp's error, whose `code` is a number and whose types are its own, as OpenAI would say it."""
    kind, message = str(found.get("type", "")), str(found.get("message", "the engine gave no reason"))
    if kind == "exceed_context_size_error":
        message = (
            f"This model's context is {found.get('n_ctx')} tokens, the request has "
            f"{found.get('n_prompt_tokens')}. Shorten it, or serve the model with a larger -c."
        )
        return ApiError(400, message, INVALID, "context_length_exceeded", "messages")
    if "is too large to process" in message:  # a text to embed, longer than one batch
        told = message.partition(". ")[0].replace("to process", "to embed")
        return ApiError(400, told, INVALID, "context_length_exceeded", "input")
    if kind == "unavailable_error" or status == 503:
        return ApiError(503, message, SERVER, "unavailable", retry_after=RETRY)
    if kind == "not_supported_error":
        return ApiError(400, message, INVALID, UNSUPPORTED)
    if 400 <= status < 500:
        return ApiError(status, message, INVALID, "invalid_value")
    return ApiError(status if status >= 500 else 500, message, SERVER, "engine")
