"""The number types that scales are stored as, and the small floats that have a table of all their values.

safetensors has types that numpy has not: bfloat16 travels as uint16, the 8-bit floats as uint8, both the
stored bits.  Sources: E4M3, Micikevicius et al. 2022, arXiv:2209.05433, table 1; E8M0 and E2M1, OCP
Microscaling Formats 1.0, sections 5.4.1 and 5.3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import UsageError
from dither.types import Floats

ARRAYS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


def e4m3() -> npt.NDArray[np.float64]:
    """All 256: one sign, four exponent bits with bias 7, three of mantissa; no infinity, one NaN per sign."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[(byte & 127) == 127] = np.nan
    return np.asarray(np.where(byte & 128, -values, values))


def e8m0() -> npt.NDArray[np.float64]:
    """All 256: powers of two from 2⁻¹²⁷ on, and a NaN at the end."""
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values


def e2m1() -> Floats:
    """All 16: a sign above an index into eight magnitudes."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([magnitudes, -magnitudes])


def e2m3() -> Floats:
    """All 64: a sign above an index into 32 magnitudes, the first eight of which are subnormal."""
    eighths = np.arange(8, dtype=np.float32) / 8
    magnitudes = np.concatenate([eighths, 1 + eighths, 2 * (1 + eighths), 4 * (1 + eighths)])
    return np.concatenate([magnitudes, -magnitudes])


def widen(stored: npt.NDArray[Any]) -> Floats:
    """Stored scales as float32: float16 and float32 as they are, uint16 as bfloat16's bits."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def of_rows(stored: npt.NDArray[Any], start: int, stop: int) -> npt.NDArray[Any]:
    """Those of rows `start` to `stop`, (stop − start, G), whether stored per tensor, row or group."""
    if stored.size == 1:
        return np.broadcast_to(stored.reshape(1, 1), (stop - start, 1))
    return stored.reshape(len(stored), -1)[start:stop]


def narrow(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """float32 as F32, F16 or BF16.

    Raises UsageError where a value is none of that type's: codes are chosen for the scale that is stored,
    so a scale is rounded before they are, never after.
    """
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        stored: npt.NDArray[Any] = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(ARRAYS[dtype])
    if not (np.isfinite(values).all() and np.array_equal(widen(stored), values)):
        raise UsageError("scales", f"hold numbers that {dtype} does not have", "Round them before choosing codes.")
    return stored
