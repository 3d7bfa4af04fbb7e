"""GGUF's metadata back to the configuration that transformers builds a network from.

The way there is a family's table of keys (`models/arch`); the way back reads the same table from right
to left.  Where the table says what llama.cpp's graph has built in (an activation, which layers are
local), the configuration says so too: the network here is the one that the GGUF stands for, whoever
wrote it.  So is what llama.cpp leaves out, such as the sliding window of Mistral.

Metadata is a stranger's: every number is held against a limit before anything is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field
from dither.models.arch.family import Family, Key
from dither.models.arch.recognize import family_of_tensors, generic
from dither.models.blocks.rotary import rope_parameters
from dither.system.text import shown
from dither.types import Model

MAX_WHOLE = 2**24  # heads, widths, layers, experts; the longest contexts and vocabularies stay below
MAX_NUMBER = 1e30
# Said elsewhere in the file as well, or of no consequence to the result.
UNREAD = frozenset({"vocab_size", "rope.scaling.finetuned"})
# llama.cpp takes these from its own defaults where a file does not say: they agree with transformers'.
OPTIONAL = ("attn_logit_softcapping", "final_logit_softcapping")
_WAY_OUT = "Take the GGUF from its authors, or convert the checkpoint again."


@dataclass
class Metadata:
    """The architecture's own keys, checked as they are read, and which of them have been."""

    arch: str
    fields: Mapping[str, Field]
    read: set[str] = field(default_factory=set)

    def value(self, key: str) -> Any:
        self.read.add(key)
        found = self.fields.get(f"{self.arch}.{key}")
        return None if found is None else found.value

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= MAX_WHOLE:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
            raise self.wrong(key, value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.value(key)
        return default if value is None else str(value)

    def wrong(self, key: str, value: Any) -> SourceError | UnsupportedError:
        thing = f"metadata {self.arch}.{key}"
        if value is None:
            return SourceError(thing, "is missing", _WAY_OUT)
        if isinstance(value, list) or hasattr(value, "__array__"):
            reason = "differs from layer to layer, which nothing here can run"
            return UnsupportedError(thing, reason, "Take a model whose layers are alike.")
        return SourceError(thing, f"is {shown(repr(value))}", _WAY_OUT)

    @property
    def unread(self) -> list[str]:
        known = {f"{self.arch}.{key}" for key in self.read | UNREAD}
        return [key for key in self.fields if key.startswith(f"{self.arch}.") and key not in known]


@dataclass(frozen=True)
class Configured:
    family: Family
    config: PretrainedConfig
    notes: tuple[str, ...]


def configure(model: Model) -> Configured:
    """The family and transformers' configuration of an opened model.

    Raises UnsupportedError where no family has the architecture, its tensors or a setting, SourceError
    where a key is missing or out of reason.
    """
    family = family_of_tensors(model)
    metadata = Metadata(model.arch, model.metadata)
    default = AutoConfig.for_model(family.model_types[0])
    values = key_values(family, metadata, default)
    check_layers(model, values["num_hidden_layers"])
    values["head_dim"] = head_dimension(metadata, values)
    names = {generic(tensor.name) for tensor in model.tensors}
    values |= {
        "vocab_size": next(tensor.shape[0] for tensor in model.tensors if tensor.name == "token_embd.weight"),
        "attention_bias": bool(names & {"blk.*.attn_q.bias", "blk.*.attn_output.bias"}),
        "mlp_bias": "blk.*.ffn_up.bias" in names,
        "tie_word_embeddings": False,  # the head is found by its tensor's name, not by this
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), 0.0),
    }
    assumed = {**family.assumes, **(family.assumes_of(values) if family.assumes_of else {})}
    values |= {name: value for name, value in assumed.items() if name != "tie_word_embeddings"}
    values["rope_parameters"] = rope_parameters(
        model,
        metadata,
        family,
        values["head_dim"],
        values["max_position_embeddings"],
        by_layer="full_attention" in (default.rope_parameters or {}),
    )
    known = {name: value for name, value in values.items() if hasattr(default, name) or name == "head_dim"}
    with refusals_told():
        config = AutoConfig.for_model(family.model_types[0], **known)
    notes = tuple(f"metadata {key} is not taken into account" for key in metadata.unread)
    return Configured(family, config, notes)


@contextmanager
def refusals_told() -> Iterator[None]:
    """Raises UnsupportedError where transformers finds that numbers of the metadata do not go together."""
    try:
        yield
    except (ArithmeticError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        reason = f"makes no network that transformers can build ({shown(cause)})"
        raise UnsupportedError("the model's metadata", reason, _WAY_OUT) from error


def key_values(family: Family, metadata: Metadata, default: PretrainedConfig) -> dict[str, Any]:
    """A family's keys under the names that transformers has for them."""
    found: dict[str, Any] = {}
    for key in family.keys:
        name = next((source for source in key.sources if hasattr(default, source)), key.sources[0])
        if name == "sliding_window" and family.ignores_window:
            metadata.value(key.name)
            continue
        found[name] = key_value(family, metadata, key, found)
    if family.ignores_window:
        found |= {"sliding_window": None, "use_sliding_window": False}
    return found


def key_value(family: Family, metadata: Metadata, key: Key, found: Mapping[str, Any]) -> Any:
    if metadata.value(key.name) is None:
        if key.fallback is not None:
            return None
        spare = next((found[source] for source in key.sources if source in found), None)
        if spare is None and key.name in OPTIONAL:
            spare = family.defaults.get(key.name)
        if spare is not None:
            return spare
    return metadata.whole(key.name) if key.kind == "u32" else metadata.number(key.name)


def check_layers(model: Model, count: int) -> None:
    """Raises SourceError where the layers that are there are not those that the metadata counts."""
    layers = {int(match[1]) for tensor in model.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    if len(layers) != count or max(layers) != count - 1:
        reason = f"is {count}, but there are tensors of {len(layers)} layers"
        raise SourceError(f"metadata {model.arch}.block_count", reason, _WAY_OUT)


def head_dimension(metadata: Metadata, values: Mapping[str, Any]) -> int:
    """Of queries, keys and values alike."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    found = metadata.whole("attention.key_length", max(width // heads, 1))
    of_values = metadata.whole("attention.value_length", found)
    if of_values != found:
        reason = f"is {of_values}, that of keys {found}: nothing here can run that"
        raise UnsupportedError(f"metadata {metadata.arch}.attention.value_length", reason)
    return found
