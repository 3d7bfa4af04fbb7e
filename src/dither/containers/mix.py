"""From a wish ("Q4_K_M") to a mix: the type and the bytes of every tensor, before any work.

The preset's mix is llama.cpp's (`presets.py`); what is added here is the arithmetic, and an honest
account of fallbacks: a row that is not a multiple of 256 cannot be a K-quant, takes a larger type
instead, and the file is no longer what its name promises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from dither.codecs import codec as find_codec
from dither.containers.gguf import can_hold
from dither.containers.presets import Assignment, Wanted, assign, file_type
from dither.display import table
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.system.json_text import object_in
from dither.types import Model, No, Tensor
from dither.units import format_bytes, format_count

PLANNED = "plan"  # instead of a preset's name


@dataclass(frozen=True)
class Options(Wanted):
    """What a person asked for.

    `plan` is the sha256 of a plan file that names every tensor's type (`containers.plan_file`); `to` then only
    says what llama.cpp calls a file of that size.
    """

    plan: str = ""
    folder: bool = False  # a checkpoint folder (`containers.folders`), not a GGUF
    bits: int | None = None  # of a folder's grid, as are the next two; None is the container's own choice
    group: int | None = None
    sym: bool | None = None
    dtype: str | None = None  # of a folder's numbers
    act_order: bool = False  # a folder's groups by what columns matter

    @property
    def label(self) -> str:
        """What people call it."""
        if self.folder:
            return self.to.lower()
        return PLANNED if self.plan else self.to.upper()


def exactly(name: str) -> str:
    """The regular expression that this name alone matches."""
    return rf"\A{re.escape(name)}\Z"


def is_planned(model: Model) -> bool:
    """Whether a file's recipe names a plan."""
    recipe = model.metadata.get("dither.recipe")
    return recipe is not None and "plan" in object_in(recipe.value)


@dataclass(frozen=True)
class MixTensor:
    name: str
    shape: tuple[int, ...]
    source_type: str
    source_bytes: int
    type: str
    bytes: int
    wanted: str  # the preset's type before any fallback
    reason: str  # why it is not `wanted`, or why it is not quantized; "" otherwise

    @classmethod
    def of(cls, tensor: Tensor, kind: str, size: int, wanted: str = "", reason: str = "") -> MixTensor:
        """A source's tensor as it becomes `kind` in `size` bytes."""
        stored, stored_bytes = tensor.stored, tensor.stored_bytes
        return cls(tensor.name, tensor.shape, stored, stored_bytes, kind, size, wanted or kind, reason)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_fallback(self) -> bool:
        return self.type != self.wanted


