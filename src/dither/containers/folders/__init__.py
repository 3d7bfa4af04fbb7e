"""Containers that are folders of safetensors, by the name that `--to` takes.

scheme.py    what a container of this kind is
gptq.py, awq.py, compressed.py, bnb.py, float8.py, plain.py    one file per method
plan.py      what every tensor becomes
output.py    the folder being written
side.py      config.json, tokenizer, card
"""

from __future__ import annotations

from dither.containers.folders.awq import Awq
from dither.containers.folders.bnb import EightBits, FourBits
from dither.containers.folders.compressed import SCHEMES
from dither.containers.folders.float8 import Float8Block
from dither.containers.folders.gptq import Gptq
from dither.containers.folders.plain import Plain
from dither.containers.folders.scheme import Scheme

_ALL: tuple[Scheme, ...] = (
    Awq(),
    Gptq(),
    *SCHEMES,
    Float8Block(),
    FourBits("nf4"),
    FourBits("fp4"),
    EightBits(),
    Plain(),
)


def schemes() -> dict[str, Scheme]:
    """Every folder container by name."""
    return {scheme.name: scheme for scheme in _ALL}


def find_scheme(name: str) -> Scheme | None:
    """The container called so (any case); None where the name is none of theirs."""
    return schemes().get(name.lower())
