"""A window into one tensor: its weights before and after, and what other types would have made of them.

The window is small (64 × 64 unless asked for more) and so is the reading: only its rows are touched, so that
a file of 70 billion weights opens as fast as one of five million.  Whole rows are read, because importance
and outliers are matters of columns; a row is a few tens of kilobytes.

Beside the file's own weights stand the same rows rounded to other types by the project's own codecs, without
any data: what each bit costs can be seen by moving a slider.  Types of 256 weights round whole blocks, of
which the window shows a part.

A column is called an outlier where its root mean square over the window's rows is three times the median
column's.  Sixty-four normal numbers estimate theirs to 9 %, so that three times is no accident.  One such
column stretches the scale of every block it is in, and its neighbors are rounded more coarsely: what
LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) and AWQ (Lin et al. 2023, arXiv:2306.00978) start from.

Legend: R rows of the window, C columns of the tensor, W columns of the window.
"""

from __future__ import annotations

import base64
import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.codecs import codec as find_codec
from dither.codecs.base import HALF_MAX, LevelCodec
from dither.errors import DitherError, SourceError, UsageError
from dither.reporting.recipes import read_recipe
from dither.system.text import shown
from dither.types import Codec, Floats, Model, Tensor

SIZE = 64
LARGEST = 256  # rows and columns; what a page can show and a request may ask for
WIDEST = 2**20  # columns of a row that is read whole
SLIDER = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
NARROW = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # where rows are no multiple of 256
CLIP = 99.5  # percentile of magnitudes at which colors end
OUTLIER = 3.0  # times the median column's root mean square
_ALIGNED = 32  # columns; a window begins where a block does


@dataclass(frozen=True)
class Tile:
    """`original_RW`, and the same weights by type: `quantized[type]` is what the file holds."""

    tensor: str
    type: str  # what the file stores the tensor as
    block: int  # neighbors that share a scale
    row: int
    column: int
    original_RW: Floats
    quantized: Mapping[str, Floats]
    clip: float
    outlier_columns: tuple[int, ...]  # of the tensor, those inside the window
    shape: tuple[int, int] = (0, 0)  # of the whole tensor, rows flattened
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        said = {**vars(self), "quantized": {kind: half_base64(w_RW) for kind, w_RW in self.quantized.items()}}
        w_RW = said.pop("original_RW")
        return {**said, "rows": w_RW.shape[0], "columns": w_RW.shape[1], "original": half_base64(w_RW)}


def tile(
    original: Model,
    quantized: Model,
    tensor: str,
    row: int = 0,
    column: int = 0,
    size: int = SIZE,
    types: Sequence[str] | None = None,
) -> Tile:
    """The window of `size` × `size` weights at `row`, `column` (moved inside, and to where a block begins).

    `types` are those of the slider; None chooses what the rows' length allows.  Raises UsageError where the
    tensor is in one model only, has another shape, or is no matrix, where `size` is out of range or a type
    is not known; SourceError where a weight is no number.
    """
    if not 1 <= size <= LARGEST:
        raise UsageError(f"a window of {size}", "cannot be shown", f"Ask for 1 to {LARGEST} rows and columns.")
    before, after = pair(original, quantized, tensor)
    rows, columns = min(size, before.rows), min(size, before.columns)
    row = max(0, min(row, before.rows - rows))
    column = max(0, min(column, before.columns - columns)) // _ALIGNED * _ALIGNED
    w_RC = finite_rows(before, original, row, row + rows)
    stored_RC = finite_rows(after, quantized, row, row + rows)
    at = slice(column, column + columns)
    others = dict.fromkeys(slider(before.columns) if types is None else types)
    others.pop(after.stored, None)
    return Tile(
        after.name,
        after.stored,
        block_of(after.stored, after.columns),
        row,
        column,
        w_RC[:, at],
        {after.stored: stored_RC[:, at], **{kind: rounded(w_RC, kind, at) for kind in others}},
        float(np.percentile(np.abs(w_RC[:, at]), CLIP)),
        outliers(w_RC, at),
        (before.rows, before.columns),
        rewritten(quantized),
    )


def pair(original: Model, quantized: Model, tensor: str) -> tuple[Tensor, Tensor]:
    """The tensor in both models.  Raises UsageError where it is not in both, or has two shapes."""
    before, after = find(original, tensor), find(quantized, tensor)
    if before.shape != after.shape:
        shapes = [" × ".join(map(str, each.shape)) for each in (after, before)]
        reason = f"is {shapes[0]} in {quantized.name}, and {shapes[1]} in {original.name}"
        raise UsageError(shown(tensor), reason, "Compare a file with the model it was made of.")
    if len(before.shape) < 2:
        raise UsageError(shown(tensor), "is a vector, kept in full precision", "Choose a matrix, such as ffn_down.")
    if before.columns > WIDEST or not before.size:
        reason = f"cannot be shown: its rows have {before.columns} weights"
        raise UsageError(shown(tensor), reason, "Choose another tensor.")
    return before, after


