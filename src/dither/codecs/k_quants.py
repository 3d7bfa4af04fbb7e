"""K-quants: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, llama.cpp's most used types.

Legend: R super-blocks (one per row), B = 256 their weights, S their sub-blocks, K neighboring columns,
C columns of a whole row, I rows of importance, N bytes.

256 weights form a super-block; 16 or 32 neighbors in it share an integer scale, and the super-block stores
one float16 that turns the integers into numbers.  Two levels make scales cheap: 4.5 bits per weight for
4-bit codes with a scale and a minimum per 32 weights, where float16 scales would cost 5.

    affine      ŵ = d·sc·q − dmin·m    q ≥ 0             Q2_K, Q4_K, Q5_K
    symmetric   ŵ = d·sc·q             q of either sign  Q3_K, Q6_K

What a super-block stores besides its codes is its Grid.  The loops are in `kernels/`: `k_affine` and
`k_symmetric` search for scales, `k_layout` rounds and packs.  They are imported on first use, for numba
takes longer to load than `dither --help` may.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import BlockCodec, Levels, Scales, check_importance, multiple_scales
from dither.codecs.blocks import Kernels, blocks, packed_blocks
from dither.errors import UsageError
from dither.types import Bytes, Codes, Floats, Grid

affine, symmetric, layout = Kernels("k_affine"), Kernels("k_symmetric"), Kernels("k_layout")
BLOCK = 256
# Where d, and dmin, lie in a packed super-block.  Q6_K's error, some 0.0003, shortens a block by less than a step
# of its d: there is no length to restore.
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": ()}


class AffineGrid(NamedTuple):
    d_R: npt.NDArray[np.float16]
    dmin_R: npt.NDArray[np.float16]
    sc_RS: npt.NDArray[np.uint8]
    m_RS: npt.NDArray[np.uint8]


class SymmetricGrid(NamedTuple):
    d_R: npt.NDArray[np.float16]
    sc_RS: npt.NDArray[np.int8]


class _KQuant(BlockCodec):
    block = BLOCK
    size: int  # weights of a sub-block
    low: np.float32  # the lowest code, and the highest
    top: np.float32
    code_type: type[np.generic]

    @abstractmethod
    def _empty(self, rows: int) -> AffineGrid | SymmetricGrid: ...

    @abstractmethod
    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> AffineGrid | SymmetricGrid:
        """As `fit`, with row r modulo I of the importance for block r."""

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        if importance_B is None:
            return self._fit(blocks(w_RB, BLOCK), None)
        check_importance(importance_B, BLOCK)
        if importance_B.ndim == 2 and len(importance_B) != len(w_RB):
            raise UsageError(f"importance of {len(importance_B)} blocks", f"does not fit {len(w_RB)} blocks")
        return self._fit(blocks(w_RB, BLOCK), blocks(importance_B, BLOCK))

    def snap(self, w_RK: Floats, grid: AffineGrid | SymmetricGrid, at: slice) -> Codes:
        codes_RK = np.empty(w_RK.shape, self.code_type)
        w_RK, start = np.ascontiguousarray(w_RK, np.float32), _first_column(at, w_RK)
        layout.snap(w_RK, start, self.size, self.low, self.top, *_four(grid), codes_RK)
        return codes_RK

    def value(self, codes_RK: Codes, grid: AffineGrid | SymmetricGrid, at: slice) -> Floats:
        w_RK = np.empty(codes_RK.shape, np.float32)
        self._write_values(codes_RK, grid, _first_column(at, codes_RK), w_RK)
        return w_RK

    def _write_values(self, codes_RK: Codes, grid: AffineGrid | SymmetricGrid, start: int, w_RK: Floats) -> None:
        """Into `w_RK`, contiguous, the numbers of columns start … start + K."""
        layout.value(np.ascontiguousarray(codes_RK, self.code_type), start, self.size, *_four(grid), w_RK)

    def pack(self, codes_RB: Codes, grid: AffineGrid | SymmetricGrid) -> Bytes:
        raw_RN = np.empty((len(codes_RB), self.block_bytes), np.uint8)
        codes_RB = np.ascontiguousarray(codes_RB, self.code_type)
        getattr(layout, f"pack_{self.name.lower()}")(codes_RB, *_patterns(grid), raw_RN)
        return raw_RN

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        raw_RN = packed_blocks(raw_RN, self.block_bytes)
        codes_RB, grid = np.empty((len(raw_RN), BLOCK), self.code_type), self._empty(len(raw_RN))
        getattr(layout, f"unpack_{self.name.lower()}")(raw_RN, codes_RB, *_patterns(grid))
        return codes_RB, grid

    def decode_blocks(self, raw_NN: Bytes, w_NB: Floats) -> None:
        codes_NB, grid = self.unpack(raw_NN)
        self._write_values(codes_NB, grid, 0, w_NB)


class AffineK(_KQuant):
    """Sub-blocks of `size` weights, codes 0 … `top`, integer scales and minima 0 … `most`."""

    low, code_type = np.float32(0), np.uint8
    _shares_above = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)  # of `most`: d as if so many more integers fitted

    def __init__(self, name: str, size: int, top: int, most: int, raised: float) -> None:
        """`raised`: how far starts move the lower end of a sub-block's range up at most, in its lengths."""
        bits = top.bit_length()
        scales = BLOCK // size * 2 * most.bit_length() // 8
        self.name, self.size, self.subs = name, size, BLOCK // size
        self.top, self.most = np.float32(top), np.float32(most)
        self.block_bytes = 4 + scales + BLOCK * bits // 8
        self.scales_at = SCALES_AT[name]
        lows, stretches = (0.0, raised / 2, raised), (-0.8, -0.4, 0.0, 0.4, 0.8)
        starts = [((top + stretch) / (1 - low), low) for stretch in stretches for low in lows]
        self._starts = np.array(starts, np.float32)
        self._shares = np.array([most / (most + more) for more in self._shares_above], np.float32)
        integers, codes = np.arange(most + 1, dtype=np.float32), np.arange(top + 1, dtype=np.uint8)
        self.levels = Levels(codes.astype(np.float32), codes, size, integers, integers, True)

    def to_scales(self, grid: AffineGrid) -> Scales:
        d_R, dmin_R = grid.d_R.astype(np.float32), grid.dmin_R.astype(np.float32)
        return Scales(d_R, grid.sc_RS.astype(np.int16), dmin_R, grid.m_RS.astype(np.int16))

    def from_scales(self, scales: Scales) -> AffineGrid:
        d_R, dmin_R = scales.unit_R.astype(np.float16), scales.below_R.astype(np.float16)
        return AffineGrid(d_R, dmin_R, scales.multiple_RS.astype(np.uint8), scales.lower_RS.astype(np.uint8))

    def _empty(self, rows: int) -> AffineGrid:
        halves, integers = ((rows,), np.float16), ((rows, self.subs), np.uint8)
        return AffineGrid(np.empty(*halves), np.empty(*halves), np.empty(*integers), np.empty(*integers))

    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> AffineGrid:
        grid = self._empty(len(w_RB))
        shared = self.size, self.top, self.most, self._starts, self._shares, 2  # rounds of looking back
        affine.fit_affine(w_RB, importance_IB, *shared, *_patterns(grid))
        return grid


