"""Codecs: which numbers a weight may become, and how they are stored.

A codec is found by iterating this folder: every module may define `CODECS`, a tuple of objects that
satisfy `dither.types.Codec`, and, where a family is too large to list, `parse(name, columns)`, which makes
the codec of a name it knows and answers None to any other, with `FAMILY`, the names it knows as a person
reads them.  Adding one is adding a file.

Names of listed codecs are GGUF's, in capitals; names that are parsed are lower-case, with dashes between
their parts.  Either is found in any case.
"""

from __future__ import annotations

from functools import cache, lru_cache

from dither.codecs.base import SplitCodec
from dither.errors import UsageError
from dither.system.discovery import modules, room_path
from dither.types import Codec

__path__ = room_path(__path__, __name__)


@cache
def all_codecs() -> dict[str, Codec]:
    """Every listed codec by name, in order of falling bits per weight: the types of GGUF."""
    found: list[Codec] = [codec for module in modules(__name__) for codec in getattr(module, "CODECS", ())]
    found.sort(key=lambda codec: (-codec.bits_per_weight, codec.name))
    return {codec.name: codec for codec in found}


def families() -> tuple[str, ...]:
    """The names that are parsed rather than listed, as a person reads them."""
    return tuple(module.FAMILY for module in modules(__name__) if hasattr(module, "FAMILY"))


def codec(name: str, columns: int = 0) -> Codec:
    """The codec called `name` (any case).

    `columns` of the matrix are needed where one scale spans a whole row ("int8-channel").  Raises UsageError
    without them, and for a name that is not known, naming those that are.
    """
    found = all_codecs().get(name.upper()) or _parsed(name.lower(), columns)
    if found is None:
        known = ", ".join((*all_codecs(), *families()))
        raise UsageError(f"type {name}", "is not known", f"Choose one of {known}.")
    return found


def split_codec(name: str, columns: int = 0) -> SplitCodec:
    """As `codec`; UsageError too for a type whose codes and scales cannot be stored apart."""
    found = codec(name, columns)
    if not isinstance(found, SplitCodec):
        raise UsageError(f"type {name}", "stores codes and scales together", f"Choose one of {', '.join(families())}.")
    return found


@lru_cache(maxsize=1024)
def _parsed(name: str, columns: int) -> Codec | None:
    made = (module.parse(name, columns) for module in modules(__name__) if hasattr(module, "parse"))
    return next((found for found in made if found is not None), None)
