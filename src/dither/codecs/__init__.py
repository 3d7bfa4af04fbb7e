"""Codecs: which numbers a weight may become, and how they are stored.

A codec is found by iterating this folder: every module may define `CODECS`, a tuple of objects that
satisfy `dither.types.Codec`.  Adding one is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dither.errors import UsageError
from dither.types import Codec


@cache
def all_codecs() -> dict[str, Codec]:
    """Every codec by name, in order of falling bits per weight."""
    found: list[Codec] = []
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            found.extend(getattr(importlib.import_module(f"{__name__}.{module.name}"), "CODECS", ()))
    found.sort(key=lambda codec: (-codec.bits_per_weight, codec.name))
    return {codec.name: codec for codec in found}


def codec(name: str) -> Codec:
    """The codec called `name` (any case).  Raises UsageError naming those that exist."""
    codecs = all_codecs()
    try:
        return codecs[name.upper()]
    except KeyError:
        known = ", ".join(codecs)
        raise UsageError(f"type {name}", "is not known", f"Choose one of {known}.") from None
