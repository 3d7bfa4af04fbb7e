"""The numbers that one block of weights may take, and which of them it takes.

A photograph saved with sixteen colors looks good if the sixteen are chosen for that photograph.  A quantized
block is the same bargain: four bits choose among sixteen numbers, and the block's scale (and minimum) choose
which sixteen.  This module lays out those numbers for one block of a real file, counts how often each is
used, and puts three other palettes of sixteen beside them for the very same weights:

    uniform   equal steps from the smallest weight to the largest, as Q4_1 has them
    IQ4_NL    llama.cpp's sixteen numbers, dense near zero, times the scale of least squared error
    NF4       quantiles of a normal distribution (QLoRA, arXiv:2305.14314), times the largest magnitude

Three sources of a block's numbers, the best that there is:

1. a GGUF's block of a type with `codecs.base.Levels`: every code is put through the codec's own `value`;
2. a packed matrix of a GPU format, which its reader gives as numbers alone: the scale that makes all of them
   entries of the type's table is found again (`deduced`);
3. a lattice (IQ2, IQ3), which chooses weights in groups: the numbers that occur, of either sign.

Legend: B weights of a block, K levels, N bytes of a packed block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.codecs import codec as find_codec
from dither.codecs.base import LevelCodec, Levels
from dither.codecs.iq4 import CODEBOOK
from dither.errors import DitherError, UsageError
from dither.formats.layouts.parts import TABLES
from dither.reporting.tiles import finite_rows, pair, rewritten
from dither.system.text import shown
from dither.types import Codec, Floats, Model, Tensor

LONGEST = 1024  # weights of a block that are shown
GRID = 16  # levels of the three palettes beside the block's own
_LATTICE = 32  # neighbors that share a scale in ggml's lattice types
_TOLERANCE = 1e-4  # of a number; a reader multiplies in float32
_SCALES = np.linspace(0.7, 1.3, 61)


@dataclass(frozen=True)
class Palette:
    """`levels` rise; `used[k]` weights of the block are stored as `levels[k]`."""

    tensor: str
    type: str
    row: int
    index: int  # which block of the row
    blocks: int  # blocks in a row
    rows: int
    levels: Sequence[float]
    used: Sequence[int]
    values: Sequence[float]  # the original weights
    uniform: Sequence[float]
    iq4_nl: Sequence[float]
    nf4: Sequence[float]
    how: str  # "stored", "deduced", "occurring": where the levels come from
    notes: tuple[str, ...] = ()

    @property
    def block(self) -> int:
        return len(self.values)

    def to_json(self) -> dict[str, Any]:
        lists = ("levels", "values", "uniform", "iq4_nl", "nf4")
        rounded = {key: [float(f"{value:.6g}") for value in getattr(self, key)] for key in lists}
        return {**vars(self), **rounded, "block": self.block}


def palette(original: Model, quantized: Model, tensor: str, row: int = 0, block: int = 0) -> Palette:
    """The palette of block `block` of a row, both moved inside the tensor.

    A block here is what shares a scale: of a K-quant, one of its sub-blocks.  Raises UsageError where the
    tensor is in one model only, or its weights are stored as floating-point numbers; SourceError where a
    weight is no number.
    """
    before, after = pair(original, quantized, tensor)
    found = _codec(after)
    levels = found.levels if isinstance(found, LevelCodec) else None
    size = min(levels.size if levels else _LATTICE, after.columns)
    row = max(0, min(row, after.rows - 1))
    blocks = -(-after.columns // size)
    block = max(0, min(block, blocks - 1))
    at = slice(block * size, min((block + 1) * size, block * size + LONGEST, after.columns))
    values_B = finite_rows(before, original, row, row + 1)[0, at]
    stored_B = finite_rows(after, quantized, row, row + 1)[0, at]
    numbers_K, how = _levels(after, found, levels, row, at, stored_B)
    used_K = count(stored_B, numbers_K)
    own = (numbers_K.tolist(), used_K.tolist(), values_B.tolist())
    others = (uniform(values_B).tolist(), iq4_nl(values_B).tolist(), nf4(values_B).tolist())
    return Palette(after.name, after.stored, row, block, blocks, after.rows, *own, *others, how, rewritten(quantized))


def _codec(tensor: Tensor) -> Codec:
    with suppress(DitherError):
        found = find_codec(tensor.stored, tensor.columns)
        if found.block > 1:
            return found
    reason = f"is stored as {tensor.stored}: each weight is a number of its own, and there is no palette"
    raise UsageError(shown(tensor.name), reason, "Choose a tensor that is quantized.")


def _levels(
    tensor: Tensor, found: Codec, levels: Levels | None, row: int, at: slice, stored_B: Floats
) -> tuple[Floats, str]:
    if levels is not None:
        if tensor.read_raw is not None:
            return _stored(tensor, found, levels, row, at), "stored"
        if (deduced_K := deduce(stored_B, levels, tensor.stored)) is not None:
            return deduced_K, "deduced"
    return np.unique(np.concatenate([stored_B, -stored_B])), "occurring"


def _stored(tensor: Tensor, found: Codec, levels: Levels, row: int, at: slice) -> Floats:
    """Every code of the block through the codec, under the scales that the file holds."""
    assert tensor.read_raw is not None
    which, start = divmod(at.start, found.block)
    raw_1N = np.array(tensor.read_raw(row, row + 1))[:1, which * found.block_bytes : (which + 1) * found.block_bytes]
    codes_1B, grid = found.unpack(raw_1N)
    here = slice(start, start + levels.size)
    numbers = [found.value(np.full_like(codes_1B[:, here], code), grid, here)[0, 0] for code in levels.codes_K]
    return np.unique(np.array(numbers, np.float32) + np.float32(0))  # −0 and 0 are one number


def deduce(values_B: Floats, levels: Levels, kind: str) -> Floats | None:
    """The levels of a block of which only the numbers are known; None where no scale explains them.

    Scaled tables hold every value for the right scale.  Of several scales, integers take the largest,
    the coarsest grid that explains the block; floats, whose tables look alike at every power of two, the one
    that brings the largest weight to the table's end, as most encoders do.  Integers with a zero point leave
    open where their window of 2ᵇ lies unless its ends are used: it is put as near to zero as it can be.

    >>> numbers = deduce(np.float32([-0.25, 0.5, 1.0, -1.75]), find_codec("int4-g32").levels, "int4-g32")
    >>> len(numbers), float(numbers[0]), float(numbers[-1])
    (16, -2.0, 1.75)
    """
    zero_points = bool(re.match(r"uint\d", kind))
    numbers_K = levels.numbers_K.astype(np.float64)
    count = len(numbers_K)
    table_K = np.arange(1.0 - count, count) if zero_points else numbers_K
    largest = float(np.abs(values_B).max(initial=0.0))
    if not largest:
        return np.zeros(1, np.float32)
    entries = np.unique(np.abs(table_K[table_K != 0]))
    if np.ptp(np.diff(numbers_K)):
        entries = entries[::-1]
    signs = (1.0,) if levels.positive or zero_points else (1.0, -1.0)
    for entry, sign in product(entries, signs):
        scale = sign * largest / entry
        at_B = nearest(values_B / scale, table_K)
        if np.allclose(values_B / scale, table_K[at_B], rtol=_TOLERANCE, atol=1e-9 * largest / abs(scale)):
            if not zero_points:
                levels_K: Floats = np.sort(numbers_K * scale).astype(np.float32)
                return levels_K
            low, high = table_K[at_B].min(), table_K[at_B].max()
            if high - low >= count:
                continue
            low = min(low, max(high - count + 1, -(count // 2)))
            window_K: Floats = ((low + np.arange(count)) * scale).astype(np.float32)
            return window_K
    return None


def nearest(values_B: npt.ArrayLike, numbers_K: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Index of the number nearest to each value; numbers rise."""
    values, numbers = np.asarray(values_B, np.float64), np.asarray(numbers_K, np.float64)
    borders = (numbers[1:] + numbers[:-1]) / 2
    return np.searchsorted(borders, values)


