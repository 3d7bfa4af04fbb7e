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

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dither.codecs.base import BlockCodec, Levels, Scales
from dither.errors import UsageError
from dither.types import Bytes, Codes, Floats, Grid

BLOCK = 256
_WHOLE = slice(0, BLOCK)
_CHUNK = 1 << 18  # weights between two steps: few enough for the second-level cache, many enough to call


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

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        if importance_B is not None and importance_B.ndim == 2 and len(importance_B) != len(w_RB):
            raise UsageError(f"importance of {len(importance_B)} blocks", f"does not fit {len(w_RB)} blocks")
        return self._fit(_floats(w_RB), _importance_rows(importance_B, BLOCK))

    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> Grid:
        """As `fit`, with row r modulo I of the importance for block r."""
        raise NotImplementedError

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        w_RK = np.empty(codes_RK.shape, np.float32)
        self._write_values(codes_RK, grid, _first_column(at, codes_RK), w_RK)
        return w_RK

    def _write_values(self, codes_RK: Codes, grid: Grid, start: int, w_RK: Floats) -> None:
        """Into `w_RK`, contiguous, the numbers of columns start … start + K."""
        raise NotImplementedError

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        rows, columns = self.check_columns(w_RC)
        w_RB = _floats(w_RC).reshape(-1, BLOCK)
        importance_IB = _importance_rows(importance_C, columns)
        raw_RN = np.empty((len(w_RB), self.block_bytes), np.uint8)
        step = max(1, _CHUNK // max(columns, 1)) * (columns // BLOCK)
        for start in range(0, len(w_RB), max(step, 1)):
            part_RB = w_RB[start : start + step]
            grid = self._fit(part_RB, importance_IB)
            raw_RN[start : start + step] = self.pack(self.snap(part_RB, grid, _WHOLE), grid)
        return raw_RN.reshape(rows, columns // BLOCK * self.block_bytes)

    def decode(self, raw_RN: Bytes) -> Floats:
        rows, size = raw_RN.shape
        blocks_RN = np.ascontiguousarray(raw_RN).reshape(-1, self.block_bytes)
        w_RB = np.empty((len(blocks_RN), BLOCK), np.float32)
        step = _CHUNK // BLOCK
        for start in range(0, len(blocks_RN), step):
            codes_RB, grid = self.unpack(blocks_RN[start : start + step])
            self._write_values(codes_RB, grid, 0, w_RB[start : start + step])
        return w_RB.reshape(rows, size // self.block_bytes * BLOCK)


class AffineK(_KQuant):
    """Sub-blocks of `size` weights, codes 0 … `top`, integer scales and minima 0 … `most`."""

    _shares_above = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)  # of `most`: d as if so many more integers fitted
    _rounds = 2

    def __init__(self, name: str, size: int, top: int, most: int, raised: float) -> None:
        """`raised`: how far starts move the lower end of a sub-block's range up at most, in its lengths."""
        bits = top.bit_length()
        scales = BLOCK // size * 2 * most.bit_length() // 8
        self.name, self.size, self.subs = name, size, BLOCK // size
        self.top, self.most = np.float32(top), np.float32(most)
        self.block_bytes = 4 + scales + BLOCK * bits // 8
        self._starts = np.array(
            [
                ((top + stretch) / (1 - low), low)
                for stretch in (-0.8, -0.4, 0.0, 0.4, 0.8)
                for low in (0.0, raised / 2, raised)
            ],
            np.float32,
        )
        self._shares = np.array([most / (most + more) for more in self._shares_above], np.float32)
        integers, codes = np.arange(most + 1, dtype=np.float32), np.arange(top + 1, dtype=np.uint8)
        self.levels = Levels(codes.astype(np.float32), codes, size, integers, integers, True)

    def to_scales(self, grid: Grid) -> Scales:
        d_R, dmin_R = grid.d_R.astype(np.float32), grid.dmin_R.astype(np.float32)
        return Scales(d_R, grid.sc_RS.astype(np.int16), dmin_R, grid.m_RS.astype(np.int16))

    def from_scales(self, scales: Scales) -> AffineGrid:
        return AffineGrid(
            scales.unit_R.astype(np.float16),
            scales.below_R.astype(np.float16),
            scales.multiple_RS.astype(np.uint8),
            scales.lower_RS.astype(np.uint8),
        )

    def _empty(self, rows: int) -> AffineGrid:
        return AffineGrid(
            np.empty(rows, np.float16),
            np.empty(rows, np.float16),
            np.empty((rows, self.subs), np.uint8),
            np.empty((rows, self.subs), np.uint8),
        )

    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> AffineGrid:
        from dither.codecs.kernels.k_affine import fit_affine

        grid = self._empty(len(w_RB))
        fit_affine(
            w_RB,
            importance_IB,
            self.size,
            self.top,
            self.most,
            self._starts,
            self._shares,
            self._rounds,
            *_patterns(grid),
        )
        return grid

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        codes_RK = np.empty(w_RK.shape, np.uint8)
        start = _first_column(at, w_RK)
        _layout().snap_affine(_floats(w_RK), start, self.size, self.top, *_patterns(grid), codes_RK)
        return codes_RK

    def _write_values(self, codes_RK: Codes, grid: Grid, start: int, w_RK: Floats) -> None:
        _layout().value_affine(_as(codes_RK, np.uint8), start, self.size, *_patterns(grid), w_RK)

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        raw_RN = np.empty((len(codes_RB), self.block_bytes), np.uint8)
        getattr(_layout(), f"pack_{self.name.lower()}")(_as(codes_RB, np.uint8), *_patterns(grid), raw_RN)
        return raw_RN

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, AffineGrid]:
        codes_RB, grid = np.empty((len(raw_RN), BLOCK), np.uint8), self._empty(len(raw_RN))
        getattr(_layout(), f"unpack_{self.name.lower()}")(_as(raw_RN, np.uint8), codes_RB, *_patterns(grid))
        return codes_RB, grid


class SymmetricK(_KQuant):
    """Sixteen sub-blocks of 16, codes −`half` … `half` − 1, integer scales −`reach` … `reach` − 1."""

    def __init__(self, name: str, half: int, reach: int, starts: list[float], thorough: bool) -> None:
        """`starts`: codes that the largest weight is given; `thorough`: try several d."""
        bits = (2 * half - 1).bit_length()
        self.name = name
        self.half, self.reach = np.float32(half), np.float32(reach)
        self.block_bytes = 2 + 16 * (2 * reach - 1).bit_length() // 8 + BLOCK * bits // 8
        self._starts = np.array(starts, np.float32)
        more = (0.5, 1.0, 1.5) if thorough else ()
        self._shares = np.array([reach / (reach + k) for k in more], np.float32)
        self._rounds = 1
        codes, multiples = np.arange(-half, half, dtype=np.int8), np.arange(-reach, reach, dtype=np.float32)
        self.levels = Levels(codes.astype(np.float32), codes, 16, multiples, np.zeros(1, np.float32), True)

    def to_scales(self, grid: Grid) -> Scales:
        multiple_RS = grid.sc_RS.astype(np.int16) + np.int16(self.reach)
        d_R = grid.d_R.astype(np.float32)
        return Scales(d_R, multiple_RS, np.zeros_like(d_R), np.zeros_like(multiple_RS))

    def from_scales(self, scales: Scales) -> SymmetricGrid:
        sc_RS = (scales.multiple_RS - np.int16(self.reach)).astype(np.int8)
        return SymmetricGrid(scales.unit_R.astype(np.float16), sc_RS)

    def _fit(self, w_RB: Floats, importance_IB: Floats | None) -> SymmetricGrid:
        from dither.codecs.kernels.k_symmetric import fit_symmetric

        grid = SymmetricGrid(np.empty(len(w_RB), np.float16), np.empty((len(w_RB), 16), np.int8))
        fit_symmetric(
            w_RB, importance_IB, self.half, self.reach, self._starts, self._shares, self._rounds, *_patterns(grid)
        )
        return grid

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        codes_RK = np.empty(w_RK.shape, np.int8)
        start = _first_column(at, w_RK)
        _layout().snap_symmetric(_floats(w_RK), start, self.half, *_patterns(grid), codes_RK)
        return codes_RK

    def _write_values(self, codes_RK: Codes, grid: Grid, start: int, w_RK: Floats) -> None:
        _layout().value_symmetric(_as(codes_RK, np.int8), start, *_patterns(grid), w_RK)

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        raw_RN = np.empty((len(codes_RB), self.block_bytes), np.uint8)
        getattr(_layout(), f"pack_{self.name.lower()}")(_as(codes_RB, np.int8), *_patterns(grid), raw_RN)
        return raw_RN

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, SymmetricGrid]:
        rows = len(raw_RN)
        codes_RB = np.empty((rows, BLOCK), np.int8)
        grid = SymmetricGrid(np.empty(rows, np.float16), np.empty((rows, 16), np.int8))
        getattr(_layout(), f"unpack_{self.name.lower()}")(_as(raw_RN, np.uint8), codes_RB, *_patterns(grid))
        return codes_RB, grid


