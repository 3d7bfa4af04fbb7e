"""GGUF's vocabulary: the types of metadata values and of tensor data, with their sizes.

Source: the GGUF specification and ggml's type list; the tests compare both tables with the
independent `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

ValueType = IntEnum(  # numbered as in a file
    "ValueType", "UINT8 INT8 UINT16 INT16 UINT32 INT32 FLOAT32 BOOL STRING ARRAY UINT64 INT64 FLOAT64", start=0
)


@dataclass(frozen=True)
class Field:
    """One metadata value with the type it has, or will have, in the file.

    An array's `value` is a list (numpy array for numbers is fine) and `item` its element type;
    arrays of arrays keep nested Fields as elements.
    """

    type: ValueType
    value: Any
    item: ValueType | None = None


def u32(value: int) -> Field:
    return Field(ValueType.UINT32, int(value))


def f32(value: float) -> Field:
    return Field(ValueType.FLOAT32, float(value))


def boolean(value: bool) -> Field:
    return Field(ValueType.BOOL, bool(value))


def string(value: str) -> Field:
    return Field(ValueType.STRING, str(value))


def array(item: ValueType, values: Any) -> Field:
    return Field(ValueType.ARRAY, list(values), item)


@dataclass(frozen=True)
class GgmlType:
    name: str
    id: int
    block: int  # weights
    block_bytes: int
    fallback: str = "F16"  # what a matrix becomes whose rows are no whole blocks
    file_type: int | None = None  # of a file all in this type, where no preset of the same name says it
    words: str = ""  # what such a file is

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.block_bytes


def read_type(row: str) -> GgmlType:
    """A row of the table: name, number, weights and bytes of a block, and as much as there is of the rest.

    >>> read_type("NVFP4 40 64 36 IQ4_NL 39 4-bit floats").words
    '4-bit floats'
    """
    name, number, block, size, *more = row.strip().split(maxsplit=6)
    fallback, file_type = more[0] if more else "F16", int(more[1]) if len(more) > 1 else None
    return GgmlType(name, int(number), int(block), int(size), fallback, file_type, "".join(more[2:]))


# What llama.cpp knows of a type; NVFP4's fallback is ours, for llama-quantize cannot make it.
_TABLE = """
F32 0 1 4; F16 1 1 2; Q4_0 2 32 18; Q4_1 3 32 20; Q5_0 6 32 22; Q5_1 7 32 24; Q8_0 8 32 34; Q8_1 9 32 40;
Q2_K 10 256 84 Q4_0; Q3_K 11 256 110 Q4_0; Q4_K 12 256 144 Q5_0; Q5_K 13 256 176 Q5_1; Q6_K 14 256 210 Q8_0;
Q8_K 15 256 292; IQ2_XXS 16 256 66 IQ4_NL; IQ2_XS 17 256 74 IQ4_NL; IQ3_XXS 18 256 98 IQ4_NL;
IQ1_S 19 256 50 IQ4_NL; IQ4_NL 20 32 18; IQ3_S 21 256 110 IQ4_NL; IQ2_S 22 256 82 IQ4_NL;
IQ4_XS 23 256 136 IQ4_NL; I8 24 1 1; I16 25 1 2; I32 26 1 4; I64 27 1 8; F64 28 1 8;
IQ1_M 29 256 56 IQ4_NL; BF16 30 1 2; TQ1_0 34 256 54 Q4_0; TQ2_0 35 256 66 Q4_0;
MXFP4 39 32 17 F16 38 4-bit floating point in small groups;
NVFP4 40 64 36 IQ4_NL 39 4-bit floating point in small groups
"""

GGML_TYPES = {kind.name: kind for kind in map(read_type, _TABLE.split(";"))}
FLOAT_TYPES = ("F32", "F16", "BF16")  # plain numbers, no scales to search
STORED_FLOATS = (*FLOAT_TYPES, "F64")  # what a source may hold that nobody has rounded to fewer numbers
GGML_BY_ID = {kind.id: kind for kind in GGML_TYPES.values()}
