"""The evidence folder: what calibration learnt about every linear layer's input, on disk.

    evidence.json     the manifest: model, data, seed, how many tokens, which tensors are in which file
    tokens.npz        tokens_ST and lengths_S (int32): the very text that was run; spare_ST and spare_lengths_S,
                      optional: more of it, which was not
    blk.N.npz         statistics of block N's inputs; output.npz those of the output matrix
    imatrix.gguf      the mean squares once more, as llama.cpp's tools read them

Layers that read the same input (query, key and value; gate and up) form one *group* and share its
arrays.  In a `.npz`, group i has the members

    i.mean_square     (E, C) float32   E[x²] over all tokens
    i.counts          (E,)   int64     tokens each expert saw; E = 1 for an ordinary layer
    i.hessian         (E, C, C) float32, optional   E[x xᵀ] over the tokens not held back
    i.output.j        (E, K, O, O) float32, optional   E[g gᵀ] of its matrix j's outputs, as diagonal blocks
    i.held            (H, C) float32, optional   inputs held back
    i.held_counts     (E,)   int64, beside it   how many of these rows are each expert's, in order

With output Hessians (`"gradients": true` in the manifest) the tokens of Hessians and held-back inputs are
weighed by how strongly a loss pulls at the outputs (`measuring.collect`).

A `.npz` is a zip archive of `.npy` files (NumPy Enhancement Proposal 1 and `numpy.savez`).  Here the
members are stored, never compressed, so that a file of n bytes can cost no more than n of memory, and
one expert's Hessian can be read without the others.  Nothing is pickled.

Legend: E experts, C columns, H rows held back, S sequences, T token positions, K diagonal
blocks of O rows each.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import FormatError, SourceError, UsageError
from dither.formats.arrays import Member, read_members
from dither.formats.imatrix import ImportanceMatrix, read_imatrix
from dither.formats.tensor_names import block_of, block_prefix
from dither.system.files import replace as replace_file, replacing
from dither.system.text import shown
from dither.types import Evidence, Floats, Model, Tensor

SCHEMA_VERSION = 1
MANIFEST, TOKENS, IMATRIX = "evidence.json", "tokens.npz", "imatrix.gguf"
_CONTINUE = "Mend that and run the same command again."
_CALIBRATE_AGAIN = "Calibrate again with `dither calibrate`."
_CACHE_BYTES = 2**30  # of arrays kept for the next layer that shares them
_SAMPLED_ROWS = (0.0, 0.31, 0.5, 0.77)  # of each sampled matrix, as a share of its rows
_SAMPLED_MATRICES = 8
_ANOTHER = "It was made from another model; learn it from this one: dither calibrate MODEL."


@dataclass(frozen=True)
class Group:
    """Layers that share an input, and where its arrays are."""

    file: str
    index: int
    tensors: tuple[str, ...]
    experts: int
    columns: int


@dataclass(frozen=True)
class GroupStatistics:
    """One group as it is written: arrays of the shapes and dtypes above."""

    tensors: tuple[str, ...]
    mean_square_EC: Floats
    counts_E: npt.NDArray[np.int64]
    hessian_ECC: Floats | None = None
    held_EHC: Sequence[Floats] | None = None  # one array for each expert
    outputs: Mapping[str, Floats] | None = None  # matrix → E[g gᵀ], (E, K, O, O)

    def listed(self) -> dict[str, Any]:
        """The group as the manifest lists it, with a digest of what identifies it."""
        digest = hashlib.sha256(self.mean_square_EC.tobytes() + self.counts_E.tobytes()).hexdigest()
        experts, columns = self.mean_square_EC.shape
        return {"tensors": list(self.tensors), "experts": experts, "columns": columns, "digest": digest}


def write_groups(path: Path, groups: Sequence[GroupStatistics]) -> list[dict[str, Any]]:
    """Writes one `.npz`, synced to the disk and renamed into place; gives the manifest's list."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for i, group in enumerate(groups):
        arrays[f"{i}.mean_square"] = group.mean_square_EC.astype(np.float32, copy=False)
        arrays[f"{i}.counts"] = group.counts_E.astype(np.int64, copy=False)
        if group.hessian_ECC is not None:
            arrays[f"{i}.hessian"] = group.hessian_ECC
        for j, tensor in enumerate(group.tensors):
            if group.outputs and tensor in group.outputs:
                arrays[f"{i}.output.{j}"] = group.outputs[tensor]
        if group.held_EHC is not None and any(len(held_HC) for held_HC in group.held_EHC):
            arrays[f"{i}.held"] = np.concatenate(group.held_EHC).astype(np.float32, copy=False)
            arrays[f"{i}.held_counts"] = np.array([len(rows) for rows in group.held_EHC], dtype=np.int64)
    write_arrays(path, arrays)
    return [group.listed() for group in groups]


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """An uncompressed `.npz`, synced and renamed: it stands there whole or not at all.

    Raises OutputError where the disk refuses.
    """
    with replacing(path, _CONTINUE) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest, last of all: a folder that has one is complete."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=1, allow_nan=False)
    replace_file(folder / MANIFEST, text.encode(), _CONTINUE)


