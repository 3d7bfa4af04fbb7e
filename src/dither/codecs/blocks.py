"""Rows cut into blocks, and scales as they are stored: what the codecs' own methods begin with.

Arrays leave here contiguous, aligned and writable, which memory-mapped ones may not be: numba would compile
every kernel anew for those.  Only what is not so already is copied.

Legend: R rows, C columns, B the weights of one block, P blocks of a row, N bytes of a packed
row, H groups of a block, J half the weights of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from dither.types import Bytes, Codes, Floats


class Kernels:
    """A file of compiled loops, imported when one of them is asked for: numba takes longer to load than
    `dither --help` may."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Callable[..., Any]:
        loop: Callable[..., Any] = getattr(import_module(f"dither.codecs.kernels.{self.file}"), name)
        return loop


def blocks(w: Floats, size: int) -> Floats:
    """One line per block."""
    return np.require(w, np.float32, ("C", "A", "W")).reshape(-1, size)


def packed_blocks(raw: Bytes, size: int) -> Bytes:
    """As `blocks`, for bytes."""
    return np.require(raw, np.uint8, ("C", "A", "W")).reshape(-1, size)


def importance_blocks(importance: Floats | None, size: int) -> Floats:
    """One line per block of a row, to be repeated down the rows; a line of ones for None."""
    return np.ones((1, size), np.float32) if importance is None else blocks(importance, size)


def invert(scale_R: Floats) -> Floats:
    """1 / scale, and 0 for 0: the factor of a grid that was read rather than fitted."""
    inverse_R = np.zeros_like(scale_R)
    return np.divide(np.float32(1), scale_R, out=inverse_R, where=scale_R != 0)


def scale_values(raw_RN: Bytes, kind: str) -> Floats:
    """The scales, of type "float16", "bfloat16" or "float32", that packed rows begin with."""
    if kind == "bfloat16":
        wide_R: Floats = (np.ascontiguousarray(raw_RN[:, :2]).view("<u2").astype(np.uint32) << 16).view(np.float32)
        return wide_R.reshape(-1)
    size, dtype = (4, "<f4") if kind == "float32" else (2, "<f2")
    return np.ascontiguousarray(raw_RN[:, :size]).view(dtype).astype(np.float32).reshape(-1)


def bytes_of_scale(scale_R: Floats, kind: str) -> Bytes:
    """The inverse of `scale_values`, for numbers of that type already."""
    scale_R = np.ascontiguousarray(scale_R, np.float32)
    if kind == "bfloat16":
        return (scale_R.view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8).reshape(-1, 2)
    size, dtype = (4, "<f4") if kind == "float32" else (2, "<f2")
    return scale_R.astype(dtype).view(np.uint8).reshape(-1, size)


def quotients(w_RK: Floats, scale: Floats, otherwise: Floats) -> Floats:
    """w / scale, in `otherwise` where the scale is 0.  A quotient beyond float32 is infinite."""
    with np.errstate(over="ignore"):
        return np.divide(np.asarray(w_RK, np.float32), scale, out=otherwise, where=scale != 0)


def nibbles(codes_NB: Codes, group: int) -> Bytes:
    """Two codes of four bits in a byte: byte j of a group holds weight j below weight j + half a group."""
    codes_NHJ = codes_NB.astype(np.uint8).reshape(len(codes_NB), -1, 2, group // 2)
    return (codes_NHJ[:, :, 0] | codes_NHJ[:, :, 1] << np.uint8(4)).reshape(len(codes_NB), codes_NB.shape[1] // 2)


def codes_of_nibbles(raw_NN: Bytes, group: int) -> Bytes:
    """The inverse of `nibbles`."""
    bytes_NHJ = raw_NN.reshape(len(raw_NN), -1, 1, group // 2)
    codes_NHJ = np.concatenate([bytes_NHJ & 15, bytes_NHJ >> 4], axis=2)
    return codes_NHJ.reshape(len(raw_NN), 2 * raw_NN.shape[1])
