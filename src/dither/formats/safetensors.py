"""safetensors: a JSON header and a heap of bytes, nothing that could run.

    u64 header length · header, JSON · the tensors, one after the other to the end of the file
    {"__metadata__": {text: text},
     "<name>": {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, …}

Source: the format's description (huggingface/safetensors, README "Format") and the checks of its
reference reader: at most 100 MB of header, which begins with `{`; no key twice; offsets count from
the end of the header and tile the data exactly, without gap, overlap or remainder.  The same is
checked here, by code of our own because the header comes from strangers and because the reference
reads whole tensors where we want rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dither.errors import FormatError
from dither.formats.mapped import Buffer, MappedFile
from dither.system.json_text import parse_object
from dither.system.mistaken import refuse_mistaken
from dither.system.text import shown

MAX_HEADER = 100_000_000  # bytes, the reference reader's own limit
MAX_DIMENSIONS = 32
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FETCH_AGAIN = "The file is damaged or incomplete: fetch it again and compare its size."


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.  `offset` is absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]  # in the order of their bytes
    data_offset: int


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file, every position checked against the file's size.

    Raises SourceError where the file cannot be opened, FormatError where its bytes contradict
    themselves or promise what the file does not hold.
    """
    return parse_header(MappedFile(path).data, str(path))


def parse_header(data: Buffer, file: str) -> Header:
    """`read_header` for a whole file already in memory or mapped; `file` names it in errors."""
    size = len(data)
    if data[8:9] != b"{":
        refuse_mistaken(data, file)
        if data[:4] == b"GGUF":
            raise FormatError(file, "is GGUF, though its name says safetensors", "Rename it to .gguf.")
    if size < 8:
        raise FormatError(file, f"has {size} bytes, too few for a safetensors header", FETCH_AGAIN)
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER, size - 8):
        reason = f"promises a header of {length} bytes; the file has {size} and the limit is {MAX_HEADER}"
        raise FormatError(file, reason, FETCH_AGAIN)
    if data[8:9] != b"{":
        raise FormatError(file, "has a header that does not begin with {", FETCH_AGAIN)
    content = parse_object(data[8 : 8 + length], file, FETCH_AGAIN, finite=False, unique=True)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FormatError(f"{file}, __metadata__", "is not a map from text to text", FETCH_AGAIN)
    tensors = [_read_entry(name, info, 8 + length, file) for name, info in content.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(tensors, 8 + length, size, file)
    return Header(metadata, tuple(tensors), 8 + length)


def _read_entry(name: str, info: Any, data_offset: int, file: str) -> TensorEntry:
    thing = f"{file}, tensor {shown(name)}"
    if not isinstance(info, dict):
        raise FormatError(thing, "has no description", FETCH_AGAIN)
    dtype = info.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        way_out = "It needs a newer release of Dither, or the file is damaged."
        raise FormatError(thing, f"has dtype {shown(str(dtype))}, which is not known", way_out)
    shape, offsets = _counts(info, "shape", thing), _counts(info, "data_offsets", thing)
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(thing, f"has {len(shape)} dimensions", FETCH_AGAIN)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(thing, f"has data_offsets {shown(str(offsets))}", FETCH_AGAIN)
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        reason = f"has {end - begin} bytes, which is not what {shown(str(shape))} of {dtype} takes"
        raise FormatError(thing, reason, FETCH_AGAIN)
    return TensorEntry(name, dtype, tuple(shape), data_offset + begin, end - begin)


def _counts(info: dict[str, Any], key: str, thing: str) -> list[int]:
    value = info.get(key)
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**62 for item in value):
        raise FormatError(thing, f"has {key} {shown(str(value))}", FETCH_AGAIN)
    return value


def _check_tiling(tensors: list[TensorEntry], data_offset: int, size: int, file: str) -> None:
    end = data_offset
    for tensor in tensors:
        thing = f"{file}, tensor {shown(tensor.name)}"
        if tensor.offset + tensor.nbytes > size:
            reason = f"ends at byte {tensor.offset + tensor.nbytes}, but the file has {size}: it is truncated"
            raise FormatError(thing, reason, FETCH_AGAIN)
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise FormatError(thing, problem, "The format allows neither: write the file anew.")
        end += tensor.nbytes
    if end != size:
        reason = f"has {size - end} bytes that belong to no tensor"
        raise FormatError(file, reason, "The format allows none: fetch the file again.")


def lay_out(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a file with these tensors (name, dtype, shape), and where each one's bytes go.

    Offsets are absolute in the file; tensors lie in the order in which they are given.  The header is padded
    with spaces so that data begin at a multiple of eight, as the format's own writer does.
    """
    described: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    places, end = {}, 0
    for name, dtype, shape in entries:
        size = nbytes(dtype, shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        places[name] = (end, size)
        end += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: (start + at, size) for n, (at, size) in places.items()}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * DTYPE_BITS[dtype] // 8
