"""Rounding and scales trained together for a whole decoder block, against the block's own output.

Error feedback judges a layer by its own output.  What matters is what leaves the block: behind the
softmax and the gate some errors vanish and others cancel, and seven matrices that know of each other can
do better than seven that do not.  Here codes and scales of all of them move together, by sign gradient
descent on the squared error of the block's output (SignRound, Cheng et al. 2023, arXiv:2309.05516), for
those who have minutes to spend.  It begins where `gptq` ends rather than at nearest rounding, and keeps
what it found only if the block's output on sequences that were held back is better for it.

    learning/grids.py      what is trained, and how gradients pass through rounding
    learning/descent.py    the steps

Legend: R rows, C columns, E experts, S sequences, T tokens, H hidden width, N bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dither.errors import UsageError
from dither.solvers.feedback.validation import SHARED
from dither.solvers.gptq import Gptq
from dither.solvers.learning.task import BlockTask
from dither.system.cores import available_cores
from dither.types import Codec, Evidence, Floats, Solved

if TYPE_CHECKING:
    from dither.solvers.learning.descent import Trained

Report = Callable[[int, float], None]


class Learned:
    """Sign gradient descent per block (see the module); `refine` is not safe to call from several threads."""

    name = "learned"
    needs: frozenset[str] = frozenset({"hessian", "block"})
    working = Gptq.working  # of a matrix; what a block takes is the block's to say

    def __init__(
        self, *, steps: int = 200, batch: int = 8, rate: float = 0.002, threads: int | None = None, seed: int = 0
    ) -> None:
        """`steps` of `batch` sequences each; `rate` is how far the first moves a code, in steps of its grid.

        `threads`: all cores of this process by default.  The bytes depend on the seed and, by the order in
        which torch adds up, on the number of threads.
        """
        self.steps, self.batch, self.rate, self.seed = steps, batch, rate, seed
        self.threads = threads or available_cores()

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        """A matrix outside any block has no block's output to be trained against: gptq's answer."""
        return Gptq(threads=self.threads)(w_RC, codec, evidence)

    def refine(self, task: BlockTask, report: Report | None = None) -> dict[str, Solved]:
        """New bytes of all matrices together, or the start's with a note where those were no better.

        `report` is called after each step with its number and its loss.  Records hold "block_loss" and
        "start_block_loss", the mean squared error of the block's output on `held` with the bytes returned and
        with the start's, and "steps".  Raises UsageError where torch is missing, or nothing is held back.
        """
        if not task.held[0]:
            raise UsageError(
                "learned rounding",
                "needs sequences held back to judge by, and there are none",
                "Calibrate with more tokens.",
            )
        # Rows that share scales cannot move one by one; such matrices stay, and the others learn to live with them.
        start = {name: _noted(solved, task.codecs[name]) for name, solved in task.start.items()}
        if all(SHARED in solved.notes for solved in start.values()):
            return start
        # All that is to be stored moves together, judged by what leaves the block.
        found = self._train(task, report)
        record = {"block_loss": found.loss, "start_block_loss": found.start_loss, "steps": float(self.steps)}
        return {name: self._solved(name, solved, found, record) for name, solved in start.items()}

    def _solved(self, name: str, start: Solved, found: Trained, record: Mapping[str, float]) -> Solved:
        record = {**start.record, **record}
        if SHARED in start.notes:
            return replace(start, record=record)
        if found.raw is None:
            note = f"training did not improve the block on sequences held back; {start.solver} kept"
            return replace(start, record=record, notes=(*start.notes, note))
        return Solved(found.raw[name], self.name, record, start.notes)

    def _train(self, task: BlockTask, report: Report | None) -> Trained:
        try:
            from dither.solvers.learning.descent import Schedule, descend
            from dither.solvers.learning.grids import trainable
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "torch":
                raise
            raise UsageError(
                "learned rounding", "needs torch, which is not installed", "pip install 'dither[calibrate]'"
            ) from None
        with torch_threads(self.threads):
            # Each starts at the bytes that it has: until something moves, the block computes what they compute.
            device, weights, importance = task.inputs[0].device, task.weights, task.importance
            matrices = {
                name: trainable(task.codecs[name], _rows(weights[name]), solved.raw_RN, importance.get(name), device)
                for name, solved in task.start.items()
            }
            return descend(task, matrices, Schedule(self.steps, self.batch, self.rate, self.seed), report)


def _noted(start: Solved, codec: Codec) -> Solved:
    """With a note where the codec's rows share scales, so that the start is not trained further."""
    if codec.rows_together == 1 or SHARED in start.notes:
        return start
    return replace(start, notes=(*start.notes, SHARED))


def _rows(w: Floats) -> Floats:
    """Experts flattened into the rows."""
    return np.ascontiguousarray(w, dtype=np.float32).reshape(-1, w.shape[-1])


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads inside torch, and as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SOLVER = Learned
