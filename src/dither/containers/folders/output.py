"""A checkpoint folder being written: safetensors in shards, config.json, tokenizer, and a card.

As with GGUF every place is known before any weight is read: headers are written first.  A module's rows are
gathered until all are there, put into the checkpoint's order, cut into the tensors that the scheme makes of
them, and written; numbers that stay numbers go to their place as they come.

Legend: R rows (experts flattened in), N bytes of a packed row.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.codecs import codec as find_codec, split_codec
from dither.containers.folders.scheme import Scheme
from dither.containers.mix import MixTensor
from dither.containers.part_folder import PartFolder
from dither.containers.part_output import PartOutput
from dither.containers.target import OrderOf
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.safetensors import DTYPE_BITS, lay_out, nbytes
from dither.models.arch.written import Written
from dither.models.checkpoint import ABOUT, INDEX
from dither.system.files import bytes_of
from dither.types import Bytes, Codec

CARD = "README.md"  # for people; no engine reads it, and sizes leave it out
SHARD = 5 * 10**9  # bytes; what the hub's own tools cut at
Named = tuple[str, str, tuple[int, ...]]  # a tensor's name, dtype and shape


@dataclass(frozen=True)
class Contents:
    """What a folder will hold: the mix, in the checkpoint's names and order, and what stands beside it."""

    tensors: Sequence[MixTensor]
    entries: Sequence[Written]
    dtype: str  # of what stays numbers
    documents: Mapping[str, Any]  # JSON files: name → content
    copies: Sequence[Path]  # files of the model's to be taken along


