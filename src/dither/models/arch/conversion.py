"""A family's tables applied to a checkpoint: names matched, rows wrapped, metadata collected.

Nothing is dropped in silence and nothing is assumed: a tensor that no rule knows, a layer without one
of its matrices, an expert that is missing, a setting that llama.cpp's graph has otherwise built in,
each is an error that names it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field, f32, string, u32
from dither.formats.tensor_names import EMBEDDING, OUTPUT, block_of, in_every_block, within_block
from dither.models.arch.biases import without_zero_biases
from dither.models.arch.changes import Change
from dither.models.arch.family import LAYER, Family, Key, Rule
from dither.models.arch.naming import model_name, size_label
from dither.models.arch.rope import Rope, built_in_otherwise, rope_of
from dither.models.arch.rope_config import Rotary, settle
from dither.models.arch.sampling import sampling_fields
from dither.models.arch.settled import Targets, lifted, settle_biases, settle_embedding, settle_output, told_of_config
from dither.models.arch.shapes import check_shapes, head_dimension
from dither.models.checkpoint import Checkpoint, StoredTensor
from dither.models.contradictions import note
from dither.models.json_object import JsonObject, described
from dither.models.tokenizers.checkpoint_tokenizer import read_tokenizer
from dither.types import Bytes, Floats, Model, Recode, Tensor

# Buffers that old transformers saved although they follow from the config.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")
LIMITS = {
    **dict.fromkeys(NEEDED, 2**24),
    "num_key_value_heads": 2**24,
    **dict.fromkeys(("head_dim", "num_local_experts", "num_experts"), 2**16),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 2**32 - 1),
}
CONFIG = "config.json"
FETCH_AGAIN = "Fetch the checkpoint again, or take it from its authors."


@dataclass(frozen=True)
class Matched:
    """A checkpoint under its family's tables: every tensor with its rule, config.json filled in."""

    family: Family
    config: JsonObject
    targets: Targets
    rope: Rope
    notes: tuple[str, ...]

    @property
    def embedding_rows(self) -> int:
        if EMBEDDING not in self.targets:
            raise SourceError(f"tensor {EMBEDDING}", "is made from no tensor of the checkpoint", FETCH_AGAIN)
        shape = self.targets[EMBEDDING][1][0].shape
        return shape[0] if shape else 0

    def hyperparameters(self) -> dict[str, Field]:
        """The architecture's keys."""
        found: dict[str, Field] = {}
        for key in self.family.keys:
            value = key_value(key, self.config)
            if value is not None:
                found[key.name] = u32(int(value)) if key.kind == "u32" else f32(float(value))
        if self.config.get("head_dim") is not None:
            found["attention.key_length"] = found["attention.value_length"] = u32(self.config["head_dim"])
        found |= self.rope.metadata
        return {f"{self.family.arch}.{name}": value for name, value in found.items()}


def matched(checkpoint: Checkpoint, family: Family, *, readable: bool = True) -> Matched:
    """Raises as `arch.convert`, where tensors or the numbers that sizes follow from are wrong."""
    flat, notes = lifted(checkpoint.config)
    rotary = settle(flat, family)
    config = full_config(family, flat, rotary)
    check_numbers(config, len(checkpoint.tensors))
    tensors, zeros = without_zero_biases(family, config, checkpoint.tensors) if readable else (checkpoint.tensors, [])
    targets, dropped = match_tensors(family, tensors)
    rope = rope_of(rotary, config, head_dimension(config), family.scalings, family.name)
    notes += [*told_of_config(family, config, tensors), *zeros, *dropped, *rotary.notes]
    notes += settle_embedding(config, targets, family.rules)
    return Matched(family, config, targets, rope, (*checkpoint.notes, *notes))


def convert_with(family: Family, checkpoint: Checkpoint, pre: str | None, *, readable: bool = True) -> Model:
    """See `arch.convert`."""
    match = matched(checkpoint, family, readable=readable)
    config, rows = match.config, match.embedding_rows
    check_assumptions(family, config)
    settled = [*settle_output(family, config, match.targets, readable=readable)]
    settled += settle_biases(family.name, config, match.targets) if readable else []
    tokenizer = read_tokenizer(checkpoint, rows=rows, pre=pre, chains=family.chains, config=config)
    vocabulary = tokenizer.used if family.crop_embedding else rows
    notes = [*match.notes, *settled]
    if config.get("vocab_size") not in (None, rows):
        notes.append(note("vocab_size and rows", stated=described(config["vocab_size"]), rows=rows))
    if vocabulary < rows:
        notes.append(f"{rows - vocabulary} rows of the embedding have no token: left out")
    tensors = build_tensors(match, vocabulary)
    check_shapes(family, tensors, config, vocabulary)
    name, renamed = model_name(checkpoint.folder, JsonObject(checkpoint.config, CONFIG), tokenizer)
    metadata = {
        "general.type": string("model"),
        "general.name": string(name),
        "general.size_label": string(size_label(tensors)),
        **match.hyperparameters(),
        f"{family.arch}.vocab_size": u32(vocabulary),
        **tokenizer.fields(vocabulary),
        **sampling_fields(checkpoint.document("generation_config.json")),
    }
    notes += [*renamed, *match.rope.notes, *tokenizer.notes, *window_note(family, config)]
    return model_of(checkpoint, name, family.arch, metadata, tensors, notes)


