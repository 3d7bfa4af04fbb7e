"""GPTQ as slowly and plainly as it can be written: Optimal Brain Surgeon, one column (or lattice) at a time.

The inverse Hessian is explicit, in float64.  When the first K columns left are rounded with error E, the
others take  −E · (H⁻¹_KK)⁻¹ · H⁻¹_K,rest, and the K are eliminated from the inverse (Hassibi and Stork 1993;
Frantar et al. 2022, equations 2 and 3).  No blocking, no Cholesky factor, no float32 beyond what a codec asks
for.

Feedback between rows is written the same way: rows in turn, each moved to where the loss is least while all
rows that are not yet rounded are free, found with an explicit inverse of the output Hessian's free part.

Legend: R rows, C columns, B those of a block, K the columns rounded together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Traced(NamedTuple):
    """What was decided, and what each decision was asked for."""

    value_RC: np.ndarray  # the decoded numbers
    target_RC: np.ndarray  # where earlier columns had moved each number to when its turn came
    fitted: list[tuple[np.ndarray, np.ndarray]]  # of each block in turn: the weights as stored and their importance


def slow_gptq(
    w_RC: np.ndarray, codec: Codec, hessian_CC: np.ndarray, damping: float, order_C: np.ndarray
) -> np.ndarray:
    """The decoded numbers; `order_C` holds whole blocks one after the other, in any order inside."""
    return traced_gptq(w_RC, codec, hessian_CC, damping, order_C).value_RC


def traced_gptq(w_RC: np.ndarray, codec: Codec, hessian_CC: np.ndarray, damping: float, order_C: np.ndarray) -> Traced:
    """The same, with what led to each number."""
    hessian_CC = hessian_CC.astype(np.float64)
    hessian_CC = hessian_CC + damping * np.diagonal(hessian_CC).mean() * np.eye(len(hessian_CC))
    inverse_CC = np.linalg.inv(hessian_CC)[np.ix_(order_C, order_C)]
    left_RC = w_RC.astype(np.float64)[:, order_C]
    value_RC, target_RC, fitted = np.zeros_like(left_RC), np.zeros_like(left_RC), []
    size, step = codec.block, codec.snap_columns
    for start in range(0, len(order_C), size):
        inside_B = order_C[start : start + size] - order_C[start : start + size].min()
        now_RB, cost_B = np.empty((len(w_RC), size), np.float32), np.empty(size, np.float32)
        now_RB[:, inside_B], cost_B[inside_B] = left_RC[:, :size], costs(inverse_CC[:size, :size])
        fitted.append((now_RB, cost_B))
        grid = as_stored(codec, now_RB, codec.fit(now_RB, cost_B))
        for begin in range(0, size, step):
            first = int(inside_B[begin])
            at = slice(first, first + step)
            codes = codec.snap(np.ascontiguousarray(left_RC[:, :step], np.float32), grid, at)
            value_RK = codec.value(codes, grid, at)
            columns_K = order_C[start + begin : start + begin + step]
            value_RC[:, columns_K], target_RC[:, columns_K] = value_RK, left_RC[:, :step]
            move_KC, inverse_CC = eliminate(inverse_CC, step)
            left_RC = left_RC[:, step:] - (left_RC[:, :step] - value_RK) @ move_KC
    return Traced(value_RC, target_RC, fitted)


def parted_without_a_tie(found_RC: np.ndarray, slow: Traced, codec: Codec, order_C: np.ndarray) -> list[str]:
    """Rows that part from the reference where float32 does not excuse it.

    Up to the first column at which a row parts, both were asked for the same but for float32's noise.  It is a
    tie if the codec itself gives what was found when the reference's own targets are moved by such noise: a
    weight may lie midway between two codes, a scale between two that can be stored.
    """
    unexcused = []
    equal_RC = np.isclose(found_RC, slow.value_RC, rtol=1e-5, atol=0)  # scales in float32 are not rounded to equal ones
    for row in np.flatnonzero(~equal_RC.all(axis=1)):
        at = int(np.flatnonzero(~equal_RC[row, order_C])[0])
        wanted = found_RC[row, order_C[at]]
        given = answers_nearby(slow, codec, order_C, int(row), at)
        if not np.isclose(given, wanted, rtol=1e-5, atol=0).any():
            unexcused.append(f"row {row}, column {order_C[at]}, {at} in turn: {wanted}, not {sorted(set(given))}")
    return unexcused


def answers_nearby(
    slow: Traced, codec: Codec, order_C: np.ndarray, row: int, at: int, noise: float = 2e-6, draws: int = 256
) -> np.ndarray:
    """What the codec makes of one weight when all that it is asked for is moved by a little of the largest."""
    random = np.random.default_rng(row)
    first = at // codec.block * codec.block
    columns_B = order_C[first : first + codec.block] - order_C[first : first + codec.block].min()
    now_RB, cost_B = slow.fitted[at // codec.block]

    def moved(x: np.ndarray) -> np.ndarray:
        near = x + noise * np.abs(now_RB[row]).max() * random.uniform(-1, 1, (draws, x.shape[-1]))
        return near.astype(np.float32)

    near_DB = moved(now_RB[row])
    grid = as_stored(codec, near_DB, codec.fit(near_DB, cost_B))
    begin = at - at % codec.snap_columns
    span = slice(int(columns_B[begin - first]), int(columns_B[begin - first]) + codec.snap_columns)
    near_DK = moved(slow.target_RC[row, order_C[begin : begin + codec.snap_columns]])
    value_DK: np.ndarray = codec.value(codec.snap(near_DK, grid, span), grid, span)
    return value_DK[:, at - begin]


def slow_in_turn(
    w_RC: np.ndarray,
    output_RR: np.ndarray,
    damping: float,
    together: int,
    round_rows: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The decoded numbers of rows rounded in the order of G's diagonal, `together` at a time.

    tr(G E H Eᵀ) with errors E_D of the rows done is least, whatever H, where the free rows have the errors
    −G_FF⁻¹ G_FD E_D; what those of the next rows would be, their targets are moved by.
    """
    output_RR = output_RR.astype(np.float64)
    output_RR = output_RR + damping * np.diagonal(output_RR).mean() * np.eye(len(output_RR))
    order_R = np.argsort(-np.diagonal(output_RR), kind="stable")
    value_RC = np.zeros(w_RC.shape)
    for start in range(0, len(w_RC), together):
        done, free, now = order_R[:start], order_R[start:], order_R[start : start + together]
        error_DC = w_RC[done].astype(np.float64) - value_RC[done]
        best_FC = -np.linalg.inv(output_RR[np.ix_(free, free)]) @ output_RR[np.ix_(free, done)] @ error_DC
        value_RC[now] = round_rows((w_RC[now] - best_FC[: len(now)]).astype(np.float32))
    return value_RC


def objectives(w_RC: np.ndarray, value_RC: np.ndarray, hessian_CC: np.ndarray) -> np.ndarray:
    """e H eᵀ of each row's error in float64."""
    error_RC = w_RC.astype(np.float64) - value_RC
    losses: np.ndarray = ((error_RC @ hessian_CC.astype(np.float64)) * error_RC).sum(axis=1)
    return losses


def joint_objective(w_RC: np.ndarray, value_RC: np.ndarray, hessian_CC: np.ndarray, output_KOO: np.ndarray) -> float:
    """tr(G E H Eᵀ) in float64, G put together from its diagonal blocks."""
    error_RC = w_RC.astype(np.float64) - value_RC
    output_RR = np.zeros((len(w_RC), len(w_RC)))
    size = output_KOO.shape[1]
    for k, output_OO in enumerate(output_KOO):
        output_RR[k * size : (k + 1) * size, k * size : (k + 1) * size] = output_OO
    return float(np.trace(output_RR @ error_RC @ hessian_CC.astype(np.float64) @ error_RC.T))
