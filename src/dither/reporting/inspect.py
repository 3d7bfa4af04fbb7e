"""What a model or a file is: read from headers alone, however large it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.containers.mix import PLANNED, count_by_type, is_planned
from dither.containers.presets import preset_of
from dither.containers.provenance import MEASUREMENT, method_of, name_note
from dither.errors import DitherError, FormatError
from dither.formats.tensor_names import within_block
from dither.models.source import opened
from dither.system.files import bytes_of
from dither.system.json_text import parse_json
from dither.types import Model

_LONG = 200  # characters of metadata shown before the rest is counted


@dataclass(frozen=True)
class Inspection:
    """Facts of one model; sizes in bytes, `bits_per_weight` exact over all tensors."""

    origin: str
    kind: str  # "gguf" or "safetensors"
    name: str
    arch: str
    file_type: str | None  # the preset's name where the file names one, "plan" where a plan made it
    parameters: int
    bytes: int  # of the file, or of a folder's weights, configuration and tokenizer together
    tensor_bytes: int
    bits_per_weight: float
    blocks: int | None
    context: int | None
    embedding: int | None
    heads: int | list[int] | None
    kv_heads: int | list[int] | None
    experts: int | None
    tokenizer: str | None
    pre: str | None
    vocabulary: int | None
    chat_template: bool
    types: dict[str, dict[str, int]]  # type → tensors, parameters, bytes
    groups: dict[str, dict[str, int]]  # kind of tensor ("attn_q") → type → count
    made_by: dict[str, Any]  # Dither's version and recipe, or what other tools left
    measurement: dict[str, Any] | None  # what the file says it lost (`measuring.schema.Measurement`)
    tensors: list[dict[str, Any]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def inspect(model: str | Path | Model, *, pre: str | None = None) -> Inspection:
    """Reads the headers of a GGUF, a checkpoint folder or a hub id.

    Raises SourceError or FormatError where they cannot be read.
    """
    found = opened(model, pre)
    metadata = {key: field.value for key, field in found.metadata.items()}
    types = count_by_type((t.stored, t.size, t.stored_bytes) for t in found.tensors)
    size = sum(group["bytes"] for group in types.values())
    number = metadata.get("general.file_type")
    preset = None if number is None else preset_of(number) or f"file type {number}"
    made = _made_by(metadata)
    recipe = made["recipe"] if isinstance(made.get("recipe"), dict) else {}
    made, note = made | ({"method": method} if (method := method_of(recipe)) else {}), name_note(recipe)
    measurement, doubts = _measurement(metadata, found.origin)

    def of_arch(key: str) -> Any:
        return _plain(metadata.get(f"{found.arch}.{key}"))

    return Inspection(
        origin=found.origin,
        kind=found.kind,
        name=str(metadata.get("general.name", found.name)),
        arch=found.arch,
        file_type=PLANNED if is_planned(found) else preset,
        parameters=found.parameters,
        bytes=bytes_of(found.files) or size,
        tensor_bytes=size,
        bits_per_weight=8 * size / max(1, found.parameters),
        blocks=of_arch("block_count"),
        context=of_arch("context_length"),
        embedding=of_arch("embedding_length"),
        heads=of_arch("attention.head_count"),
        kv_heads=of_arch("attention.head_count_kv"),
        experts=of_arch("expert_count"),
        tokenizer=metadata.get("tokenizer.ggml.model"),
        pre=metadata.get("tokenizer.ggml.pre"),
        vocabulary=len(metadata["tokenizer.ggml.tokens"]) if "tokenizer.ggml.tokens" in metadata else None,
        chat_template="tokenizer.chat_template" in metadata,
        types=types,
        groups=_by_group(found),
        made_by=made,
        measurement=measurement,
        tensors=[
            {"name": t.name, "shape": list(t.shape), "type": t.stored, "bytes": t.stored_bytes} for t in found.tensors
        ],
        notes=[*found.notes, *doubts, *filter(None, [note])],
    )


def _measurement(metadata: Mapping[str, Any], origin: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The measurement that the metadata carries, and a note where it cannot be read."""
    text = str(metadata.get(MEASUREMENT, "")).strip()
    if text in ("", "{}"):
        return None, []
    from dither.measuring.proof import read  # pydantic, for those files alone that need it

    try:
        return read(text, f"{origin}: {MEASUREMENT}").model_dump(), []
    except DitherError as error:
        return None, [str(error)]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _by_group(model: Model) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for tensor in model.tensors:
        kind = "norms, biases" if len(tensor.shape) < 2 else within_block(tensor.name).partition(".")[0]
        group = groups.setdefault(kind, {})
        group[tensor.stored] = group.get(tensor.stored, 0) + 1
    return groups


def _made_by(metadata: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "dither.version" in metadata:
        made["tool"] = f"dither {metadata['dither.version']}"
    if "dither.recipe" in metadata:
        try:
            made["recipe"] = parse_json(str(metadata["dither.recipe"]), "the recipe", finite=False)
        except FormatError:
            made["recipe"] = str(metadata["dither.recipe"])[:_LONG]
    told = [key for key in ("quantized_by", "author", "organization", "license") if f"general.{key}" in metadata]
    made |= {key: str(metadata[f"general.{key}"])[:_LONG] for key in told}
    imatrix = [key for key in metadata if key.startswith("quantize.imatrix.")]
    return made | {key.removeprefix("quantize."): _plain(metadata[key]) for key in imatrix}
