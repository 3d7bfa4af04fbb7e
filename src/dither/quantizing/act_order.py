"""Groups of columns by how much the columns matter, instead of by where they stand (GPTQ's desc_act).

A group shares a scale.  Put columns that meet large inputs together and they share scales with each other;
a table in the file (`g_idx`) says which group each column belongs to.  The file is as large, and slower in
engines that must look the group up for every column.  Error feedback takes columns by how much they
matter either way, within groups, and so has most of the gain without.

A model and its evidence are rewritten with their columns in that order; the codes go back to their places
when they are packed.

Source: Frantar et al. 2022, arXiv:2210.17323, and the option `desc_act` of AutoGPTQ.

Legend: R rows, C columns, H held-back inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dither.types import Evidence, EvidenceSource, Floats, Model, Tensor

Order = npt.NDArray[np.intp]


class ActOrder:
    """The order of the columns of each of `tensors`, by falling mean square of their inputs."""

    def __init__(self, evidence: EvidenceSource, tensors: Collection[str]) -> None:
        self._evidence, self._tensors = evidence, frozenset(tensors)
        self._orders: dict[tuple[str, int], Order | None] = {}

    def order(self, tensor: str, expert: int = 0) -> Order | None:
        """Columns as they are taken; None where nothing is known, and they stay as they stand."""
        key = (tensor, expert)
        if key not in self._orders:
            seen = self._evidence(tensor, expert) if tensor in self._tensors else None
            self._orders[key] = None if seen is None else np.argsort(-seen.mean_square_C, kind="stable")
        return self._orders[key]

    def evidence(self, tensor: str, expert: int = 0) -> Evidence | None:
        """What is known of the columns in their new order; an `EvidenceSource`."""
        seen, order_C = self._evidence(tensor, expert), self.order(tensor, expert)
        if seen is None or order_C is None:
            return seen
        return replace(
            seen,
            mean_square_C=seen.mean_square_C[order_C],
            hessian_CC=None if seen.hessian_CC is None else seen.hessian_CC[np.ix_(order_C, order_C)],
            held_HC=None if seen.held_HC is None else seen.held_HC[:, order_C],
        )

    def model(self, model: Model) -> Model:
        """The model with the columns of its tensors in their new order."""
        return replace(model, tensors=tuple(map(self._reordered, model.tensors)))

    def _reordered(self, tensor: Tensor) -> Tensor:
        if tensor.name not in self._tensors or self.order(tensor.name) is None:
            return tensor
        rows_per_expert = tensor.shape[-2]

        def read(start: int, stop: int) -> Floats:
            w_RC = tensor.read(start, stop)
            expert_R = np.arange(start, stop) // rows_per_expert
            parts = [
                w_RC[expert_R == expert][:, self.order(tensor.name, int(expert))] for expert in np.unique(expert_R)
            ]
            return np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)

        return replace(tensor, read=read, read_raw=None, recode=None)
