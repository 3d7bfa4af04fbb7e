"""JSON of strangers: an object, or an error that names where it came from.

Nothing is taken on trust: nesting that exhausts the stack and numbers of a million digits are faults like any
other, NaN and infinities are no numbers in JSON, and where a key that occurs twice would let two readers see
two documents, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

from dither.errors import FormatError
from dither.system.files import read_bytes
from dither.system.mistaken import what_it_is
from dither.system.text import shown


def read_object(path: Path, limit: int, way_out: str = "") -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.  Raises SourceError or FormatError."""
    return parse_object(read_bytes(path, limit, way_out), str(path), way_out)


def object_in(text: object) -> dict[str, Any]:
    """The JSON object of a metadata value; empty where it is no text, or the text holds none."""
    try:
        return parse_object(text, "the text", finite=False) if isinstance(text, str) else {}
    except FormatError:
        return {}


def parse_object(
    raw: bytes | str, thing: str, way_out: str = "", *, finite: bool = True, unique: bool = False
) -> dict[str, Any]:
    """A JSON object; `thing` names it in errors.

    `finite` refuses NaN and infinities, `unique` a key that occurs twice.  Raises FormatError.
    """
    found = parse_json(raw, thing, way_out, finite=finite, unique=unique)
    if not isinstance(found, dict):
        raise FormatError(thing, f"holds a JSON {type(found).__name__}, not an object", way_out)
    return found


def parse_json(
    raw: bytes | str,
    thing: str,
    way_out: str = "",
    *,
    said: str = "holds no readable JSON",
    finite: bool = True,
    unique: bool = False,
) -> Any:
    """Any JSON value; what is none is `said` of it.  Raises FormatError."""

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{thing}, key {shown(key)}", "occurs twice", "Write the file anew.")
            found[key] = value
        return found

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        only_numbers: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
        return json.loads(text, object_pairs_hook=once if unique else None, **only_numbers)
    except (ValueError, RecursionError) as error:
        found = what_it_is(raw) if isinstance(raw, bytes) else None
        if found is not None:
            raise FormatError(thing, f"{said}: it {found[0]}", way_out or found[1]) from None
        text_or_not = ": it is not even text" if isinstance(error, UnicodeDecodeError) else ""
        raise FormatError(thing, f"{said} ({error}){text_or_not}", way_out) from None


def _finite(text: str) -> float:
    """1e999 is a number in JSON and infinite in Python."""
    number = float(text)
    return number if isfinite(number) else _no_number(shown(text, 20))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number here")
