"""Codes and what they stand for: four records that layouts pack or unpack.

A weight is a scale times a small number, and the records differ in how that number follows from the code:
below a zero point (Affine), looked up in a table (Table4), a float of six bits or four (Micro), or the code
itself (Int8).  Floats of eight bits need none: their bytes are stored as they are.

Legend: O out features (rows), I in features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError
from dither.formats.layouts import numbers
from dither.types import Bytes, Floats

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
Shapes: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]  # suffix → safetensors' number type and shape

# NF4: the averages of neighboring quantiles of a normal distribution, scaled to reach from −1 to 1
# (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E).
NF4 = np.array((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
), np.float32)  # fmt: skip
# bitsandbytes' FP4: a sign above three bits that it decodes to these, in units of the largest.
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
TABLES = {"nf4": NF4, "fp4": np.concatenate([_FP4, -_FP4])}
# Every number of the small floats, by its bits.
_E4M3, _E8M0 = numbers.e4m3().astype(np.float32), numbers.e8m0().astype(np.float32)
_E2M1, _E2M3 = numbers.e2m1(), numbers.e2m3()


@dataclass(frozen=True)
class Affine:
    """ŵ[o, i] = scale[o, g(i)] · (code[o, i] − zero[o, g(i)]).

    Groups are neighbors of equal number unless `group_of_I` says which group each column belongs to.
    """

    codes_OI: npt.NDArray[np.uint8]  # unsigned
    scale_OG: Floats
    zero_OG: npt.NDArray[Any]  # integers, of the codes' range or just beyond
    group_of_I: npt.NDArray[np.int32] | None = None

    def scales(self) -> Floats:
        return self.scale_OG

    def values(self) -> Floats:
        w_OI = self.codes_OI.astype(np.float32)
        zero_OG = self.zero_OG.astype(np.float32)
        if self.group_of_I is not None:
            w_OI -= zero_OG[:, self.group_of_I]
            w_OI *= self.scale_OG[:, self.group_of_I]
            return w_OI
        w_OGC = _grouped(w_OI, self.scale_OG)
        w_OGC -= zero_OG[..., None]
        w_OGC *= self.scale_OG[..., None]
        return w_OI


@dataclass(frozen=True)
class Table4:
    """ŵ[o, i] = absmax[o, g(i)] · table[code[o, i]]."""

    codes_OI: npt.NDArray[np.uint8]  # 0 to 15
    absmax_OG: Floats
    quant_type: str  # "nf4" or "fp4"

    def scales(self) -> Floats:
        return self.absmax_OG

    def values(self) -> Floats:
        w_OI = TABLES[self.quant_type][self.codes_OI]
        _grouped(w_OI, self.absmax_OG)[...] *= self.absmax_OG[..., None]
        return w_OI


@dataclass(frozen=True)
class Micro:
    """ŵ[o, i] = scale[o, g(i)] / global_scale · e2m1(code[o, i]), or e2m3 where codes have six bits."""

    codes_OI: npt.NDArray[np.uint8]  # a sign above the index of the magnitude
    scale_OG: Bytes  # the bits of an E8M0, or of an E4M3 where there is a scale of the tensor
    global_scale: float | None = None
    multiplier: float | None = None  # the same, as those store it who multiply by it
    bits: int = 4

    def scales(self) -> Floats:
        """What the scales' bits stand for, the tensor's own scale included."""
        if self.multiplier is not None:
            return _E4M3[self.scale_OG] * np.float32(self.multiplier)
        if self.global_scale is None:
            return _E8M0[self.scale_OG]
        return _E4M3[self.scale_OG] / np.float32(self.global_scale)

    def values(self) -> Floats:
        w_OI = (_E2M1 if self.bits == 4 else _E2M3)[self.codes_OI]
        _grouped(w_OI, self.scale_OG)[...] *= self.scales()[..., None]
        return w_OI


@dataclass(frozen=True)
class Int8:
    """ŵ[o, i] = scale[o, g(i)] · (code[o, i] − zero[o, g(i)])."""

    codes_OI: npt.NDArray[np.int8]
    scale_OG: Floats
    zero_OG: npt.NDArray[np.int8] | None = None

    def scales(self) -> Floats:
        return self.scale_OG

    def values(self) -> Floats:
        w_OI = self.codes_OI.astype(np.float32)
        w_OGC = _grouped(w_OI, self.scale_OG)
        if self.zero_OG is not None:
            w_OGC -= self.zero_OG[..., None].astype(np.float32)
        w_OGC *= self.scale_OG[..., None]
        return w_OI


def whole_groups(thing: str, columns: int, group_size: int) -> int:
    """Groups of a row.  Raises UnsupportedError, about `thing`, where they are not whole."""
    if group_size < 1 or columns % group_size:
        reason = f"needs whole groups, and {columns} columns are no multiple of {group_size}"
        raise UnsupportedError(thing, reason, "Choose another group size.")
    return columns // group_size


def _grouped(w_OI: Floats, scale_OG: npt.NDArray[Any]) -> Floats:
    """A view with the columns of each group along the last axis."""
    rows, groups = scale_OG.shape
    return w_OI.reshape(rows, groups, w_OI.shape[1] // groups)
