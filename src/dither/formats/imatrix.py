"""Importance matrices: E[x²] of every column of every linear layer's input, as llama.cpp keeps them.

Two forms exist.  GGUF, since mid-2025: `<tensor>.in_sum2` (sums of squares, one row per expert) and
`<tensor>.counts` (how many tokens each row saw).  The old `.dat`: a count of entries, then for each
a name, a number of calls, how many values there are, and means times calls.  Of a mixture these are E rows of C
values one after the other, and nothing in the file says so: only the model can (`split_rows`).  An expert that saw
no token has importance 1 throughout, which is what llama-imatrix writes and llama-quantize reads; merged and older
files have zeros there.  Both are read here into mean squares; written is the former,
with the keys that llama-quantize asks for: `general.type` "imatrix", `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size` (`tools/imatrix/imatrix.cpp` in llama.cpp).

Legend: E experts (1 for an ordinary layer), C columns.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dither.errors import FormatError, OutputError, SourceError
from dither.formats.ggml import ValueType, array, string, u32
from dither.formats.gguf import TensorEntry, lay_out, read_header
from dither.system.files import replacing, sha256_of
from dither.system.mistaken import refuse_mistaken
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
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # tokens per expert, where known
    flat: frozenset[str] = frozenset()  # tensors of a .dat, whose rows the file does not tell apart

    def split_rows(self, columns: Mapping[str, int]) -> ImportanceMatrix:
        """The matrix with the rows that a model's tensors have, where it knew none: E·C values become (E, C).

        `columns` are C of the model's tensors, by name; values that are no multiple of them stay as they are.
        """
        means, unseen = dict(self.means), dict(self.unseen)
        for name in self.means:
            if name in self.flat and name in columns and means[name].size % columns[name] == 0:
                rows_EC, dead = _seen(means[name].reshape(-1, columns[name]))
                means[name] = rows_EC
                if dead:
                    unseen[name] = dead
        return replace(self, means=means, unseen=unseen)


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
    means, counts, datasets, chunks = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    if not means:
        raise FormatError(str(path), "holds no importance values", _MAKE_IT_AGAIN)
    unseen = {}
    for tensor, values_EC in means.items():
        _check(path, tensor, values_EC)
        means[tensor], dead = _seen(values_EC)
        dead += int((counts[tensor] == 0).sum()) if tensor in counts else 0
        if dead:
            unseen[tensor] = dead
    flat = frozenset(() if counts else means)
    return ImportanceMatrix(means, unseen, datasets, chunks, sha256_of(path), path.name, counts, flat)


def _seen(means_EC: Floats) -> tuple[Floats, int]:
    """Experts whose importance is zero throughout saw nothing: it becomes 1.  With their number."""
    dead_E = np.asarray(means_EC.sum(axis=-1) == 0)
    count = int(dead_E.sum())
    return (np.where(dead_E[:, None], np.float32(1), means_EC) if count else means_EC), count


def write_imatrix(
    path: str | Path,
    means: Mapping[str, Floats],
    counts: Mapping[str, npt.NDArray[np.int64]],
    *,
    datasets: Sequence[str],
    chunks: int,
    context: int,
) -> None:
    """Writes mean squares in llama.cpp's GGUF form; the file stands there whole or not at all.

    `means` are (E, C) per tensor, `counts` the tokens (E,) behind each row; the sums in the file are
    their products.  llama.cpp gives an expert without tokens the same importance everywhere: to
    hand over what is in `means`, its count must be at least 1.  `chunks` of `context` tokens were run.
    Raises OutputError naming the tensor whose rows and counts differ in number, or the file.
    """
    arrays: dict[str, Floats] = {}
    for tensor, means_EC in sorted(means.items()):
        counts_E = counts[tensor]
        if means_EC.ndim != 2 or len(counts_E) != len(means_EC):
            reason = f"has means of shape {means_EC.shape} and {len(counts_E)} counts"
            raise OutputError(f"importance of {tensor}", reason, "Give one count for each row.")
        sums_EC = means_EC.astype(np.float64) * counts_E[:, None]
        arrays[f"{tensor}.in_sum2"] = sums_EC.astype("<f4")
        arrays[f"{tensor}.counts"] = counts_E.astype("<f4").reshape(-1, 1)
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array(ValueType.STRING, datasets),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(context),
    }
    layout = lay_out(metadata, [(name, values.shape, "F32") for name, values in arrays.items()])
    with replacing(Path(path), "Free some space or choose another place.") as file:
        file.truncate(layout.total)
        file.write(layout.header)
        for offset, values in zip(layout.offsets, arrays.values(), strict=True):
            file.seek(offset)
            file.write(values.tobytes())


def _check(path: Path, tensor: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise FormatError(f"{path}: {tensor}", "holds NaN or infinite importance", _MAKE_IT_AGAIN)
    if (values < 0).any():
        raise FormatError(f"{path}: {tensor}", "holds negative importance", _MAKE_IT_AGAIN)
    if not values.any():
        raise FormatError(f"{path}: {tensor}", "is zero throughout", _MAKE_IT_AGAIN)


_Read = tuple[dict[str, Floats], dict[str, npt.NDArray[np.int64]], tuple[str, ...], int]


def _read_gguf(path: Path) -> _Read:
    header = read_header(path)
    entries = {entry.name: entry for entry in header.tensors}
    means: dict[str, Floats] = {}
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for name in (name for name in entries if name.endswith(".in_sum2")):
        tensor = name.removesuffix(".in_sum2")
        counts_entry = entries.get(f"{tensor}.counts")
        if counts_entry is None:
            raise FormatError(f"{path}: {tensor}", "has sums without counts", _MAKE_IT_AGAIN)
        sums_EC = _floats(path, entries[name])
        counts_E = _floats(path, counts_entry).reshape(-1)
        if len(counts_E) != len(sums_EC):
            raise FormatError(f"{path}: {tensor}", "has as many counts as not experts", _MAKE_IT_AGAIN)
        seen = counts_E > 0
        means[tensor] = np.where(seen[:, None], sums_EC / np.maximum(counts_E, 1)[:, None], np.float32(1))
        counts[tensor] = _whole(counts_E)
    datasets = header.metadata.get("imatrix.datasets")
    chunks = header.metadata.get("imatrix.chunk_count")
    texts = tuple(map(str, datasets.value)) if datasets else ()
    return means, counts, texts, int(chunks.value) if chunks else 0


def _whole(counts_E: Floats) -> npt.NDArray[np.int64]:
    """Counts as whole numbers; a fraction below one still counts as seen, and NaN as not."""
    bounded_E = np.clip(np.nan_to_num(counts_E, nan=0.0), 0.0, 2.0**62)
    whole_E: npt.NDArray[np.int64] = np.ceil(bounded_E).astype(np.int64)
    return whole_E


def _floats(path: Path, entry: TensorEntry) -> Floats:
    if entry.kind.name != "F32":
        raise FormatError(f"{path}: {entry.name}", f"is {entry.kind.name}, not F32", _MAKE_IT_AGAIN)
    flat = np.fromfile(path, dtype="<f4", count=entry.nbytes // 4, offset=entry.offset)
    return flat.reshape(-1, entry.shape[-1])


def _read_dat(path: Path) -> _Read:
    data = path.read_bytes()
    refuse_mistaken(data, str(path))
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