def _layout() -> ModuleType:
    from dither.codecs.kernels import k_layout

    return k_layout


def _patterns(grid: AffineGrid | SymmetricGrid) -> list[npt.NDArray[Any]]:
    """The grid's arrays as kernels take them: float16 as uint16 patterns."""
    return [_as(part.view(np.uint16) if part.dtype == np.float16 else part, None) for part in grid]


def _as(array: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, dtype=dtype)


def _floats(w: Floats) -> Floats:
    return np.ascontiguousarray(w, dtype=np.float32)


def _first_column(at: slice, array: npt.NDArray[Any]) -> int:
    start, stop, step = at.indices(BLOCK)
    if step != 1 or stop - start != array.shape[1]:
        raise UsageError(f"columns {at.start}:{at.stop}", f"do not match {array.shape[1]} columns of weights")
    return start


def _importance_rows(importance: Floats | None, columns: int) -> Floats | None:
    """Importance of shape (C,), (B,) or (R, B) as rows of blocks."""
    if importance is None:
        return None
    if importance.shape[-1] != columns:
        raise UsageError(
            f"importance of {importance.shape[-1]} columns",
            f"does not fit weights of {columns}",
            "Use the importance matrix that was made from this very model.",
        )
    return _floats(importance).reshape(-1, BLOCK)


CODECS = (
    AffineK("Q2_K", size=16, top=3, most=15, raised=0.12),
    AffineK("Q4_K", size=32, top=15, most=63, raised=0.6 / 15),
    AffineK("Q5_K", size=32, top=31, most=63, raised=0.6 / 31),
    SymmetricK("Q3_K", half=4, reach=32, thorough=True, starts=[-4.6, -4.1, -3.6, -3.1, 2.6, 3.1, 3.6, 4.1]),
    SymmetricK("Q6_K", half=32, reach=128, thorough=False, starts=[-float(k) for k in range(23, 34)]),
)
