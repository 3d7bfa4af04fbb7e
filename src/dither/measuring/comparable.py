"""Whether a file and a reference can be compared at all, and if so, what a person should know about it."""

from __future__ import annotations

from typing import Any

from dither.errors import UsageError
from dither.types import Model

_TOKEN_LIST = "tokenizer.ggml.tokens"
_TEXT_RULES = ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.model")
_NO_FUNCTION = ("vocab_size", "context_length")  # keys that do not change what a block computes


def check_comparable(name: str, model: Model, reference: Model) -> list[str]:
    """Notes on differences between a file and its reference that do not prevent a comparison.

    Raises UsageError for another architecture, vocabulary, or shape.
    """
    way_out = f"Measure it against the model it was made of; {reference.origin} is not."
    if model.arch != reference.arch:
        reason = f"is of architecture {model.arch}, the reference of {reference.arch}"
        raise UsageError(name, reason, way_out)
    notes = []
    ours, theirs = (list(m.value(_TOKEN_LIST, ())) for m in (model, reference))
    if ours and theirs and ours != theirs:
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        differs = f"has {len(ours)} tokens, the reference {len(theirs)}"
        if len(ours) == len(theirs):
            differs = f"calls token {first} by another name than the reference"
        raise UsageError(name, f"has another vocabulary: it {differs}", way_out)
    if not ours:
        notes.append("It carries no tokenizer: the reference's token ids were taken for its own.")
    elif any(_plain(model.value(key)) != _plain(reference.value(key)) for key in _TEXT_RULES):
        notes.append("It splits text into tokens by other rules; both were given the reference's tokens.")
    _check_shapes(name, model, reference, way_out)
    return notes + _other_settings(model, reference)


def _check_shapes(name: str, model: Model, reference: Model, way_out: str) -> None:
    """Both must have the same matrices, in the same shapes.  Only the output matrix may be in one of them alone, where
    the other one's is tied to the embedding; vectors, such as rope factors, may differ."""
    ours, theirs = ({t.name: t.shape for t in m.tensors if len(t.shape) > 1} for m in (model, reference))
    for tensor in sorted((ours.keys() ^ theirs.keys()) - {"output.weight"}):
        owner = "the reference" if tensor in ours else "it"
        raise UsageError(name, f"cannot be compared: {owner} has no {tensor}", way_out)
    for tensor in sorted(ours.keys() & theirs.keys()):
        if ours[tensor] != theirs[tensor]:
            mine, other = (" × ".join(map(str, shapes[tensor])) for shapes in (ours, theirs))
            reason = f"its {tensor} is {mine}, the reference's {other}"
            raise UsageError(name, f"cannot be compared: {reason}", way_out)


def _other_settings(model: Model, reference: Model) -> list[str]:
    notes = []
    for key in sorted({*model.metadata, *reference.metadata}):
        setting = key.removeprefix(f"{model.arch}.")
        if setting == key or setting in _NO_FUNCTION:
            continue
        ours, theirs = (_plain(m.value(key)) for m in (model, reference))
        if ours is not None and theirs is not None and ours != theirs:
            notes.append(f"{key} is {ours} here and {theirs} in the reference: each ran with its own.")
    return notes


def _plain(value: Any) -> Any:
    """Numbers and lists that compare by value, floats as the float32 that GGUF holds."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
