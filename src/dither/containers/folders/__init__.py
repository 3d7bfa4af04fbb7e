"""Containers that are folders of safetensors, by the name that `--to` takes.

    scheme.py    what a container of this kind is
    integers.py  what those that hold integers share
    mix.py       what every tensor becomes
    target.py    the folder as the target of a run
    output.py    the folder being written
    side.py      config.json, tokenizer, card
    joined.py    matrices that a server computes as one

A container is found by iterating this folder: every module may define `SCHEMES`, a tuple of `scheme.Scheme`, one
file per method (gptq.py, awq.py, compressed.py, bnb.py, float8.py, plain.py).  Adding one is adding a file.
"""

from __future__ import annotations

from functools import cache

from dither.containers.folders.scheme import Scheme
from dither.system.discovery import modules, room_path

__path__ = room_path(__path__, __name__)


@cache
def schemes() -> dict[str, Scheme]:
    """Every folder container by name."""
    found: list[Scheme] = [scheme for module in modules(__name__) for scheme in getattr(module, "SCHEMES", ())]
    return {scheme.name: scheme for scheme in sorted(found, key=lambda scheme: scheme.listed)}


def find_scheme(name: str) -> Scheme | None:
    """The container called so (any case); None where the name is none of theirs."""
    return schemes().get(name.lower())