@dataclass(frozen=True)
class Mix:
    """What will be written: every tensor's type and bytes, in the file's order."""

    to: str
    file_type: int
    tensors: tuple[MixTensor, ...]
    remarks: tuple[str, ...] = ()  # what a person should know of the choice of types
    file_bytes: int | None = None  # of the file that holds it, where that was laid out

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data; the file's header comes on top."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.parameters

    def by_type(self) -> dict[str, dict[str, int]]:
        """Type → number of tensors, parameters and bytes, the largest first."""
        return count_by_type((tensor.type, tensor.size, tensor.bytes) for tensor in self.tensors)

    def notes(self) -> list[str]:
        """Everything that is to be said of it before it is made."""
        return [*self.fallback_notes(), *self.remarks]

    def fallback_notes(self) -> list[str]:
        """One sentence per kind of fallback, then what they cost together; empty without any.

        `180 of 211 matrices have 576 columns and cannot be Q4_K: they become Q5_0.`
        """
        changed = [t for t in self.tensors if t.is_fallback]
        if not changed:
            return []
        matrices = sum(1 for t in self.tensors if len(t.shape) > 1)
        kinds = Counter((t.shape[-1], t.wanted, t.type) for t in changed)
        notes = [
            f"{count} of {matrices} matrices have {columns} columns and cannot be {wanted}: "
            f"{'they become' if count > 1 else 'it becomes'} {kind} "
            f"({bits_of(kind, columns):.2f} bpw, not {bits_of(wanted, columns):.2f})."
            for (columns, wanted, kind), count in kinds.most_common()
        ]
        wished = sum(t.size * bits_of(t.wanted, t.shape[-1]) for t in self.tensors) / self.parameters
        notes.append(f"{self.to} becomes {self.bits_per_weight:.2f} bpw, not {wished:.2f}.")
        return notes

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows = []
        for kind, group in self.by_type().items():
            weights, size = group["parameters"], group["bytes"]
            bits = f"{8 * size / max(1, weights):.2f}"
            rows.append((kind, group["tensors"], format_count(weights), format_bytes(size), bits))
        whole = format_bytes(self.file_bytes or self.tensor_bytes)
        title = (
            f"{self.to}: {whole}{'' if self.file_bytes else ' of tensors'}, {self.bits_per_weight:.2f} bits per weight"
        )
        heads = ("type", "tensors", "weights", "size", "bits per weight")
        return table(title, heads, rows, self.notes())

    def to_json(self) -> dict[str, Any]:
        return {
            "to": self.to,
            "parameters": self.parameters,
            "bytes": self.file_bytes,
            "tensor_bytes": self.tensor_bytes,
            "source_bytes": self.source_bytes,
            "bits_per_weight": self.bits_per_weight,
            "types": self.by_type(),
            "fallbacks": self.fallback_notes(),
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
        }


def bits_of(kind: str, columns: int) -> float:
    """Bits per weight of a type."""
    known = GGML_TYPES.get(kind)
    return known.bits_per_weight if known else find_codec(kind, columns).bits_per_weight


def count_by_type(tensors: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """(type, weights, bytes) of every tensor → per type how many, the largest share first."""
    groups: dict[str, dict[str, int]] = {}
    for kind, size, stored in tensors:
        group = groups.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += size
        group["bytes"] += stored
    return dict(sorted(groups.items(), key=lambda item: -item[1]["bytes"]))


def make_mix(model: Model, options: Options, importance: Collection[str] = ()) -> Mix:
    """The mix for a model; `importance` names the tensors that an importance matrix covers.

    Raises UsageError: an unknown preset or type, a pattern that is no regular expression or matches
    nothing, an override that cannot hold the tensor, a type that needs importance and has none.
    """
    check_patterns(model, options)
    listed = [(tensor.name, tensor.shape) for tensor in model.tensors]
    assigned = assign(listed, options, arch=model.arch, metadata=model.metadata, has_imatrix=bool(importance))
    planned = (_plan_tensor(tensor, own, model.kind) for tensor, own in zip(model.tensors, assigned, strict=True))
    return Mix(options.label, file_type(options.to), tuple(planned))


def check_patterns(model: Model, options: Options) -> None:
    """Raises UsageError for a pattern, or a plan's tensor, that nothing of the model answers to."""
    for pattern, _ in options.tensors:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--tensor {pattern}", f"is no regular expression ({error})") from None
        if not any(compiled.search(tensor.name) for tensor in model.tensors):
            way_out = "`dither inspect --tensors` lists their names."
            raise UsageError(f"--tensor {pattern}", "matches no tensor", way_out)


def _plan_tensor(tensor: Tensor, assignment: Assignment, kind: str) -> MixTensor:
    chosen, wanted = assignment.type, assignment.wanted
    if kind == "gguf" and assignment.reason and chosen == wanted == "F32" and tensor.read_raw is not None:
        chosen = wanted = tensor.stored  # what is not quantized keeps the source's type
    verdict = can_hold(chosen, tensor.shape)
    if isinstance(verdict, No):
        raise UsageError(tensor.name, verdict.reason, "Choose another type for it with --tensor.")
    size = tensor.rows * GGML_TYPES[chosen].row_bytes(tensor.columns)
    return MixTensor.of(tensor, chosen, size, wanted, assignment.reason)
