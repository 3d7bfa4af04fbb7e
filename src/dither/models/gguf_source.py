"""A GGUF file as a source: its metadata carried over untouched, its tensors decoded row by row.

A model too large for one file is split (llama.cpp's gguf-split) into `name-00001-of-00003.gguf` and so
on; the first part holds the metadata, every part the keys split.no, split.count and
split.tensors.count.  Whichever part is named, all of them are read as one model.

Legend: R flattened rows, C columns, N bytes of a stored row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dither.codecs import all_codecs
from dither.errors import FormatError, SourceError, UnsupportedError, UsageError
from dither.formats.ggml import Field, ValueType
from dither.formats.gguf import Header, TensorEntry, parse_header
from dither.formats.mapped import MappedFile, fingerprint
from dither.models import dtypes
from dither.system.text import shown
from dither.types import Bytes, Floats, Model, Tensor

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# ggml types in which no file of ours is written: run-time formats, and numbers that are no weights.
_READ_ONLY = frozenset({"Q8_1", "Q8_K", "F64", "I8", "I16", "I32", "I64"})
_FETCH_AGAIN = "Fetch every part of the model again."
HASH = re.compile(r"(sha256[-:])?[0-9a-f]{32,64}")  # what Ollama and the hub's cache call their files
# What a GGUF may be besides a model, by its general.type or, in older files, its general.architecture.
_PROJECTOR = (
    "is a projector of pictures or sound (mmproj), which belongs beside a model and is none",
    "Name the model's own GGUF; llama.cpp takes this file with --mmproj as it is.",
)
_ADAPTER = (
    "is a LoRA adapter, not a model",
    "Merge it first: llama-export-lora -m BASE.gguf --lora ADAPTER.gguf -o MERGED.gguf.",
)
_NO_MODELS = {
    "imatrix": ("is an importance matrix, not a model", "Pass it with --imatrix."),
    "adapter": _ADAPTER,
    "mmproj": _PROJECTOR,
    "clip": _PROJECTOR,
    "controlvector": ("is a control vector, not a model", "Name the model that it steers."),
}


@dataclass(frozen=True)
class _StoredRows:
    """The rows of one tensor in a file."""

    file: MappedFile
    entry: TensorEntry

    def read_raw(self, start: int, stop: int) -> Bytes:
        """Rows `start` to `stop` as they are stored, as uint8 (stop − start, N)."""
        rows = prod(self.entry.shape[:-1])
        if not 0 <= start <= stop <= rows:
            raise UsageError(shown(self.entry.name), f"has {rows} rows, not {start} to {stop}")
        row_bytes = self.entry.nbytes // rows
        raw_N = self.file.read(self.entry.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw_N.reshape(stop - start, row_bytes)

    def read(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` as float32 (stop − start, C)."""
        raw_RN, kind = self.read_raw(start, stop), self.entry.kind.name
        if kind in dtypes.READABLE:
            return dtypes.to_float32(raw_RN.reshape(-1), kind).reshape(len(raw_RN), -1)
        codec = all_codecs().get(kind)
        if codec is None:
            thing, reason = f"tensor {shown(self.entry.name)}", f"is stored as {kind}, which cannot be decoded"
            raise UnsupportedError(thing, reason, "Take a GGUF of another type, F16 or BF16 if there is one.")
        return codec.decode(raw_RN)


def is_projector(name: str) -> bool:
    """Whether a GGUF is named as llama.cpp's converters name a projector, which lies beside its model."""
    return name.endswith(".gguf") and "mmproj" in name.rpartition("/")[2].lower()


