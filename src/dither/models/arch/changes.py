"""What happens to rows between a checkpoint and a GGUF: stacked, permuted, cut apart, shifted, and all of it undone.

A line of a family's table names a change (`[rope_rows_q]`); the object of that name knows everything about it:

    shape, read          the way to a GGUF: what comes out, and how a span of its rows is read from the sources'
    order, undo          the way back to a folder: where each row goes, and its numbers as they were
    view, part_shape     the way back to a network: the tensor as a view into one of transformers' parameters

A reader takes a span of the *target's* rows and reads just the source rows it needs: a stack of 128 experts is never
held, and a permutation reads a few heads, not matrices.  A family that needs another change defines it in its own
file and names it in `Family.changes`; one that reorders rows needs no more than `Reordered` with a `view`.

Legend: R rows (all dimensions but the last flattened), C columns, E experts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from dither.errors import SourceError
from dither.types import Floats

Read = Callable[[int, int], Floats]
Shape = tuple[int, ...]


class Source(Protocol):
    """What is asked of a checkpoint's tensor: float32 (stop − start, C), a 1-D tensor being one row."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    def read(self, start: int, stop: int) -> Floats: ...


@dataclass(frozen=True)
class Change:
    """Rows stay as they are.  Classes below override what differs."""

    # The keys of config.json and of the metadata that count the heads which rows are grouped by.
    heads: tuple[str, str] | None = None

    stacks: ClassVar[bool] = False  # made of one source per expert
    is_part: ClassVar[bool] = False  # made of a part of its source
    new_numbers: ClassVar[bool] = False  # not only moved: codes cannot be carried over

    def shape(self, sources: Sequence[Source], vocabulary: int) -> Shape:
        """Of the target; `vocabulary` is the number of tokens that are kept."""
        return sources[0].shape

    def read(self, sources: Sequence[Source], heads: int) -> Read:
        return sources[0].read

    def apply(self, w: Any) -> Any:
        """Numbers of a checkpoint as the GGUF has them, in an array of numpy or torch."""
        return w

    def undo(self, w: Any) -> Any:
        return w

    def order(self, rows: int, heads: int) -> npt.NDArray[np.intp] | None:
        """For each row of the GGUF its row in the checkpoint; None for as it is."""
        return None

    def view(self, parameter: Any, heads: int) -> Any:
        """The target's numbers within a parameter of transformers, rows in GGUF's order."""
        return parameter

    def part_shape(self, parameter: Shape) -> Shape:
        """The target's shape, given that parameter's."""
        return parameter


class TokenRows(Change):
    """One row per token, those that are no token's left out."""

    def shape(self, sources: Sequence[Source], vocabulary: int) -> Shape:
        return (vocabulary, *sources[0].shape[1:])


class Reordered(Change):
    """Rows (of a bias: numbers) in another order, which `view` says."""

    def order(self, rows: int, heads: int) -> npt.NDArray[np.intp]:
        return np.asarray(self.view(np.arange(rows), heads).reshape(-1))

    def read(self, sources: Sequence[Source], heads: int) -> Read:
        source = sources[0]

        def read(start: int, stop: int) -> Floats:
            order = self.order(source.shape[0], heads)
            if len(source.shape) == 1:
                return np.take(source.read(start, stop), order, axis=1)
            wanted = order[start:stop]
            first, last = (wanted.min(), wanted.max()) if len(wanted) else (start, start - 1)
            return np.take(source.read(int(first), int(last) + 1), wanted - first, axis=0)

        return read


class Rotated(Reordered):
    """Queries or keys whose rotated pairs stand half a head apart in the checkpoint, side by side in the GGUF."""

    def view(self, parameter: Any, heads: int) -> Any:
        rows, *columns = parameter.shape
        return parameter.reshape(heads, 2, rows // heads // 2, *columns).swapaxes(1, 2)


class PlusOne(Change):
    """Norms that the checkpoint stores as their distance from one."""

    new_numbers = True

    def read(self, sources: Sequence[Source], heads: int) -> Read:
        return lambda start, stop: self.apply(sources[0].read(start, stop))

    def apply(self, w: Any) -> Any:
        return w + 1

    def undo(self, w: Any) -> Any:
        return w - 1


class Stacked(Change):
    """One matrix per expert, laid one below the other."""

    stacks = True

    def shape(self, sources: Sequence[Source], vocabulary: int) -> Shape:
        return (len(sources), *sources[0].shape)

    def read(self, sources: Sequence[Source], heads: int) -> Read:
        return spans([(expert, 0, expert.shape[0] if expert.shape else 1) for expert in sources])


@dataclass(frozen=True)
class ExpertHalf(Change):
    """The gate (first) or up (second) half of every expert in a fused (E, 2 · rows, C)."""

    second: bool = False
    is_part = True

    def shape(self, sources: Sequence[Source], vocabulary: int) -> Shape:
        fused = sources[0].shape
        if len(fused) != 3 or fused[1] % 2:
            reason = f"of shape {fused} holds no gate and up"
            raise SourceError(f"tensor {sources[0].name}", reason, "Fetch the checkpoint again.")
        return self.part_shape(fused)

    def read(self, sources: Sequence[Source], heads: int) -> Read:
        experts, fused_rows, _ = sources[0].shape
        half = fused_rows // 2
        return spans([(sources[0], expert * fused_rows + self.second * half, half) for expert in range(experts)])

    def view(self, parameter: Any, heads: int) -> Any:
        half = parameter.shape[1] // 2
        return parameter[:, half:] if self.second else parameter[:, :half]

    def part_shape(self, parameter: Shape) -> Shape:
        experts, rows, columns = parameter
        return experts, rows // 2, columns


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


UNCHANGED = Change()
CHANGES: Mapping[str, Change] = {
    "": UNCHANGED,
    "vocabulary": TokenRows(),
    "rope_rows_q": Rotated(heads=("num_attention_heads", "attention.head_count")),
    "rope_rows_k": Rotated(heads=("num_key_value_heads", "attention.head_count_kv")),
    "plus_one": PlusOne(),
    "stack": Stacked(),
    "expert_gate": ExpertHalf(),
    "expert_up": ExpertHalf(second=True),
}
