"""Tensors that are rewritten while they are read, and evidence rewritten to match.

Nothing is computed until rows are asked for, so a rewritten model costs no more memory than the original.
Scaling is local to a row; whatever a layer's input is multiplied by, its statistics follow:
x' = x / s gives E[x'²] = E[x²] / s² and E[x' x'ᵀ] = E[x xᵀ] / (s sᵀ).  Rows multiplied by s put out y' = s y,
at which a loss pulls with g' = g / s.

Legend: R rows (experts flattened in), C columns, E experts (1 where all share), H held-back inputs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from dither.types import Evidence, EvidenceSource, Floats, Model, Tensor

T = TypeVar("T")


class Recent(Generic[T]):
    """The last few of some costly results, computed once each however many threads ask."""

    def __init__(self, size: int) -> None:
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._size, self._lock = size, threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= self._size:  # before, so that memory never holds one more
                    self._kept.popitem(last=False)
                self._kept[key] = compute()
            self._kept.move_to_end(key)
            return self._kept[key]


def rewritten(tensor: Tensor, read: Callable[[int, int], Floats]) -> Tensor:
    """The tensor with other numbers: no raw bytes to copy any more; its cost in the source stays."""
    return replace(tensor, stored="F32", read=read, read_raw=None, recode=None)


@dataclass(frozen=True)
class Scaling:
    """Factors for one tensor: `columns_EC` per expert (or for all), `rows_R` per flattened row."""

    columns_EC: Floats | None = None
    rows_R: Floats | None = None

    def merged(self, other: Scaling) -> Scaling:
        return Scaling(_product(self.columns_EC, other.columns_EC), _product(self.rows_R, other.rows_R))

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with these factors applied to whatever rows are read."""
        experts = 1 if self.columns_EC is None else len(self.columns_EC)
        rows_per_expert = tensor.rows // experts

        def read(start: int, stop: int) -> Floats:
            w_RC = tensor.read(start, stop)
            if self.columns_EC is not None:
                # Rows of several experts may be read at once, each with its own factors.
                expert_R = np.arange(start, stop) // rows_per_expert
                w_RC = w_RC * (self.columns_EC if experts == 1 else self.columns_EC[expert_R])
            if self.rows_R is not None:
                w_RC = w_RC * self.rows_R[start:stop, None]
            return np.asarray(w_RC, dtype=np.float32)

        return rewritten(tensor, read)


def _product(one: Floats | None, other: Floats | None) -> Floats | None:
    return other if one is None else one if other is None else one * other


class ScaledEvidence:
    """What calibration would have seen of inputs divided by s.

    `scales` gives s as (E or 1, C) for the tensors whose input changed, the same array for those that
    share an input; evidence that two of them share in `base` is rescaled once and stays shared.  `rows`
    gives what the flattened rows of a tensor were multiplied by.
    """

    def __init__(
        self, base: EvidenceSource, scales: Mapping[str, Floats], rows: Mapping[str, Floats] | None = None
    ) -> None:
        self._base, self._scales, self._rows = base, dict(scales), dict(rows or {})
        self._recent: Recent[tuple[Evidence, Evidence]] = Recent(2)

    def __call__(self, tensor: str, expert: int = 0) -> Evidence | None:
        seen = self._base(tensor, expert)
        if seen is not None and seen.output_KOO is not None and tensor in self._rows:
            seen = put_out(seen, self._rows[tensor], expert)
        s_EC = self._scales.get(tensor)
        if seen is None or s_EC is None:
            return seen
        s_C = s_EC[min(expert, len(s_EC) - 1)]
        # Kept with its origin, which a number that stood for it must not outlive.
        key = (id(seen.mean_square_C), id(s_EC), min(expert, len(s_EC) - 1))
        found = self._recent.get(key, lambda: (divided(seen, s_C), seen))[0]
        return sharing_inputs(found, seen.output_KOO)


def sharing_inputs(seen: Evidence, output_KOO: Floats | None) -> Evidence:
    """The same evidence of an input, for another of the matrices that read it."""
    return seen if seen.output_KOO is output_KOO else replace(seen, output_KOO=output_KOO)


def divided(seen: Evidence, s_C: Floats) -> Evidence:
    """The evidence of x / s."""
    inverse_C = (1 / s_C.astype(np.float64)).astype(np.float32)
    hessian_CC = None if seen.hessian_CC is None else seen.hessian_CC * inverse_C
    if hessian_CC is not None:
        hessian_CC *= inverse_C[:, None]
    return replace(
        seen,
        mean_square_C=seen.mean_square_C * inverse_C**2,
        hessian_CC=hessian_CC,
        held_HC=None if seen.held_HC is None else seen.held_HC * inverse_C,
    )


def put_out(seen: Evidence, rows_R: Floats, expert: int) -> Evidence:
    """The evidence of a layer whose rows were multiplied by what `rows_R` says of this expert's."""
    assert seen.output_KOO is not None
    blocks, rows = seen.output_KOO.shape[:2]
    inverse_KO = 1 / rows_R.reshape(-1, blocks, rows)[expert]
    scaled_KOO = seen.output_KOO * inverse_KO[:, :, None] * inverse_KO[:, None, :]
    return replace(seen, output_KOO=scaled_KOO.astype(np.float32))


def rewritten_model(model: Model, tensors: tuple[Tensor, ...], record: Mapping[str, Any]) -> Model:
    """The model with other tensors, and a fingerprint of its own, so that no half-written file of the
    original is continued with it."""
    text = json.dumps([model.fingerprint, record], sort_keys=True)
    return replace(model, tensors=tensors, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def digest(*arrays: Floats) -> str:
    """sha256 over the numbers, for the record."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()
