"""GGUF: the one file in which llama.cpp keeps a model.

    magic "GGUF" · version u32 · tensor count u64 · key-value count u64
    key-values     key, type u32, value
    tensor infos   name, dimension count u32, dimensions u64 (fastest first), type u32, offset u64
    padding to the alignment (general.alignment, 32 unless given), then the tensors, each padded to it

A string is its length u64 and UTF-8; an array is its items' type u32, their count u64, the items.

Source: the GGUF specification (ggml/docs/gguf.md) and the checks that llama.cpp's loader makes.
Versions 2 and 3 are the same bytes; version 3 only allowed big-endian files, which are refused here.

The reader trusts nothing: a count or a length is held against the bytes that are left *before*
anything is allocated for it, so that a file of n bytes can cost no more than a small multiple of n.
Text that is no UTF-8 occurs in real token lists: values keep such bytes as surrogate escapes, and an
untouched copy is byte-identical.  Only this module knows the layout; codecs are somebody else's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dither.errors import FormatError, OutputError
from dither.formats.foreign_types import foreign_type
from dither.formats.ggml import GGML_BY_ID, GGML_TYPES, Field, GgmlType, ValueType, u32
from dither.formats.mapped import Buffer, MappedFile
from dither.system.mistaken import refuse_mistaken
from dither.system.text import shown

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 2**21  # a huge page; more would only inflate files
MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
MAX_DIMENSION = 2**40
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less the closing NUL
MAX_NESTING = 8  # arrays of arrays occur in no known file; llama.cpp refuses them altogether

# The letters that struct and numpy have for value types, in these types' order; none for texts and arrays.
_FORMATS = {kind: code for kind, code in zip(ValueType, "BbHhIif?  Qqd", strict=True) if code != " "}
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _FORMATS.items()}
_DTYPES = {kind: np.dtype("<" + code) for kind, code in _FORMATS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_LEAST_FIELD = 8 + 1 + 4 + 1  # bytes: key length, key, type, value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: name length, dimension count, type, offset
_FETCH_AGAIN = "The file is damaged or incomplete: fetch it again and compare its size."


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.  `offset` is absolute in the file; `shape` has the columns last."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    version: int
    metadata: dict[str, Field]
    tensors: tuple[TensorEntry, ...]
    data_offset: int  # where the first tensor's data may start; all before it is header
    alignment: int


@dataclass(frozen=True)
class Layout:
    """A file to be written: its first bytes, and where every tensor goes (absolute, unpadded sizes)."""

    header: bytes
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int  # bytes of the whole file, the last tensor's padding included


def read_header(path: Path) -> Header:
    """Metadata and tensor positions of a GGUF file, every one of them checked against the file's size.

    Raises SourceError where the file cannot be opened, FormatError where its bytes contradict
    themselves or promise what the file does not hold.
    """
    return parse_header(MappedFile(path).data, str(path))


def parse_header(data: Buffer, file: str) -> Header:
    """`read_header` for a whole file already in memory or mapped; `file` names it in errors."""
    cursor = _Cursor(data, file)
    version = _read_version(cursor)
    tensor_count, field_count = cursor.number(_U64), cursor.number(_U64)
    cursor.promise(field_count, _LEAST_FIELD, "metadata keys")
    metadata: dict[str, Field] = {}
    for _ in range(field_count):
        key, value = _read_field(cursor)
        if key in metadata:
            raise FormatError(f"{file}, key {shown(key)}", "occurs twice", "Write the file anew without it.")
        metadata[key] = value
    problem = _alignment_problem(metadata)
    if problem:
        raise FormatError(f"{file}, key {ALIGNMENT_KEY}", problem, _FETCH_AGAIN)
    alignment = alignment_of(metadata)
    cursor.thing = file
    cursor.promise(tensor_count, _LEAST_TENSOR, "tensors")
    infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    data_offset = padded(cursor.at, alignment)
    tensors = tuple(
        TensorEntry(name, shape, kind, data_offset + offset, prod(shape) // kind.block * kind.block_bytes)
        for name, shape, kind, offset in infos
    )
    _check_tensors(tensors, data_offset, alignment, len(data), file)
    return Header(version, metadata, tensors, data_offset, alignment)


class _Cursor:
    """A position in untrusted bytes that never moves past their end."""

    def __init__(self, data: Buffer, file: str) -> None:
        self.data, self.file, self.at, self.end = data, file, 0, len(data)
        self.thing = file  # what is being read, for errors

    def promise(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses `count` items, each of at least so many bytes, that the rest of the file cannot hold."""
        if count * least_bytes > self.end - self.at:
            reason = f"promises {count} {what}, but only {self.end - self.at} bytes are left in the file"
            raise FormatError(self.thing, reason, _FETCH_AGAIN)

    def number(self, kind: struct.Struct) -> Any:
        self.promise(kind.size, 1, "bytes")
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def text(self, errors: str = "surrogateescape") -> str:
        length = self.number(_U64)
        self.promise(length, 1, "bytes of text")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors)

    def name(self, what: str) -> str:
        """A key or a tensor's name, where bad UTF-8 is an error."""
        self.thing = f"{self.file}, {what} at byte {self.at}"
        try:
            return self.text("strict")
        except UnicodeDecodeError as error:
            raise FormatError(self.thing, f"is not UTF-8 ({error.reason})", _FETCH_AGAIN) from None

    def texts(self, count: int) -> list[str]:
        """The hot loop of a header: 150 thousand tokens and as many merges."""
        self.promise(count, _U64.size, "strings")
        data, at, end, unpack = self.data, self.at, self.end, _U64.unpack_from
        found: list[str] = []
        for _ in range(count):
            start = at + 8
            stop = start + unpack(data, at)[0] if start <= end else start
            if stop > end:
                self.at = at
                self.text()  # the careful way, which says what is missing
            found.append(data[start:stop].decode("utf-8", "surrogateescape"))
            at = stop
        self.at = at
        return found


