"""What a checkpoint's folder says beside its weights, made from a GGUF's metadata, and what it cannot say.

config.json is the network's configuration with the ids of special tokens; the tokenizer is llama.cpp's reading of the
file (`models/tokenizers/restored`), which transformers is made to load and cut a few texts with before it is written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from dither.engines.llama_start import EngineError
from dither.errors import UnsupportedError
from dither.models.arch import families
from dither.models.arch.sampling import SAMPLING
from dither.models.blocks.config import Configured, configure
from dither.models.blocks.rotary import FREQUENCIES
from dither.models.tokenizers.compared import differences, told
from dither.models.tokenizers.pre import Chain
from dither.models.tokenizers.restored import Restored, restored, special_ids, uncovered
from dither.system.text import shown
from dither.types import Model

TOKENS = "tokenizer.ggml.tokens"
MEASUREMENT = "dither.measure"
# Of the file itself, said anew, or on the card that every folder gets.
_NOT_MISSED = (
    "general.architecture", "general.type", "general.name", "general.basename", "general.finetune",
    "general.size_label", "general.file_type", "general.quantization_version", "general.alignment",
)  # fmt: skip
_OTHERS_FILES = ("quantize.imatrix.", "dither.", "split.")
_LISTED = 6


def checkpoint_config(model: Model) -> dict[str, Any]:
    """config.json of the network that a model's metadata describes."""
    configured = configure(model)
    found: dict[str, Any] = configured.config.to_dict()
    ids = special_ids(model.metadata, _chains()) if TOKENS in model.metadata else {}
    special = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    window = _window(model, configured)
    if window is not None:
        found["sliding_window"] = window
    described: dict[str, Any] = _plain({**found, **special, "architectures": [configured.family.architectures[0]]})
    return described


def _window(model: Model, configured: Configured) -> int | None:
    """The sliding window that llama.cpp's graph of this architecture leaves out, where the file names one."""
    found = model.metadata.get(f"{model.arch}.attention.sliding_window")
    if found is None or not configured.family.ignores_window or not hasattr(configured.config, "sliding_window"):
        return None
    return found.value if type(found.value) is int and found.value > 0 else None


def _plain(value: Any) -> Any:
    """1e-06 for the float32 next to it, all the way down: GGUF keeps numbers as float32."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_single = isinstance(value, float) and float(np.float32(value)) == value
    return float(str(np.float32(value))) if is_single else value


def save_tokenizer(model: Model, folder: Path) -> list[str]:
    """Writes the tokenizer of a GGUF and how to generate with it into a folder; the names of its files.

    Raises UnsupportedError for a tokenizer that is not known here.
    """
    if TOKENS not in model.metadata:
        return []
    found = _tokenizer(model)
    documents = {
        "tokenizer.json": found.tokenizer,
        "tokenizer_config.json": {
            **found.settings,
            "model_max_length": configure(model).config.max_position_embeddings,
        },
        "generation_config.json": _generation(model, found),
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return sorted(documents)


def not_carried(model: Model) -> list[str]:
    """Notes on what a folder made of a GGUF will lack, or say in other words than the GGUF.

    Raises UnsupportedError for a network or a tokenizer that is not known here.
    """
    configured = configure(model)
    notes = list(configured.notes)
    rope = configured.config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "longrope" and any(tensor.name == FREQUENCIES for tensor in model.tensors):
        notes.append(
            f"{FREQUENCIES} is of no scheme that is known: config.json has its factors one by one, as longrope"
        )
    window = _window(model, configured)
    if window is not None and window < configured.config.max_position_embeddings:
        notes.append(
            f"config.json keeps the sliding window of {window} tokens that llama.cpp leaves out: they differ beyond"
        )
    measured = model.metadata.get(MEASUREMENT)
    if measured is not None and str(measured.value).strip():
        notes.append("what was measured of the GGUF stays with it: `dither measure` tells it of the folder")
    if TOKENS not in model.metadata:
        return [*notes, *_left_out(model, ()), "the GGUF carries no tokenizer: the folder will have none"]
    found = _tokenizer(model)
    notes += _left_out(model, found.left_out)
    signs = uncovered(model.metadata)
    if signs is not None:
        told_of = f"the tokenizer has no byte tokens, so llama.cpp stops with an error at {signs}"
        return [*notes, f"{told_of}; in the folder such a character is the unknown token"]
    try:
        return [*notes, *_differences(model, found, configured.family.model_types[0])]
    except OSError as error:  # no place for what is to be compared: the folder itself may have one
        return [
            *notes,
            f"the tokenizers were not compared: {error.strerror or error} in the folder for temporary files",
        ]


def _tokenizer(model: Model) -> Restored:
    return restored(model.metadata, _chains())


def _chains() -> list[Chain]:
    return [chain for family in families() for chain in family.chains]


def _generation(model: Model, found: Restored) -> dict[str, Any]:
    ids = {f"{name}_token_id": found.special[name] for name in ("bos", "pad") if name in found.special}
    if found.ends:
        ids["eos_token_id"] = found.ends[0] if len(found.ends) == 1 else list(found.ends)  # type: ignore[assignment]
    fields = {name: model.metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    drawn = {name: _plain(f.value) for name, f in fields.items() if f is not None and type(f.value) in (int, float)}
    return {"_from_model_config": False, **ids, **({"do_sample": True, **drawn} if drawn else {})}


def _left_out(model: Model, of_tokenizer: Sequence[str]) -> list[str]:
    """A note on keys that neither a checkpoint's files nor its card have a place for."""
    known = {*_NOT_MISSED, *(f"general.sampling.{key}" for key in SAMPLING)}
    about = (f"{model.arch}.", "tokenizer.", *_OTHERS_FILES)
    missed = [*(key for key in model.metadata if key not in known and not key.startswith(about)), *of_tokenizer]
    if not missed:
        return []
    more = f" and {len(missed) - _LISTED} more" if len(missed) > _LISTED else ""
    return [f"metadata that a folder has no place for is left out: {shown(', '.join(missed[:_LISTED]), 500)}{more}"]


def _differences(model: Model, found: Restored, model_type: str) -> list[str]:
    """A note where transformers, given the files, cuts a text otherwise than llama.cpp does.

    Raises UnsupportedError where it cannot load them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in (
            ("tokenizer.json", found.tokenizer),
            ("tokenizer_config.json", found.settings),
            ("config.json", {"model_type": model_type}),
        ):
            (Path(scratch) / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(scratch)
        except Exception as error:  # tokenizers raises nothing narrower on a vocabulary it does not expect
            reason = f"has a tokenizer that transformers cannot load ({shown(str(error))})"
            way_out = "Convert the checkpoint it was made from, or write a GGUF."
            raise UnsupportedError(model.origin, reason, way_out) from error
    try:
        return told(differences(model, _encode(tokenizer, False), _encode(tokenizer, True), found.marks), "the folder")
    except EngineError as error:
        return [f"the tokenizer could not be compared with llama.cpp's, which does not take it: {shown(str(error))}"]


def _encode(tokenizer: Any, whole: bool) -> Callable[[str], Sequence[int]]:
    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=whole)["input_ids"]
        return ids

    return encode
