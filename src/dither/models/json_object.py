"""A JSON object out of a stranger's file, whose values are checked as they are taken.

config.json and the tokenizer's files may hold anything under any key.  The methods here give a value of the kind
that is wanted, None where the key is missing or null, and otherwise raise a FormatError that names the key, what was
found and what is wanted.  Whoever reads through them meets no surprise, so that a TypeError of our own is a bug and
never passes for a damaged file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from dither.errors import FormatError
from dither.system.text import shown

MOST_WHOLE = 2**32 - 1  # GGUF's u32
_MOST_NUMBER = 1e30
_MOST_DEPTH = 32  # objects within objects; tokenizers in use have five
_FETCH_AGAIN = "Fetch the file again."


class JsonObject(Mapping[str, Any]):
    """`thing` is what an error calls it: "config.json"."""

    def __init__(self, values: Mapping[str, Any], thing: str, depth: int = 0) -> None:
        self._values, self.thing, self._depth = values, thing, depth

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def wrong(self, key: str, wanted: str) -> FormatError:
        value = self._values.get(key)
        reason = "is missing" if value is None else f"is {described(value)}"
        return FormatError(f"{self.thing}, {shown(key)}", f"{reason}, but {wanted} is needed", _FETCH_AGAIN)

    def given(self, key: str) -> Any:
        """The value of a key that must be there."""
        if self._values.get(key) is None:
            raise self.wrong(key, "a value")
        return self._values[key]

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(key, "a text")

    def flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "true or false")

    def whole(self, key: str, least: int = 0, most: int = MOST_WHOLE) -> int | None:
        value = self._values.get(key)
        if value is None or (type(value) is int and least <= value <= most):
            return value
        raise self.wrong(key, f"a whole number of {least} to {most}")

    def number(self, key: str) -> float:
        """A number of at least zero, which must be there."""
        value = self.given(key)
        if not _is_number(value) or value < 0:
            raise self.wrong(key, "a number of at least 0")
        return float(value)

    def positive(self, key: str) -> float:
        """A number above zero, which must be there."""
        value = self.given(key)
        if not _is_number(value) or not 0 < value < _MOST_NUMBER:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers, which must be there."""
        values = self.given(key)
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise self.wrong(key, "a list of numbers")
        return [float(value) for value in values]

    def wholes(self) -> dict[str, int]:
        """The whole object as numbers by text: a vocabulary."""
        for key, number in self._values.items():
            if type(number) is not int or not 0 <= number <= MOST_WHOLE:
                raise self.wrong(key, "a whole number")
        return dict(self._values)

    def section(self, key: str) -> JsonObject:
        """An object within; an empty one where there is none."""
        return self._inner(key, self._values.get(key), f"{self.thing}, {shown(key)}")

    def sections(self, key: str) -> list[JsonObject]:
        """A list of objects; empty where there is none."""
        found = self._values.get(key)
        if found is not None and not isinstance(found, list):
            raise self.wrong(key, "a list of objects")
        return [self._inner(key, item, f"{self.thing}, {shown(key)}[{at}]") for at, item in enumerate(found or ())]

    def within(self, *lists: str) -> Iterator[JsonObject]:
        """This object, and those in its lists of these names, theirs, and so on, in order."""
        yield self
        for key in lists:
            for inner in self.sections(key):
                yield from inner.within(*lists)

    def _inner(self, key: str, value: Any, thing: str) -> JsonObject:
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        if self._depth >= _MOST_DEPTH:
            raise FormatError(shown(thing), f"is an object within {_MOST_DEPTH} others", _FETCH_AGAIN)
        return JsonObject(value or {}, thing, self._depth + 1)


def described(value: object) -> str:
    """A value of a stranger's file for an error: bounded, however long or deep it is."""
    return shown(reprlib.repr(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST_NUMBER < value < _MOST_NUMBER
