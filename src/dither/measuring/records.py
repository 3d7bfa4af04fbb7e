"""Records of text: JSON lines on disk, or a data set of the hub.

A record is read by the keys it has: `text`; `messages`, a list of {"role", "content"}; or `prompt`
with `response` (also `instruction`, `question` with `output`, `answer`, `completion`).  Conversations
are rendered by the model's own chat template later, up to the last word of the last answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from dither.errors import SourceError, UsageError
from dither.system.text import shown

Conversation: TypeAlias = list[dict[str, str]]

_ASKED = ("prompt", "instruction", "question")
_ANSWERED = ("response", "completion", "output", "answer")
_EXPECTED = 'Each line needs "text", "messages" or "prompt" with "response".'


def json_records(path: Path) -> Iterator[str | Conversation]:
    """The records of a file with one JSON object a line; empty lines are skipped.

    Raises SourceError naming a line that is not UTF-8, not JSON or not a record.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _parsed(raw, f"{path.name}, line {number}")


def _parsed(raw: bytes, thing: str) -> str | Conversation:
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise SourceError(thing, "is not UTF-8 text", "Convert it: iconv -t UTF-8 FILE.") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(thing, f"is not JSON ({error})", _EXPECTED) from None
    record = read_record(found) if isinstance(found, dict) else found if isinstance(found, str) else None
    if record is None:
        raise SourceError(thing, "holds no text", _EXPECTED)
    return record


def read_record(found: Mapping[str, Any]) -> str | Conversation | None:
    """The text or conversation of one record, None where it has neither.

    >>> read_record({"prompt": "Why?", "response": "Because."})
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because.'}]
    """
    messages = found.get("messages")
    if isinstance(messages, list):
        return _conversation(messages)
    if isinstance(found.get("text"), str):
        return str(found["text"])
    asked = next((found[key] for key in _ASKED if isinstance(found.get(key), str)), None)
    answered = next((found[key] for key in _ANSWERED if isinstance(found.get(key), str)), None)
    if asked is None or answered is None:
        return None
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _conversation(messages: list[Any]) -> Conversation | None:
    turns: list[tuple[Any, Any]] = [
        (message.get("role"), message.get("content")) for message in messages if isinstance(message, dict)
    ]
    whole = len(turns) == len(messages) > 0 and all(isinstance(text, str) for turn in turns for text in turn)
    return [{"role": role, "content": content} for role, content in turns] if whole else None


def hub_records(wanted: str) -> Iterator[str | Conversation]:
    """Records of `DATASET[:SPLIT[:COLUMN]]`, streamed; the split is `train` unless named.

    The library honors HF_HUB_OFFLINE: offline, only what is in its cache can be read.
    Raises UsageError if the library is missing or there is no such column, SourceError if the data set cannot be
    read.
    """
    name, _, rest = wanted.partition(":")
    split, _, column = rest.partition(":")
    if not name:
        raise UsageError("--data hf:", "names no data set", "Write hf:DATASET[:SPLIT[:COLUMN]].")
    try:
        library = import_module("datasets")
    except ImportError:
        reason = "needs the `datasets` library, which is not installed"
        way_out = "pip install datasets, or give a text file with --data FILE."
        raise UsageError(f"hf:{wanted}", reason, way_out) from None
    try:
        rows = iter(library.load_dataset(name, split=split or "train", streaming=True))
        first = next(rows, None)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = f"cannot be read ({shown((str(error).splitlines() or [type(error).__name__])[0])})"
        way_out = "Check its name, split and configuration, and the network."
        raise SourceError(f"data set {shown(name)}", reason, way_out) from None
    if first is None:
        raise SourceError(f"data set {shown(name)}", "is empty", "Name another split.")
    for row in chain([first], rows):
        yield _row(row, column, wanted)


def _row(row: Mapping[str, Any], column: str, wanted: str) -> str | Conversation:
    value = row.get(column) if column else read_record(row)
    record = _conversation(value) if isinstance(value, list) else value
    if not isinstance(record, str | list):
        columns = shown(", ".join(map(str, row)))
        reason = f"column {column!r} holds no text" if column else "no column is known to hold text"
        raise UsageError(f"hf:{wanted}", reason, f"Name one of: {columns}, as hf:DATASET:SPLIT:COLUMN.")
    return record
