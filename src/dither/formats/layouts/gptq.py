"""GPTQ's layout: unsigned codes below zero points, packed along the inputs.

    qweight  I32 [I·b/32, O]    the codes of a column of inputs, one stream of bits from top to bottom
    qzeros   I32 [G, O·b/32]    the zero points, one stream from left to right
    scales   F16 [G, O]
    g_idx    I32 [I]            the group of each input; [0, 0, …, 1, 1, …] unless columns were reordered

Everything is transposed, so that a kernel multiplies x W with O along the fast axis; a row of the weight is a
column here.  `checkpoint_format` says how zero points are stored: "gptq" (v1) keeps z − 1, because the first
kernel added 1, "gptq_v2" keeps z.  A zero point of 0 has no place in v1: its all-ones field becomes a carry
into the neighbor when today's loaders add 1 to whole words, so v1 is refused for it here.  Read, v1 at
2, 4 and 8 bits is what that addition makes of it, as in GPTQModel, which both borrows and carries and so gets
its own files back; at 3 bits fields wrap one by one, as there.

Sources: AutoGPTQ and GPTQModel, `QuantLinear.pack`; GPTQModel's conversion of v1 to v2.

Legend: O out features, I in features, G groups, W words, b bits.
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
from dither.formats.layouts.words import PERIOD, pack_words, unpack_words, words

BITS = (2, 3, 4, 8)
METHODS = (Method("gptq", "GPTQ", vllm_bits=BITS), Method("auto-round", "AutoRound"))


def parts(rows: int, columns: int, bits: int, group_size: int) -> Shapes:
    """The tensors of one matrix.  `group_size` is `columns` where a row has one scale.

    Raises UnsupportedError where the matrix does not fill whole words or groups.
    """
    thing = f"{rows} × {columns} as GPTQ with {bits} bits"
    if bits not in BITS:
        raise UnsupportedError(thing, f"has {BITS} bits only", "Choose one of them.")
    for what, count in (("rows", rows), ("columns", columns)):
        step = PERIOD if bits == 3 else 32 // bits
        if count % step:
            reason = f"packs {step} {what} into whole words, and {count} is no multiple"
            raise UnsupportedError(thing, reason, "Leave the tensor unquantized, or choose another format.")
    groups = whole_groups(thing, columns, group_size)
    return {
        "qweight": ("I32", (words(columns, bits), rows)),
        "qzeros": ("I32", (groups, words(rows, bits))),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def pack(weight: Affine, bits: int, v1: bool) -> Arrays:
    """The tensors of `parts`; zero points of every code's value, with `v1` not 0.

    Raises UnsupportedError for a zero point that the layout has no room for, UsageError for scales that
    are no float16.
    """
    columns = weight.codes_OI.shape[1]
    groups = weight.scale_OG.shape[1]
    zero_OG = weight.zero_OG.astype(np.int64)
    least, most = int(v1), (1 << bits) - 1 + int(v1)
    if zero_OG.size and not least <= zero_OG.min() <= zero_OG.max() <= most:
        reason = f"stores zero points from {least} to {most}, not {zero_OG.min()} to {zero_OG.max()}"
        raise UnsupportedError(f"checkpoint_format gptq{'' if v1 else '_v2'}", reason, "gptq_v2 has 0, gptq has not.")
    group_of_I = weight.group_of_I
    if group_of_I is None:
        group_of_I = np.arange(columns, dtype=np.int32) // np.int32(columns // groups)
    return {
        "qweight": np.ascontiguousarray(pack_words(weight.codes_OI, bits).T).view(np.int32),
        "qzeros": pack_words((zero_OG.T - int(v1)).astype(np.uint8), bits).view(np.int32),
        "scales": narrow(np.ascontiguousarray(weight.scale_OG.T), "F16"),
        "g_idx": group_of_I.astype(np.int32),
    }


def unpack(
    arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int, *, bits: int, v1: bool, columns: int
) -> Affine:
    """Rows `start` to `stop` of the matrix.

    Without `g_idx` groups are neighbors, as many as fit; `group_of_I` is None where they are of equal number.
    """
    words_OW = np.ascontiguousarray(arrays["qweight"][:, start:stop].T)
    codes_OI = unpack_words(words_OW, bits, 0, columns)
    zero_GO = _zeros(arrays["qzeros"], start, stop, bits, v1)
    scale_OG = np.ascontiguousarray(widen(arrays["scales"][:, start:stop].T))
    group_of_I = plain_or(arrays.get("g_idx"), columns, scale_OG.shape[1])
    return Affine(codes_OI, scale_OG, np.ascontiguousarray(zero_GO.T), group_of_I)


def _zeros(qzeros_GW: npt.NDArray[Any], start: int, stop: int, bits: int, v1: bool) -> npt.NDArray[np.uint8]:
    first = start // PERIOD * PERIOD
    packed_GW = np.ascontiguousarray(qzeros_GW[:, words(first, bits) : words(stop, bits)]).view(np.uint32)
    if v1 and bits != 3:
        ones = np.uint32(0xFFFFFFFF // ((1 << bits) - 1))  # a 1 in every field
        packed_GW = packed_GW + ones
    zero_GO = unpack_words(packed_GW, bits, start - first, stop - first)
    if v1 and bits == 3:
        zero_GO = (zero_GO + np.uint8(1)) & np.uint8(7)
    return zero_GO


def plain_or(group_of_I: npt.NDArray[Any] | None, columns: int, groups: int) -> npt.NDArray[np.int32] | None:
    """The group of each column, None where groups are neighbors of equal number."""
    size = -(-columns // groups)
    neighbors_I = np.arange(columns, dtype=np.int32) // np.int32(size)
    given_I = neighbors_I if group_of_I is None else group_of_I.astype(np.int32)
    if columns % groups == 0 and np.array_equal(given_I, neighbors_I):
        return None
    return given_I
