"""transformers' network filled from a source, the matrices of its decoder blocks quantized as they are read.

A matrix of a block is read a few rows at a time, in the source's order; `Restored.rows` says where each row
belongs in transformers' parameter.  Embedding, norms, biases, routers and the output matrix are read into
the type that is computed in: they are few weights, or those that suffer most, and the peers leave them alone
as well.

Legend: R rows, C columns, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dither.codecs import split_codec
from dither.errors import SourceError, UnsupportedError
from dither.executors.local import run
from dither.formats import tensor_names
from dither.formats.tensor_names import is_expert_stack, is_router
from dither.loading.int4 import Int4Linear
from dither.loading.linear import QuantizedStack
from dither.loading.methods import LoadMethod
from dither.loading.sinks import BnbLinear, PackedRows, Sink, stored_bytes
from dither.models.blocks import open_blocks
from dither.models.blocks.restore import Restored, fill, layer_of, other_release
from dither.models.blocks.surroundings import rotary_embedding
from dither.progress import Progress
from dither.types import Model, Tensor

CHUNK = 1 << 20  # weights of one task
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id", "eot_token_id"),
    "pad_token_id": ("padding_token_id",),
}


@dataclass(frozen=True)
class LoadOptions:
    """What to make of the matrices."""

    method: LoadMethod
    backend: str
    group: int
    device: torch.device
    dtype: torch.dtype
    threads: int


@dataclass
class Filling:
    """A network while its weights are put in place, and what became of them."""

    network: PreTrainedModel
    wanted: LoadOptions
    report: Progress
    notes: list[str]
    backends: dict[str, str] = field(default_factory=dict)  # by the name of the layer
    weights: int = 0
    bytes: int = 0
    kept: list[str] = field(default_factory=list)  # matrices of blocks that could not be quantized

    def dense(self, name: str, sources: list[Tensor], plan: Restored | None = None) -> None:
        """Puts a parameter in place in the type that is computed in."""
        shape = plan.shape if plan else sources[0].shape
        parameter = torch.empty(shape, device=self.wanted.device, dtype=self.wanted.dtype)
        if plan:
            plan.fill(parameter, sources)
        else:
            fill(parameter, sources[0])
        _set(self.network, name, nn.Parameter(parameter))
        self.report.advance(sum(tensor.size for tensor in sources), name)

    def quantized(self, name: str, plan: Restored, sources: list[Tensor]) -> None:
        """Puts a layer of codes in the place of a matrix, or the matrix itself where the codec cannot hold its rows."""
        sink, backend = _sink(plan, self.wanted)
        if sink is None:
            self.kept.append(name)
            self.dense(name, sources, plan)
            return
        # bitsandbytes' rows are only copied; ours are encoded, which releases the interpreter's lock.
        threads = 1 if backend == "bitsandbytes" else self.wanted.threads
        for size in run(partial(_put, sink), _pieces(plan, sources), threads):
            self.report.advance(size, name)
        home, _, leaf = name.rpartition(".")
        parent: Any = self.network.get_submodule(home)
        if len(plan.shape) == 3:
            layer = sink.module(None)
            delattr(parent, leaf)  # a parameter's name is free for a module only then
            parent.add_module(leaf, layer)
        else:
            layer = sink.module(parent.bias)  # still without memory, filled in its turn
            self.network.set_submodule(home, layer)
        if backend == "torch" and not isinstance(layer, Int4Linear):
            backend = "dither"  # the kernel cannot hold this matrix
        self.backends[name if len(plan.shape) == 3 else home] = backend
        self.weights += prod(plan.shape)
        self.bytes += stored_bytes(layer)

    def head(self, tensors: dict[str, Tensor]) -> None:
        """The output matrix, which is the embedding itself where the source has no other."""
        own = tensors.get(tensor_names.OUTPUT)
        self.network.config.tie_word_embeddings = own is None
        if own is None:
            _set(self.network, HEAD, self.network.get_parameter(EMBEDDING))
        else:
            self.dense(HEAD, [own])


def build(model: Model, wanted: LoadOptions, report: Progress) -> PreTrainedModel:
    """The network with every weight in place; `network.dither` says how.

    Raises as `open_blocks` does, and SourceError for a weight that is no number.
    """
    blocks = open_blocks(model)
    network = blocks.skeleton
    filling = Filling(network, wanted, report, [*model.notes, *blocks.notes])
    tensors = {tensor.name: tensor for tensor in model.tensors}
    report.start(model.parameters, 0)
    with torch.inference_mode(False), torch.no_grad():
        for name, plan in blocks.plans.items():
            sources = [tensors[source] for source in plan.tensors]
            if _is_matrix(network, name, plan):
                filling.quantized(name, plan, sources)
            else:
                filling.dense(name, sources, plan)
        filling.head(tensors)
        _fill_buffers(network, wanted.device)
    _settle(network, model, filling)
    network.train(False)  # new layers begin in training mode, in which bitsandbytes computes otherwise
    return network


def _is_matrix(network: nn.Module, name: str, plan: Restored) -> bool:
    """Whether a parameter is the weight of a linear layer in a block, or of such layers of all experts."""
    if layer_of(name) is None or is_router(plan.tensors[0]):
        return False
    home, _, leaf = name.rpartition(".")
    is_linear = leaf == "weight" and type(network.get_submodule(home)) is nn.Linear
    return is_linear or (len(plan.shape) == 3 and is_expert_stack(plan.tensors[0]))


def _sink(plan: Restored, wanted: LoadOptions) -> tuple[Sink | None, str]:
    """Where a matrix goes, and whose kernels run it; None where the codec cannot hold its rows."""
    method, shape = wanted.method, plan.shape
    if wanted.backend == "bitsandbytes" and len(shape) == 2:
        return BnbLinear(method, wanted.group, shape, wanted.device, wanted.dtype), "bitsandbytes"
    kernel = wanted.backend == "torch" and len(shape) == 2
    codec = split_codec(method.codec_name(wanted.group, kernel), shape[-1])
    if shape[-1] % codec.block:
        return None, ""
    sink = PackedRows(method, codec, shape, wanted.device, kernel)
    return sink, "torch" if kernel else "dither"


def _pieces(plan: Restored, sources: list[Tensor]) -> Iterator[tuple[Tensor, int, int, torch.Tensor]]:
    """Rows of the tensors a few at a time, with their places in the parameter, experts flattened."""
    rows_of_expert = plan.shape[-2]
    for tensor, row_R in zip(sources, plan.rows(), strict=True):
        step = max(1, CHUNK // tensor.columns)
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            at_R = torch.arange(start, stop)
            expert_R = at_R.div(len(row_R), rounding_mode="floor")
            yield tensor, start, stop, expert_R * rows_of_expert + row_R[at_R % len(row_R)]


def _put(sink: Sink, piece: tuple[Tensor, int, int, torch.Tensor]) -> int:
    """Rows on their way; how many weights they are.  Raises SourceError for one that is no number."""
    tensor, start, stop, row_R = piece
    w_RC = tensor.read(start, stop)
    if not np.isfinite(w_RC).all():
        row, column = np.argwhere(~np.isfinite(w_RC))[0]
        reason = f"holds {w_RC[row, column]} at row {start + row}, column {column}"
        raise SourceError(tensor.name, reason, "The checkpoint is damaged: fetch or export it again.")
    sink.put(w_RC if w_RC.flags.writeable else w_RC.copy(), row_R)  # torch warns of memory it must not write to
    return w_RC.size


def _set(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    home, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(home), leaf, parameter)


def _fill_buffers(network: PreTrainedModel, device: torch.device) -> None:
    """What the network computes from its configuration, which on the meta device has no numbers.

    Raises UnsupportedError naming one that is not known here.
    """
    network.get_submodule("model").rotary_emb = rotary_embedding(network).to(device)
    for name, buffer in list(network.named_buffers()):
        if not buffer.is_meta:
            continue
        home, _, leaf = name.rpartition(".")
        module: Any = network.get_submodule(home)
        if leaf != "embed_scale" or not hasattr(module, "scalar_embed_scale"):
            raise other_release(f"buffer {name}", "of transformers' network is not known here")
        module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)


def _settle(network: Any, model: Model, filling: Filling) -> None:
    """What generating, adapters and people ask of a model."""
    config, wanted, backends = network.config, filling.wanted, filling.backends
    config.dtype, config._name_or_path = wanted.dtype, model.origin
    for key, names in TOKENS.items():
        fields = (model.metadata.get(f"tokenizer.ggml.{name}") for name in names)
        values = [found.value for found in fields if found is not None and type(found.value) is int]
        ids = list(dict.fromkeys(value for value in values if 0 <= value < config.vocab_size))
        setattr(config, key, None if not ids else ids[0] if len(ids) == 1 else ids)
    network.generation_config = GenerationConfig.from_model_config(config)
    if "bitsandbytes" in backends.values():  # peft asks these before it takes bitsandbytes' layers
        network.is_loaded_in_8bit = wanted.method.bnb == "int8"
        network.is_loaded_in_4bit = wanted.method.bnb != "int8"
    network.save_pretrained = _refuse_to_save
    counts, dtype = Counter(backends.values()), str(wanted.dtype).removeprefix("torch.")
    if filling.kept:
        filling.notes.append(
            f"{len(filling.kept)} matrices, {filling.kept[0]} the first, are in {dtype}: "
            f"{wanted.method.name} of groups of {wanted.group} cannot hold their rows"
        )
    if wanted.backend == "torch" and counts["dither"]:
        filling.notes.append(
            f"{counts['dither']} of {len(backends)} matrices are de-quantized for each product: "
            "torch's 4-bit kernel has no place for them"
        )
    stacks = [name for name, module in network.named_modules() if isinstance(module, QuantizedStack)]
    if stacks and wanted.backend == "bitsandbytes":
        filling.notes.append(
            f"the experts run on dither's own kernels ({len(stacks)} stacks): bitsandbytes has none for them"
        )
    network.dither = {
        "to": wanted.method.name,
        "backend": " and ".join(sorted(counts)) or "none",
        "layers": len(backends),
        "bits_per_weight": 8 * filling.bytes / filling.weights if filling.weights else 0.0,
        "by_layer": backends,
        "dtype": dtype,
        "notes": filling.notes,
    }


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        "a model quantized while loading",
        "is not saved: no other program could read its layers",
        "Write a file with `dither quantize`; save adapters with peft's own save_pretrained.",
    )
