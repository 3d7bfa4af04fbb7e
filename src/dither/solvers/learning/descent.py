"""Sign gradient descent on the matrices of one block, so that the block's own output comes out right.

Each step runs a few sequences through the block, compares its output with what the original block gave,
and moves every position a little against the sign of its gradient (SignRound, Cheng et al. 2023,
arXiv:2309.05516, section 3), by steps that shrink linearly to nothing.  All that matters of a code's
gradient is whether to cross the border of its cell, so its size is divided out.  A plain sign moves as
far for a gradient that flutters about zero as for one that never turns, and a code that crosses for
nothing is a loss; so the sign is that of running means, m/√v as in Adam (Kingma and Ba 2015,
arXiv:1412.6980): ±1 where the gradients agree, and about 0 where they do not.

What the block gains on the sequences it is trained on need not hold for others.  So a few are held back;
from time to time the block is packed, unpacked again by its codecs and run on these, and the best bytes
seen so are the answer.

Legend: R rows, C columns, N bytes of a packed row, S sequences, T tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dither.solvers.learning.grids import Knob, Trainable
from dither.solvers.learning.task import BlockTask
from dither.types import Bytes

Batches = Sequence[torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]  # what enters and what should leave
MEAN_KEPT, SQUARE_KEPT = 0.9, 0.99  # shares that running means keep at each step
WARM = 10  # steps until the means know enough for steps of full size
JUDGED = 10  # times that the held-back sequences are run


@dataclass(frozen=True)
class Schedule:
    """`steps` of `batch` sequences each, drawn with `seed`; `rate` is how far the first moves a code."""

    steps: int
    batch: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """The best bytes by name, None where none were better than the start's; losses on held-back sequences."""

    raw: dict[str, Bytes] | None
    loss: float
    start_loss: float


@torch.no_grad()
def held_back_loss(task: BlockTask, raw: Mapping[str, Bytes]) -> float:
    """The block's mean squared error per output, on sequences held back, for stored bytes."""
    device = task.held[0][0].device
    weights = {
        name: torch.from_numpy(task.codecs[name].decode(raw_RN)).reshape(task.weights[name].shape).to(device)
        for name, raw_RN in raw.items()
    }
    total, count = 0.0, 0
    for inputs_STH, targets_STH in zip(*task.held, strict=True):
        away_STH = task.run(inputs_STH, weights).float() - targets_STH.float()
        total += float(away_STH.square().sum(dtype=torch.float64))
        count += away_STH.numel()
    loss = total / count
    return loss if math.isfinite(loss) else math.inf


class SoftSign:
    """One knob's running means of its gradient and of the gradient's square."""

    def __init__(self, knob: Knob) -> None:
        self.knob = knob
        self.mean, self.square = torch.zeros_like(knob.tensor), torch.zeros_like(knob.tensor)
        self.steps = 0

    @torch.no_grad()
    def move(self, gradient: torch.Tensor, rate: float) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 1 - MEAN_KEPT)
        self.square.lerp_(gradient.square_(), 1 - SQUARE_KEPT)
        # Both means begin at zero, and are divided by the share of gradients that they hold by now.
        size = (self.square / (1 - SQUARE_KEPT**self.steps)).sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)
        # m/√v is ±1 where gradients agree; a knob's pace is how far that moves it.
        rate *= self.knob.pace / (1 - MEAN_KEPT**self.steps)
        self.knob.tensor.addcdiv_(self.mean, size, value=-rate).clamp_(self.knob.low, self.knob.high)


def descend(
    task: BlockTask,
    matrices: Mapping[str, Trainable],
    schedule: Schedule,
    report: Callable[[int, float], None] | None = None,
) -> Trained:
    """Trains `matrices` in place; `report` hears of every step's number, from 1, and loss on its own sequences."""
    steps = schedule.steps
    best, start_loss = None, held_back_loss(task, {name: solved.raw_RN for name, solved in task.start.items()})
    least = start_loss
    pairs = minibatches(task.inputs, task.targets, schedule.batch, schedule.seed)
    signs = [SoftSign(knob) for matrix in matrices.values() for knob in matrix.knobs]
    # The held-back sequences cost as much as several steps, so they are run now and then, and after the last step.
    judged = {math.ceil(steps * (i + 1) / JUDGED) for i in range(JUDGED)}
    for step in range(steps):
        with torch.enable_grad():
            # What will be stored goes forward, so that the loss is the file's; gradients pass through to positions.
            weights = {name: matrix.value().reshape(task.weights[name].shape) for name, matrix in matrices.items()}
            inputs_STH, targets_STH = next(pairs)
            loss = (task.run(inputs_STH, weights).float() - targets_STH.float()).square().mean()
            gradients = torch.autograd.grad(loss, [sign.knob.tensor for sign in signs])
        # All move together, after all gradients are known: errors of one matrix can cancel those of another.
        for sign, gradient in zip(signs, gradients, strict=True):
            sign.move(gradient, schedule.rate * min(1, (step + 1) / WARM) * (1 - step / steps))
        if report is not None:
            report(step + 1, loss.item())
        if step + 1 in judged:
            # Through bytes and back: what was trained counts only as a decoder will read it.
            raw = {name: matrix.pack() for name, matrix in matrices.items()}
            found = held_back_loss(task, raw)
            if found < least:
                best, least = raw, found
    return Trained(best, least, start_loss)


def minibatches(inputs: Batches, targets: Batches, batch: int, seed: int) -> Iterator[Pair]:
    """Without end: all sequences in a new order each time round, at most `batch` together.

    Only sequences of one of the given batches go together, for others may be of another length.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        pieces = [
            (given, order_S)
            for given, inputs_STH in enumerate(inputs)
            for order_S in torch.split(torch.randperm(len(inputs_STH), generator=generator), batch)
        ]
        for at in torch.randperm(len(pieces), generator=generator).tolist():
            given, order_S = pieces[at]
            yield inputs[given][order_S], targets[given][order_S]
