"""compressed-tensors' pack-quantized layout: integers along the inputs, offset to be unsigned.

    weight_packed      I32 [O, ⌈I·b/32⌉]   q + 2^(b−1), one stream of bits per row
    weight_scale       [O, G]              in the model's number type
    weight_zero_point  I32 [⌈O·b/32⌉, G]   only where asymmetric; z + 2^(b−1), packed along the outputs
    weight_shape       I64 [2]             O and I, since ⌈I·b/32⌉ words do not tell

One stream per row makes it the one layout of these whose rows lie together.  Zero points run the other way:
those of 32 rows share b words, so a span of rows begins at a multiple of 32.

Source: vllm-project/compressed-tensors, `compressors/pack_quantized`.

Legend: O out features, I in features, G groups, W words, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts.gptq import plain_or
from dither.formats.layouts.methods import Method
from dither.formats.layouts.numbers import narrow, of_rows, widen
from dither.formats.layouts.parts import Affine, Arrays, Shapes, whole_groups
from dither.formats.layouts.words import pack_words, unpack_words, words

BITS = (2, 3, 4, 5, 6, 7, 8)
METHODS = (Method("compressed-tensors", "compressed-tensors"),)


def parts(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True, scale: str = "BF16"
) -> Shapes:
    """The tensors of one matrix.  `group_size` is `columns` where a row has one scale.

    Raises UnsupportedError where the groups are not whole.
    """
    thing = f"{rows} × {columns} as pack-quantized with {bits} bits"
    if bits not in BITS:
        raise UnsupportedError(thing, f"has {BITS} bits only", "Choose one of them.")
    groups = whole_groups(thing, columns, group_size)
    found: Shapes = {
        "weight_packed": ("I32", (rows, words(columns, bits))),
        "weight_scale": (scale, (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not symmetric:
        found["weight_zero_point"] = ("I32", (words(rows, bits), groups))
    return found


def pack(weight: Affine, bits: int, *, symmetric: bool = True, scale: str = "BF16") -> Arrays:
    """The tensors of `parts`.

    Raises UnsupportedError for reordered columns and for zero points that are not the middle where
    `symmetric` leaves them out, UsageError for scales that the number type does not have.
    """
    if weight.group_of_I is not None:
        raise UnsupportedError("pack-quantized", "loads no reordered columns any more", "Choose GPTQ.")
    zero_OG = weight.zero_OG
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    if symmetric and (zero_OG != middle).any():
        raise UnsupportedError("pack-quantized", f"has a zero point of {middle} only", "Store zero points.")
    if zero_OG.size and not 0 <= zero_OG.min() <= zero_OG.max() <= most:
        raise UnsupportedError("pack-quantized", f"stores zero points from 0 to {most}", "Choose others.")
    found: Arrays = {
        "weight_packed": pack_words(weight.codes_OI, bits).view(np.int32),
        "weight_scale": narrow(weight.scale_OG, scale),
        "weight_shape": np.array(weight.codes_OI.shape, np.int64),
    }
    if not symmetric:
        packed_GW = pack_words(np.ascontiguousarray(zero_OG.T), bits)
        found["weight_zero_point"] = np.ascontiguousarray(packed_GW.T).view(np.int32)
    return found


def unpack(arrays: Mapping[str, npt.NDArray[Any]], start: int, stop: int, *, bits: int, columns: int) -> Affine:
    """Rows `start` to `stop` of the matrix, from whichever parts there are.

    A `weight_zero_point` of I8 is not packed; a `weight_g_idx`, which older releases wrote, says the group
    of each column, with −1 throughout where it has nothing to say.
    """
    codes_OI = unpack_words(arrays["weight_packed"][start:stop], bits, 0, columns)
    scale_OG = widen(of_rows(arrays["weight_scale"], start, stop))
    zero_OG = np.full(scale_OG.shape, 1 << (bits - 1), np.int32)
    given = arrays.get("weight_zero_point")
    if given is not None and given.dtype == np.int8:
        zero_OG += of_rows(given, start, stop).astype(np.int32)
    elif given is not None:
        zero_GO = unpack_words(given.T, bits, start, stop)
        zero_OG = np.ascontiguousarray(zero_GO.T).astype(np.int32)
    group_of_I = arrays.get("weight_g_idx")
    if group_of_I is not None and (group_of_I == -1).all():
        group_of_I = None
    return Affine(codes_OI, scale_OG, zero_OG, plain_or(group_of_I, columns, scale_OG.shape[1]))
