"""A file's tensors as rows of the heat map: layer × kind, and what each lost.

Read from the header alone.  The relative error of each tensor is what `dither quantize` counted and kept in
the file; where a file has none and the original is at hand, `with_errors` compares some rows of each tensor.

Legend: R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

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
    return tuple(
        TensorRow(
            name=shown(tensor.name),
            layer=layer,
            kind=kind,
            type=shown(tensor.stored),
            bpw=8 * tensor.stored_bytes / max(1, tensor.size),
            bytes=tensor.stored_bytes,
            shape=tensor.shape,
            relative_error=errors.get(tensor.name),
            error_tag="measured" if tensor.name in errors else None,
        )
        for tensor, (layer, kind) in ((tensor, place_of(tensor.name)) for tensor in model.tensors[:MOST_TENSORS])
    )


def with_costs(rows: Sequence[TensorRow], costs: Costs) -> tuple[TensorRow, ...]:
    """Rows with the divergence if only that tensor were stored as it is.  Estimated: a plan measured it at the type of
    its probe, and scaled it by the ratio of the types' errors; the file may be another solver's."""

    def known(row: TensorRow) -> float | None:
        if costs.probe.get(row.name) == row.type or row.name not in costs.divergence:
            return costs.divergence.get(row.name)
        return costs.predicted(row.name, row.type) if row.type in costs.ratios.get(row.name, {}) else None

    found = ((row, known(row)) for row in rows)
    return tuple(
        row if cost is None else row.model_copy(update={"kl_alone": cost, "kl_tag": "estimated"}) for row, cost in found
    )


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
    return {name: float(x) for name, x in found.items() if type(x) in (int, float) and 0 <= x < math.inf}


def with_errors(rows: Sequence[TensorRow], model: Model, original: Model) -> tuple[TensorRow, ...]:
    """Rows that lack an error given one, by comparing `model` with `original`; reads weights.

    Of a tensor of more than `SAMPLED_WEIGHTS` some rows are read, spread over it, and the error is marked
    as estimated.  Tensors that are not in both, in one shape, keep none.
    """
    theirs = {tensor.name: tensor for tensor in original.tensors}
    ours = {shown(tensor.name): tensor for tensor in model.tensors}
    found = []
    for row in rows:
        tensor = None if row.relative_error is not None else ours.get(row.name)
        other = tensor and theirs.get(tensor.name)
        if tensor and other and other.shape == tensor.shape:
            error, tag = _error(tensor, other)
            row = row if error is None else row.model_copy(update={"relative_error": error, "error_tag": tag})
        found.append(row)
    return tuple(found)


def _error(tensor: Tensor, other: Tensor) -> tuple[float | None, str]:
    if tensor.stored == "F32" and other.stored in FLOAT_TYPES:
        return 0.0, "measured"
    count = min(tensor.rows, max(1, SAMPLED_WEIGHTS // tensor.columns))
    squares = norm = 0.0
    for start, stop in _pieces(tensor.rows, count):
        w_RC, v_RC = other.read(start, stop), tensor.read(start, stop)
        squares += float(np.square(w_RC - v_RC, dtype=np.float64).sum())
        norm += float(np.square(w_RC, dtype=np.float64).sum())
    found = math.sqrt(squares / norm) if norm > 0 else 0.0
    return found if math.isfinite(found) else None, "measured" if count == tensor.rows else "estimated"


def _pieces(rows: int, count: int) -> list[tuple[int, int]]:
    """`count` of all rows, in at most 16 contiguous runs spread evenly."""
    runs = 1 if count >= rows else min(16, count)
    each = count // runs
    starts = np.linspace(0, rows - each, runs).astype(int)
    return [(int(start), int(start) + each) for start in starts]
