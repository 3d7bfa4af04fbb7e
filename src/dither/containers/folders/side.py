"""What stands beside the weights: config.json as the consumer wants it, the tokenizer's files, and a card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dither.containers.folders.scheme import TORCH
from dither.formats.tensor_names import EMBEDDING, OUTPUT, block_prefix
from dither.models.arch.family import Family
from dither.models.arch.rope_config import rewritten
from dither.models.arch.written import Written
from dither.models.checkpoint import ABOUT
from dither.types import Model

# Of the source's own weights or quantization: written anew, or meaningless beside new ones.
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", ABOUT, "recipe.yaml")
_OLD_KEYS = ("quantization_config", "compression_config", "torch_dtype", "auto_map", "_name_or_path")
HEAD = "lm_head"


def checkpoint_config(model: Model, family: Family, dtype: str) -> dict[str, Any]:
    """config.json for the model's weights as numbers.

    Taken from the checkpoint's own, a nested text model lifted out; made from GGUF's metadata by transformers
    otherwise.  Raises UnsupportedError where there is neither.
    """
    own = next((Path(file) for file in model.files if Path(file).name == "config.json"), None)
    if own is None:
        from dither.models.blocks import checkpoint_config as made

        found = made(model)
    else:
        found = json.loads(own.read_text(encoding="utf-8"))
        text = found.get("text_config")
        found = {**text, "architectures": [family.architectures[0]]} if isinstance(text, dict) else found
        found = rewritten(found, family)
    config = {key: value for key, value in found.items() if key not in _OLD_KEYS}
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    config["dtype"] = TORCH[dtype]
    config["tie_word_embeddings"] = OUTPUT not in shapes
    config["vocab_size"] = shapes[EMBEDDING][0]
    for switch, kinds in family.biases.items():  # biases of zeros may have been left out
        if switch:
            config[switch] = any(f"{block_prefix(0)}{kind}.bias" in shapes for kind in kinds)
    return config


def made_files(model: Model, folder: Path) -> None:
    """The tokenizer of a GGUF, as a checkpoint has it, into a folder."""
    if model.kind == "gguf":
        from dither.models.blocks import save_tokenizer

        save_tokenizer(model, folder)


def copies(model: Model) -> list[Path]:
    """Files of the source that belong to any form of it: tokenizer, template, generation settings."""
    if model.kind != "safetensors":
        return []
    others = (path for path in map(Path, model.files) if path.name not in _NOT_COPIED)
    return [path for path in others if not path.name.endswith((".safetensors", ".index.json", ".measure.json"))]


def linear_modules(model: Model, entries: Sequence[Written]) -> dict[str, str]:
    """The linear modules of a network and the tensor each is made from: every matrix but the embedding.

    A tied output matrix is a module of the network as well, of no tensor of its own.
    """
    found = {entry.module: entry.tensor for entry in entries if len(entry.shape) > 1 and entry.tensor != EMBEDDING}
    if not any(tensor.name == OUTPUT for tensor in model.tensors):
        found[HEAD] = EMBEDDING
    return found
