"""AWQ's GEMM layout: 4-bit codes with zero points, packed along the outputs in an order of its own.

    qweight  I32 [I, O/8]
    qzeros   I32 [G, O/8]    the true zero points
    scales   F16 [G, O]

Nibble i of a word, counted from the lowest, holds output ORDER[i] of its eight: a kernel that widens two
nibbles at a time by masks alone gets neighbors in pairs that way.

Sources: AutoAWQ, `WQLinear_GEMM.from_linear`; for the trick, Kim et al. 2022, arXiv:2211.10017, section 3.

Legend: O out features, I in features, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts.methods import Method
from dither.formats.layouts.numbers import narrow, widen
from dither.formats.layouts.parts import Affine, Arrays, Shapes, whole_groups
from dither.formats.layouts.words import pack_words, unpack_words

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
BITS = 4
METHODS = (Method("awq", "AWQ", vllm_bits=(BITS,)),)
_EACH = 8  # outputs of a word


def parts(rows: int, columns: int, group_size: int) -> Shapes:
    """The tensors of one matrix.  `group_size` is `columns` where a row has one scale.

    Raises UnsupportedError where the matrix does not fill whole words or groups.
    """
    thing = f"{rows} × {columns} as AWQ"
    if rows % _EACH:
        reason = f"packs {_EACH} rows into a word, and {rows} is no multiple"
        raise UnsupportedError(thing, reason, "Leave the tensor unquantized, or choose another format.")
    groups = whole_groups(thing, columns, group_size)
    return {
        "qweight": ("I32", (columns, rows // _EACH)),
        "qzeros": ("I32", (groups, rows // _EACH)),
        "scales": ("F16", (groups, rows)),
    }


def pack(weight: Affine) -> Arrays:
    """The tensors of `parts`.

    Raises UnsupportedError for reordered columns and zero points beyond 15, UsageError for scales that are
    no float16.
    """
    if weight.group_of_I is not None:
        raise UnsupportedError("AWQ", "has no place for reordered columns", "Choose GPTQ.")
    if weight.zero_OG.size and not 0 <= weight.zero_OG.min() <= weight.zero_OG.max() <= 15:
        raise UnsupportedError("AWQ", "stores zero points from 0 to 15", "Choose scales that give such.")
    return {
        "qweight": _packed(weight.codes_OI.T),
        "qzeros": _packed(weight.zero_OG.T),
        "scales": narrow(np.ascontiguousarray(weight.scale_OG.T), "F16"),
    }


def unpack(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int) -> Affine:
    """Rows `start` to `stop` of the matrix."""
    codes_IO = _unpacked(arrays["qweight"], start, stop)
    zero_GO = _unpacked(arrays["qzeros"], start, stop)
    scale_OG = np.ascontiguousarray(widen(arrays["scales"][:, start:stop].T))
    return Affine(np.ascontiguousarray(codes_IO.T), scale_OG, np.ascontiguousarray(zero_GO.T))


def _packed(codes_RO: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    rows, outputs = codes_RO.shape
    ordered = codes_RO.reshape(rows, outputs // _EACH, _EACH)[..., ORDER]
    return pack_words(ordered.reshape(rows, outputs), BITS).view(np.int32)


def _unpacked(packed_RW: npt.NDArray[Any], start: int, stop: int) -> npt.NDArray[np.uint8]:
    first, last = start // _EACH, -(-stop // _EACH)
    codes_RO = unpack_words(packed_RW[:, first:last], BITS, 0, (last - first) * _EACH)
    natural = codes_RO.reshape(len(codes_RO), last - first, _EACH)[..., np.argsort(ORDER)]
    flat_RO = natural.reshape(len(codes_RO), (last - first) * _EACH)
    return flat_RO[:, start - first * _EACH : stop - first * _EACH]
