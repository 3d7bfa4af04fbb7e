"""A Hugging Face folder: config.json, safetensors, and what belongs to the tokenizer.

Nothing is read but headers until rows are asked for; then exactly those rows are converted to
float32, whatever they are stored as (`stored`).  Quantized weights are several tensors of the file and one
of the model, which de-quantizes as it is read (`packed`).

A folder is a stranger's: names in its index may not leave it, pickle is never loaded because
unpickling runs whatever code the file names, and the code that `auto_map` points to is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.errors import FormatError, SourceError
from dither.formats import safetensors
from dither.formats.mapped import MappedFile, fingerprint
from dither.models import packed
from dither.models.contradictions import note
from dither.models.json_object import JsonObject
from dither.models.packed.settings import read_quantization
from dither.models.stored import PlainTensor, StoredTensor
from dither.system.files import read_bytes
from dither.system.json_text import parse_object
from dither.system.text import shown

__all__ = ["Checkpoint", "PlainTensor", "StoredTensor", "open_checkpoint", "refuse_pickle"]

MAX_JSON = 256 * 2**20  # bytes; the largest tokenizer.json in use has a tenth of it
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
ABOUT = "dither.json"  # version, recipe and measurement of a folder that Dither wrote
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Files that hold weights of a model: not those of an optimizer, or of a trainer's settings.
_WEIGHTS = re.compile(
    r"[^.].*\.(safetensors|gguf)|(pytorch_model|model|consolidated|adapter_model).*\.(bin|pth?|ckpt)|adapter_config\.json"
)
_FETCH_AGAIN = "The download is incomplete: fetch the model again."


@dataclass(frozen=True)
class Checkpoint:
    """A folder opened but not read.  `files` are all that conversion may read from it."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Another JSON file of the folder, such as tokenizer.json; None where there is none.

        Raises SourceError where it is too large or no regular file, FormatError where it is no JSON object.
        """
        return _read_json(self.folder / name)

    def document(self, name: str) -> JsonObject:
        """The same to be read with care; an empty object where there is no such file."""
        return JsonObject(self.read_json(name) or {}, name)


def open_checkpoint(folder: Path, weights: Path | None = None) -> Checkpoint:
    """Opens a folder of safetensors, or of all its safetensors only `weights` (with its fellow shards).

    Raises SourceError where something is missing or unsafe, FormatError where files contradict
    themselves or each other, UnsupportedError where the weights are quantized in a way that nothing reads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(str(folder), "no such folder", "Check the path.")
    config_path = folder / "config.json"
    names, index = _weight_files(folder, weights)
    config = _read_json(config_path)
    if config is None:
        raise SourceError(str(folder), "holds no config.json", "Fetch the model's config.json beside it.")
    found = read_quantization(config, lambda name: _read_json(folder / name), str(config_path))
    shards = [MappedFile(folder / name) for name in names]
    stored, header_bytes = _read_shards(shards, index)
    tensors, notes = packed.join(stored, found)
    if config.get("auto_map"):
        notes.append("config.json names Python code of its own (auto_map): it is not run")
    notes += _index_notes(index, stored)
    notes += _beside_notes(folder, names) if weights is None else []
    found_files = (path for pattern in _SIDE_FILES for path in folder.glob(pattern))
    side_files = sorted({path for path in found_files if path.is_file() and not path.name.startswith(".")})
    return Checkpoint(
        folder,
        config,
        tensors,
        (*(shard.path for shard in shards), *side_files),
        fingerprint(zip(shards, header_bytes, strict=True), side_files),
        tuple(notes),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    raw = read_bytes(path, MAX_JSON, "Check that it is what its name says.")
    return parse_object(raw, str(path), safetensors.FETCH_AGAIN, finite=False, unique=True)


def _weight_files(folder: Path, weights: Path | None) -> tuple[list[str], dict[str, str]]:
    """The safetensors to read, and the index that says which tensor is where, if there is one.

    `weights` is the file that was asked for: a shard stands for all of them.
    """
    if weights is not None and not _SHARD.fullmatch(weights.name):
        return [weights.name], {}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if WHOLE in names and weights is None:
        return [WHOLE], {}
    index = _read_json(folder / INDEX)
    if index is not None:
        return _indexed(folder, index)
    numbered = [match for name in names if (match := _SHARD.fullmatch(name))]
    series = {(match[1], match[3]) for match in numbered}
    if len(series) == 1 and len(numbered) == int(numbered[0][3]):
        return [match[0] for match in numbered], {}
    others = [name for name in names if not name.startswith(("adapter_", "consolidated"))]
    if len(others) == 1 and not numbered:
        return others, {}
    raise _no_weights(folder, names)


def _indexed(folder: Path, index: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    thing = str(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(thing, "has no weight_map", _FETCH_AGAIN)
    for tensor, name in weight_map.items():
        # A name such as ../../etc/passwd, /dev/zero or model.bin must never be opened.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            reason = f"says that {shown(tensor)} is in {shown(str(name))}, which is no safetensors of the folder"
            raise FormatError(thing, reason, "Take the model from a source you trust.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        reason = f"{len(missing)} of {len(names)} shards are missing: {shown(', '.join(missing))}"
        raise SourceError(str(folder), reason, _FETCH_AGAIN)
    return names, weight_map


def _no_weights(folder: Path, names: list[str]) -> SourceError:
    if names == ["adapter_model.safetensors"]:
        reason = "holds a LoRA adapter, not a model"
        return SourceError(str(folder), reason, "Merge it into its base model first.")
    if names:
        reason = f"holds {len(names)} safetensors that are not one model: {shown(', '.join(names))}"
        return SourceError(str(folder), reason, f"Name one of them, or fetch {INDEX} and every shard.")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        return refuse_pickle(folder, pickles)
    if (folder / "config.json").exists():
        reason = "holds a config.json and no weights: neither safetensors nor GGUF"
        return SourceError(str(folder), reason, "Its download was never finished: fetch the model's weights beside it.")
    return SourceError(str(folder), "holds no safetensors", "Name a folder with a model in it.")


def refuse_pickle(path: Path | str, names: Iterable[str]) -> SourceError:
    """The error for weights that only unpickling could read."""
    listed = shown(", ".join(names))
    reason = f"has its weights as pickle ({listed}), and loading a pickle can run any code hidden in it"
    way_out = (
        "Take a safetensors revision of the model, or convert it where you trust it: load it with "
        "transformers and call save_pretrained(folder, safe_serialization=True)."
    )
    return SourceError(str(path), reason, way_out)


def _read_shards(shards: list[MappedFile], index: Mapping[str, str]) -> tuple[dict[str, PlainTensor], list[int]]:
    """Every tensor of every shard, and how many bytes of each shard are header."""
    stored: dict[str, PlainTensor] = {}
    header_bytes = []
    for shard in shards:
        header = safetensors.parse_header(shard.data, str(shard.path))
        header_bytes.append(header.data_offset)
        for entry in header.tensors:
            if entry.name in stored:
                other = stored[entry.name]._file.path.name
                reason = f"is in {shown(other)} and again in {shown(shard.path.name)}"
                raise FormatError(f"tensor {shown(entry.name)}", reason, _FETCH_AGAIN)
            stored[entry.name] = PlainTensor(entry.name, entry.shape, entry.dtype, entry.nbytes, shard, entry.offset)
    for name, shard_name in index.items():
        if name not in stored:
            reason = f"should be in {shown(shard_name)}, says the index, but no shard holds it"
            raise FormatError(f"tensor {shown(name)}", reason, _FETCH_AGAIN)
    return stored, header_bytes


def _index_notes(index: Mapping[str, str], stored: Mapping[str, PlainTensor]) -> list[str]:
    elsewhere = sum(stored[name].file_name != shard for name, shard in index.items())
    unnamed = len(stored) - len(index) if index else 0
    notes = [note("index and shards", count=elsewhere, index=INDEX)] if elsewhere else []
    return notes + ([f"{unnamed} tensors are in shards, but not in {INDEX}"] if unnamed else [])


def _beside_notes(folder: Path, names: list[str]) -> list[str]:
    """Notes on weights of the folder that are not read: another set of them, or an adapter."""
    found = sorted(path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in names)
    adapters = [name for name in found if name.startswith("adapter_")]
    others = [name for name in found if name not in adapters]
    notes = [note("an adapter", files=_listed(adapters))] if adapters else []
    read = names[0] if len(names) == 1 else f"{names[0]} and its fellow shards"
    return notes + ([note("other weights", files=_listed(others), read=shown(read))] if others else [])


def _listed(names: list[str]) -> str:
    return shown(", ".join(names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
