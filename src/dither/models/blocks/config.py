"""The configuration that transformers builds a model's network from.

A checkpoint has one, and transformers reads it: what is measured and calibrated is what
`AutoModelForCausalLM.from_pretrained` computes.  It does not go through GGUF's metadata and back, so that a mistake
of the conversion is no mistake of the original as well, and shows as a divergence.  Only what the tensors decide is
taken from them: how many tokens there are, which biases, whether there is an output matrix.

A GGUF has metadata.  The way there is a family's table of keys (`models/arch`); the way back reads the same table
from right to left.  Where the table says what llama.cpp's graph has built in (an activation, which layers are
local), the configuration says so too: the network here is the one that the GGUF stands for, whoever
wrote it.  So is what llama.cpp leaves out, such as the sliding window of Mistral.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import EMBEDDING, block_of, in_every_block
from dither.models.arch import family_of
from dither.models.arch.family import Family, Key
from dither.models.arch.recognize import WAY_OUT, family_of_tensors
from dither.models.blocks.metadata import Metadata
from dither.models.blocks.rotary import rope_parameters
from dither.system.text import shown
from dither.types import Model

# llama.cpp takes these from its own defaults where a file does not say: they agree with transformers'.
OPTIONAL = ("attn_logit_softcapping", "final_logit_softcapping")
# What a walk through the blocks asks of a configuration.
_ASKED = (*OPTIONAL, "layer_types", "sliding_window")
# Of config.json: how weights are stored, and code that is never run.
_NOT_THE_NETWORK = ("quantization_config", "compression_config", "auto_map")


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
    return of_checkpoint(model) if model.config else of_metadata(model)


def of_checkpoint(model: Model) -> Configured:
    """By transformers' own reading of config.json; of a multimodal one the text model's."""
    family_of_tensors(model)
    family = family_of(model.config)
    stated = {key: value for key, value in model.config.items() if key not in _NOT_THE_NETWORK}
    kind = stated.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        stated["model_type"] = family.model_types[0]
    with refusals_told(model):
        config = auto_config(stated).get_text_config()
        for name, value in stored_settings(model).items():
            if name == "vocab_size" or hasattr(config, name):
                setattr(config, name, value)
        known_here = {each.name for each in fields(config)}
        for name in set(_ASKED) - known_here:  # another family's key: transformers keeps it, its network ignores it
            config.__dict__.pop(name, None)
    check_layers(model, config.num_hidden_layers)
    return Configured(family, config, ())


def auto_config(stated: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of a config.json: it may choose another class than `model_type` names."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(stated), encoding="utf-8")
        found: PretrainedConfig = AutoConfig.from_pretrained(scratch, local_files_only=True)
    return found


def stored_settings(model: Model) -> dict[str, Any]:
    """What a model's tensors decide, and what nothing here makes use of."""
    names = {in_every_block(tensor.name) for tensor in model.tensors}
    return {
        "vocab_size": next(tensor.shape[0] for tensor in model.tensors if tensor.name == EMBEDDING),
        "attention_bias": bool(names & {"blk.*.attn_q.bias", "blk.*.attn_output.bias"}),
        "mlp_bias": "blk.*.ffn_up.bias" in names,
        "tie_word_embeddings": False,  # the head is found by its tensor's name, not by this
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), 0.0),
    }


def of_metadata(model: Model) -> Configured:
    """By GGUF's metadata."""
    family = family_of_tensors(model)
    metadata = Metadata(model.arch, model.metadata)
    default = AutoConfig.for_model(family.model_types[0])
    values = key_values(family, metadata, default)
    check_layers(model, values["num_hidden_layers"])
    # One width of a head for queries, keys and values alike.
    head = max(values["hidden_size"] // values["num_attention_heads"], 1)
    values["head_dim"] = metadata.whole("attention.key_length", head)
    of_values = metadata.whole("attention.value_length", values["head_dim"])
    if of_values != values["head_dim"]:
        reason = f"is {of_values}, that of keys {values['head_dim']}: nothing here can run that"
        raise UnsupportedError(f"metadata {metadata.arch}.attention.value_length", reason)
    values |= stored_settings(model)
    assumed = {**family.assumes, **(family.assumes_of(values) if family.assumes_of else {})}
    values |= {name: value for name, value in assumed.items() if name != "tie_word_embeddings"}
    by_layer = "full_attention" in (default.rope_parameters or {})
    context = values["max_position_embeddings"]
    values["rope_parameters"] = rope_parameters(model, metadata, family, values["head_dim"], context, by_layer=by_layer)
    known = {name: value for name, value in values.items() if hasattr(default, name) or name == "head_dim"}
    with refusals_told(model):
        config = AutoConfig.for_model(family.model_types[0], **known)
    notes = tuple(f"metadata {key} is not taken into account" for key in metadata.unread)
    return Configured(family, config, notes)


@contextmanager
def refusals_told(model: Model) -> Iterator[None]:
    """Raises UnsupportedError where transformers finds that numbers of the configuration do not go together."""
    try:
        yield
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        reason = f"makes no network that transformers can build ({shown(cause)})"
        if model.config:
            raise UnsupportedError("config.json", reason, "Correct it so that transformers loads it.") from error
        raise UnsupportedError("the model's metadata", reason, WAY_OUT) from error


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
    layers = {index for tensor in model.tensors if (index := block_of(tensor.name)) is not None}
    if len(layers) != count or max(layers) != count - 1:
        reason = f"is {count}, but there are tensors of {len(layers)} layers"
        raise SourceError(f"metadata {model.arch}.block_count", reason, WAY_OUT)
