"""Who reads what inside a model: the facts of a family's table, found again in a model's tensors.

A family says once what feeds what ("attn_norm → attn_q attn_k attn_v"); a model has it in every layer,
or lacks some of it, or has tensors that no table mentions.  A rewrite that changes a tensor's output is
exact only when every reader of that output is known, so a layer with unknown tensors is left out and
named rather than guessed at.

What stands between source and readers decides how a change passes through:

    norm → readers                the gain is per channel: divided there, multiplied in the readers
    attn_v → attn_output          attention averages rows of v over tokens, never across channels; with
                                  grouped queries one row of v serves several columns of attn_output
    ffn_up → ffn_down             the gate multiplies each row of up by a number of its own

Sources: Lin et al. 2023 (AWQ, arXiv:2306.00978), section 4; llama.cpp's graphs for the order of heads and
of fused halves (phi3: q, k, v in one matrix, gate above up in another).

Legend: R rows, C columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dither.formats.tensor_names import EMBEDDING, OUTPUT, OUTPUT_NORM, ROPE_TABLES, block_of, kind_of
from dither.types import Model, Tensor

Rows = npt.NDArray[np.int64]

_OUTSIDE_LAYERS = {EMBEDDING, OUTPUT, "output.bias", OUTPUT_NORM, *ROPE_TABLES}


class Feeds(Protocol):
    """One line of a family's table, names without layer and suffix; without readers, what scales pass by."""

    @property
    def source(self) -> str: ...
    @property
    def readers(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class InputGroup:
    """Matrices of one model that share an input, and the tensor whose output that input is."""

    source: str  # "blk.0.attn_norm.weight"
    readers: tuple[str, ...]
    kind: str  # "norm", "value" (attn_v → attn_output) or "up" (ffn_up → ffn_down)

    @property
    def layer(self) -> str:
        return layer_of(self.source)


def layer_of(name: str) -> str:
    """
    >>> layer_of("blk.3.attn_v.weight"), layer_of("output_norm.weight")
    ('blk.3', '')
    """
    block = block_of(name)
    return "" if block is None else f"blk.{block}"


def by_name(model: Model) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


def groups(model: Model, feeds: Iterable[Feeds]) -> list[InputGroup]:
    """Every group of the model in which source and at least one reader are there, layer by layer."""
    names = {tensor.name for tensor in model.tensors}
    layers = list(dict.fromkeys(layer_of(tensor.name) for tensor in model.tensors))
    found = []
    for feed in feeds:
        for layer in layers:
            source, *readers = (f"{layer}.{n}.weight".lstrip(".") for n in (feed.source, *feed.readers))
            present = tuple(reader for reader in readers if reader in names)
            if source in names and present:
                name = feed.source
                kind = "norm" if name.endswith("norm") else "value" if name.startswith("attn") else "up"
                found.append(InputGroup(source, present, kind))
    return sorted(found, key=lambda group: layers.index(group.layer))


def strangers(model: Model, feeds: Sequence[Feeds]) -> dict[str, list[str]]:
    """Tensors that the tables do not account for, by layer ("" outside of them): unknown names, and
    readers whose source is missing, which must then read something else."""
    known = {name for feed in feeds for name in (feed.source, *feed.readers)}
    wired = {name for group in groups(model, feeds) for name in (group.source, *group.readers)}
    must_be_wired = {reader for feed in feeds for reader in feed.readers}
    found: dict[str, list[str]] = {}
    for tensor in model.tensors:
        name, layer = tensor.name, layer_of(tensor.name)
        if not layer:
            strange = name not in _OUTSIDE_LAYERS
        else:
            unfed = kind_of(name) in must_be_wired and name.endswith("weight") and name not in wired
            strange = kind_of(name) not in known or unfed
        if strange:
            found.setdefault(layer, []).append(name)
    return found


def feeding_rows(group: InputGroup, tensors: Mapping[str, Tensor], model: Model) -> Rows | str:
    """For every column of the readers, the row (or gain) of the source it reads: int64 (C,), per expert.

    A reason, in words, where the shapes do not say so.
    """
    source, reader = tensors[group.source], tensors[group.readers[0]]
    columns = reader.columns
    if group.kind == "norm":
        fits = source.size == columns
        return np.arange(columns) if fits else f"has {source.size} gains for {columns} columns"
    rows = source.shape[-2]
    if group.kind == "up":
        fused = not any(f"{group.layer}.{gate}.weight" in tensors for gate in ("ffn_gate", "ffn_gate_exps"))
        if rows != (2 * columns if fused else columns):
            return f"has {rows} rows for {columns} columns, and no gate was found beside it"
        # Fused, the gate's rows stand above up's.
        return np.arange(columns) + (rows - columns)
    return _value_rows(group, rows, columns, model)


def _value_rows(group: InputGroup, rows: int, columns: int, model: Model) -> Rows | str:
    """Query head h reads the values of key/value head h // (heads per key/value head)."""
    heads, kv_heads = (_of_layer(model, f"attention.{key}", group) for key in ("head_count", "head_count_kv"))
    kv_heads = kv_heads or heads
    if not heads or not kv_heads or columns % heads or heads % kv_heads:
        return f"feeds {columns} columns, which {heads} heads over {kv_heads} cannot share"
    head = columns // heads
    # Of a fused matrix, the rows of queries and keys stand above those of values.
    above = columns + kv_heads * head if kind_of(group.source) == "attn_qkv" else 0
    if rows != above + kv_heads * head:
        return f"has {rows} rows, not those of {kv_heads} heads of {head}"
    head_C, within_C = np.divmod(np.arange(columns), head)
    return np.asarray(above + head_C // (heads // kv_heads) * head + within_C)


def _of_layer(model: Model, key: str, group: InputGroup) -> int:
    """A whole number of the metadata, of this layer where each has its own; 0 where there is none."""
    field = model.metadata.get(f"{model.arch}.{key}")
    value: Any = getattr(field, "value", None)
    if isinstance(value, (list, tuple, np.ndarray)):
        layer = block_of(group.source) or 0
        value = value[layer] if layer < len(value) else 0
    return int(value) if isinstance(value, (int, np.integer)) else 0
