"""How rows change on their way from a checkpoint to a GGUF: permuted, stacked, cut apart, shifted.

Every change is a function from a span of the *target's* rows to its numbers, reading just the source
rows it needs: a stack of 128 experts is never held, and a permutation reads whole heads, not matrices.

Legend: R rows (all dimensions but the last flattened), C columns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from dither.types import Floats

Read = Callable[[int, int], Floats]


class Source(Protocol):
    """What is asked of a checkpoint's tensor: float32 (stop − start, C), a 1-D tensor being one row."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, start: int, stop: int) -> Floats: ...


def plus_one(source: Source) -> Read:
    """Norms that are stored as their distance from one."""

    def read(start: int, stop: int) -> Floats:
        return source.read(start, stop) + np.float32(1)

    return read


def rotary_order(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """Which row of transformers' layout stands at each of these rows of llama.cpp's.

    Inside a head of d rows the rotated pair is (i, i + d/2) there and (2i, 2i + 1) here.
    """
    head, within = np.divmod(rows, head_rows)
    pair, second = np.divmod(within, 2)
    return np.asarray(head * head_rows + second * (head_rows // 2) + pair)


def rotary_rows(source: Source, heads: int) -> Read:
    """The rows (or, of a bias, the numbers) of q or k with rotated pairs put side by side."""
    head_rows = source.shape[0] // heads

    def read(start: int, stop: int) -> Floats:
        wanted = np.arange(start, stop)
        first = start // head_rows * head_rows  # whole heads: a pair is half a head apart
        last = min(-(-stop // head_rows) * head_rows, source.shape[0])
        w_RC = source.read(first, last)
        return np.take(w_RC, rotary_order(wanted, head_rows) - first, axis=0)

    def read_bias(start: int, stop: int) -> Floats:
        order = rotary_order(np.arange(source.shape[0]), head_rows)
        return np.take(source.read(start, stop), order, axis=1)

    return read if len(source.shape) > 1 else read_bias


def spans(pieces: Sequence[tuple[Source, int, int]]) -> Read:
    """Spans of source rows one after another, each (source, first row, rows), as if they were one matrix."""
    ends = list(accumulate(count for _, _, count in pieces))

    def read(start: int, stop: int) -> Floats:
        found = []
        at = start
        while at < stop:
            index = bisect_right(ends, at)
            source, first, count = pieces[index]
            offset = at - (ends[index] - count)
            step = min(stop - at, count - offset)
            found.append(source.read(first + offset, first + offset + step))
            at += step
        return found[0] if len(found) == 1 else np.concatenate(found)

    return read


def stacked(experts: Sequence[Source]) -> Read:
    """One matrix per expert, laid one below the other."""
    return spans([(expert, 0, expert.shape[0]) for expert in experts])


def expert_half(source: Source, second: bool) -> Read:
    """The gate (first) or up (second) half of every expert in a fused (experts, 2 · rows, columns)."""
    experts, fused_rows, _ = source.shape
    half = fused_rows // 2
    return spans([(source, expert * fused_rows + second * half, half) for expert in range(experts)])
