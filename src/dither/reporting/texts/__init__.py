"""What a writer edits: the prose of the page as data (`guide.toml`, `glossary.toml`), read when it is asked for.

A file is checked as it is read.  What breaks a rule is told by the name of the file, the entry and the field,
so that a writer finds the place without knowing the code.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dither.errors import FormatError
from dither.formats.sidecars import first_fault

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAMES = ("term", "id", "method", "for")  # the key that tells an entry of a list from its neighbors


class Entry(BaseModel):
    """A table of such a file.  A key that is not known is a slip of the pen, and refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# A paragraph: wrapped as the writer likes it, one line on the page.
Prose = Annotated[str, BeforeValidator(lambda text: " ".join(text.split()) if isinstance(text, str) else text)]

_Kind = TypeVar("_Kind", bound=BaseModel)


def load(name: str, kind: type[_Kind]) -> _Kind:
    """The checked content of texts/NAME.  Raises FormatError naming the entry that breaks a rule."""
    return parse((files(__name__) / name).read_text("utf-8"), name, kind)


def parse(text: str, name: str, kind: type[_Kind]) -> _Kind:
    """The same of a text that is at hand.  Raises as `load` does."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise wrong(name, f"is no TOML: {error}") from None
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        location = error.errors(include_url=False)[0]["loc"]
        raise wrong(name, f"{_entry(found, location)}{first_fault(error)}") from None


def wrong(name: str, reason: str) -> FormatError:
    """The error to raise of a file of texts."""
    return FormatError(f"texts/{name}", reason, "Mend that entry.")


def _entry(found: Any, location: tuple[int | str, ...]) -> str:
    """Which entry of a list a location lies in, by the name that it gives itself."""
    for part in location:
        try:
            found = found[part]
        except (LookupError, TypeError):  # the rest of the location is pydantic's own
            return ""
        if isinstance(part, int) and isinstance(found, dict):
            return next((f"in the entry {found[key]!r}, " for key in _NAMES if key in found), "")
    return ""
