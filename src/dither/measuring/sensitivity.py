"""How much each tensor's rounding costs: one tensor at a time, as KL divergence at the model's output.

A rounded copy of the model is at hand (the *probe*).  For each tensor the original is run with that one
tensor taken from the probe, and what this does to the predictions is measured.  Small divergences add up
(the linearity theorem of HIGGS, Malinovskii et al. 2024, arXiv:2411.17525, section 3), so these numbers, each
scaled by the error that another type would make of the same tensor, predict any mixture of types.

All tensors of a block are measured together: the text reaches the block once, in the original; from there
each detour goes on by itself, side by side with the original, to the end.  A block's results are final before
the next begins, so that an interrupted measurement keeps them.

Legend: S sequences, T positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import torch

from dither.measuring.live import Passage
from dither.measuring.stream import Lockstep, Stages, Step
from dither.measuring.text import Sequences
from dither.models.blocks import Blocks
from dither.progress import Progress
from dither.types import Model, Tensor

Found = Callable[[Mapping[str, float]], None]
FORWARD_TOKENS = 40 * 8192  # of one pass through the whole model, all detours together: 40 measurements'


def divergences(
    network: Blocks, probe: Model, names: Collection[str], text: Sequences, found: Found, progress: Progress
) -> None:
    """KL divergence, in nats per token, of the original with one of `names` taken from `probe`.

    `found` hears of a block's tensors together, and first of those outside blocks.  All positions but the
    first half of each sequence are scored, as in `measure`.
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
            _enter(run, passage.entering(index))
        for block in range(index or 0, network.count):
            run.step(block, detours)
        values = run.finish(detours)
        found({name: float(values[name].kl_N.mean()) for name in group})
        progress.advance(_passes(network, index) * len(group), ", ".join(map(_short, group)))


def affordable(text: Sequences, tensors: int) -> Sequences:
    """As many whole sequences as 40 measurements' worth of forward passes pay for, at least one.

    A detour takes half a pass on average, and the original goes along with it.
    """
    wanted = max(1, FORWARD_TOKENS // max(1, tensors))
    kept = int(np.searchsorted(np.cumsum(text.lengths_S), wanted, side="right"))
    kept = min(max(1, kept), len(text.lengths_S))
    return replace(text, tokens_ST=text.tokens_ST[:kept], lengths_S=text.lengths_S[:kept])


def by_block(names: Collection[str]) -> dict[int | None, tuple[str, ...]]:
    """Names outside blocks first, under None, then block by block."""
    groups: dict[int | None, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(int(parts[1]) if parts[0] == "blk" else None, []).append(name)
    order = sorted(groups, key=lambda index: -1 if index is None else index)
    return {index: tuple(groups[index]) for index in order}


class Detour:
    """The original (`measuring.stream.Stages`) but for one tensor, in block `index` or outside of all."""

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


def _enter(run: Lockstep, entering_STH: torch.Tensor) -> None:
    for hidden_STH in run.hidden.values():
        hidden_STH.copy_(entering_STH)


def _passes(network: Blocks, index: int | None) -> int:
    """Blocks that a detour from `index` goes through, the head counted as one."""
    return network.count + 1 - (index or 0)


def _short(name: str) -> str:
    return name.removesuffix(".weight")
