"""A calibration's walk: all sequences go through block 0, then block 1, …, and each layer's inputs are collected.

One decoder block is in memory at a time.  A block counts as done when its statistics and the states behind it are
on disk, so that a walk that is killed at any moment can be continued and ends with the same bytes.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dither.formats.evidence import write_groups
from dither.formats.tensor_names import OUTPUT as OUTPUT_MATRIX, block_of, block_prefix, input_of
from dither.measuring.calibration_folder import Folder
from dither.measuring.collect import HELD_ROWS, Collector
from dither.measuring.hidden import Hidden
from dither.measuring.text import Sequences, batches
from dither.models.blocks import Blocks
from dither.progress import Progress
from dither.types import Model, Tensor

OUTPUT = "output.npz"


class Walk:
    """One walk through the network; the folder's `state` says how far it has come."""

    gradients = False

    def __init__(
        self,
        model: Model,
        blocks: Blocks,
        text: Sequences,
        folder: Folder,
        hessians: bool,
        batch: int,
        report: Progress,
    ) -> None:
        self.model, self.network, self.text, self.folder = model, blocks, text, folder
        self.hessians, self.report = hessians, report
        sequences, context = text.tokens_ST.shape
        self.shape = (sequences, context, blocks.width)
        self.batches = batches(text.lengths_S, batch)
        self.hidden = self._states()
        self.experts = {t.name: t.shape[0] if len(t.shape) > 2 else 1 for t in model.tensors}
        self.notes = [*model.notes, *blocks.notes, *text.notes]
        if hessians and not self.collector().held_S.any():
            few = f"{sequences} sequences are too few to hold any back: solutions cannot be validated."
            self.notes.append(few)
        folder.need(self._needs())

    def _states(self) -> Hidden:
        return Hidden(self.folder.path, self.shape)

    def _needs(self) -> int:
        """About how many bytes on disk."""
        return statistics_bytes(self.model.tensors, self.hessians) + self.hidden.disk_bytes

    def run(self, afresh: bool = False) -> int:
        """Runs the blocks that are not done yet; returns how many were."""
        done = 0 if afresh else self.hidden.resume(self._finished())
        if done:
            self.report.note(f"Resuming: {done} of {self.network.count} blocks were already done.")
        weights, output = self._weights()
        self.report.start(sum(weights) + output, sum(weights[:done]))
        if not done:
            self._embed()
        for index in range(done, self.network.count):
            self._block(index, weights[index])
            self.hidden.finished(index + 1)
        self.folder.state["files"][OUTPUT] = self._output(output)
        return done

    def remove(self) -> None:
        """Removes what is kept for the case of an interruption."""
        self.hidden.remove()

    def _weights(self) -> tuple[list[int], int]:
        """The number of weights in each block and in the output matrix: the unit of progress."""
        weights = [weights_of(self.model, block_prefix(index)) for index in range(self.network.count)]
        return weights, weights_of(self.model, "output.") or weights_of(self.model, "token_embd.")

    def order(self) -> range:
        """The blocks in the order in which their statistics are taken."""
        return range(self.network.count)

    def _finished(self) -> int:
        """How many blocks, counted along `order`, have their statistics on disk."""
        order = self.order()
        return next((at for at, index in enumerate(order) if not self._has(f"blk.{index}.npz")), len(order))

    def _has(self, name: str) -> bool:
        return name in self.folder.state["files"] and (self.folder.path / name).is_file()

    def _embed(self) -> None:
        for index_B in self.batches:
            tokens_BT = torch.from_numpy(self.text.tokens_ST[index_B].astype(np.int64))
            self.hidden.write(index_B, self.network.embed(tokens_BT).float().cpu().numpy())
        self.hidden.finished(0)

    def collector(self) -> Collector:
        sequences, context, _ = self.shape
        return Collector(self.experts, sequences=sequences, context=context, hessians=self.hessians)

    def _block(self, index: int, weights: int) -> None:
        block, collector = self.network.load(index), self.collector()
        for index_B, hidden_BTH in self._through(collector):
            # One computation does both: the block's output, and what its layers saw of it on the way.
            left_BTH = block.watch(hidden_BTH, collector.see)
            self.hidden.write(index_B, left_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"block {index + 1} of {self.network.count}")
        self._keep(index, collector)

    def _keep(self, index: int, collector: Collector) -> None:
        """Writes a block's statistics to the disk."""
        groups, few = collector.finish()
        name = f"blk.{index}.npz"
        self.folder.state["files"][name] = write_groups(self.folder.path / name, groups)
        self.folder.state["few"].update(few)
        self.folder.save()

    def _output(self, weights: int) -> list[dict[str, Any]]:
        head, collector = self.network.head(), self.collector()
        for index_B, hidden_BTH in self._through(collector):
            head.watch(hidden_BTH, collector.see)
            self.report.advance(self._share(index_B, weights), "the output matrix")
        return write_groups(self.folder.path / OUTPUT, collector.finish()[0])

    def _through(self, *collectors: Collector) -> Iterator[tuple[Any, torch.Tensor]]:
        for index_B in self.batches:
            for collector in collectors:
                collector.batch(index_B, self.text.lengths_S[index_B], self.network.device)
            yield index_B, self._read(self.hidden, index_B)

    def _read(self, states: Hidden, index_B: Any) -> torch.Tensor:
        # Copied into torch's own memory, which is aligned: numpy's starts anywhere, and matrix products round
        # differently by where it starts.
        return torch.tensor(states.read(index_B)).to(self.network.device, self.network.dtype)

    def _share(self, index_B: Any, weights: int) -> int:
        return weights * len(index_B) // len(self.text.lengths_S)


def weights_of(model: Model, prefix: str) -> int:
    return sum(tensor.size for tensor in model.tensors if tensor.name.startswith(prefix))


def statistics_bytes(tensors: Sequence[Tensor], hessians: bool) -> int:
    """About what the statistics will take on disk: layers that share an input are counted once."""
    linear = [t for t in tensors if len(t.shape) > 1 and (block_of(t.name) is not None or t.name == OUTPUT_MATRIX)]
    inputs = {input_of(tensor.name): tensor for tensor in linear}
    total = 0
    for tensor in inputs.values():
        experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
        rows = tensor.columns + HELD_ROWS if hessians else 0
        total += 4 * experts * tensor.columns * (1 + rows)
    return total if hessians else 2 * total  # the importance matrix has the mean squares once more
