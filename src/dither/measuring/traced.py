"""There and back: the text goes through the model, and the pull of a loss comes back through it.

On the way forth nothing is learnt, but what enters every block is kept on disk.  At the end each position
draws a token from the model's own prediction, and the gradient of its log-probability (`Head.trace`) walks
back block by block: a block is loaded once more, computed from what entered it, and carries the gradient from
its output to its input, while a `Collector` sees each layer's input together with the gradient at its output.
The cost is that of three walks, the memory that of one block with the activations of one batch.

What is drawn depends on the seed and on the batch, so that an interrupted walk continues with the same draws.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch.
"""

from __future__ import annotations

from typing import Any

import torch

from dither.formats.evidence import write_groups
from dither.measuring.collect import diagonal_blocks
from dither.measuring.hidden import Hidden
from dither.measuring.walk import OUTPUT, Walk, statistics_bytes
from dither.types import Model


class TracedWalk(Walk):
    """A walk whose statistics are taken on the way back."""

    gradients = True

    def _states(self) -> Hidden:
        self._back = Hidden(self.folder.path, self.shape, name="back")
        return Hidden(self.folder.path, self.shape, keep=self.network.count + 1)

    def _needs(self) -> int:
        states = self.hidden.disk_bytes + self._back.disk_bytes
        return statistics_bytes(self.model, self.hessians) + outputs_bytes(self.model) + states

    def run(self, afresh: bool = False) -> int:
        """Runs what is not done; how many blocks' statistics were."""
        count = self.network.count
        weights, output = self._weights()
        forth = 0 if afresh else self.hidden.resume(count)
        back = 0 if afresh else self._back.resume(self._finished()) if self._has(OUTPUT) else 0
        if forth or back:
            self.report.note(f"Resuming: {forth} of {count} blocks were already run, {back} run back.")
        todo = 3 * (sum(weights) + output)
        done = sum(weights[:forth]) + 2 * sum(weights[count - back :])
        self.report.start(todo, done + (3 * output if back else 0))
        if not forth:
            self._embed()
        for index in range(forth, count):
            self._forth(index, weights[index])
        if not back:
            self._turn(3 * output)
        for gone, index in enumerate(self.order()[back:], back + 1):
            self._come_back(index, 2 * weights[index])
            self._back.finished(gone)
        self._in_order()
        return back

    def remove(self) -> None:
        super().remove()
        self._back.remove()

    def order(self) -> range:
        return range(self.network.count - 1, -1, -1)

    def _forth(self, index: int, weights: int) -> None:
        block = self.network.load(index)
        for index_B in self.batches:
            left_BTH = block(self._read(self.hidden, index_B))
            self.hidden.write(index_B, left_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"block {index + 1} of {self.network.count}")
        self.hidden.finished(index + 1)

    def _turn(self, weights: int) -> None:
        """At the predictions: the gradient by what left the last block."""
        self.hidden.go_to(self.network.count)
        head, collector = self.network.head(), self.collector()
        for index_B, hidden_BTH in self._through(collector):
            length_B = torch.from_numpy(self.text.lengths_S[index_B].astype("int64"))
            valid_BT = torch.arange(self.shape[1])[None, :] < length_B[:, None]
            pulled_BTH = head.trace(hidden_BTH, valid_BT, self._draw(index_B), collector.see)
            self._back.write(index_B, pulled_BTH.cpu().numpy())
            self.report.advance(self._share(index_B, weights), "the output matrix")
        self.folder.state["files"][OUTPUT] = write_groups(self.folder.path / OUTPUT, collector.finish()[0])
        self.folder.save()
        self._back.finished(0)

    def _come_back(self, index: int, weights: int) -> None:
        self.hidden.go_to(index)
        block, collector = self.network.load(index), self.collector()
        for index_B, hidden_BTH in self._through(collector):
            back_BTH = self._read(self._back, index_B)
            pulled_BTH = block.trace(hidden_BTH, back_BTH, collector.see)
            self._back.write(index_B, pulled_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"back through block {index + 1}")
        self._keep(index, collector)

    def _draw(self, index_B: Any) -> torch.Generator:
        """On the processor, wherever the network is: every device shall draw the same words."""
        seed = (self.text.seed or 0) + 1_000_003 * (int(index_B[0]) + 1)
        return torch.Generator().manual_seed(seed)

    def _in_order(self) -> None:
        """The manifest lists blocks as they stand in the model, whichever way they were walked."""
        files = self.folder.state["files"]
        names = [f"blk.{index}.npz" for index in range(self.network.count)] + [OUTPUT]
        self.folder.state["files"] = {name: files[name] for name in names}
        few = self.folder.state["few"]
        self.folder.state["few"] = {t.name: few[t.name] for t in self.model.tensors if t.name in few}


def outputs_bytes(model: Model) -> int:
    """What output Hessians take on disk."""
    total = 0
    for tensor in model.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            rows = tensor.shape[-2]
            total += 4 * (tensor.rows // rows) * rows * (rows // diagonal_blocks(rows))
    return total
