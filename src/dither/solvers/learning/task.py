"""What trained rounding is given of one decoder block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dither.types import Codec, Floats, Solved

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to refine.  Tensors have GGUF's names, shapes and order of rows.

    Sequences hold no padding; batches may differ in length.
    """

    run: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    """hidden_STH and the matrices that are replaced → the block's output, differentiable in these matrices"""
    inputs: Sequence[torch.Tensor]  # batches (S, T, H): hidden states entering the block
    targets: Sequence[torch.Tensor]  # the same sequences leaving the original block
    held: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # inputs and targets of others, to judge by
    weights: Mapping[str, Floats]  # original matrices (R, C), stacks of experts (E, R, C)
    codecs: Mapping[str, Codec]
    start: Mapping[str, Solved]  # bytes (R, N), experts flattened into R
    importance: Mapping[str, Floats] = field(default_factory=dict)
    """E[x²] of the inputs, (C,), for codecs that search with it: lattices"""