def model_of(
    checkpoint: Checkpoint,
    name: str,
    arch: str,
    metadata: Mapping[str, Field],
    tensors: tuple[Tensor, ...],
    notes: Iterable[str],
) -> Model:
    """The model that a checkpoint is, under an architecture of llama.cpp's."""
    return Model(
        name=name,
        arch=arch,
        metadata={"general.architecture": string(arch), **metadata},
        tensors=tensors,
        origin=str(checkpoint.folder),
        kind="safetensors",
        files=tuple(map(str, checkpoint.files)),
        fingerprint=checkpoint.fingerprint,
        notes=tuple(notes),
        config=checkpoint.config,
    )


def full_config(family: Family, flat: JsonObject, rotary: Rotary) -> JsonObject:
    """config.json with the values that may be left out filled in.

    Rotary parameters appear at the top whichever version of transformers wrote the file.
    """
    filled = {**family.defaults, **flat}
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if rotary.shared.get(name) is not None:
            filled[name] = rotary.shared[name]
    for name in ("num_key_value_heads", "rope_theta"):
        if filled.get(name) is None and name in family.defaults:
            filled[name] = family.defaults[name]
    return JsonObject(filled, CONFIG)


def check_numbers(config: JsonObject, tensors: int) -> None:
    """Holds the numbers that sizes are computed from against reason, before anything is made of them.

    Raises FormatError naming the key.
    """
    for name in NEEDED:
        config.given(name)
    for name, limit in LIMITS.items():
        config.whole(name, 1, limit)
    config.flag("tie_word_embeddings")
    if config["num_hidden_layers"] > tensors:
        reason = f"is {config['num_hidden_layers']}, but there are only {tensors} tensors"
        raise SourceError(f"{CONFIG}, num_hidden_layers", reason, FETCH_AGAIN)


def check_assumptions(family: Family, config: JsonObject) -> None:
    """Refuses settings that llama.cpp has built in otherwise: it would run and be wrong.

    Raises UnsupportedError naming the setting.
    """
    built_in = {**family.assumes, **(family.assumes_of(config) if family.assumes_of else {})}
    for name, expected in built_in.items():
        actual = config.get(name, expected)
        if actual != expected and (actual or expected):  # null, false and [] all mean "not so"
            raise built_in_otherwise(name, actual, family.name, described(expected))


def window_note(family: Family, config: JsonObject) -> Iterator[str]:
    is_ignored = family.ignores_window and config.get("use_sliding_window", True)
    window = config.whole("sliding_window") if is_ignored else None
    if window and window < (config.whole("max_position_embeddings") or window + 1):
        yield f"llama.cpp has no sliding window for {family.name}: exact up to {window} tokens, wider beyond"


def key_value(key: Key, config: JsonObject) -> Any:
    for source in key.sources:
        value = config.get(source)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**32:
            return value
        if value is not None:
            raise config.wrong(source, "a number of 0 or more")
    if key.fallback is None:
        raise SourceError(CONFIG, f"lacks {' and '.join(key.sources)}", FETCH_AGAIN)
    return key.fallback or None


def match_tensors(family: Family, tensors: Mapping[str, StoredTensor]) -> tuple[Targets, list[str]]:
    """Every tensor under the name it will have, and notes on those that are left out knowingly.

    Raises UnsupportedError naming the tensors that no rule knows.
    """
    targets: dict[str, tuple[Rule, dict[int, StoredTensor]]] = {}
    unknown, dropped = [], []
    for stored_name, tensor in tensors.items():
        name = family.own_name(stored_name)
        if DERIVED.fullmatch(name):
            continue
        if name.startswith(family.dropped or "\0"):
            dropped.append(stored_name)
            continue
        hits = [(rule, match) for rule in family.rules if (match := rule.pattern.fullmatch(name))]
        if not hits:
            unknown.append(stored_name)
        for rule, match in hits:
            numbers = match.groupdict()
            target = rule.target.replace(LAYER, numbers.get("layer") or "")
            targets.setdefault(target, (rule, {}))[1][int(numbers.get("expert") or 0)] = tensor
    if unknown:
        listed = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise UnsupportedError(
            f"{len(unknown)} tensors of the checkpoint",
            f"are not part of a {family.name} model: {listed}",
            "Nothing is dropped in silence: merge adapters first, or take the plain checkpoint.",
        )
    return targets, [note("a projector", count=len(dropped))] if dropped else []


