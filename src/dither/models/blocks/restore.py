"""GGUF's tensors as parameters of transformers' modules: the rule tables read from right to left.

A parameter of the network finds its rules by name; they say which tensors it came from and what was
done to them.  Undoing that is a view in most cases:

    rope_rows_*       rotated pairs lie side by side in GGUF, half a head apart here
    expert_gate, …    two stacks there, one stack with both halves here
    plus_one          the norm's gain there, its distance from one here

Legend: R rows, C columns, E experts, N heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dither.errors import SourceError, UnsupportedError
from dither.models.arch.family import EXPERT, Family, Rule
from dither.system.text import shown
from dither.types import Model, Tensor

CHUNK = 1 << 22  # weights that are float32 on their way into a parameter
_UNCHANGED = ("", "embedding", "output")
_WAY_OUT = "Take the model from its authors again."


@dataclass(frozen=True)
class Restored:
    """One parameter and the tensors it is made from."""

    parameter: str  # "model.layers.0.self_attn.q_proj.weight"
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    change: str
    heads: int = 0

    @property
    def offset(self) -> float:
        return 1.0 if self.change == "plus_one" else 0.0

    def views(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each tensor as a view into the parameter, rows in GGUF's order (heads apart where permuted).

        What is stored in GGUF is the view plus `offset`.
        """
        if self.change == "rotary":
            per_head = (self.heads, 2, self.shape[0] // self.heads // 2, *self.shape[1:])
            return (parameter.view(per_head).transpose(1, 2),)
        if self.change == "gate_and_up":
            return parameter.chunk(2, dim=1)
        return (parameter,)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """GGUF's shape of each tensor."""
        if self.change == "gate_and_up":
            experts, rows, columns = self.shape
            return ((experts, rows // 2, columns),) * 2
        return (self.shape,)

    def rows(self) -> tuple[torch.Tensor, ...]:
        """Of each tensor's rows, in GGUF's order, the row of the parameter (or of one of its experts)."""
        row_R = torch.arange(self.shape[-2])
        if self.change == "rotary":
            return (row_R.view(self.heads, 2, -1).transpose(1, 2).reshape(-1),)
        return row_R.chunk(2) if self.change == "gate_and_up" else (row_R,)

    def join(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter from its tensors as GGUF has them; differentiable."""
        if self.change == "rotary":
            per_head = (self.heads, self.shape[0] // self.heads // 2, 2, *self.shape[1:])
            return stored[0].reshape(per_head).transpose(1, 2).reshape(self.shape)
        if self.change == "gate_and_up":
            return torch.cat(tuple(stored), dim=1)
        return stored[0] - self.offset if self.offset else stored[0]


def plan(family: Family, config: PretrainedConfig, skeleton: nn.Module) -> dict[str, Restored]:
    """How each parameter of the network is made, by its name; the output matrix apart.

    Raises UnsupportedError naming a parameter that no tensor of the family fills.
    """
    found = {}
    for name, parameter in skeleton.named_parameters():
        if name == "lm_head.weight":
            continue
        found[name] = _restored(family, config, name, tuple(parameter.shape))
    return found


def _restored(family: Family, config: PretrainedConfig, name: str, shape: tuple[int, ...]) -> Restored:
    hits = [
        (rule, match) for rule in family.rules if EXPERT not in rule.source and (match := rule.pattern.fullmatch(name))
    ]
    tensors = tuple(rule.target.replace("*", match.groupdict().get("layer") or "") for rule, match in hits)
    changes = [rule.change for rule, _ in hits]
    if changes == ["expert_gate", "expert_up"]:
        return Restored(name, shape, tensors, "gate_and_up")
    if len(changes) == 1 and changes[0].startswith("rope_rows"):
        return Restored(name, shape, tensors, "rotary", _heads(config, hits[0][0]))
    if len(changes) == 1 and changes[0] in (*_UNCHANGED, "plus_one"):
        return Restored(name, shape, tensors, changes[0] if changes[0] == "plus_one" else "")
    raise UnsupportedError(
        f"parameter {name}",
        f"of transformers' {family.name} is made from no tensor that is known here",
        "Install another release of transformers, 5.0 or later.",
    )


def _heads(config: PretrainedConfig, rule: Rule) -> int:
    of_queries = rule.change == "rope_rows_q"
    return int(config.num_attention_heads if of_queries else config.num_key_value_heads)


def tensors_by_name(model: Model, plans: Iterable[Restored]) -> dict[str, Tensor]:
    """A model's tensors, held against what the network is made from.

    Raises SourceError naming one that is missing or of another shape, UnsupportedError naming one that
    no parameter takes.
    """
    found = {tensor.name: tensor for tensor in model.tensors}
    shapes: dict[str, tuple[int, ...]] = {}
    for restored in plans:
        shapes |= dict(zip(restored.tensors, restored.shapes(), strict=True))
    if "output.weight" in found:
        shapes["output.weight"] = shapes["token_embd.weight"]
    check_shapes(found, shapes)
    unknown = [name for name in found if name not in shapes and not name.startswith("rope_f")]
    if unknown:
        raise UnsupportedError(
            f"tensor {shown(unknown[0])}",
            "is taken by no parameter of the network",
            "Only what is understood is run: take a plain model of this architecture.",
        )
    return found


def check_shapes(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in found:
            raise SourceError(f"tensor {name}", "is missing", _WAY_OUT)
        if found[name].shape != shape:
            reason = f"has shape {list(found[name].shape)}, but the metadata makes it {list(shape)}"
            raise SourceError(f"tensor {name}", reason, _WAY_OUT)


def fill(view: torch.Tensor, tensor: Tensor, offset: float = 0.0) -> None:
    """Reads a tensor into a view of a parameter, a few rows (heads, experts) at a time."""
    if len(tensor.shape) < 2:
        view.copy_(_read(tensor, 0, 1, offset).view(view.shape))
        return
    rows = tensor.rows // view.shape[0]  # of the tensor to one step of the view's first dimension
    step = max(1, CHUNK // (rows * tensor.columns))
    for start in range(0, view.shape[0], step):
        part = view[start : start + step]
        part.copy_(_read(tensor, start * rows, (start + len(part)) * rows, offset).view(part.shape))


def _read(tensor: Tensor, start: int, stop: int, offset: float) -> torch.Tensor:
    rows_RC = tensor.read(start, stop)
    if not rows_RC.flags.writeable:  # torch warns of memory that it could write to but must not
        rows_RC = rows_RC.copy()
    w_RC = torch.from_numpy(rows_RC)
    return w_RC - offset if offset else w_RC


def layer_of(parameter: str) -> int | None:
    """
    >>> layer_of("model.layers.12.mlp.up_proj.weight")
    12
    """
    match = re.match(r"model\.layers\.(\d+)\.", parameter)
    return int(match[1]) if match else None
