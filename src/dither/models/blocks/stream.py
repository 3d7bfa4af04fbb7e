"""A network walked from the embedding to the head, one decoder block in memory at a time.

transformers builds its skeleton on torch's meta device, where a parameter is a shape without memory.
Loading a block copies one layer of the skeleton and fills it from the source; dropping the block frees
it.  The same walk over another model of the same network (a quantized GGUF, a rewritten one) needs only
other tensors under the same names.

Legend: S sequences, T tokens of each, H hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dither.errors import UsageError
from dither.formats.tensor_names import EMBEDDING, OUTPUT
from dither.models.blocks.block import Block, Head
from dither.models.blocks.config import Configured, configure, refusals_told
from dither.models.blocks.restore import Restored, fill, plan, tensors_by_name
from dither.models.blocks.surroundings import Surroundings
from dither.types import Model, Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GAP = 16  # rows of the embedding between two tokens that are read along rather than sought over


def open_blocks(model: Model, *, device: str, dtype: str) -> Blocks:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype}", "is not one of float32 and bfloat16")
    configured = configure(model)
    config = configured.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    with refusals_told(model), torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            # torch's fused attention knows no softcap; without one it is as exact and needs no T × T scores
            attn_implementation="eager" if softcap else "sdpa",
            experts_implementation="eager",
        ).eval()
    plans = plan(configured.family, config, skeleton)
    tensors_by_name(model, plans.values())
    return Blocks(model, configured, skeleton, plans, device_of(device), DTYPES[dtype])


def device_of(name: str) -> torch.device:
    """Raises UsageError where torch has no such device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {name}", reason, "Name another, such as cpu.") from None


class Blocks:
    """A model's network: `embed`, then `load(0)` … `load(count - 1)`, then `head`.

    `weights`, wherever it may be given, is another model of the same network whose tensors are used
    instead.  `notes` say what of the model is not taken into account.
    """

    def __init__(
        self,
        model: Model,
        configured: Configured,
        skeleton: PreTrainedModel,
        plans: dict[str, Restored],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        config = skeleton.config
        self.model = model
        self.count: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.context: int = config.max_position_embeddings
        self.vocabulary: int = config.vocab_size
        self.device = device
        self.dtype = dtype
        self.notes = configured.notes
        self.skeleton = skeleton  # the whole network on the meta device: for whoever fills it rather than walks it
        self.plans = plans  # how each of its parameters is made, by name; the output matrix apart
        self._family = configured.family
        self._surroundings = Surroundings(skeleton, device, dtype)

    @torch.no_grad()
    def embed(self, tokens_ST: torch.Tensor, weights: Model | None = None) -> torch.Tensor:
        """Hidden states (S, T, H) of token ids; only the rows of these tokens are read.

        Raises UsageError for an id that the vocabulary does not have.
        """
        ids, at_ST = torch.unique(tokens_ST, return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.vocabulary:
            wrong = int(ids[0]) if ids[0] < 0 else int(ids[-1])
            raise UsageError(f"token {wrong}", f"is outside the model's vocabulary of {self.vocabulary}")
        table = self._tensors(weights)[EMBEDDING]
        rows_VH = torch.from_numpy(read_rows(table, ids.cpu().numpy())).to(self.device, self.dtype)
        hidden_STH = rows_VH[at_ST.to(self.device)]
        # A scale of the dtype's own precision, as Gemma was trained with.
        scale = torch.tensor(self.width**0.5, device=self.device, dtype=self.dtype)
        return hidden_STH * scale if self._family.scaled_embedding else hidden_STH

    @torch.inference_mode(False)  # the weights may be replaced or trained later
    def load(self, index: int, weights: Model | None = None) -> Block:
        """Block `index` with its weights, read now."""
        if not 0 <= index < self.count:
            raise UsageError(f"block {index}", f"is not one of the model's {self.count}")
        tensors = self._tensors(weights)
        layer = copy_of(self.skeleton.get_submodule(f"model.layers.{index}"))
        plans = {name: self.plans[f"model.layers.{index}.{name}"] for name, _ in layer.named_parameters()}
        self._fill(layer, plans, tensors)
        own = {name for restored in plans.values() for name in restored.tensors}
        names = (tensor.name for tensor in self.model.tensors if tensor.name in own and len(tensor.shape) > 1)
        return Block(index, layer, plans, tuple(names), self._surroundings)

    def head(self, weights: Model | None = None) -> Head:
        """The last norm and the output matrix: the embedding where `weights` has no other."""
        tensors = self._tensors(weights)
        norm = copy_of(self.skeleton.get_submodule("model.norm"))
        self._fill(norm, {"weight": self.plans["model.norm.weight"]}, tensors)
        name = OUTPUT if OUTPUT in tensors else EMBEDDING
        output_VH = torch.empty(tensors[name].shape, device=self.device, dtype=self.dtype)
        fill(output_VH, tensors[name])
        return Head(norm, name, output_VH, getattr(self.skeleton.config, "final_logit_softcapping", None))

    def _tensors(self, weights: Model | None) -> dict[str, Tensor]:
        model = weights or self.model
        if model.arch != self.model.arch:
            reason = f"is of architecture {model.arch}, not {self.model.arch} as {self.model.name}"
            raise UsageError(model.name, reason, "Compare models of one network.")
        return tensors_by_name(model, self.plans.values())

    def _fill(self, module: nn.Module, plans: dict[str, Restored], tensors: dict[str, Tensor]) -> None:
        for name, restored in plans.items():
            parameter = torch.empty(restored.shape, device=self.device, dtype=self.dtype)
            restored.fill(parameter, [tensors[source] for source in restored.tensors])
            home, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(home), leaf, nn.Parameter(parameter, requires_grad=False))


def copy_of(module: nn.Module) -> Any:
    """A copy that shares the configuration, which is read only."""
    config = getattr(module, "config", None)
    return copy.deepcopy(module, {id(config): config})


def read_rows(tensor: Tensor, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix, float32 (rows, C); `rows` ascending.  Neighbors are read together."""
    found = np.empty((len(rows), tensor.columns), np.float32)
    breaks = np.flatnonzero(np.diff(rows) > GAP) + 1
    for at in np.split(np.arange(len(rows)), breaks):
        if len(at):
            first = int(rows[at[0]])
            found[at] = tensor.read(first, int(rows[at[-1]]) + 1)[rows[at] - first]
    return found