def _read_version(cursor: _Cursor) -> int:
    if cursor.data[:4] != MAGIC:
        refuse_mistaken(cursor.data, cursor.file)
        if cursor.data[8:9] == b"{":
            raise FormatError(cursor.file, "is safetensors, though its name says GGUF", "Rename it to .safetensors.")
        start = bytes(cursor.data[:4])
        raise FormatError(cursor.file, f"starts with {start!r}, not with GGUF", "Name a GGUF file.")
    cursor.at = 4
    version = int(cursor.number(_U32))
    if version & 0xFFFF == 0 and version:
        reason = "is big-endian GGUF, for machines such as IBM's Z, and this reads little-endian ones"
        way_out = "Convert the original model here, or swap the file with gguf_convert_endian.py of llama.cpp."
        raise FormatError(cursor.file, reason, way_out)
    if version not in (2, 3):
        way_out = "It needs a newer release of Dither."
        if version < 2:
            way_out = "It is from August 2023: take a newer GGUF of the model, or convert the original again."
        raise FormatError(cursor.file, f"is GGUF version {version}; 2 and 3 can be read", way_out)
    return version


def _read_field(cursor: _Cursor) -> tuple[str, Field]:
    key = cursor.name("metadata key")
    cursor.thing = f"{cursor.file}, key {shown(key)}"
    if not key:
        raise FormatError(cursor.thing, "is empty", _FETCH_AGAIN)
    return key, _read_value(cursor, _value_type(cursor), MAX_NESTING)


def _value_type(cursor: _Cursor) -> ValueType:
    number = cursor.number(_U32)
    try:
        return ValueType(number)
    except ValueError:
        raise FormatError(cursor.thing, f"has a value of unknown type {number}", _FETCH_AGAIN) from None


def _read_value(cursor: _Cursor, kind: ValueType, nesting: int) -> Field:
    if kind is ValueType.STRING:
        return Field(kind, cursor.text())
    if kind is ValueType.ARRAY:
        item = _value_type(cursor)
        return Field(kind, _read_items(cursor, item, cursor.number(_U64), nesting), item)
    if kind is ValueType.BOOL:
        _check_bools(cursor, 1)
    return Field(kind, cursor.number(_SCALARS[kind]))


