"""Codes of 1 to 8 bits as one stream of bits in 32-bit words, the lowest bit first.

Code i occupies bits i·b to i·b + b − 1 of its row's stream.  Where b divides 32 no code leaves its word; at
3 bits the eleventh begins in the last two bits of the first word and ends in the second, and after 32 codes
and 3 words all begins anew.  GPTQ (Frantar et al. 2022, arXiv:2210.17323, its 3-bit kernel) and
compressed-tensors both pack so, along different axes.

Legend: R rows, C codes of a row, W words of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Small = npt.NDArray[np.uint8]
PERIOD = 32  # codes after which a code begins at a word's first bit again, whatever the bits


def words(count: int, bits: int) -> int:
    """How many words `count` codes take.

    >>> words(32, 3), words(33, 4)
    (3, 5)
    """
    return -(-count * bits // 32)


def pack_words(codes_RC: npt.NDArray[Any], bits: int) -> Words:
    """Rows of codes as uint32 (R, W); what the last word has left over is zero."""
    rows, count = codes_RC.shape
    padded_RC = np.zeros((rows, -(-count // PERIOD) * PERIOD), np.uint8)
    padded_RC[:, :count] = codes_RC
    if bits in (1, 2, 4, 8):
        bytes_R = padded_RC[:, :: 8 // bits].copy()
        for k in range(1, 8 // bits):
            bytes_R |= padded_RC[:, k :: 8 // bits] << np.uint8(k * bits)
        packed_RW = bytes_R.view("<u4")
    else:
        packed_RW = _pack_straddling(padded_RC, bits)
    return np.ascontiguousarray(packed_RW[:, : words(count, bits)])


def _pack_straddling(codes_RC: Small, bits: int) -> Words:
    codes = codes_RC.reshape(len(codes_RC), codes_RC.shape[1] // PERIOD, PERIOD).astype(np.uint32)
    packed = np.zeros((*codes.shape[:2], bits), "<u4")
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        packed[..., word] |= codes[..., i] << np.uint32(shift)
        if shift + bits > 32:
            packed[..., word + 1] |= codes[..., i] >> np.uint32(32 - shift)
    return packed.reshape(len(codes_RC), packed.shape[1] * bits)


def unpack_words(packed_RW: npt.NDArray[Any], bits: int, start: int, stop: int) -> Small:
    """Codes `start` to `stop` of every row as uint8 (R, stop − start), touching only their words."""
    first = start // PERIOD * PERIOD
    piece_RW = np.ascontiguousarray(packed_RW[:, words(first, bits) : words(stop, bits)]).view("<u4")
    if bits in (1, 2, 4, 8):
        bytes_RN, each = piece_RW.view(np.uint8), 8 // bits
        codes_RC = np.empty((len(bytes_RN), bytes_RN.shape[1] * each), np.uint8)
        for k in range(each):
            codes_RC[:, k::each] = bytes_RN >> np.uint8(k * bits) & np.uint8((1 << bits) - 1)
    else:
        codes_RC = _unpack_straddling(piece_RW, bits)
    return codes_RC[:, start - first : stop - first]


def _unpack_straddling(packed_RW: Words, bits: int) -> Small:
    rows, count = packed_RW.shape
    periods = -(-count // bits)
    if periods * bits > count:
        packed_RW = np.pad(packed_RW, ((0, 0), (0, periods * bits - count)))
    packed = packed_RW.reshape(rows, periods, bits)
    codes = np.empty((rows, periods, PERIOD), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        code = packed[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | packed[..., word + 1] << np.uint32(32 - shift)
        codes[..., i] = code & mask
    return codes.reshape(rows, periods * PERIOD)
