"""GGUF's tensors as parameters of transformers' modules: the rule tables read from right to left.

A parameter of the network finds its rules by name; they say which tensors it came from and what was
done to them.  Undoing that (`models/arch/changes`) is a view in most cases: rotated pairs that lie side by
side in GGUF are half a head apart here, two stacks there are one with both halves here.

Legend: R rows, C columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import EMBEDDING, OUTPUT, in_every_block
from dither.models.arch.changes import UNCHANGED, Change
from dither.models.arch.family import EXPERT, LAYER, Family
from dither.models.arch.recognize import PLAIN
from dither.system.text import shown
from dither.types import Model, Tensor

CHUNK = 1 << 22  # weights that are float32 on their way into a parameter
_WAY_OUT = "Take the model from its authors again."


@dataclass(frozen=True)
class PartOfParameter:
    """A tensor, and how it lies in a parameter."""

    tensor: str
    change: Change
    heads: int  # that the change moves rows within; 0 for none


@dataclass(frozen=True)
class Restored:
    """One parameter and the tensors it is made from."""

    parameter: str  # "model.layers.0.self_attn.q_proj.weight"
    shape: tuple[int, ...]
    parts: tuple[PartOfParameter, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(part.tensor for part in self.parts)

    def views(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each tensor as a view into the parameter, rows in GGUF's order (heads apart where permuted).

        Numbers are the parameter's: `PartOfParameter.change` turns them into the GGUF's.
        """
        return tuple(part.change.view(parameter, part.heads) for part in self.parts)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """GGUF's shape of each tensor."""
        return tuple(part.change.part_shape(self.shape) for part in self.parts)

    def rows(self) -> tuple[torch.Tensor, ...]:
        """Of each tensor's rows, in GGUF's order, the row of the parameter (or of one of its experts)."""
        row_R1 = torch.arange(self.shape[-2])[:, None]
        every = row_R1[None] if len(self.shape) > 2 else row_R1
        return tuple(view.reshape(-1) for view in self.views(every))

    def join(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter from its tensors as GGUF has them; differentiable."""
        undone: list[torch.Tensor] = [part.change.undo(w) for part, w in zip(self.parts, stored, strict=True)]
        if self.parts[0].change is UNCHANGED:
            return undone[0]
        parameter = undone[0].new_empty(self.shape)
        for view, w in zip(self.views(parameter), undone, strict=True):
            view.copy_(w.reshape(view.shape))
        return parameter

    def fill(self, parameter: torch.Tensor, sources: Sequence[Tensor]) -> None:
        """Reads the tensors into the parameter."""
        for view, part, source in zip(self.views(parameter), self.parts, sources, strict=True):
            fill(view, source, part.change)


def plan(family: Family, config: PretrainedConfig, skeleton: nn.Module) -> dict[str, Restored]:
    """How each parameter of the network is made, by its name; the output matrix apart.

    Raises UnsupportedError naming a parameter that no tensor of the family fills.
    """
    return {
        name: _restored(family, config, name, tuple(parameter.shape))
        for name, parameter in skeleton.named_parameters()
        if name != "lm_head.weight"
    }


def _restored(family: Family, config: PretrainedConfig, name: str, shape: tuple[int, ...]) -> Restored:
    parts = []
    for rule in family.rules:
        match = rule.pattern.fullmatch(name)
        if match and EXPERT not in rule.source:
            change = family.change_of(rule)
            heads = int(getattr(config, change.heads[0])) if change.heads else 0
            target = rule.target.replace(LAYER, match.groupdict().get("layer") or "")
            parts.append(PartOfParameter(target, change, heads))
    found = Restored(name, shape, tuple(parts))
    if sum(map(prod, found.shapes())) != prod(shape):
        reason = f"of transformers' {family.name} is made from no tensor that is known here"
        raise other_release(f"parameter {name}", reason)
    return found


def other_release(thing: str, reason: str) -> UnsupportedError:
    """The error for a network that transformers builds otherwise than is known here."""
    return UnsupportedError(thing, reason, "Install another release of transformers, 5.0 or later.")


def tensors_by_name(model: Model, plans: Iterable[Restored]) -> dict[str, Tensor]:
    """A model's tensors, held against what the network is made from.

    Raises SourceError naming one that is missing or of another shape, UnsupportedError naming one that
    no parameter takes.
    """
    found = {tensor.name: tensor for tensor in model.tensors}
    shapes: dict[str, tuple[int, ...]] = {}
    for restored in plans:
        shapes |= dict(zip(restored.tensors, restored.shapes(), strict=True))
    if OUTPUT in found:
        shapes[OUTPUT] = shapes[EMBEDDING]
    kinds = {in_every_block(name) for name in found}
    for name, shape in shapes.items():
        if name.endswith(".bias") and in_every_block(name) not in kinds:  # of some matrices and not of others
            found[name] = zeros(name, shape)
        if name not in found:
            raise SourceError(f"tensor {name}", "is missing", _WAY_OUT)
        if found[name].shape != shape:
            reason = f"has shape {list(found[name].shape)}, but the metadata makes it {list(shape)}"
            raise SourceError(f"tensor {name}", reason, _WAY_OUT)
    unknown = [name for name in found if name not in shapes and not name.startswith("rope_f")]
    if unknown:
        raise UnsupportedError(f"tensor {shown(unknown[0])}", "is taken by no parameter of the network", PLAIN)
    return found


def zeros(name: str, shape: tuple[int, ...]) -> Tensor:
    """A vector that is stored nowhere."""
    return Tensor(name, shape, "F32", 4 * prod(shape), lambda start, stop: np.zeros((stop - start, *shape), np.float32))


def fill(view: torch.Tensor, tensor: Tensor, change: Change = UNCHANGED) -> None:
    """Reads a tensor into a view of a parameter, `change` undone, a few rows (heads, experts) at a time."""
    if len(tensor.shape) < 2:
        view.copy_(_read(tensor, 0, 1, change).view(view.shape))
        return
    rows = tensor.rows // view.shape[0]  # of the tensor to one step of the view's first dimension
    step = max(1, CHUNK // (rows * tensor.columns))
    for start in range(0, view.shape[0], step):
        part = view[start : start + step]
        part.copy_(_read(tensor, start * rows, (start + len(part)) * rows, change).view(part.shape))


def _read(tensor: Tensor, start: int, stop: int, change: Change) -> torch.Tensor:
    rows_RC = tensor.read(start, stop)
    if not rows_RC.flags.writeable:  # torch warns of memory that it could write to but must not
        rows_RC = rows_RC.copy()
    w_RC: torch.Tensor = change.undo(torch.from_numpy(rows_RC))
    return w_RC


def layer_of(parameter: str) -> int | None:
    """
    >>> layer_of("model.layers.12.mlp.up_proj.weight")
    12
    """
    match = re.match(r"model\.layers\.(\d+)\.", parameter)
    return int(match[1]) if match else None
