"""A file's tensors as rows of the heat map: layer × kind, and what each lost.

Read from the header alone.  The relative error of each tensor is what `dither quantize` counted and kept in
the file; where a file has none and the original is at hand, `with_errors` compares some rows of each tensor.

Legend: R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dither.containers.provenance import ERRORS
from dither.formats.ggml import FLOAT_TYPES
from dither.planning.costs import Costs
from dither.reporting.document import MOST_TENSORS, TensorRow
from dither.system.json_text import object_in
from dither.system.text import shown
from dither.types import Model, Tensor

SAMPLED_WEIGHTS = 2**18  # of each tensor, in whole rows: what is compared where nothing is recorded
_BLOCK = re.compile(r"(?:[a-z]+\.)?blk\.(\d{1,6})\.([^.]{1,120})")


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and kind.

    >>> place_of("blk.12.attn_q.weight"), place_of("token_embd.weight"), place_of("blk.3.attn_q.bias")
    ((12, 'attn_q'), (None, 'token_embd'), (3, 'attn_q.bias'))
    """
    found = _BLOCK.match(name)
    kind = found[2] if found else shown(name.removesuffix(".weight").removesuffix(".bias"))
    bias = ".bias" if name.endswith(".bias") else ""
    return (int(found[1]) if found else None), kind + bias


def rows_of(model: Model) -> tuple[TensorRow, ...]:
    """Every tensor of a file, with the errors that the file keeps."""
    errors = recorded_errors(model)
    return tuple(_row(tensor, errors.get(tensor.name)) for tensor in model.tensors[:MOST_TENSORS])


def _row(tensor: Tensor, error: float | None) -> TensorRow:
    layer, kind = place_of(tensor.name)
    return TensorRow(
        name=shown(tensor.name),
        layer=layer,
        kind=kind,
        type=shown(tensor.stored),
        bpw=8 * tensor.stored_bytes / max(1, tensor.size),
        bytes=tensor.stored_bytes,
        shape=tensor.shape,
        relative_error=error,
        error_tag=None if error is None else "measured",
    )


def with_costs(rows: Sequence[TensorRow], costs: Costs) -> tuple[TensorRow, ...]:
    """Rows with the divergence if only that tensor were stored as it is.

    Estimated: a plan measured it at the type of its probe, and scaled it by the ratio of the types' errors;
    the file may be another solver's.
    """
    return tuple(_with_cost(row, costs) for row in rows)


def _with_cost(row: TensorRow, costs: Costs) -> TensorRow:
    if row.name not in costs.divergence:
        return row
    found = costs.divergence[row.name]
    if costs.probe.get(row.name) != row.type:
        if row.type not in costs.ratios.get(row.name, {}):
            return row
        found = costs.predicted(row.name, row.type)
    return row.model_copy(update={"kl_alone": found, "kl_tag": "estimated"})


def recorded_errors(model: Model) -> dict[str, float]:
    """Tensor → relative error, as the file's metadata has them; nothing where they make no sense."""
    field = model.metadata.get(ERRORS)
    found = None if field is None else field.value
    if isinstance(found, str):  # a folder's, which are JSON by name
        found = object_in(found)
    if isinstance(found, np.ndarray) and len(found) == len(model.tensors):  # a GGUF's, in its order
        found = {t.name: float(value) for t, value in zip(model.tensors, found, strict=True)}
    if not isinstance(found, dict):
        return {}
    return {name: float(value) for name, value in found.items() if _is_error(value)}


def _is_error(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def with_errors(rows: Sequence[TensorRow], model: Model, original: Model) -> tuple[TensorRow, ...]:
    """Rows that lack an error given one, by comparing `model` with `original`; reads weights.

    Of a tensor of more than `SAMPLED_WEIGHTS` some rows are read, spread over it, and the error is marked
    as estimated.  Tensors that are not in both, in one shape, keep none.
    """
    theirs = {tensor.name: tensor for tensor in original.tensors}
    ours = {shown(tensor.name): tensor for tensor in model.tensors}
    return tuple(_compared(row, ours.get(row.name), theirs) for row in rows)


def _compared(row: TensorRow, tensor: Tensor | None, theirs: Mapping[str, Tensor]) -> TensorRow:
    if row.relative_error is not None or tensor is None:
        return row
    other = theirs.get(tensor.name)
    if other is None or other.shape != tensor.shape:
        return row
    if tensor.stored == "F32" and other.stored in FLOAT_TYPES:
        return row.model_copy(update={"relative_error": 0.0, "error_tag": "measured"})
    count = min(tensor.rows, max(1, SAMPLED_WEIGHTS // tensor.columns))
    error = _error(tensor, other, count)
    if error is None:
        return row
    tag = "measured" if count == tensor.rows else "estimated"
    return row.model_copy(update={"relative_error": error, "error_tag": tag})


def _error(tensor: Tensor, other: Tensor, count: int) -> float | None:
    squares = norm = 0.0
    for start, stop in _pieces(tensor.rows, count):
        w_RC, v_RC = other.read(start, stop), tensor.read(start, stop)
        squares += float(np.square(w_RC - v_RC, dtype=np.float64).sum())
        norm += float(np.square(w_RC, dtype=np.float64).sum())
    found = math.sqrt(squares / norm) if norm > 0 else 0.0
    return found if math.isfinite(found) else None


def _pieces(rows: int, count: int) -> list[tuple[int, int]]:
    """`count` of all rows, in at most 16 contiguous runs spread evenly."""
    if count >= rows:
        return [(0, rows)]
    runs = min(16, count)
    each = count // runs
    starts = np.linspace(0, rows - each, runs).astype(int)
    return [(int(start), int(start) + each) for start in starts]
