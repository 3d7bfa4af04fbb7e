"""What a run of `dither quantize` gives back, and what it says of its tensors."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dither.containers.mix import Mix
from dither.display import pairs
from dither.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from dither.engines.check import Checked
    from dither.measuring.schema import Measurement

_LOST = 0.95  # one bit per weight still keeps relative errors near 0.6


@dataclass(frozen=True)
class Result:
    """What was written, and what rounding cost.

    `seconds` is reading, solving and writing, without compiling kernels on their first use and without
    measuring.  `relative_error` is √(Σ(w − ŵ)² / Σw²) over the quantized matrices; `tensors` holds the
    same per tensor beside its type and bytes.  `solvers` counts who kept how many layers (each expert
    of a stack is one) of those that had a choice.
    """

    path: str
    mix: Mix
    bytes: int  # of the file, or of a folder's weights, configuration and tokenizer together
    seconds: float
    relative_error: float
    tensors: dict[str, dict[str, Any]]
    resumed: int  # tensors an interrupted run had finished
    notes: tuple[str, ...]
    method: str = ""  # what chose the codes: "awq + gptq", "plain rounding"; nothing where none were chosen
    solver: str = "nearest"
    solvers: Mapping[str, int] | None = None
    transforms: Mapping[str, Any] | None = None
    measurement: Measurement | None = None
    checked: Checked | None = None  # the engine that loaded the file, where that was asked for

    @property
    def plan(self) -> Mix:
        """The mix, by its name in earlier versions."""
        return self.mix

    @property
    def bits_per_weight(self) -> float:
        return self.mix.bits_per_weight

    @property
    def compression(self) -> float:
        return self.mix.source_bytes / self.mix.tensor_bytes

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows: list[tuple[str, object]] = [
            ("size", f"{format_bytes(self.bytes)}, {self.bits_per_weight:.2f} bits per weight"),
            ("smaller than the source", f"{self.compression:.2f} ×"),
            ("relative weight error", f"{100 * self.relative_error:.2f} %"),
            ("method", self.method or "no codes: numbers alone"),
            ("time", format_seconds(self.seconds)),
        ]
        if self.measurement is not None:
            rows.append(("KL divergence", self.measurement.kl_mean.with_ends()))
        return pairs(self.path, rows, self.notes)

    def to_json(self) -> dict[str, Any]:
        mix = self.mix.to_json()
        for tensor in mix["tensors"]:
            record = self.tensors[tensor["name"]]
            kept = ("relative_error", "solvers", "objective", "nearest_objective", "held", "nearest_held", "damping")
            tensor |= {key: record[key] for key in kept if key in record}
        return {
            **mix,
            "path": self.path,
            "bytes": self.bytes,
            "compression": self.compression,
            "seconds": self.seconds,
            "relative_error": self.relative_error,
            "method": self.method,
            "solver": self.solver,
            "solvers": dict(self.solvers or {}),
            "transforms": dict(self.transforms or {}),
            "resumed_tensors": self.resumed,
            "check": self.checked.to_json() if self.checked else None,
            "measurement": self.measurement.model_dump() if self.measurement else None,
            "notes": list(self.notes),
        }


def tensor_notes(mix: Mix, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tensors of which next to nothing is left, and what solvers had to say."""
    notes = [
        f"{tensor.name}: relative weight error {records[tensor.name]['relative_error']:.0%}, "
        f"its values are beyond what {tensor.type} can hold."
        for tensor in mix.tensors
        if records[tensor.name]["relative_error"] > _LOST
    ]
    said = defaultdict[str, list[str]](list)
    for tensor in mix.tensors:
        for note in records[tensor.name].get("notes", ()):
            said[note].append(tensor.name)
    for note, names in said.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notes.append(f"{shown}: {note}")
    return notes


def solver_counts(records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Who kept how many layers, of those that had a choice; the most first."""
    kept = sum((Counter(record.get("solvers", {})) for record in records.values()), Counter[str]())
    return dict(kept.most_common())


def total_error(mix: Mix, records: Mapping[str, Mapping[str, Any]]) -> float:
    matrices = [records[tensor.name] for tensor in mix.tensors if len(tensor.shape) > 1]
    error, norm = (math.fsum(record[key] for record in matrices) for key in ("squared_error", "squared_norm"))
    return math.sqrt(error / norm) if norm > 0 else 0.0
