"""Extension points: what a room offers is found by iterating its folder, so that adding to it is adding a file.

A room that is open to additions says `__path__ = room_path(__path__, __name__)`: a folder anywhere on Python's
search path that has the room's name and no `__init__.py`, such as `mine/dither/codecs/` with `mine` on the path,
then belongs to the room as well.  Modules come in the order of their names, ours before the same name elsewhere.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dither.errors import UsageError


def room_path(path: Iterable[str], room: str) -> list[str]:
    """`extend_path` without another installation of ours: of folders elsewhere those without an `__init__.py`."""
    own = list(path)
    return [*own, *(f for f in pkgutil.extend_path(own, room)[len(own) :] if not Path(f, "__init__.py").exists())]


@cache
def modules(room: str) -> tuple[ModuleType, ...]:
    """The imported modules of a package (`"dither.codecs"`), without those in folders below it."""
    package = importlib.import_module(room)
    names = {found.name for found in pkgutil.iter_modules(package.__path__) if not found.ispkg}
    return tuple(importlib.import_module(f"{room}.{name}") for name in sorted(names))


@cache
def defining(room: str, attribute: str) -> dict[str, str]:
    """Modules of a package that define `attribute` (`"SOLVER"`) at their top: name, with dashes, → module.

    Their source is read, and neither they nor the package imported: help names them, and has to start at once.
    """
    spec = importlib.util.find_spec(room)
    folders = room_path((spec and spec.submodule_search_locations) or (), room)
    files = {file.stem: file for folder in reversed(folders) for file in Path(folder).glob("*.py")}
    stated = re.compile(rf"^{attribute}\b.*=", re.MULTILINE)
    names = sorted(name for name, file in files.items() if stated.search(file.read_text(encoding="utf-8")))
    return {name.replace("_", "-"): f"{room}.{name}" for name in names}


def find_offered(room: str, attribute: str, kind: str, name: str) -> Any:
    """What the module of this name defines.  Raises UsageError, about `kind` ("solver"), naming those there are."""
    there = defining(room, attribute)
    if name.replace("_", "-") not in there:
        raise UsageError(f"{kind} {name}", f"is not one of {', '.join(there)}")
    return getattr(importlib.import_module(there[name.replace("_", "-")]), attribute)
