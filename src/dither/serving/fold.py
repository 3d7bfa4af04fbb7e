"""A stream of events folded into the one document that a client without `stream` expects.

llama.cpp goes on writing an answer whose client has left, unless it was asked for as a stream.  So it always
is, and what a client wants in one piece is put together here.

Source: OpenAI's API reference, the chat completion object and its chunk.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from dither.serving.errors import from_event


async def fold(pieces: AsyncIterator[bytes]) -> bytes:
    """The document.  Raises ApiError where the stream carries an error, EngineGoneError where it breaks."""
    document: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            kind, _, value = line.partition(b": ")
            if kind in (b"data", b"error") and value != b"[DONE]":
                _add(document, choice, json.loads(value))
    if calls := choice.get("message", {}).get("tool_calls"):
        choice["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
    return json.dumps({"choices": [choice], **document}).encode()


def _add(document: dict[str, Any], choice: dict[str, Any], event: dict[str, Any]) -> None:
    if "choices" not in event:
        raise from_event(event)
    document.setdefault("object", event["object"].removesuffix(".chunk"))
    for name in ("id", "created", "model", "system_fingerprint"):
        document.setdefault(name, event.get(name))
    for name in ("usage", "timings"):
        if event.get(name) is not None:
            document[name] = event[name]
    for part in event["choices"]:
        choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
        if "text" in part:
            choice["text"] = choice.get("text", "") + part["text"]
        if "delta" in part:
            _add_delta(choice.setdefault("message", {"role": "assistant", "content": ""}), part["delta"])
        for name, values in (part.get("logprobs") or {}).items():
            if values:
                choice.setdefault("logprobs", {}).setdefault(name, []).extend(values)


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", {})
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        made = calls.setdefault(call["index"], empty)
        made["id"] = call.get("id") or made["id"]
        for name, text in (call.get("function") or {}).items():
            made["function"][name] += text or ""
