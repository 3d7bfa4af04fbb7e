"""How much each tensor's rounding costs: one tensor at a time, as KL divergence at the model's output.

Given is a rounded copy of the model (the *probe*).  For each tensor the original is run with that one tensor taken
from the probe, and the KL divergence of its predictions is measured.  Small divergences add up (the linearity
theorem of HIGGS, Malinovskii et al. 2024, arXiv:2411.17525, section 3), so these numbers, each scaled by the error
that another type makes in the same tensor, predict any mixture of types.

All tensors of a block are measured together: the text runs through the original up to the block once; from there
each changed model (a *detour*) runs to the end, side by side with the original.  A block's results are final
before the next begins, so that an interrupted measurement keeps them.

Legend: S sequences, T positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from dither.formats.tensor_names import block_of
from dither.measuring.live import Passage
from dither.measuring.stream import Lockstep, Stages, Step
from dither.measuring.text import Sequences
from dither.models.blocks import Blocks
from dither.progress import Progress
from dither.types import Model, Tensor

Found = Callable[[Mapping[str, float]], None]
FORWARD_TOKENS = 40 * 8192  # through the whole model, of all detours together: as many as 40 measurements take


def divergences(
    network: Blocks, probe: Model, names: Collection[str], text: Sequences, found: Found, progress: Progress
) -> None:
    """KL divergence, in nats per token, of the original with one of `names` taken from `probe`.

    `found` is called with the results of each block, and first with those of tensors outside blocks.  The first
    half of each sequence is not scored, as in `measure`.
    """
    own = {tensor.name: tensor for tensor in probe.tensors}
    groups = by_block(names)
    progress.start(sum(_passes(network, index) * len(group) for index, group in groups.items()), 0)
    passage = Passage(network, text.tokens_ST, text.lengths_S, None)
    for index, group in groups.items():
        detours: dict[str, Stages] = {
            name: Detour(network, with_tensor(network.model, own[name]), index) for name in group
        }
        run = Lockstep(network, list(group), text.tokens_ST, text.lengths_S)
        if index is None:
            run.embed(detours)
        else:
            entering_STH = passage.entering(index)
            for hidden_STH in run.hidden.values():
                hidden_STH.copy_(entering_STH)
        for block in range(index or 0, network.count):
            run.step(block, detours)
        values = run.finish(detours)
        found({name: float(values[name].kl_N.mean()) for name in group})
        what = ", ".join(name.removesuffix(".weight") for name in group)
        progress.advance(_passes(network, index) * len(group), what)


def affordable(text: Sequences, tensors: int) -> Sequences:
    """As many whole sequences as keep the forward passes within those of 40 measurements, at least one.

    A detour is half a pass on average, and the original runs beside it.
    """
    wanted = max(1, FORWARD_TOKENS // max(1, tensors))
    kept = int(np.searchsorted(np.cumsum(text.lengths_S), wanted, side="right"))
    kept = min(max(1, kept), len(text.lengths_S))
    return replace(text, tokens_ST=text.tokens_ST[:kept], lengths_S=text.lengths_S[:kept])


def by_block(names: Collection[str]) -> dict[int | None, tuple[str, ...]]:
    """Names outside blocks first, under None, then block by block."""
    ordered = sorted(names, key=lambda name: (block_of(name) is not None, block_of(name) or 0))
    return {index: tuple(group) for index, group in groupby(ordered, block_of)}


class Detour:
    """The original (`measuring.stream.Stages`) with one tensor changed, in block `index` or outside all blocks."""

    def __init__(self, network: Blocks, changed: Model, index: int | None) -> None:
        self._network, self._changed, self._index = network, changed, index

    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        return self._network.embed(tokens_ST, self._changed)

    def load(self, index: int) -> Step:
        return self._network.load(index, self._changed if index == self._index else None)

    def head(self) -> Step:
        return self._network.head(self._changed if self._index is None else None)


def with_tensor(model: Model, tensor: Tensor) -> Model:
    """The model with one tensor replaced by another of its name."""
    return replace(model, tensors=tuple(tensor if t.name == tensor.name else t for t in model.tensors))


def _passes(network: Blocks, index: int | None) -> int:
    """How many blocks a detour from `index` runs through, the head counted as one."""
    return network.count + 1 - (index or 0)