def build_tensors(match: Matched, vocabulary: int) -> tuple[Tensor, ...]:
    """Tensors in the order llama.cpp reads them: embedding, tables of rotary frequencies, layer by layer, output."""
    family = match.family
    order = {rule.target: index for index, rule in reversed(list(enumerate(family.rules)))}
    first_layer = next(index for index, rule in enumerate(family.rules) if LAYER in rule.source)

    def place(target: str) -> tuple[int, int, int]:
        index, block = order[match.targets[target][0].target], block_of(target)
        if block is not None:
            return 1, block, index
        return (0 if index < first_layer else 2), 0, index

    targets = sorted(match.targets, key=place)
    check_layers(match.config, targets)
    check_complete(family, targets)
    tensors = []
    for target in targets:
        rule, sources = match.targets[target]
        tensors.append(build_tensor(target, family.change_of(rule), sources, match.config, vocabulary))
    tables = [constant(name, values) for name, values in match.rope.tensors.items()]
    before = sum(place(target)[0] == 0 for target in targets)
    return (*tensors[:before], *tables, *tensors[before:])


def check_layers(config: JsonObject, targets: Iterable[str]) -> None:
    """Every layer from 0 on is there, and all have the same tensors."""
    names: dict[int, set[str]] = defaultdict(set)
    for target in targets:
        if (block := block_of(target)) is not None:
            names[block].add(within_block(target))
    count = config["num_hidden_layers"]
    wrong = set(range(count)) ^ set(names)
    if wrong:
        reason = f"config.json promises {count} layers, the tensors have {len(names)}"
        way_out = f"Fetch it again; if it was made with {len(names)}, set num_hidden_layers to that."
        raise SourceError(f"layer {min(wrong)}", reason, way_out)
    everywhere = set().union(*names.values())
    for layer in sorted(names):
        if names[layer] != everywhere:
            missing = ", ".join(sorted(everywhere - names[layer]))
            raise SourceError(f"layer {layer}", f"lacks {missing}, which other layers have", FETCH_AGAIN)


def check_complete(family: Family, targets: Iterable[str]) -> None:
    """Nothing that the family cannot do without is missing from every layer, or from the model.

    Biases are left out freely; the output matrix has rules of its own.
    """
    present = {OUTPUT, *map(in_every_block, targets)}
    for rule in family.rules:
        if rule.target.endswith(".weight") and rule.target not in present:
            reason = f"is missing: a {family.name} model has it as {rule.target}"
            raise SourceError(f"tensor {rule.source}", reason, FETCH_AGAIN)


def constant(name: str, values_C: Floats) -> Tensor:
    return Tensor(name, values_C.shape, "F32", values_C.nbytes, lambda start, stop: values_C[None][start:stop])


def build_tensor(
    target: str, change: Change, found: Mapping[int, StoredTensor], config: JsonObject, vocabulary: int
) -> Tensor:
    """One target tensor, made of the tensors `found` by expert."""
    for stored in found.values():
        stored.check_readable()
    sources = _all_experts(target, found, config) if change.stacks else [found[min(found)]]
    first = sources[0]
    heads = _heads(config, change.heads[0], first) if change.heads else 0
    shape = change.shape(sources, vocabulary)
    recode = None
    if not change.new_numbers and all(stored.recode for stored in sources):
        recode = _recoder(change, sources, heads)
    nbytes = first.nbytes * prod(shape) // max(1, prod(first.shape))
    return Tensor(target, shape, first.dtype, nbytes, change.read(sources, heads), recode=recode)


class _OffGridError(Exception):
    """Some rows are not exactly what the type asked for can hold."""


@dataclass(frozen=True)
class _Recoded:
    """A quantized tensor whose rows are read as another type stores them."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Any]


def _recoder(change: Change, sources: Sequence[StoredTensor], heads: int) -> Recode:
    def rows(recoded: Recode, kind: str, start: int, stop: int) -> Bytes:
        found = recoded(kind, start, stop)
        if found is None:
            raise _OffGridError
        return found

    def recode(kind: str, start: int, stop: int) -> Bytes | None:
        recoded = [_Recoded(one.name, one.shape, partial(rows, one.recode, kind)) for one in sources if one.recode]
        try:
            found: Any = change.read(recoded, heads)(start, stop)
        except _OffGridError:
            return None
        return np.ascontiguousarray(found, np.uint8)

    return recode


def _heads(config: JsonObject, key: str, source: StoredTensor) -> int:
    heads = int(config.get(key) or config["num_attention_heads"])
    size = head_dimension(config)
    if source.shape[:1] != (heads * size,) or size % 2:
        reason = f"has shape {list(source.shape)}, which is not {heads} heads of {size} rows in pairs"
        raise SourceError(f"tensor {source.name}", reason, FETCH_AGAIN)
    return heads


def _all_experts(target: str, sources: Mapping[int, StoredTensor], config: JsonObject) -> list[StoredTensor]:
    count = int(config.get("num_local_experts") or config.get("num_experts") or len(sources))
    missing = sorted(set(range(count)) ^ set(sources))
    if missing:
        reason = f"has {len(sources)} experts where config.json has {count}: expert {missing[0]}"
        raise SourceError(f"tensor {target}", reason, FETCH_AGAIN)
    experts = [sources[index] for index in range(count)]
    for expert in experts:
        if expert.shape != experts[0].shape:
            reason = f"is {expert.shape}, its neighbors {experts[0].shape}"
            raise SourceError(f"tensor {expert.name}", reason, FETCH_AGAIN)
    return experts
