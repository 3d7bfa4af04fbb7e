"""An importance matrix meets a plan: which tensor gets which importance, and what is missing.

Legend: E experts (1 for an ordinary layer), C columns.
"""

from __future__ import annotations

import numpy as np

from dither.codecs import codec as find_codec
from dither.containers.recipe import Plan, PlannedTensor
from dither.errors import UsageError
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.imatrix import ImportanceMatrix
from dither.types import Floats


def gather_evidence(plan: Plan, matrix: ImportanceMatrix | None) -> dict[str, Floats]:
    """Importance per tensor as (experts or 1, C), for the tensors that the matrix covers.

    Raises UsageError where sizes differ (a matrix of another model) or where a type needs
    importance that is not there.
    """
    found: dict[str, Floats] = {}
    for planned in plan.tensors:
        values = matrix.means.get(planned.name) if matrix else None
        if values is not None and matrix is not None:
            found[planned.name] = _fit_importance(planned, values, matrix.name)
        elif planned.type not in FLOAT_TYPES and find_codec(planned.type).needs_importance:
            raise UsageError(
                planned.name, f"{planned.type} needs importance, and there is none for this tensor",
                "Give an importance matrix with --imatrix, or choose a larger type.",
            )  # fmt: skip
    if matrix is not None and not found:
        raise UsageError(matrix.name, "names none of this model's tensors", "It was made from another model.")
    return found


def _fit_importance(planned: PlannedTensor, values: Floats, matrix: str) -> Floats:
    experts = planned.shape[0] if len(planned.shape) > 2 else 1
    columns = planned.shape[-1]
    if values.size not in (columns, experts * columns):
        raise UsageError(
            f"{matrix}: {planned.name}", f"has {values.size} values for {experts * columns} columns",
            "It was made from another model.",
        )  # fmt: skip
    means: Floats = values.reshape(-1, columns).astype(np.float32)
    floor = means.mean(axis=-1, keepdims=True) * np.float32(1e-8)  # a dead column still has a scale to share
    raised: Floats = np.maximum(means, floor)
    return raised


def matrix_notes(plan: Plan, matrix: ImportanceMatrix | None) -> list[str]:
    if matrix is None:
        return []
    quantized = [t.name for t in plan.tensors if t.type not in FLOAT_TYPES]
    missing = [name for name in quantized if name not in matrix.means]
    notes = []
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        notes.append(f"No importance for {len(missing)} of {len(quantized)} quantized tensors: {shown}.")
    if matrix.unseen:
        shown = ", ".join(f"{name} ({count})" for name, count in list(matrix.unseen.items())[:3])
        more = " …" if len(matrix.unseen) > 3 else ""
        notes.append(f"Experts that saw no token, whose importance is uniform: {shown}{more}.")
    return notes