class FolderOutput(PartOutput):
    """A context manager.  `identity` says what work this is, as for GGUF.

    `order` says of a tensor and an expert in which order columns come, where that is not theirs.
    """

    def __init__(
        self, path: Path, scheme: Scheme, contents: Contents, identity: str, order: OrderOf | None = None
    ) -> None:
        self._scheme, self._dtype, self._order = scheme, contents.dtype, order
        self._planned = {tensor.name: tensor for tensor in contents.tensors}
        self._modules: dict[str, list[Written]] = {}
        for entry in contents.entries:
            self._modules.setdefault(entry.tensor, []).append(entry)
        kinds = {tensor.name: tensor.type for tensor in contents.tensors}
        self._parts = {e.name: stored_as(scheme, e, kinds[e.tensor], self._dtype) for e in contents.entries}
        shards = _shards([named for parts in self._parts.values() for named in parts.values()], SHARD)
        headers, self._places = _headers(shards)
        sizes = {name: len(header) for name, header in headers.items()}
        for file, _, size in self._places.values():
            sizes[file] += size
        digest = hashlib.sha256(json.dumps([identity, sorted(contents.documents)]).encode())
        for header in headers.values():
            digest.update(header)
        self._file: PartFolder = PartFolder(path, sizes, digest.hexdigest())
        self._rows: dict[str, Bytes] = {}
        self._lock = threading.Lock()
        self._documents = dict(contents.documents)
        for name, header in headers.items():
            self._file.write_at(0, header, name)
        self._write_documents(headers, contents.copies)

    def _write_documents(self, headers: Mapping[str, bytes], copies: Sequence[Path]) -> None:
        if len(headers) > 1:
            total = sum(size for _, _, size in self._places.values())
            files = {name: file for name, (file, _, _) in self._places.items()}
            self._documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": files}
        for source in copies:
            self._file.copy(source, source.name)
        for name, content in self._documents.items():
            self._file.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @property
    def total(self) -> int:
        folder = self._file.part if self._file.part.is_dir() else self._file.target
        return bytes_of(path for path in folder.rglob("*") if path.name != CARD)

    def write_rows(self, tensor: str, start: int, raw_RN: Bytes) -> None:
        planned, modules = self._planned[tensor], self._modules[tensor]
        if planned.type in FLOAT_TYPES and len(modules) == 1 and modules[0].is_unchanged:
            file, at, _ = self._places[modules[0].name]
            self._file.write_at(at + start * raw_RN.shape[-1], np.ascontiguousarray(raw_RN).data, file)
            return
        rows = planned.size // planned.shape[-1]
        with self._lock:
            if tensor not in self._rows:
                self._rows[tensor] = np.empty((rows, raw_RN.shape[-1]), np.uint8)
        self._rows[tensor][start : start + len(raw_RN)] = raw_RN

    def finish(self, tensor: str, record: Mapping[str, Any]) -> None:
        rows_RN, kind = self._rows.pop(tensor, None), self._planned[tensor].type
        if rows_RN is not None:
            for entry in self._modules[tensor]:
                raw_RN = rows_RN[entry.first_row : entry.first_row + entry.rows]
                if kind in FLOAT_TYPES:
                    self._write_arrays(entry, {"": _numbers(raw_RN, find_codec(kind), entry)})
                    continue
                order = entry.order()
                raw_RN = raw_RN if order is None else raw_RN[order]
                order_C = self._order(tensor, entry.first_row // entry.rows) if self._order else None
                columns = entry.shape[-1]
                packed = self._scheme.pack(split_codec(kind, columns), raw_RN, columns, self._dtype, order_C)
                self._write_arrays(entry, packed)
        self._file.finish(tensor, record, self._planned[tensor].bytes)

    def _write_arrays(self, entry: Written, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for suffix, array in arrays.items():
            name, dtype, shape = self._parts[entry.name][suffix]
            file, at, size = self._places[name]
            data = np.ascontiguousarray(array)
            assert data.nbytes == size, f"{name}: {data.nbytes} bytes for {size} of {dtype} {shape}"
            self._file.write_at(at, data.reshape(-1).view(np.uint8).data, file)

    def fill(self, key: str, text: str) -> bool:
        """Puts a JSON document into what the folder says of itself, under the last part of `key`."""
        about = self._documents.setdefault(ABOUT, {})
        about[key.rpartition(".")[2]] = json.loads(text)
        self._file.write_text(ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        return True

    def keep_errors(self, key: str, errors: Mapping[str, float]) -> None:
        self.fill(key, json.dumps({name: float(f"{error:.6g}") for name, error in errors.items()}))

    def describe(self, card: str) -> None:
        """The folder's README.md."""
        self._file.write_text(CARD, card)


def stored_as(scheme: Scheme, entry: Written, kind: str, dtype: str) -> dict[str, Named]:
    """Suffix → the file's tensors that one tensor of a checkpoint turns into."""
    if kind in FLOAT_TYPES:
        return {"": (entry.name, kind, entry.shape)}
    rows, columns = entry.shape
    parts = scheme.parts(split_codec(kind, columns), rows, columns, dtype)
    return {suffix: (f"{entry.module}.{suffix}", *part) for suffix, part in parts.items()}


def _numbers(raw_RN: Bytes, codec: Codec, entry: Written) -> npt.NDArray[Any]:
    """Numbers in the checkpoint's order, shifted where its norms are."""
    w_RC = codec.decode(raw_RN)
    order = entry.order()
    if order is not None:
        w_RC = w_RC[order] if len(entry.shape) > 1 else w_RC[:, order]
    return codec.encode(entry.change.undo(w_RC))


def _shards(named: Sequence[Named], limit: int) -> list[list[Named]]:
    """Tensors in order, cut where the next would make a shard too large; wide dtypes first within each.

    So that every tensor lies at a multiple of its numbers' size, as the format's own writer has it.
    """
    shards: list[list[Named]] = [[]]
    filled = 0
    for entry in named:
        size = nbytes(entry[1], entry[2])
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return [sorted(shard, key=lambda entry: -DTYPE_BITS[entry[1]]) for shard in shards]


def _headers(shards: Sequence[Sequence[Named]]) -> tuple[dict[str, bytes], dict[str, tuple[str, int, int]]]:
    """File → its header, and tensor → its file, its offset and its size."""
    count = len(shards)
    headers, places = {}, {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        headers[file], found = lay_out(shard, {"format": "pt"})
        places.update({name: (file, at, size) for name, (at, size) in found.items()})
    return headers, places