def _read_items(cursor: _Cursor, item: ValueType, count: int, nesting: int) -> Any:
    if item is ValueType.STRING:
        return cursor.texts(count)
    if item is ValueType.ARRAY:
        if nesting == 1:
            reason = f"nests arrays more than {MAX_NESTING} deep"
            raise FormatError(cursor.thing, reason, "No known tool writes this: fetch the file elsewhere.")
        cursor.promise(count, 12, "arrays")
        return [_read_value(cursor, item, nesting - 1) for _ in range(count)]
    dtype = _DTYPES[item]
    cursor.promise(count, dtype.itemsize, "numbers")
    if item is ValueType.BOOL:
        _check_bools(cursor, count)
    # A copy: a view would keep the whole file mapped for as long as anybody holds its metadata.
    values = np.frombuffer(cursor.data[cursor.at : cursor.at + count * dtype.itemsize], dtype).copy()
    cursor.at += count * dtype.itemsize
    return values


def _check_bools(cursor: _Cursor, count: int) -> None:
    raw = bytes(cursor.data[cursor.at : cursor.at + count])
    if raw.strip(b"\0\1"):
        raise FormatError(cursor.thing, "holds a truth value that is neither 0 nor 1", _FETCH_AGAIN)


def alignment_of(metadata: Mapping[str, Field]) -> int:
    """What every tensor's offset is a multiple of."""
    return int(metadata.get(ALIGNMENT_KEY, u32(DEFAULT_ALIGNMENT)).value)


def _alignment_problem(metadata: Mapping[str, Field]) -> str:
    field = metadata.get(ALIGNMENT_KEY, u32(DEFAULT_ALIGNMENT))
    if field.type is not ValueType.UINT32:
        return f"is a {field.type.name}, not a UINT32"
    if not 1 <= field.value <= MAX_ALIGNMENT or field.value & (field.value - 1):
        return f"is {field.value}, not a power of two up to {MAX_ALIGNMENT}"
    return ""


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GgmlType, int]:
    name = cursor.name("tensor name")
    cursor.thing = f"{cursor.file}, tensor {shown(name)}"
    count = cursor.number(_U32)
    if count > MAX_DIMENSIONS:
        raise FormatError(cursor.thing, f"has {count} dimensions; ggml knows {MAX_DIMENSIONS}", _FETCH_AGAIN)
    shape = tuple(cursor.number(_U64) for _ in range(count))[::-1]
    type_id = cursor.number(_U32)
    kind = GGML_BY_ID.get(type_id)
    if kind is None:
        raise FormatError(cursor.thing, *foreign_type(type_id))
    problem = _shape_problem(shape, kind)
    if problem:
        raise FormatError(cursor.thing, problem, _FETCH_AGAIN)
    return name, shape, kind, cursor.number(_U64)


def _shape_problem(shape: Sequence[int], kind: GgmlType) -> str:
    """Why ggml could not hold such a tensor; nothing where it could."""
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions; ggml knows {MAX_DIMENSIONS}"
    for dimension in shape:
        if not 1 <= dimension <= MAX_DIMENSION:
            return f"has a dimension of {dimension}"
    if prod(shape) >= 2**62:
        return f"has {prod(shape)} elements"
    columns = shape[-1] if shape else 1
    if columns % kind.block:
        return f"has rows of {columns}, not a multiple of {kind.name}'s {kind.block}"
    return ""