class SymmetricK(_KQuant):
    """Sixteen sub-blocks of 16, codes −`half` … `half` − 1, integer scales −`reach` … `reach` − 1."""

    code_type, size = np.int8, 16

    def __init__(self, name: str, half: int, reach: int, starts: list[float], thorough: bool) -> None:
        """`starts`: codes that the largest weight is given; `thorough`: try several d."""
        bits = (2 * half - 1).bit_length()
        self.name = name
        self.low, self.top, self.reach = np.float32(-half), np.float32(half - 1), np.float32(reach)
        self.block_bytes = 2 + 16 * (2 * reach - 1).bit_length() // 8 + BLOCK * bits // 8
        self.scales_at = SCALES_AT[name]
        self._starts = np.array(starts, np.float32)
        more = (0.5, 1.0, 1.5) if thorough else ()
        self._shares = np.array([reach / (reach + k) for k in more], np.float32)
        codes, multiples = np.arange(-half, half, dtype=np.int8), np.arange(-reach, reach, dtype=np.float32)
        self.levels = Levels(codes.astype(np.float32), codes, 16, multiples, np.zeros(1, np.float32), True)

    def to_scales(self, grid: SymmetricGrid) -> Scales:
        multiple_RS = grid.sc_RS.astype(np.int16) + np.int16(self.reach)
        return multiple_scales(grid.d_R.astype(np.float32), multiple_RS)

    def from_scales(self, scales: Scales) -> SymmetricGrid:
        sc_RS = (scales.multiple_RS - np.int16(self.reach)).astype(np.int8)
        return SymmetricGrid(scales.unit_R.astype(np.float16), sc_RS)

    def _empty(self, rows: int) -> SymmetricGrid:
        return SymmetricGrid(np.empty(rows, np.float16), np.empty((rows, 16), np.int8))

    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> SymmetricGrid:
        grid = self._empty(len(w_RB))
        shared = -self.low, self.reach, self._starts, self._shares, 1  # round of looking back
        symmetric.fit_symmetric(w_RB, importance_IB, *shared, *_patterns(grid))
        return grid


def _patterns(grid: AffineGrid | SymmetricGrid) -> list[npt.NDArray[Any]]:
    """The grid's arrays as kernels take them: float16 as uint16 patterns."""
    return [np.ascontiguousarray(part.view(np.uint16) if part.dtype == np.float16 else part) for part in grid]


def _four(grid: AffineGrid | SymmetricGrid) -> list[npt.NDArray[Any] | None]:
    """The grid as `snap` and `value` take it: d, dmin, sc and m, with None for what it lacks."""
    parts = _patterns(grid)
    return [*parts] if len(parts) == 4 else [parts[0], None, parts[1], None]


def _first_column(at: slice, array: npt.NDArray[Any]) -> int:
    start, stop, step = at.indices(BLOCK)
    if step != 1 or stop - start != array.shape[1]:
        raise UsageError(f"columns {at.start}:{at.stop}", f"do not match {array.shape[1]} columns of weights")
    return start


CODECS = (
    AffineK("Q2_K", size=16, top=3, most=15, raised=0.12),
    AffineK("Q4_K", size=32, top=15, most=63, raised=0.6 / 15),
    AffineK("Q5_K", size=32, top=31, most=63, raised=0.6 / 31),
    SymmetricK("Q3_K", half=4, reach=32, thorough=True, starts=[-4.6, -4.1, -3.6, -3.1, 2.6, 3.1, 3.6, 4.1]),
    SymmetricK("Q6_K", half=32, reach=128, thorough=False, starts=[-float(k) for k in range(23, 34)]),
)