def model_identity(model: Model) -> str:
    """sha256 (hex) that a checkpoint and any GGUF made of it share.

    Covers names and shapes of all weights, and, as float32, the values of the vectors that every type
    keeps exactly: the norms and biases of the first and last block and the output norm.
    """
    digest = hashlib.sha256()
    listed = sorted(tensor.name for tensor in model.tensors if not tensor.name.startswith("rope_"))
    by_name = {tensor.name: tensor for tensor in model.tensors}
    for name in listed:
        digest.update(f"{name}{list(by_name[name].shape)}\0".encode())
    blocks = [block for block in map(block_of, listed) if block is not None]
    ends = tuple(map(block_prefix, sorted({0, max(blocks, default=0)})))
    for name in listed:
        tensor = by_name[name]
        if len(tensor.shape) == 1 and name.startswith((*ends, "output_norm")):
            digest.update(tensor.read(0, tensor.rows).astype("<f4").tobytes())
    return digest.hexdigest()


def weights_sample(model: Model) -> str:
    """sha256 (hex) over a few rows of a few matrices as float32: a fine-tune or another type differs."""
    digest = hashlib.sha256()
    matrices = sorted((t for t in model.tensors if len(t.shape) > 1), key=lambda tensor: tensor.name)
    for tensor in matrices[:: max(1, len(matrices) // _SAMPLED_MATRICES)]:
        for row in sorted({int(share * tensor.rows) for share in _SAMPLED_ROWS}):
            digest.update(tensor.read(row, row + 1).astype("<f4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class EvidenceSize:
    bytes: int
    has_outputs: bool  # whether what acts on a layer's outputs is known as well


class EvidenceStore:
    """Evidence by tensor (`types.EvidenceSource`), read when it is asked for.

    Layers that share an input get the same array objects as long as they are asked for one after the
    other, so that a solver can keep a factorization by identity.  Safe to call from several threads.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        groups: Sequence[Group],
        sha256: str,
        matrix: ImportanceMatrix | None = None,
    ) -> None:
        self.path, self.manifest, self.sha256 = path, manifest, sha256
        self.matrix = matrix  # set where the evidence is an importance matrix and nothing more
        self._groups = {tensor: group for group in groups for tensor in group.tensors}
        self.kept_bytes = _CACHE_BYTES  # of arrays kept for the next layer that shares them
        self._members: dict[str, Mapping[str, Member]] = {}
        self._kept: OrderedDict[tuple[str, int, int], Evidence] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> EvidenceStore:
        """A folder of `dither calibrate`, or a file that holds an importance matrix.

        Raises SourceError where there is none, FormatError where the bytes contradict themselves.
        """
        path = Path(path).expanduser()
        if path.is_dir() or path.name == MANIFEST:
            return _open_folder(cls, path if path.is_dir() else path.parent)
        matrix = read_imatrix(path)
        manifest = {"data": {"name": ", ".join(matrix.datasets), "sha256": matrix.sha256}, "hessians": False}
        return cls(path, manifest, _groups_of(matrix), matrix.sha256, matrix)

    def __call__(self, tensor: str, expert: int = 0) -> Evidence | None:
        """What is known of the input of `tensor`, None where nothing is.

        Raises FormatError naming the tensor where its arrays hold NaN, negative or only zero mean
        squares, or are not of the sizes the manifest gives.
        """
        group = self._groups.get(tensor)
        if group is None:
            return None
        expert = min(expert, group.experts - 1)
        key = (group.file, group.index, expert)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                if not self.kept_bytes:
                    self._kept.clear()  # before the next is read, not after
                found = self._read(group, expert, tensor)
            self._kept[key] = found
            while len(self._kept) > 1 and sum(map(_nbytes, self._kept.values())) > self.kept_bytes:
                self._kept.popitem(last=False)
        output_KOO = self._output(group, expert, tensor)
        return found if output_KOO is None else replace(found, output_KOO=output_KOO)

    def _output(self, group: Group, expert: int, tensor: str) -> Floats | None:
        """One matrix's own, of which layers that share an input share nothing."""
        if self.matrix is not None:
            return None
        file, members = self.path / group.file, self._members_of(group.file)
        member = members.get(f"{group.index}.output.{group.tensors.index(tensor)}")
        if member is None:
            return None
        experts, blocks, rows, across = member.shape if len(member.shape) == 4 else (0, 0, 0, 0)
        sound = experts == group.experts and rows == across and blocks * rows > 0
        if not sound or member.dtype != np.dtype(np.float32):
            reason = f"has output Hessians of shape {member.shape}, {member.dtype}"
            raise FormatError(f"{file}: {tensor}", reason, _CALIBRATE_AGAIN)
        output_KOO: Floats = member.row(expert)
        _check_hessian(output_KOO, f"{file}: {tensor}: outputs")
        return output_KOO

    def bytes_of(self, tensor: str) -> EvidenceSize | None:
        """What one tensor's evidence, or one expert's, takes in memory; None where there is no Hessian."""
        group = self._groups.get(tensor)
        if group is None or self.matrix is not None:
            return None
        members = self._members_of(group.file)
        if f"{group.index}.hessian" not in members:
            return None
        outputs = f"{group.index}.output.{group.tensors.index(tensor)}"
        known = (members.get(name) for name in (f"{group.index}.hessian", f"{group.index}.held", outputs))
        size = sum(prod(member.shape) * member.dtype.itemsize for member in known if member is not None)
        return EvidenceSize(size // group.experts, outputs in members)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self._groups)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The tensors that share an input, together."""
        return tuple(dict.fromkeys(group.tensors for group in self._groups.values()))

    @property
    def has_hessians(self) -> bool:
        return bool(self.manifest.get("hessians"))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(map(str, self.manifest.get("notes", ())))

    def tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(tokens_ST, lengths_S) of the text that was run.  Raises UsageError for a mere matrix."""
        return self._text("tokens_ST", "lengths_S")

    def spare_tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """The same of further text that was not run, for measuring; None in a folder that holds none."""
        return self._text("spare_ST", "spare_lengths_S") if "spare_ST" in self._members_of(TOKENS) else None

    def _text(self, tokens: str, lengths: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        if self.matrix is not None:
            raise UsageError(str(self.path), "is an importance matrix and holds no text", _CALIBRATE_AGAIN)
        members = self._members_of(TOKENS)
        tokens_ST = _member(members, self.path / TOKENS, tokens, np.int32, 2).read()
        lengths_S = _member(members, self.path / TOKENS, lengths, np.int32, 1).read()
        if len(lengths_S) != len(tokens_ST) or not ((lengths_S >= 0).all() and (lengths_S <= tokens_ST.shape[1]).all()):
            raise FormatError(str(self.path / TOKENS), "has lengths that fit no sequences", _CALIBRATE_AGAIN)
        return tokens_ST, lengths_S

    def check(self, model: Model) -> tuple[str, ...]:
        """Whether this evidence is about `model`; notes on what differs.

        An old matrix does not say how many experts its values are of: from here on they are the model's.

        Raises UsageError where it is another model's: hashes, tensors or numbers of columns differ.
        """
        tensors = {tensor.name: tensor for tensor in model.tensors}
        if self.matrix is not None and self.matrix.flat:
            columns = {tensor.name: tensor.columns for tensor in model.tensors if len(tensor.shape) > 2}
            self.matrix = self.matrix.split_rows(columns)
            self._groups = {group.tensors[0]: group for group in _groups_of(self.matrix)}
        known = [name for name in self._groups if name in tensors]
        if not known:
            raise UsageError(str(self.path), f"names none of {model.name}'s tensors", _ANOTHER)
        for name in known:
            self._check_shape(tensors[name])
        if self.matrix is not None:
            return ()
        if self.manifest.get("model_identity") != model_identity(model):
            learnt = shown(str(self.manifest.get("model", "another model")))
            raise UsageError(str(self.path), f"was learnt from {learnt}, not from {model.name}", _ANOTHER)
        if self.manifest.get("weights_sample") != weights_sample(model):
            kin = f"another precision or a relative of {model.name}"
            return (f"The evidence was learnt from {kin}: norms agree, weights differ.",)
        return ()

    def _check_shape(self, tensor: Tensor) -> None:
        group = self._groups[tensor.name]
        experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
        if group.columns != tensor.columns or group.experts not in (1, experts):
            given, needed = f"{group.experts} × {group.columns}", f"{experts} × {tensor.columns}"
            reason = f"is evidence on {given} inputs, and the model's tensor has {needed}"
            raise UsageError(f"{self.path}: {tensor.name}", reason, _ANOTHER)

    def _members_of(self, file: str) -> Mapping[str, Member]:
        if file not in self._members:
            self._members[file] = read_members(self.path / file)
        return self._members[file]

    def _read(self, group: Group, expert: int, tensor: str) -> Evidence:
        if self.matrix is not None:
            counts_E = self.matrix.counts.get(tensor)
            count = int(counts_E[expert]) if counts_E is not None and expert < len(counts_E) else 0
            return Evidence(count, self.matrix.means[tensor][expert], data_sha256=self.sha256)
        thing = f"{self.path / group.file}: {tensor}"
        members, E, C = self._members_of(group.file), group.experts, group.columns

        def part(name: str, dtype: type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
            member = _member(members, self.path / group.file, f"{group.index}.{name}", dtype, len(shape))
            if member.shape != shape:
                raise FormatError(thing, f"has {name} of shape {member.shape}, not {shape}", _CALIBRATE_AGAIN)
            return member.row(expert)

        mean_square_C = part("mean_square", np.float32, (E, C))
        _check_mean_square(mean_square_C, thing)
        hessian_CC = None
        if f"{group.index}.hessian" in members:
            hessian_CC = part("hessian", np.float32, (E, C, C))
            _check_hessian(hessian_CC, thing)
        held_HC = self._held(members, group, expert, thing) if f"{group.index}.held" in members else None
        count = int(part("counts", np.int64, (E,)))
        sha256 = str(self.manifest["data"]["sha256"])
        return Evidence(count, mean_square_C, hessian_CC, held_HC, sha256)

    def _held(self, members: Mapping[str, Member], group: Group, expert: int, thing: str) -> Floats | None:
        file = self.path / group.file
        counts_E = _member(members, file, f"{group.index}.held_counts", np.int64, 1).read()
        member = _member(members, file, f"{group.index}.held", np.float32, 2)
        sound = len(counts_E) == group.experts and (counts_E >= 0).all()
        if not sound or member.shape != (int(counts_E.sum()), group.columns):
            raise FormatError(thing, "has held-back rows that do not add up", _CALIBRATE_AGAIN)
        start = int(counts_E[:expert].sum())
        held_HC: Floats = member.rows(start, start + int(counts_E[expert]))
        if not np.isfinite(held_HC).all():
            raise FormatError(thing, "holds NaN or infinite inputs", _CALIBRATE_AGAIN)
        return held_HC if len(held_HC) else None


def _groups_of(matrix: ImportanceMatrix) -> list[Group]:
    """A matrix knows no groups: every tensor has arrays of its own."""
    return [Group(name, 0, (name,), *means.shape) for name, means in matrix.means.items()]


def _nbytes(evidence: Evidence) -> int:
    arrays = (evidence.mean_square_C, evidence.hessian_CC, evidence.held_HC)
    return sum(array.nbytes for array in arrays if array is not None)


def _check_mean_square(mean_square_C: Floats, thing: str) -> None:
    if not np.isfinite(mean_square_C).all():
        raise FormatError(thing, "holds NaN or infinite mean squares", _CALIBRATE_AGAIN)
    if (mean_square_C < 0).any():
        raise FormatError(thing, "holds negative mean squares", _CALIBRATE_AGAIN)
    if not mean_square_C.any():
        raise FormatError(thing, "is zero throughout: no input ever reached it", _CALIBRATE_AGAIN)


def _check_hessian(hessian: Floats, thing: str) -> None:
    # A sum is NaN or infinite where any term is, and needs no second array of C² truth values.
    if not np.isfinite(hessian.sum(dtype=np.float64)):
        raise FormatError(thing, "holds NaN or infinity in its Hessian", _CALIBRATE_AGAIN)
    if (hessian.diagonal(axis1=-2, axis2=-1) < 0).any():
        raise FormatError(thing, "has a Hessian with a negative diagonal", _CALIBRATE_AGAIN)


def _member(members: Mapping[str, Member], file: Path, name: str, dtype: type, dimensions: int) -> Member:
    member = members.get(name)
    if member is None:
        raise FormatError(f"{file}: {name}", "is missing", _CALIBRATE_AGAIN)
    if member.dtype != np.dtype(dtype) or len(member.shape) != dimensions:
        reason = f"is {member.dtype} of {len(member.shape)} dimensions, not {np.dtype(dtype)} of {dimensions}"
        raise FormatError(f"{file}: {name}", reason, _CALIBRATE_AGAIN)
    return member


def _open_folder(cls: type[EvidenceStore], folder: Path) -> EvidenceStore:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        unfinished = any(folder.glob("blk.*.npz"))
        reason = "holds an unfinished calibration" if unfinished else f"holds no {MANIFEST}"
        way_out = "Run the same `dither calibrate` again to finish it." if unfinished else _CALIBRATE_AGAIN
        raise SourceError(str(folder), reason, way_out) from None
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from None
    try:
        manifest = json.loads(raw)
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION:
            raise FormatError(str(path), f"is of version {version!r}; {SCHEMA_VERSION} can be read", _CALIBRATE_AGAIN)
        str(manifest["data"]["sha256"])
        groups = [
            _group(file, i, entry) for file, entries in manifest["files"].items() for i, entry in enumerate(entries)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"is damaged ({type(error).__name__}: {shown(str(error))})"
        raise FormatError(str(path), reason, _CALIBRATE_AGAIN) from None
    return cls(folder, manifest, groups, hashlib.sha256(raw).hexdigest())


def _group(file: str, index: int, entry: Mapping[str, Any]) -> Group:
    """Raises ValueError where the file is no plain name: a manifest must not make us read elsewhere."""
    if Path(file).name != file or not file.endswith(".npz"):
        raise ValueError(f"file name {file!r}")
    experts, columns = entry["experts"], entry["columns"]
    if not all(type(count) is int and 1 <= count < 2**31 for count in (experts, columns)):
        raise ValueError(f"{shown(str(experts))} experts of {shown(str(columns))} columns")
    return Group(file, index, tuple(map(str, entry["tensors"])), experts, columns)
