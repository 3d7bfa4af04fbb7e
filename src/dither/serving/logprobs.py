"""Log-probabilities of a completion as OpenAI's completions have them.

OpenAI gives `{"tokens", "token_logprobs", "top_logprobs", "text_offset"}` there, and another form in chats;
llama.cpp gives the chat's form in both.  Only requests that ask for log-probabilities come through here, all
others' events are passed on unread.

Source: OpenAI's API reference, the completion object.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from itertools import accumulate
from typing import Any

_DATA = b"data: "


async def as_completions(pieces: AsyncGenerator[bytes, None], most: int) -> AsyncGenerator[bytes, None]:
    """The same events, each token with its `most` likeliest alternatives."""
    rest, offset = b"", 0
    async with aclosing(pieces) as found:
        async for piece in found:
            *lines, rest = (rest + piece).split(b"\n")
            for at, line in enumerate(lines):
                lines[at], offset = _line(line, most, offset)
            if lines:
                yield b"\n".join([*lines, b""])
    if rest:
        yield rest


def _line(line: bytes, most: int, offset: int) -> tuple[bytes, int]:
    """An event rewritten, and where the next token stands in the text."""
    if not line.startswith(_DATA) or line == b"data: [DONE]":
        return line, offset
    event = json.loads(line.removeprefix(_DATA))
    for choice in event.get("choices", ()):
        content = (choice.get("logprobs") or {}).get("content")
        if content is not None:
            choice["logprobs"], offset = _listed(content, most, offset)
    return _DATA + json.dumps(event).encode(), offset


def _listed(content: list[Mapping[str, Any]], most: int, offset: int) -> tuple[dict[str, list[Any]], int]:
    *offsets, end = accumulate((len(token["token"]) for token in content), initial=offset)
    return {
        "tokens": [token["token"] for token in content],
        "token_logprobs": [token["logprob"] for token in content],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token["top_logprobs"][:most]} for token in content
        ],
        "text_offset": offsets,
    }, end
