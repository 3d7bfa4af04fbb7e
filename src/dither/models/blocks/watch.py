"""What each linear layer of a block reads, seen while the block computes.

The network is transformers' and is not rewritten: for the time of one forward pass every call of
`torch.nn.functional.linear` passes through here (torch calls this a TorchFunctionMode), and the weight
says which matrix it is.  Consecutive calls with one and the same input (q, k and v; gate and up) are
reported together, so that statistics of an input are taken once.

Experts are slices of a stack, and their inputs are picked from all tokens by an index; both are
indexing, which passes through here as well: the stack's index is the expert's number, the tokens' index
is where in the batch they stand.

Legend: N tokens, C columns (in features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dither.errors import UnsupportedError

See = Callable[[tuple[str, ...], torch.Tensor, torch.Tensor, int | None], None]
"""(names of the matrices that read this input, x_NC in float32, position_N in the flattened batch, the
expert's number or None for layers that every token goes through).  x_NC may be the network's own memory:
it must not be written to."""


@dataclass
class _Input:
    """An input that at least one matrix has read."""

    x: torch.Tensor
    names: list[str]
    position_N: torch.Tensor | None  # None: all of them in order
    expert: int | None


class Watching(TorchFunctionMode):
    """Calls `see` for every distinct input of the matrices in `names`, each given with its parameter."""

    def __init__(self, names: Mapping[torch.Tensor, tuple[str, ...]], see: See) -> None:
        super().__init__()
        self._names = {id(parameter): found for parameter, found in names.items()}
        self._see = see
        self._seen: set[str] = set()
        self._input: _Input | None = None
        self._expert: tuple[torch.Tensor, tuple[str, ...], int] | None = None  # its matrix, names, number
        self._picked_N: torch.Tensor | None = None  # the positions of the tokens picked last

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._linear(args[0], args[1])
        elif func is torch.Tensor.__getitem__:
            self._index(args[0], args[1], result)
        return result

    def _index(self, tensor: torch.Tensor, index: Any, result: torch.Tensor) -> None:
        if id(tensor) in self._names and _is_number(index):
            self._expert = (result, self._names[id(tensor)], int(index))
        elif isinstance(index, torch.Tensor) and index.dtype == torch.long and index.dim() == 1:
            self._picked_N = index

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        if id(weight) in self._names:
            self._read(x, self._names[id(weight)], None, None)
        elif self._expert is not None and weight is self._expert[0]:
            _, names, expert = self._expert
            self._read(x, names, self._picked_N, expert)

    def _read(
        self, x: torch.Tensor, names: tuple[str, ...], position_N: torch.Tensor | None, expert: int | None
    ) -> None:
        if self._input is not None and self._input.x is x and self._input.expert == expert:
            self._input.names += names
            return
        self._report()
        self._input = _Input(x, list(names), position_N, expert)

    def _report(self) -> None:
        if self._input is None:
            return
        found, self._input = self._input, None
        x_NC = found.x.detach().reshape(-1, found.x.shape[-1]).float()
        position_N = found.position_N
        if found.expert is None:
            position_N = torch.arange(len(x_NC), device=x_NC.device)
        if position_N is None or len(position_N) != len(x_NC):
            raise _unwatchable(found.names[0])
        self._seen.update(found.names)
        self._see(tuple(found.names), x_NC, position_N, found.expert)

    def close(self) -> None:
        """Reports the last input.  Raises UnsupportedError naming a matrix that was not seen."""
        self._report()
        missed = {name for names in self._names.values() for name in names} - self._seen
        if missed:
            raise _unwatchable(min(missed))


def _is_number(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)


def _unwatchable(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor {name}", "is multiplied by this release of transformers in a way that cannot be watched",
        "Install another release of transformers, 5.0 or later.",
    )  # fmt: skip
