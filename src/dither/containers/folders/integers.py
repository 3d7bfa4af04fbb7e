"""Integers in folders: what a codec's name says of them, whichever scheme stores them.

Legend: R rows (out features), C columns (in features), G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dither.codecs.integers import NAME
from dither.containers.folders.scheme import Scheme, Wish, refuse
from dither.formats.layouts import Int8
from dither.types import Bytes, Floats, No, Yes

BITS = (2, 3, 4, 8)
_SCALES = {None: "F16", "bf16": "BF16", "f32": "F32"}  # how a codec's name ends → dtype of its scales


def signed(codes_RC: Bytes, scale_RG: Floats, zero_RG: Bytes) -> Int8:
    """Codes below a zero point as signed bytes around zero."""
    numbers_RC = codes_RC.astype(np.int16) - zero_RG.astype(np.int16)
    return Int8(numbers_RC.astype(np.int8), scale_RG)


def group_name(group: int) -> str:
    """
    >>> group_name(128), group_name(0)
    ('g128', 'channel')
    """
    return f"g{group}" if group else "channel"


def integer_codec(scheme: Scheme, wish: Wish, bits: int, group: int) -> str:
    """Integers as wished, or of these bits around zero in groups of so many columns; scales are float16."""
    bits = wish.bits or bits
    if bits not in BITS:
        raise refuse(scheme, f"--bits {bits}", "is not one of 2, 3, 4 and 8", "Choose one of them.")
    sign = "int" if wish.sym in (None, True) else "uint"
    return f"{sign}{bits}-{group_name(group if wish.group is None else wish.group)}"


@dataclass(frozen=True)
class IntegerType:
    """What an integer codec's name says."""

    bits: int
    group: int  # 0 for the whole row
    affine: bool
    scale: str  # safetensors dtype of the scales


def integers_of(codec: str) -> IntegerType | None:
    """
    >>> integers_of("uint4-g128")
    IntegerType(bits=4, group=128, affine=True, scale='F16')
    >>> integers_of("nf4-g64") is None
    True
    """
    found = NAME.fullmatch(codec)
    if found is None:
        return None
    unsigned, bits, group, stored = found.groups()
    return IntegerType(int(bits), int(group or 0), bool(unsigned), _SCALES[stored])


def known_integers(codec: str) -> IntegerType:
    """`integers_of` a codec that the scheme is known to hold."""
    kind = integers_of(codec)
    assert kind is not None
    return kind


def whole_groups(kind: IntegerType, columns: int) -> Yes | No:
    """Whether a row is cut into whole groups, and if not, why."""
    if kind.group and columns % kind.group:
        return No(f"{columns} columns are no whole groups of {kind.group}")
    return Yes()