def open_gguf(path: Path) -> Model:
    """Opens a GGUF model; of a split one, any part.

    Raises SourceError where a part is missing or the file is no model, FormatError where the bytes
    contradict themselves or parts do not belong together.
    """
    path = Path(path)
    parts = _open_parts(path)
    metadata = parts[0][1].metadata
    if len(parts) > 1:
        metadata = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    kind, arch = _text(metadata, "general.type"), _text(metadata, "general.architecture")
    if (kind or arch) in _NO_MODELS or arch in _NO_MODELS:
        raise SourceError(str(path), *_NO_MODELS[kind if kind in _NO_MODELS else arch])
    if not arch:
        reason = "names no general.architecture, so it is not a model"
        raise SourceError(str(path), reason, "Name a GGUF that llama.cpp can run.")
    if not any(header.tensors for _, header in parts):
        reason = "holds a vocabulary and no tensors: it is for testing tokenizers, and there is nothing to run"
        raise SourceError(str(path), reason, "Name the GGUF with the model's weights.")
    unnamed = HASH.fullmatch(path.name) and not _text(metadata, "general.name")
    tensors = tuple(_tensor(file, entry) for file, header in parts for entry in header.tensors)
    return Model(
        name=_text(metadata, "general.name") or path.stem,
        arch=arch,
        metadata=metadata,
        tensors=tensors,
        origin=str(path),
        kind="gguf",
        files=tuple(str(file.path) for file, _ in parts),
        fingerprint=fingerprint((file, header.data_offset) for file, header in parts),
        notes=((f"read from {len(parts)} parts",) if len(parts) > 1 else ())
        + (
            (f"{path.name[:19]}… is named by a hash, and no general.name is in it: -o gives a name",) if unnamed else ()
        ),
    )


def _tensor(file: MappedFile, entry: TensorEntry) -> Tensor:
    rows = _StoredRows(file, entry)
    raw = None if entry.kind.name in _READ_ONLY else rows.read_raw
    return Tensor(entry.name, entry.shape, entry.kind.name, entry.nbytes, rows.read, raw)


def _text(metadata: dict[str, Field], key: str) -> str:
    """A text of the metadata, safe to print; empty where there is none."""
    field = metadata.get(key)
    return shown(field.value) if field and field.type is ValueType.STRING else ""


def _number(header: Header, key: str) -> Any:
    """A whole number of the metadata, or 0."""
    field = header.metadata.get(key)
    return field.value if field and type(field.value) is int else 0


def _open_parts(path: Path) -> list[tuple[MappedFile, Header]]:
    named = MappedFile(path)
    header = parse_header(named.data, str(path))
    count = _number(header, "split.count")
    if count <= 1:
        return [(named, header)]
    parts = []
    for position, part_path in enumerate(_part_paths(path, count, _number(header, "split.no"))):
        file = named if part_path == path else MappedFile(part_path)
        part = header if part_path == path else parse_header(file.data, str(part_path))
        if (_number(part, "split.count"), _number(part, "split.no")) != (count, position):
            reason = f"is not part {position + 1} of {count}, though its name says so"
            raise FormatError(str(part_path), reason, _FETCH_AGAIN)
        parts.append((file, part))
    _check_parts(path, parts, _number(parts[0][1], "split.tensors.count"))
    return parts


def _part_paths(path: Path, count: int, position: int) -> list[Path]:
    match = PART.fullmatch(path.name)
    if not match or (int(match[2]), int(match[3])) != (position + 1, count):
        reason = f"is part {position + 1} of {count}, but its name does not say so"
        way_out = f"Name the parts as they were: …-{position + 1:05d}-of-{count:05d}.gguf."
        raise SourceError(str(path), reason, way_out)
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        lost = f"{len(missing)} {'is' if len(missing) == 1 else 'are'} missing: {shown(', '.join(missing))}"
        reason = f"is one of {count} parts, of which {lost}"
        raise SourceError(str(path), reason, "Put all parts into one folder.")
    return paths


def _check_parts(path: Path, parts: list[tuple[MappedFile, Header]], promised: int) -> None:
    seen: set[str] = set()
    for file, header in parts:
        for entry in header.tensors:
            if entry.name in seen:
                thing = f"{file.path}, tensor {shown(entry.name)}"
                raise FormatError(thing, "is in another part as well", _FETCH_AGAIN)
            seen.add(entry.name)
    if promised and promised != len(seen):
        reason = f"promises {promised} tensors, but its parts hold {len(seen)}"
        raise FormatError(str(path), reason, _FETCH_AGAIN)