def find(model: Model, name: str) -> Tensor:
    """The tensor of that name.  Raises UsageError, naming those that are called nearly so."""
    if found := next((tensor for tensor in model.tensors if tensor.name == name), None):
        return found
    names = [tensor.name for tensor in model.tensors if len(tensor.shape) > 1]
    near = difflib.get_close_matches(name[:200], names, 3, 0.4) or names[:3]
    way_out = f"It has {', '.join(map(shown, near))}." if near else "It holds no matrix at all."
    raise UsageError(f"tensor {shown(name)}", f"is not in {shown(model.name)}", way_out)


def finite_rows(tensor: Tensor, model: Model, start: int, stop: int) -> Floats:
    """Rows `start` to `stop`.  Raises SourceError where one of their weights is no number."""
    w_RC = tensor.read(start, stop)
    if not np.isfinite(w_RC).all():
        thing, way_out = (
            f"{shown(tensor.name)} of {shown(model.name)}",
            "The file is damaged: `dither inspect` says more.",
        )
        raise SourceError(thing, "holds NaN or infinity", way_out)
    return w_RC


def slider(columns: int) -> tuple[str, ...]:
    """The types that rows of so many columns can be rounded to, most bits first.

    >>> slider(4096)[0], slider(288)[-1], slider(30)
    ('Q8_0', 'Q4_0', ())
    """
    return SLIDER if columns % 256 == 0 else NARROW if columns % 32 == 0 else ()


def rounded(w_RC: Floats, kind: str, at: slice) -> Floats:
    """Columns `at` of the rows after a round trip through `kind`, no more blocks than they lie in.  Raises UsageError
    where the type is not known, or does not divide the rows."""
    found = find_codec(kind, w_RC.shape[1])
    if w_RC.shape[1] % found.block:
        reason = f"needs a multiple of {found.block} columns; these rows have {w_RC.shape[1]}"
        raise UsageError(found.name, reason, "Choose a type with smaller blocks.")
    first = at.start // found.block * found.block
    last = -(-at.stop // found.block) * found.block
    return round_trip(found, w_RC[:, first:last])[:, at.start - first : at.stop - first]


def round_trip(found: Codec, w_RC: Floats) -> Floats:
    """Encoded and decoded; every weight of equal importance, for the types that ask for some."""
    w_RC = np.ascontiguousarray(w_RC, np.float32)
    importance_C = np.ones(w_RC.shape[1], np.float32) if found.needs_importance else None
    return found.decode(found.encode(w_RC, importance_C))


def block_of(kind: str, columns: int) -> int:
    """How many neighbors share a scale; 1 where each weight stands alone or the type is not known here.

    >>> block_of("Q4_K", 4096), block_of("Q6_K", 4096), block_of("Q8_0", 4096), block_of("BF16", 4096)
    (32, 16, 32, 1)
    """
    with suppress(DitherError):
        found = find_codec(kind, columns)
        return found.levels.size if isinstance(found, LevelCodec) else found.block
    return 1


def outliers(w_RC: Floats, at: slice) -> tuple[int, ...]:
    """Columns inside `at` whose root mean square is `OUTLIER` times the median column's of the whole rows."""
    size_C = np.sqrt(np.square(w_RC, dtype=np.float64).mean(axis=0))
    limit = OUTLIER * float(np.median(size_C))
    return tuple(int(c) for c in np.flatnonzero(size_C > limit) if at.start <= c < at.stop) if limit else ()


def rewritten(model: Model) -> tuple[str, ...]:
    """A note where the file says that its weights were changed before they were rounded."""
    kept = model.metadata.get("dither.recipe")
    changes = read_recipe(kept.value if kept else None).get("transforms")
    if not isinstance(changes, dict) or not changes:
        return ()
    names = shown(", ".join(map(str, changes)))
    return (f"The weights were rewritten ({names}) before they were rounded: the difference is both.",)


def half_base64(w_RW: Floats) -> str:
    """Little-endian float16, row by row, as base64; beyond its range, its ends."""
    return base64.b64encode(np.clip(w_RW, -HALF_MAX, HALF_MAX).astype("<f2").tobytes()).decode("ascii")
