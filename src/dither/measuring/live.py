"""Evidence from a model while it is quantized: the text runs through the layers as they are written.

The statistics of an evidence folder are those of the original model.  In a deep layer the real inputs have drifted
from them, and a solver that knows the drifted ones can make up for part of the loss (GPTQ, arXiv:2210.17323,
section 4, quantizes block by block in this way).  `LiveEvidence`, asked for a tensor, runs the calibration text up
to it, through the finished layers of the file being written, and collects its inputs.  `BlockTasks` gives a solver
that trains a whole block what enters the block behind the quantized layers, and what left it in the original.

Both must be asked in the order in which activations flow, and each tensor must be written before the next is asked
for; a resumed run continues with the first that is not.

Legend: S sequences, T tokens of each, H hidden width, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dither.codecs import codec as find_codec
from dither.formats.evidence import GroupStatistics
from dither.formats.tensor_names import block_of
from dither.measuring.collect import Collector, held_back
from dither.measuring.text import BATCH_TOKENS
from dither.models.blocks import Block, Blocks
from dither.solvers.learning.task import BlockTask
from dither.types import Evidence, EvidenceSource, Floats, Model, Solved

Tokens = npt.NDArray[np.int32]
Weights = Callable[[], Model]  # the file as it stands


class Passage:
    """The hidden states of a text in front of one block of a model.

    `weights` gives the tensors to run with, opened anew for every block; with None the model's own are used.
    """

    def __init__(self, blocks: Blocks, tokens_ST: Tokens, lengths_S: Tokens, weights: Weights | None) -> None:
        self.blocks, self.lengths_S, self.weights = blocks, lengths_S, weights
        self._tokens_ST = torch.from_numpy(tokens_ST.astype(np.int64))
        self._hidden_STH: torch.Tensor | None = None
        self._at = 0

    @torch.no_grad()
    def entering(self, index: int) -> torch.Tensor:
        """What enters block `index`, float32 (S, T, H); a later call with a larger index overwrites it."""
        if self._hidden_STH is None:
            weights = self.weights() if self.weights else None
            embedded = [self.blocks.embed(self._tokens_ST[batch], weights).float() for batch in self.batches()]
            self._hidden_STH = torch.cat(embedded)
        while self._at < index:
            block = self.blocks.load(self._at, self.weights() if self.weights else None)
            for batch in self.batches():
                self._hidden_STH[batch] = block(self._hidden_STH[batch]).float()
            self._at += 1
        return self._hidden_STH

    def batches(self) -> list[slice]:
        step = max(1, BATCH_TOKENS // self._tokens_ST.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.lengths_S), step)]


@dataclass(eq=False)
class LiveEvidence:
    """An `EvidenceSource` over a file that is being written.

    `known` names the tensors whose evidence is wanted, `written` those that are complete in the file.  For
    tensors outside the blocks, and those no block reports, `base`'s evidence is given.
    """

    passage: Passage
    base: EvidenceSource
    known: Collection[str]
    written: Collection[str]
    sha256: str
    _groups: dict[str, GroupStatistics] = field(default_factory=dict)

    def __call__(self, tensor: str, expert: int = 0) -> Evidence | None:
        block = block_of(tensor)
        if block is None or tensor not in self.known:
            return self.base(tensor, expert)
        if tensor not in self._groups:
            self._groups = self._watch(block, tensor)
        group, before = self._groups.get(tensor), self.base(tensor, expert)
        if group is None:
            return before
        expert = min(expert, len(group.counts_E) - 1)
        hessian_ECC, held_EHC = group.hessian_ECC, group.held_EHC
        return Evidence(
            int(group.counts_E[expert]),
            group.mean_square_EC[expert],
            None if hessian_ECC is None else hessian_ECC[expert],
            None if held_EHC is None or not len(held_EHC[expert]) else held_EHC[expert],
            self.sha256,
            # How errors of outputs act on each other is still the original's: no gradient was computed here.
            None if before is None else before.output_KOO,
        )

    def _watch(self, index: int, tensor: str) -> dict[str, GroupStatistics]:
        """The inputs of the layers that share `tensor`'s; those of the block's other layers will still change."""
        hidden_STH, lengths_S = self.passage.entering(index), self.passage.lengths_S
        block = self._half_written(index)
        sequences, context = hidden_STH.shape[:2]
        experts = {t.name: t.shape[0] for t in self.passage.blocks.model.tensors if len(t.shape) > 2}
        collector = Collector(experts, sequences=sequences, context=context, hessians=True)

        def see(names: tuple[str, ...], x_NC: torch.Tensor, at_N: torch.Tensor, expert: int | None) -> None:
            if tensor in names:
                collector.see(names, x_NC, at_N, expert)

        for batch in self.passage.batches():
            collector.batch(range(sequences)[batch], lengths_S[batch].tolist(), hidden_STH.device)
            block.watch(hidden_STH[batch], see)
        groups, _ = collector.finish()
        return {name: group for group in groups for name in group.tensors}

    def _half_written(self, index: int) -> Block:
        """A block with the file's matrices where they are finished, and the model's own for the rest."""
        block = self.passage.blocks.load(index)
        assert self.passage.weights is not None
        stored = {tensor.name: tensor for tensor in self.passage.weights().tensors}
        for name in block.names:
            if name in self.written:
                block.set_weight(name, stored[name].read(0, stored[name].rows).reshape(stored[name].shape))
        return block


class BlockTasks:
    """What `solvers.learned` trains a block on: the same text in the `quantized` and the `original` model."""

    def __init__(self, quantized: Passage, original: Passage, evidence: EvidenceSource) -> None:
        self.quantized, self.original, self.evidence = quantized, original, evidence

    def __call__(
        self, index: int, weights: Mapping[str, Floats], types: Mapping[str, str], start: Mapping[str, Solved]
    ) -> BlockTask:
        """The task of one block whose matrices `start` are already in the file."""
        inputs_STH = self.quantized.entering(index)
        targets_STH = self.original.entering(index + 1)
        assert self.quantized.weights is not None
        block = self.quantized.blocks.load(index, self.quantized.weights())
        held_S = held_back(len(inputs_STH)).numpy()
        importance = {name: seen.mean_square_C for name in start if (seen := self.evidence(name)) is not None}
        return BlockTask(
            block,
            self._pieces(inputs_STH, ~held_S),
            self._pieces(targets_STH, ~held_S),
            (self._pieces(inputs_STH, held_S), self._pieces(targets_STH, held_S)),
            weights,
            {name: find_codec(kind, weights[name].shape[-1]) for name, kind in types.items()},
            start,
            importance,
        )

    def _pieces(self, hidden_STH: torch.Tensor, wanted_S: npt.NDArray[np.bool_]) -> list[torch.Tensor]:
        """Batches of sequences of equal length, so that there is no padding."""
        lengths_S = self.quantized.lengths_S
        alike = ((int(length), wanted_S & (lengths_S == length)) for length in np.unique(lengths_S[wanted_S]))
        return [hidden_STH[torch.from_numpy(chosen_S), :length] for length, chosen_S in alike]
