"""The walk back: the text goes forward through the model, and the gradient of a loss comes back through it.

On the way forward nothing is collected, but what enters every block is kept on disk.  At the end each position
samples a token from the model's own prediction, and the gradient of its log-probability (`Head.trace`) goes back
block by block: a block is loaded once more, computed again from what entered it, and carries the gradient from its
output to its input, while a `Collector` sees each layer's input together with the gradient at its output.  This
takes as long as three forward walks, and the memory of one block with the activations of one batch.

As many of the last blocks as fit into `TURN_BYTES` together are run forward and back in one turn, batch by batch,
so that nothing in them is computed twice: in a small model these are all blocks.  The numbers are the same.

Sampling depends on the seed and on the batch alone, so that an interrupted walk continues with the same tokens.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dither.formats.evidence import write_groups
from dither.formats.tensor_names import block_of
from dither.measuring.collect import diagonal_blocks
from dither.measuring.hidden import Hidden
from dither.measuring.walk import OUTPUT, Walk, statistics_bytes
from dither.models.blocks import Blocks
from dither.types import Tensor

TURN_BYTES = 2 * 2**30  # for the blocks of the turn, with their statistics and a batch's activations
_ACTIVATIONS = 1.5  # numbers kept for the way back, over those that enter and leave matrices; 1.0 was seen


class BackwardWalk(Walk):
    """A walk that collects its statistics on the way back."""

    gradients = True

    def _states(self) -> Hidden:
        tokens = max(len(index_B) for index_B in self.batches) * self.shape[1]
        self._first = first_of_turn(self.network, tokens)
        self._back = Hidden(self.folder.path, self.shape, name="back")
        return Hidden(self.folder.path, self.shape, keep=self._first + 1)

    def _needs(self) -> int:
        tensors = self.model.tensors
        states = self.hidden.disk_bytes + self._back.disk_bytes
        return statistics_bytes(tensors, self.hessians) + outputs_bytes(tensors) + states

    def run(self, afresh: bool = False) -> int:
        """Runs what is not done yet; returns how many blocks had their statistics."""
        count, first = self.network.count, self._first
        weights, output = self._weights()
        # An interrupted walk was on its way forward or on its way back: `back` blocks have their statistics.
        forth = 0 if afresh else self.hidden.resume(first)
        back = 0 if afresh else self._back.resume(self._finished()) if self._has(OUTPUT) else 0
        if forth or back:
            self.report.note(f"Resuming: {forth} of {count} blocks were already run, {back} run back.")
        # The way back computes a block again and then its gradients: two shares of work beside the one forward.
        turn = 3 * (sum(weights[first:]) + output)
        gone_back = sum(weights[:first]) + turn + 2 * sum(weights[count - back : first])
        self.report.start(3 * (sum(weights) + output), gone_back if back else sum(weights[:forth]))
        if not forth:
            self._embed()
        for index in range(forth, first):
            self._forward(index, weights[index])
        if not back:
            self._turn(turn)
        for index in self.order()[max(back, count - first) :]:
            self._backward(index, 2 * weights[index])
            self._back.finished(count - index)
        self._sort_files()
        return back

    def remove(self) -> None:
        super().remove()
        self._back.remove()

    def order(self) -> range:
        return range(self.network.count - 1, -1, -1)

    def _forward(self, index: int, weights: int) -> None:
        block = self.network.load(index)
        for index_B, hidden_BTH in self._through():
            left_BTH = block(hidden_BTH)
            self.hidden.write(index_B, left_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"block {index + 1} of {self.network.count}")
        self.hidden.finished(index + 1)

    def _turn(self, weights: int) -> None:
        """Runs each batch through the last blocks to the predictions, and its gradient back through them."""
        self.hidden.go_to(self._first)
        head, head_sees, count = self.network.head(), self.collector(), self.network.count
        last = [(self.network.load(index), self.collector()) for index in range(self._first, count)]
        for index_B, hidden_BTH in self._through(head_sees, *(collector for _, collector in last)):
            there = []
            for block, collector in last:
                there.append((block.there(hidden_BTH), collector))
                hidden_BTH = there[-1][0].reached
            valid_BT = torch.arange(self.shape[1]) < torch.from_numpy(self.text.lengths_S[index_B])[:, None]
            # The loss: the log-probability of a token that the model itself samples at each position.
            back_BTH = head.trace(hidden_BTH, valid_BT, self._draw(index_B), head_sees.see)
            while there:  # popped, so that a block's activations are freed as soon as they were used
                way, collector = there.pop()
                back_BTH = way.back(back_BTH, collector.see)
            self._back.write(index_B, back_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), "the predictions, and back")
        for block, collector in reversed(last):
            self._keep(block.index, collector)
        self.folder.state["files"][OUTPUT] = write_groups(self.folder.path / OUTPUT, head_sees.finish()[0])
        self.folder.save()
        self._back.finished(len(last))

    def _backward(self, index: int, weights: int) -> None:
        self.hidden.go_to(index)
        block, collector = self.network.load(index), self.collector()
        for index_B, hidden_BTH in self._through(collector):
            back_BTH = self._read(self._back, index_B)
            pulled_BTH = block.trace(hidden_BTH, back_BTH, collector.see)
            self._back.write(index_B, pulled_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"back through block {index + 1}")
        self._keep(index, collector)

    def _draw(self, index_B: Any) -> torch.Generator:
        """On the CPU wherever the network is, so that the same tokens are sampled on every device."""
        seed = (self.text.seed or 0) + 1_000_003 * (int(index_B[0]) + 1)
        return torch.Generator().manual_seed(seed)

    def _sort_files(self) -> None:
        """Sorts the manifest's blocks as they stand in the model, though they were collected backwards."""
        files = self.folder.state["files"]
        names = [f"blk.{index}.npz" for index in range(self.network.count)] + [OUTPUT]
        self.folder.state["files"] = {name: files[name] for name in names}
        few = self.folder.state["few"]
        self.folder.state["few"] = {t.name: few[t.name] for t in self.model.tensors if t.name in few}


def first_of_turn(network: Blocks, tokens: int) -> int:
    """The first of the last blocks that fit into `TURN_BYTES` together, in batches of `tokens` tokens.

    Experts count as if each saw every token, so a mixture of experts is mostly walked block by block.
    """
    if network.skeleton.config._attn_implementation != "sdpa":
        return network.count  # attention would keep the scores of all pairs of tokens
    left = float(TURN_BYTES)
    for index in reversed(range(network.count)):
        tensors = [tensor for tensor in network.model.tensors if block_of(tensor.name) == index]
        kept = sum(kept_per_token(tensor) for tensor in tensors if len(tensor.shape) > 1)
        left -= 4 * (sum(tensor.size for tensor in tensors) + kept * tokens)
        left -= statistics_bytes(tensors, True) + outputs_bytes(tensors)
        if left < 0:
            return index + 1
    return 0


def kept_per_token(tensor: Tensor) -> float:
    """At most how many numbers per token a matrix's gradient needs."""
    rows = tensor.shape[-2]
    return _ACTIVATIONS * (tensor.rows // rows) * (rows + tensor.columns)


def outputs_bytes(tensors: Sequence[Tensor]) -> int:
    """What the output Hessians take on disk."""
    matrices = [tensor for tensor in tensors if block_of(tensor.name) is not None and len(tensor.shape) > 1]
    return sum(4 * t.rows * (t.shape[-2] // diagonal_blocks(t.shape[-2])) for t in matrices)
