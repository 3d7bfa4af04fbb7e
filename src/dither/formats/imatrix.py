"""Importance matrices: E[x²] of every column of every linear layer's input, as llama.cpp keeps them.

Two forms exist.  GGUF, since mid-2025: `<tensor>.in_sum2` (sums of squares, one row per expert) and
`<tensor>.counts` (how many tokens each row saw).  The old `.dat`: a count of entries, then for each
a name, a number of calls and the sums.  Both are read here into mean squares.

Legend: E experts (1 for an ordinary layer), C columns.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dither.errors import FormatError, SourceError
from dither.formats.gguf import Header, TensorEntry, read_header
from dither.types import Floats

_MAKE_IT_AGAIN = "Make the matrix again, or leave --imatrix out."


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares per tensor: float32 (E, C), finite, not negative, not all zero."""

    means: dict[str, Floats]
    unseen: dict[str, int]  # tensor → experts that saw no token; their importance is 1 throughout
    datasets: tuple[str, ...]
    chunks: int
    sha256: str
    name: str


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Either form, told apart by the file's first bytes.

    Raises SourceError or FormatError: no such file, not a matrix, truncated, NaN, negative or all
    zero, each by tensor name.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(str(path), "is no file", "Give the path of an importance matrix.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        means, unseen, datasets, chunks = _read_gguf(path)
    else:
        means, unseen, datasets, chunks = _read_dat(path)
    if not means:
        raise FormatError(str(path), "holds no importance values", _MAKE_IT_AGAIN)
    for tensor, values in means.items():
        _check(path, tensor, values)
    return ImportanceMatrix(means, unseen, datasets, chunks, _sha256(path), path.name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check(path: Path, tensor: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise FormatError(f"{path}: {tensor}", "holds NaN or infinite importance", _MAKE_IT_AGAIN)
    if (values < 0).any():
        raise FormatError(f"{path}: {tensor}", "holds negative importance", _MAKE_IT_AGAIN)
    if not values.any(axis=-1).all():
        raise FormatError(f"{path}: {tensor}", "is zero throughout", _MAKE_IT_AGAIN)


def _read_gguf(path: Path) -> tuple[dict[str, Floats], dict[str, int], tuple[str, ...], int]:
    header = read_header(path)
    entries = {entry.name: entry for entry in header.tensors}
    means: dict[str, Floats] = {}
    unseen: dict[str, int] = {}
    for name, entry in entries.items():
        if not name.endswith(".in_sum2"):
            continue
        tensor = name.removesuffix(".in_sum2")
        counts_entry = entries.get(f"{tensor}.counts")
        if counts_entry is None:
            raise FormatError(f"{path}: {tensor}", "has sums without counts", _MAKE_IT_AGAIN)
        sums_EC = _floats(path, entry)
        counts_E = _floats(path, counts_entry).reshape(-1)
        if len(counts_E) != len(sums_EC):
            raise FormatError(f"{path}: {tensor}", "has as many counts as not experts", _MAKE_IT_AGAIN)
        seen = counts_E > 0
        means[tensor] = np.where(seen[:, None], sums_EC / np.maximum(counts_E, 1)[:, None], np.float32(1))
        if not seen.all():
            unseen[tensor] = int((~seen).sum())
    return means, unseen, *_provenance(header)


def _provenance(header: Header) -> tuple[tuple[str, ...], int]:
    datasets = header.metadata.get("imatrix.datasets")
    chunks = header.metadata.get("imatrix.chunk_count")
    return tuple(map(str, datasets.value)) if datasets else (), int(chunks.value) if chunks else 0


def _floats(path: Path, entry: TensorEntry) -> Floats:
    if entry.kind.name != "F32":
        raise FormatError(f"{path}: {entry.name}", f"is {entry.kind.name}, not F32", _MAKE_IT_AGAIN)
    flat = np.fromfile(path, dtype="<f4", count=entry.nbytes // 4, offset=entry.offset)
    return flat.reshape(-1, entry.shape[-1])


def _read_dat(path: Path) -> tuple[dict[str, Floats], dict[str, int], tuple[str, ...], int]:
    data = path.read_bytes()
    position = 0

    def take(size: int, what: str) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(data):
            raise FormatError(str(path), f"is no importance matrix, or ends inside {what}", _MAKE_IT_AGAIN)
        position += size
        return data[position - size : position]

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    means: dict[str, Floats] = {}
    for _ in range(integer("its count")):
        name = take(integer("a name"), "a name").decode("utf-8", "replace")
        calls, size = integer(name), integer(name)
        values = np.frombuffer(take(4 * size, name), dtype="<f4").astype(np.float32)
        if calls > 0:
            values /= calls
        means[name] = values.reshape(1, -1)
    chunks = 0
    datasets: tuple[str, ...] = ()
    if position < len(data):
        chunks = integer("the number of chunks")
        datasets = (take(integer("the data's name"), "the data's name").decode("utf-8", "replace"),)
    return means, {}, datasets, chunks
