"""A model's tensors under the names and in the order of a checkpoint: tables of a family read backwards.

    blk.0.attn_q.weight       →  model.layers.0.self_attn.q_proj.weight, rotated pairs half a head apart again
    blk.3.ffn_up_exps.weight  →  one matrix per expert: model.layers.3.mlp.experts.7.up_proj.weight
    output_norm.weight        →  model.norm.weight, less the one that Gemma's GGUF adds

Only rows are moved, so it can be done to codes as well as to weights: columns, by which weights share
scales, stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import ROPE_TABLES, block_of, in_every_block
from dither.models.arch.changes import UNCHANGED, Change
from dither.models.arch.family import EXPERT, LAYER, Family, Rule
from dither.models.arch.recognize import WAY_OUT, family_of_tensors
from dither.types import Model, Tensor


@dataclass(frozen=True)
class Written:
    """One tensor of a checkpoint, made from the rows of one tensor of the model."""

    name: str  # "model.layers.0.self_attn.q_proj.weight"
    tensor: str  # "blk.0.attn_q.weight"
    shape: tuple[int, ...]
    first_row: int  # of the tensor's, experts flattened in
    change: Change = UNCHANGED  # to be undone
    heads: int = 0  # that the change moves rows within; 0 for none

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def module(self) -> str:
        """The module that the tensor is a parameter of."""
        return self.name.rpartition(".")[0]

    def order(self) -> npt.NDArray[np.intp] | None:
        """For each row of the checkpoint (of a bias: number) its place in the model; None for as it is."""
        here = self.change.order(self.shape[0], self.heads)
        return None if here is None else np.argsort(here)

    @property
    def is_unchanged(self) -> bool:
        return not self.change.new_numbers and self.order() is None


def written(model: Model) -> tuple[Family, list[Written]]:
    """A model's family, and how each tensor of its checkpoint is made, in the model's order.

    Tables of rotary frequencies have no tensor in a checkpoint: config.json stands for them.  Raises
    UnsupportedError for a model of no known family, SourceError where its tensors are not the family's.
    """
    family = family_of_tensors(model)
    tensors = (tensor for tensor in model.tensors if tensor.name not in ROPE_TABLES)
    return family, [made for tensor in tensors for made in _written(family, model, tensor)]


def _written(family: Family, model: Model, tensor: Tensor) -> Iterator[Written]:
    rule = _rule(family, tensor)
    change, block = family.change_of(rule), block_of(tensor.name)
    name = rule.source if block is None else rule.source.replace(LAYER, str(block))
    if change.stacks:
        experts, rows = tensor.shape[0], tensor.shape[1]
        for expert in range(experts):
            yield Written(name.replace(EXPERT, str(expert)), tensor.name, tensor.shape[1:], expert * rows)
        return
    heads = _heads(model, change.heads[1], tensor) if change.heads else 0
    yield Written(name, tensor.name, tensor.shape, 0, change, heads)


def _rule(family: Family, tensor: Tensor) -> Rule:
    """The first rule that makes this tensor; of stacked experts the one that names each."""
    rules = [rule for rule in family.rules if rule.target == in_every_block(tensor.name)]
    separate = [rule for rule in rules if family.change_of(rule).stacks]
    rule = (separate or rules)[0]
    if family.change_of(rule).is_part:
        reason = f"has no name for each expert in {family.name}"
        raise UnsupportedError(f"tensor {tensor.name}", reason, "Write a GGUF instead.")
    return rule


def _heads(model: Model, key: str, tensor: Tensor) -> int:
    key = f"{model.arch}.{key}"
    found = model.metadata.get(key)
    heads = found.value if found is not None else None
    if type(heads) is not int or heads <= 0 or tensor.shape[0] % (2 * heads):
        raise SourceError(f"metadata {key}", f"is {heads!r}, for {tensor.shape[0]} rows", WAY_OUT)
    return heads
