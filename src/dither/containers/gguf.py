"""GGUF: one file with a header (metadata, then a directory of tensors) and the tensors' bytes.

The layout is known before any weight is read, because every type has a fixed size: the header is
written first into the part file, then each tensor's rows at their place, in any order.

Source: the GGUF specification, version 3.  Legend: R rows, N bytes of a packed row.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dither._version import __version__
from dither.containers.journal import PartFile
from dither.containers.part_output import PartOutput
from dither.formats.ggml import GGML_TYPES, Field, ValueType, array, string, u32
from dither.formats.gguf import lay_out, packed_text
from dither.types import Bytes, No, Yes

Entry = tuple[str, tuple[int, ...], str]  # name, shape with columns last, ggml type


def can_hold(codec: str, shape: tuple[int, ...]) -> Yes | No:
    """Whether a tensor of this shape can be stored in this type, and if not, why."""
    kind = GGML_TYPES.get(codec)
    if kind is None:
        return No(f"GGUF has no type {codec}")
    columns = shape[-1] if shape else 1
    if columns % kind.block:
        return No(f"{columns} columns; {codec} needs a multiple of {kind.block}")
    return Yes()


def recipe_metadata(file_type: int, recipe_json: str) -> dict[str, Field]:
    """What a quantized file says of itself: llama.cpp's two keys, and how Dither made it."""
    return {
        "general.quantization_version": u32(2),
        "general.file_type": u32(file_type),
        "dither.version": string(__version__),
        "dither.recipe": string(recipe_json),
    }


def reserved(size: int) -> Field:
    """A string of spaces, which are nothing to JSON: room for a document that is not known yet."""
    return string("{}".ljust(size))


def reserved_numbers(count: int) -> Field:
    """Room for as many float32 numbers that are not known yet."""
    return array(ValueType.FLOAT32, [math.nan] * count)


class GGUFOutput(PartOutput):
    """A GGUF being written (see `types.Output`); a context manager.

    `identity` says what work this is; a run of the same work resumes, and writes identical bytes.
    Raises OutputError where the file cannot be written.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Field], tensors: Sequence[Entry], identity: str) -> None:
        self._layout = lay_out(metadata, tensors)
        self._metadata = metadata
        self._index = {name: i for i, (name, _, _) in enumerate(tensors)}
        digest = hashlib.sha256(self._layout.header + identity.encode()).hexdigest()
        self._file = PartFile(path, self._layout.total, digest)
        self._file.write_at(0, self._layout.header)

    @property
    def total(self) -> int:
        return self._layout.total

    def write_rows(self, tensor: str, start: int, raw_RN: Bytes) -> None:
        offset = self._layout.offsets[self._index[tensor]] + start * raw_RN.shape[-1]
        self._file.write_at(offset, raw_RN.data)

    def finish(self, tensor: str, record: Mapping[str, Any]) -> None:
        self._file.finish(tensor, record, self._layout.sizes[self._index[tensor]])

    def fill(self, key: str, text: str) -> bool:
        """Writes text into the room that `reserved` keeps in the metadata; False where it is too small."""
        room = len(str(self._metadata[key].value).encode())
        raw = text.encode()
        if len(raw) > room:
            return False
        before = packed_text(key)
        at = self._layout.header.index(before) + len(before) + 4 + 8  # behind the value's type and length
        self._file.write_at(at, raw.ljust(room))
        return True

    def keep_errors(self, key: str, errors: Mapping[str, float]) -> None:
        """Writes every tensor's error into the room of `reserved_numbers`, in the order of the tensors."""
        before = packed_text(key)
        at = self._layout.header.index(before) + len(before) + 4 + 4 + 8  # behind two types and the count
        self._file.write_at(at, struct.pack(f"<{len(self._index)}f", *(errors[name] for name in self._index)))
