"""What each linear layer of a block reads, seen while the block computes.

The network is transformers' and is not rewritten: for the time of one forward pass every call of
`torch.nn.functional.linear` passes through here (torch calls this a TorchFunctionMode), and the weight
says which matrix it is.  Consecutive calls with one and the same input (q, k and v; gate and up) are
reported together, so that statistics of an input are taken once.

Experts are slices of a stack, and their inputs are picked from all tokens by an index; both are
indexing, which passes through here as well: the stack's index is the expert's number, the tokens' index
is where in the batch they stand.

Traced rather than watched, a block also tells how strongly a loss pulls at what its matrices put out: the
outputs are kept, the loss is carried back through the block, and input and gradient are reported together.

Legend: N tokens, C columns (in features), R rows (out features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dither.models.blocks.restore import other_release

_UNSEEN = "is multiplied by this release of transformers in a way that cannot be watched"

See = Callable[[tuple[str, ...], torch.Tensor, torch.Tensor, int | None], None]
"""(names of the matrices that read this input, x_NC in float32, position_N in the flattened batch, the
expert's number or None for layers that every token goes through).  x_NC may be the network's own memory:
it must not be written to."""


@dataclass(frozen=True)
class Pull:
    """How a loss pulls at the outputs of the matrices that read one input."""

    weight_N: torch.Tensor  # Σ g² over all these outputs, of each token
    gradients: Mapping[str, torch.Tensor]  # matrix → g_NR, rows in GGUF's order
    apart: bool = False  # outputs are too many to ask how each goes with every other


SeePull = Callable[[tuple[str, ...], torch.Tensor, torch.Tensor, int | None, Pull], None]
"""As `See`, with the gradients by the outputs."""


@dataclass
class _SharedInput:
    """An input that at least one matrix has read, and where outputs are kept, one per call."""

    x: torch.Tensor
    names: list[str]
    position_N: torch.Tensor | None  # None: all of them in order
    expert: int | None
    outputs: list[tuple[tuple[str, ...], torch.Tensor]] = field(default_factory=list)

    def report(self, see: Callable[..., None], *pull: Pull) -> None:
        """Calls a `See`, or with a pull a `SeePull`."""
        see(tuple(self.names), *self.rows(), self.expert, *pull)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x_NC and position_N.  Raises UnsupportedError where an expert's tokens cannot be told."""
        x_NC = self.x.detach().reshape(-1, self.x.shape[-1]).float()
        position_N = self.position_N
        if self.expert is None:
            position_N = torch.arange(len(x_NC), device=x_NC.device)
        if position_N is None or len(position_N) != len(x_NC):
            raise other_release(f"tensor {self.names[0]}", _UNSEEN)
        return x_NC, position_N


class Linears(TorchFunctionMode):
    """Calls `found` with every distinct input of the matrices in `names`, each given with its parameter, once all that
    read it have done so."""

    keeps_outputs = False

    def __init__(self, names: Mapping[torch.Tensor, tuple[str, ...]], found: Callable[[_SharedInput], None]) -> None:
        super().__init__()
        self._found = found
        self._names = {id(parameter): found for parameter, found in names.items()}
        self._seen: set[str] = set()
        self._input: _SharedInput | None = None
        self._expert: tuple[torch.Tensor, tuple[str, ...], int] | None = None  # its matrix, names, number
        self._picked_N: torch.Tensor | None = None  # the positions of the tokens picked last

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._linear(args[0], args[1], result)
        elif func is torch.Tensor.__getitem__:
            self._index(args[0], args[1], result)
        return result

    def _index(self, tensor: torch.Tensor, index: Any, result: torch.Tensor) -> None:
        is_tensor = isinstance(index, torch.Tensor)
        if id(tensor) in self._names and (isinstance(index, int) or (is_tensor and index.dim() == 0)):
            self._expert = (result, self._names[id(tensor)], int(index))
        elif is_tensor and index.dtype == torch.long and index.dim() == 1:
            self._picked_N = index

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        names, position_N, expert = self._names.get(id(weight), ()), None, None
        if not names and self._expert is not None and weight is self._expert[0]:
            (_, names, expert), position_N = self._expert, self._picked_N
        if not names:
            return
        if self._input is not None and self._input.x is x and self._input.expert == expert:
            self._input.names += names
        else:
            self._end()
            self._input = _SharedInput(x, list(names), position_N, expert)
        if self.keeps_outputs:
            self._input.outputs.append((names, y))

    def _end(self) -> None:
        if self._input is not None:
            self._seen.update(self._input.names)
            found, self._input = self._input, None
            self._found(found)

    def close(self) -> None:
        """Ends the last input.  Raises UnsupportedError naming a matrix that was not seen."""
        self._end()
        missed = {name for names in self._names.values() for name in names} - self._seen
        if missed:
            raise other_release(f"tensor {min(missed)}", _UNSEEN)


class Tracing(Linears):
    """Keeps every input with its outputs until gradients by the outputs are known."""

    keeps_outputs = True

    def __init__(self, names: Mapping[torch.Tensor, tuple[str, ...]]) -> None:
        self._inputs: list[_SharedInput] = []
        super().__init__(names, self._inputs.append)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [y for given in self._inputs for _, y in given.outputs]

    def report(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Callable[[tuple[str, ...]], Mapping[str, torch.Tensor]],
        see: SeePull,
    ) -> None:
        """`gradients` by `outputs`, in their order; None is zero.  `rows` tells which features of an output
        are each matrix's, in GGUF's order."""
        left = iter(gradients)
        for given in self._inputs:
            found: dict[str, torch.Tensor] = {}
            for names, y in given.outputs:
                gradient = next(left)
                g_NR = (torch.zeros_like(y) if gradient is None else gradient).reshape(-1, y.shape[-1]).float()
                found |= {name: _of_rows(g_NR, row_R) for name, row_R in rows(names).items()}
            weight_N = torch.stack([squared_norm(g_NR) for g_NR in found.values()]).sum(dim=0)
            given.report(see, Pull(weight_N, found))


def squared_norm(g_NR: torch.Tensor) -> torch.Tensor:
    """Σ g² of each row.  The norm leaves no squares in memory, which would take longer than adding them."""
    squared_N: torch.Tensor = torch.linalg.vector_norm(g_NR, dim=1).square_()
    return squared_N


def _of_rows(g_NR: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """Some features in their order; no copy where that is all of them as they are."""
    if len(row_R) == g_NR.shape[1] and torch.equal(row_R, torch.arange(len(row_R), device=row_R.device)):
        return g_NR
    return g_NR[:, row_R]