def count(stored_B: Floats, numbers_K: Floats) -> npt.NDArray[np.int64]:
    """How many of a block's stored weights are each number."""
    return np.bincount(nearest(stored_B, numbers_K), minlength=len(numbers_K)).astype(np.int64)


def uniform(values_B: Floats) -> Floats:
    """Sixteen numbers in equal steps from the least weight to the largest."""
    return np.linspace(values_B.min(), values_B.max(), GRID).astype(np.float32)


def iq4_nl(values_B: Floats) -> Floats:
    """IQ4_NL's numbers times the scale, of either sign, that keeps the squared error least."""
    largest = float(np.abs(values_B).max(initial=0.0))
    best, least = np.zeros_like(CODEBOOK), np.inf
    for scale in np.concatenate([_SCALES, -_SCALES]) * (largest / np.abs(CODEBOOK).max()):
        numbers_K = np.sort(CODEBOOK * scale)
        error = float(np.square(values_B - numbers_K[nearest(values_B, numbers_K)]).sum())
        if error < least:
            best, least = numbers_K.astype(np.float32), error
    return best


def nf4(values_B: Floats) -> Floats:
    """NF4's numbers times the block's largest magnitude."""
    return np.sort(TABLES["nf4"] * np.abs(values_B).max(initial=0.0)).astype(np.float32)