def _check_tensors(tensors: Sequence[TensorEntry], data_offset: int, alignment: int, size: int, file: str) -> None:
    """Every tensor inside the file, aligned, of its own name and on bytes of its own."""
    names: set[str] = set()
    for tensor in tensors:
        thing = f"{file}, tensor {shown(tensor.name)}"
        if tensor.name in names:
            raise FormatError(thing, "occurs twice", "Write the file anew without it.")
        names.add(tensor.name)
        if (tensor.offset - data_offset) % alignment:
            reason = f"starts at byte {tensor.offset - data_offset} of the data, not at a multiple of {alignment}"
            raise FormatError(thing, reason, _FETCH_AGAIN)
        if tensor.offset + tensor.nbytes > size:
            reason = f"ends at byte {tensor.offset + tensor.nbytes}, but the file has {size}: it is truncated"
            raise FormatError(thing, reason, _FETCH_AGAIN)
    for before, after in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
        if before.offset + before.nbytes > after.offset:
            thing = f"{file}, tensor {shown(after.name)}"
            raise FormatError(thing, f"overlaps tensor {shown(before.name)}", _FETCH_AGAIN)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def lay_out(metadata: Mapping[str, Field], tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> Layout:
    """The header of a GGUF file, and where each tensor's bytes go.

    `tensors` are (name, shape with the columns last, ggml type name); they are laid out one after
    the other in this order, as llama.cpp demands, each padded to the alignment, the last one too.
    Key-values keep their order.  The alignment is what `general.alignment` in the metadata says, else 32.

    Raises OutputError naming the key or tensor that no GGUF file could hold.
    """
    problem = _alignment_problem(metadata)
    if problem:
        raise OutputError(f"key {ALIGNMENT_KEY}", problem, "Choose one power of two, such as 32.")
    alignment = alignment_of(metadata)
    infos, starts, sizes, offset = [], [], [], 0
    names: set[str] = set()
    for name, shape, type_name in tensors:
        kind = _checked_kind(name, shape, type_name)
        if name in names:
            raise OutputError(f"tensor {shown(name)}", "occurs twice", "Give every tensor a name of its own.")
        names.add(name)
        infos.append(
            packed_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.id, offset)
        )
        starts.append(offset)
        sizes.append(prod(shape) // kind.block * kind.block_bytes)
        offset += padded(sizes[-1], alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    parts += [_packed_field(key, value) for key, value in metadata.items()]
    header = b"".join(parts + infos)
    header += bytes(-len(header) % alignment)
    return Layout(header, tuple(len(header) + start for start in starts), tuple(sizes), len(header) + offset)


def _checked_kind(name: str, shape: tuple[int, ...], type_name: str) -> GgmlType:
    thing = f"tensor {shown(name)}"
    kind = GGML_TYPES.get(type_name)
    if kind is None:
        raise OutputError(thing, f"cannot be {type_name}: GGUF has no such type", "Choose another type.")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        reason = f"has a name of more than {MAX_NAME_BYTES} bytes, which llama.cpp refuses"
        raise OutputError(thing, reason, "Rename the tensor.")
    problem = _shape_problem(shape, kind)
    if problem:
        raise OutputError(thing, problem, "Choose a type with a smaller block, or another shape.")
    return kind


def packed_text(text: str) -> bytes:
    """A key or a string as it stands in a file."""
    raw = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(raw)) + raw


def _packed_field(key: str, field: Field) -> bytes:
    try:
        return packed_text(key) + _U32.pack(field.type) + _packed_value(field.type, field)
    except (struct.error, TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
        reason = f"cannot be written as {field.type.name} ({error})"
        raise OutputError(f"key {shown(key)}", reason, "Give it a value that its type can hold.") from None


def _packed_value(kind: ValueType, field: Field) -> bytes:
    if kind is ValueType.STRING:
        return packed_text(field.value)
    if kind is not ValueType.ARRAY:
        return _SCALARS[kind].pack(field.value)
    if field.item is None:
        raise ValueError("an array needs the type of its items")
    return _U32.pack(field.item) + _U64.pack(len(field.value)) + _packed_items(field.item, field.value)


def _packed_items(item: ValueType, values: Any) -> bytes:
    if item is ValueType.STRING:
        return b"".join(map(packed_text, values))
    if item is ValueType.ARRAY:
        return b"".join(_packed_value(item, value) for value in values)
    given = np.asarray(values)
    packed = given.astype(_DTYPES[item])
    if given.size and given.dtype.kind != "f" and not np.array_equal(packed, given):
        raise ValueError("a number is out of range")
    return packed.tobytes()
