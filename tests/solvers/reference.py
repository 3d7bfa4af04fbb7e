"""GPTQ as slowly and plainly as it can be written: Optimal Brain Surgeon, one column (or lattice) at a time.

The inverse Hessian is explicit, in float64.  When the first K columns left are rounded with error E, the
others take  −E · (H⁻¹_KK)⁻¹ · H⁻¹_K,rest, and the K are eliminated from the inverse (Hassibi and Stork 1993;
Frantar et al. 2022, equations 2 and 3).  No blocking, no Cholesky factor, no float32 beyond what a codec asks
for.

Legend: R rows, C columns, B those of a block, K the columns rounded together.
"""

from __future__ import annotations

import numpy as np

from dither.types import Codec, Grid


def eliminate(inverse_CC: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How errors of the first `count` columns move the rest, and the inverse Hessian of the rest."""
    move_KC = np.linalg.inv(inverse_CC[:count, :count]) @ inverse_CC[:count, count:]
    return move_KC, inverse_CC[count:, count:] - inverse_CC[count:, :count] @ move_KC


def costs(inverse_BB: np.ndarray) -> np.ndarray:
    """What rounding each column of a block costs while those after it are free: 1 / H⁻¹_kk then."""
    found = []
    while len(inverse_BB):
        found.append(1 / inverse_BB[0, 0])
        _, inverse_BB = eliminate(inverse_BB, 1)
    return np.array(found)


def as_stored(codec: Codec, w_RB: np.ndarray, grid: Grid) -> Grid:
    """The grid that a reader of the bytes sees: the types of 32 weights round under one not yet stored."""
    if codec.snap_columns > 1:
        return grid
    return codec.unpack(codec.pack(codec.snap(w_RB, grid, slice(0, codec.block)), grid))[1]


def slow_gptq(
    w_RC: np.ndarray, codec: Codec, hessian_CC: np.ndarray, damping: float, order_C: np.ndarray
) -> np.ndarray:
    """The decoded numbers; `order_C` holds whole blocks one after the other, in any order inside."""
    hessian_CC = hessian_CC.astype(np.float64)
    hessian_CC = hessian_CC + damping * np.diagonal(hessian_CC).mean() * np.eye(len(hessian_CC))
    inverse_CC = np.linalg.inv(hessian_CC)[np.ix_(order_C, order_C)]
    left_RC = w_RC.astype(np.float64)[:, order_C]
    value_RC = np.zeros_like(left_RC)
    size, step = codec.block, codec.snap_columns
    for start in range(0, len(order_C), size):
        inside_B = order_C[start : start + size] - order_C[start : start + size].min()
        now_RB, cost_B = np.empty((len(w_RC), size), np.float32), np.empty(size, np.float32)
        now_RB[:, inside_B], cost_B[inside_B] = left_RC[:, :size], costs(inverse_CC[:size, :size])
        grid = as_stored(codec, now_RB, codec.fit(now_RB, cost_B))
        for begin in range(0, size, step):
            first = int(inside_B[begin])
            at = slice(first, first + step)
            codes = codec.snap(np.ascontiguousarray(left_RC[:, :step], np.float32), grid, at)
            value_RK = codec.value(codes, grid, at)
            columns_K = order_C[start + begin : start + begin + step]
            value_RC[:, columns_K] = value_RK
            move_KC, inverse_CC = eliminate(inverse_CC, step)
            left_RC = left_RC[:, step:] - (left_RC[:, :step] - value_RK) @ move_KC
    return value_RC


def objectives(w_RC: np.ndarray, value_RC: np.ndarray, hessian_CC: np.ndarray) -> np.ndarray:
    """e H eᵀ of each row's error in float64."""
    error_RC = w_RC.astype(np.float64) - value_RC
    losses: np.ndarray = ((error_RC @ hessian_CC.astype(np.float64)) * error_RC).sum(axis=1)
    return losses
