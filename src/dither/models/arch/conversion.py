"""A family's tables applied to a checkpoint: names matched, rows wrapped, metadata collected.

Nothing is dropped in silence and nothing is assumed: a tensor that no rule knows, a layer without one
of its matrices, an expert that is missing, a setting that llama.cpp's graph has otherwise built in,
each is an error that names it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field, f32, string, u32
from dither.models.arch import rows
from dither.models.arch.family import Config, Family, Key, Rule
from dither.models.arch.naming import model_name, size_label
from dither.models.arch.rope import Rope, parameters, rope_of
from dither.models.arch.shapes import check_shapes
from dither.models.checkpoint import Checkpoint, StoredTensor
from dither.models.tokenizer import read_tokenizer
from dither.system.text import shown
from dither.types import Bytes, Floats, Model, Recode, Tensor

# Buffers that old transformers saved although they follow from the config.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")
LIMITS = {
    **dict.fromkeys(NEEDED, 2**24),
    "num_key_value_heads": 2**24,
    "head_dim": 2**16,
    "num_local_experts": 2**16,
    "num_experts": 2**16,
    "max_position_embeddings": 2**32 - 1,
    "original_max_position_embeddings": 2**32 - 1,
}
FETCH_AGAIN = "Fetch the checkpoint again, or take it from its authors."


def convert_with(family: Family, checkpoint: Checkpoint, pre: str | None) -> Model:
    config = full_config(family, checkpoint.config)
    check_numbers(config, len(checkpoint.tensors))
    check_assumptions(family, config)
    found, dropped = match_tensors(family, checkpoint.tensors)
    notes = [*checkpoint.notes, *dropped]
    embedding = found.single("token_embd.weight")
    tokenizer = read_tokenizer(checkpoint, rows=embedding.shape[0], pre=pre, config=config)
    vocabulary = tokenizer.used if family.crop_embedding else embedding.shape[0]
    if vocabulary < embedding.shape[0]:
        notes.append(f"{embedding.shape[0] - vocabulary} rows of the embedding have no token: left out")
    rope = rope_of(config, head_dimension(config), family.scalings, family.name)
    tensors = tuple(build_tensors(family, config, found, rope, vocabulary))
    check_shapes(tensors, config, vocabulary)
    name, renamed = model_name(checkpoint.folder, checkpoint.config, tokenizer)
    metadata = {
        "general.architecture": string(family.arch),
        "general.type": string("model"),
        "general.name": string(name),
        "general.size_label": string(size_label(tensors)),
        **{f"{family.arch}.{key}": value for key, value in hyperparameters(family, config, rope).items()},
        f"{family.arch}.vocab_size": u32(vocabulary),
        **tokenizer.fields(vocabulary),
    }
    return Model(
        name=name,
        arch=family.arch,
        metadata=metadata,
        tensors=tensors,
        origin=str(checkpoint.folder),
        kind="safetensors",
        files=tuple(str(path) for path in checkpoint.files),
        fingerprint=checkpoint.fingerprint,
        notes=(*notes, *renamed, *rope.notes, *tokenizer.notes, *window_note(family, config)),
    )


def full_config(family: Family, config: Config) -> dict[str, Any]:
    """config.json with a nested text model lifted out and the values that may be left out filled in.

    Rotary parameters appear at the top whichever version of transformers wrote the file.
    """
    text = config.get("text_config")
    flat = {**config, **(text if isinstance(text, Mapping) else {})}
    shared, _ = parameters(flat)
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if shared.get(name) is not None:
            flat[name] = shared[name]
    filled = {**family.defaults, **flat}
    for name in ("num_key_value_heads", "rope_theta"):
        if filled.get(name) is None and name in family.defaults:
            filled[name] = family.defaults[name]
    return filled


def check_numbers(config: Config, tensors: int) -> None:
    """Holds the numbers that sizes are computed from against reason, before anything is made of them.

    Raises SourceError naming the key.
    """
    for name, limit in LIMITS.items():
        value = config.get(name)
        absent = value is None and name not in NEEDED
        if not absent and (type(value) is not int or not 0 < value <= limit):
            reason = "is missing" if value is None else f"is {shown(repr(value))}"
            raise SourceError(f"config.json, {name}", reason, FETCH_AGAIN)
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        reason = f"is {shown(repr(tied))}, neither true nor false"
        raise SourceError("config.json, tie_word_embeddings", reason, FETCH_AGAIN)
    if config["num_hidden_layers"] > tensors:
        reason = f"is {config['num_hidden_layers']}, but there are only {tensors} tensors"
        raise SourceError("config.json, num_hidden_layers", reason, FETCH_AGAIN)


def check_assumptions(family: Family, config: Config) -> None:
    """Refuses settings that llama.cpp has built in otherwise: it would run and be wrong.

    Raises UnsupportedError naming the setting.
    """
    built_in = {**family.assumes, **(family.assumes_of(config) if family.assumes_of else {})}
    for name, expected in built_in.items():
        actual = config.get(name, expected)
        if actual != expected and (actual or expected):  # null, false and [] all mean "not so"
            raise UnsupportedError(
                f"config.json, {name}",
                f"is {actual!r}, but llama.cpp computes {family.name} with {expected!r}",
                "No GGUF of this model would be right.",
            )


def head_dimension(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def window_note(family: Family, config: Config) -> Iterator[str]:
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if not family.ignores_window or not config.get("use_sliding_window", True) or not window:
        return
    if context is None or window < context:
        yield f"llama.cpp has no sliding window for {family.name}: exact up to {window} tokens, wider beyond"


def hyperparameters(family: Family, config: Config, rope: Rope) -> dict[str, Field]:
    """The architecture's keys, without its prefix."""
    found: dict[str, Field] = {}
    for key in family.keys:
        value = key_value(key, config)
        if value is not None:
            found[key.name] = u32(int(value)) if key.kind == "u32" else f32(float(value))
    if config.get("head_dim") is not None:
        found["attention.key_length"] = found["attention.value_length"] = u32(config["head_dim"])
    return {**found, **rope.metadata}


def key_value(key: Key, config: Config) -> Any:
    for source in key.sources:
        value = config.get(source)
        if isinstance(value, (int, float)) and 0 <= value < 2**32:
            return value
        if value is not None:
            raise SourceError(f"config.json, {source}", f"is {shown(repr(value))}", FETCH_AGAIN)
    if key.fallback is None:
        raise SourceError("config.json", f"lacks {' and '.join(key.sources)}", FETCH_AGAIN)
    return key.fallback or None


@dataclass
class Found:
    """Source tensors by target: one, or one per expert."""

    targets: dict[str, tuple[Rule, dict[int, StoredTensor]]]

    def single(self, target: str) -> StoredTensor:
        if target not in self.targets:
            raise SourceError(f"tensor {target}", "is made from no tensor of the checkpoint", FETCH_AGAIN)
        return self.targets[target][1][0]


def match_tensors(family: Family, tensors: Mapping[str, StoredTensor]) -> tuple[Found, list[str]]:
    """Every tensor under the name it will have, and notes on those that are left out knowingly.

    Raises UnsupportedError naming the tensors that no rule knows.
    """
    targets: dict[str, tuple[Rule, dict[int, StoredTensor]]] = {}
    unknown, dropped = [], []
    for stored_name, tensor in tensors.items():
        name = without_prefix(family, stored_name)
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
            target = rule.target.replace("*", numbers.get("layer") or "")
            targets.setdefault(target, (rule, {}))[1][int(numbers.get("expert") or 0)] = tensor
    if unknown:
        listed = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise UnsupportedError(
            f"{len(unknown)} tensors of the checkpoint",
            f"are not part of a {family.name} model: {listed}",
            "Nothing is dropped in silence: merge adapters first, or take the plain checkpoint.",
        )
    notes = [f"{len(dropped)} tensors of the vision part are left out: only the text model is converted"]
    return Found(targets), notes if dropped else []


def without_prefix(family: Family, name: str) -> str:
    for prefix, own in family.prefixes.items():
        if name.startswith(prefix):
            return own + name[len(prefix) :]
    return name


def build_tensors(family: Family, config: Config, found: Found, rope: Rope, vocabulary: int) -> Iterator[Tensor]:
    """Tensors in the order llama.cpp reads them: embedding, layer by layer, output."""
    before, layered, after = _sorted_targets(family, found)
    check_layers(config, layered)
    check_complete(family, found)
    drop_tied_output(family, config, found, after)
    for target in before:
        yield build_tensor(target, *found.targets[target], config, vocabulary)
    yield from (constant(name, values) for name, values in rope.tensors.items())
    for layer in sorted(layered):
        for target in layered[layer]:
            yield build_tensor(target, *found.targets[target], config, vocabulary)
    for target in after:
        yield build_tensor(target, *found.targets[target], config, vocabulary)


def _sorted_targets(family: Family, found: Found) -> tuple[list[str], dict[int, list[str]], list[str]]:
    order = {rule.target: index for index, rule in reversed(list(enumerate(family.rules)))}
    first_layer = next(index for index, rule in enumerate(family.rules) if rule.of_layers)
    before: list[str] = []
    after: list[str] = []
    layered: dict[int, list[str]] = defaultdict(list)
    for target in sorted(found.targets, key=lambda target: order[found.targets[target][0].target]):
        rule = found.targets[target][0]
        if rule.of_layers:
            layered[int(target.split(".")[1])].append(target)
        else:
            (before if order[rule.target] < first_layer else after).append(target)
    return before, layered, after


def check_layers(config: Config, layered: Mapping[int, list[str]]) -> None:
    """Every layer from 0 on is there, and all have the same tensors."""
    count = config["num_hidden_layers"]
    wrong = set(range(count)) ^ set(layered)
    if wrong:
        reason = f"config.json promises {count} layers, the tensors have {len(layered)}"
        raise SourceError(f"layer {min(wrong)}", reason, FETCH_AGAIN)
    names = {layer: {target.split(".", 2)[2] for target in targets} for layer, targets in layered.items()}
    everywhere = set().union(*names.values())
    for layer, present in names.items():
        if present != everywhere:
            missing = ", ".join(sorted(everywhere - present))
            raise SourceError(f"layer {layer}", f"lacks {missing}, which other layers have", FETCH_AGAIN)


def check_complete(family: Family, found: Found) -> None:
    """Nothing that the family cannot do without is missing from every layer, or from the model.

    Biases are left out freely; the output matrix has rules of its own.
    """
    present = {re.sub(r"^blk\.\d+\.", "blk.*.", target) for target in found.targets}
    for rule in family.rules:
        if rule.target.endswith(".weight") and rule.target not in (*present, "output.weight"):
            reason = f"is missing: a {family.name} model has it as {rule.target}"
            raise SourceError(f"tensor {rule.source}", reason, FETCH_AGAIN)


def drop_tied_output(family: Family, config: Config, found: Found, after: list[str]) -> None:
    """A tied model's output matrix is its embedding: llama.cpp takes it from there."""
    target = "output.weight"
    tied = config.get("tie_word_embeddings", False)
    if tied and target in after:
        after.remove(target)
    elif not tied and target not in after:
        reason = "is missing, and config.json does not say that it is tied to the embedding"
        raise SourceError("tensor lm_head.weight", reason, FETCH_AGAIN)
    elif target in after:
        head, embedding = found.single(target).shape, found.single("token_embd.weight").shape
        if head[:1] != embedding[:1]:
            reason = f"has shape {list(head)}, which are not the embedding's {embedding[0]} rows"
            raise SourceError("tensor lm_head.weight", reason, FETCH_AGAIN)


def constant(name: str, values_C: Floats) -> Tensor:
    return Tensor(name, values_C.shape, "F32", values_C.nbytes, lambda start, stop: values_C[None][start:stop])


def build_tensor(target: str, rule: Rule, sources: dict[int, StoredTensor], config: Config, vocabulary: int) -> Tensor:
    """One target tensor with the change its rule asks for."""
    for stored in sources.values():
        stored.check_readable()
    source = sources[min(sources)]
    used, shape, share, heads = [source], source.shape, 1.0, 0
    if rule.change.startswith("rope_rows"):
        heads = _heads(config, rule.change, source)
    elif rule.change == "stack":
        used = _all_experts(target, sources, config)
        shape, share = (len(used), *shape), len(used)
    elif rule.change in ("expert_gate", "expert_up"):
        shape, share = _halved(source), 0.5
    elif rule.change in ("embedding", "output"):
        shape, share = (vocabulary, *shape[1:]), vocabulary / shape[0]
    recode = None
    if rule.change != "plus_one" and all(stored.recode for stored in used):
        recode = _recoder(rule, used, heads)
    read = _reader(rule, used, heads)
    return Tensor(target, shape, source.dtype, int(source.nbytes * share), read, recode=recode)


def _reader(rule: Rule, sources: Sequence[rows.Source], heads: int) -> rows.Read:
    """The target's rows, numbers or bytes alike, from the sources'."""
    if rule.change == "plus_one":
        return rows.plus_one(sources[0])
    if rule.change == "stack":
        return rows.stacked(sources)
    if rule.change in ("expert_gate", "expert_up"):
        return rows.expert_half(sources[0], second=rule.change == "expert_up")
    return rows.rotary_rows(sources[0], heads) if heads else sources[0].read


class _OffGridError(Exception):
    """Some rows are not exactly what the type asked for can hold."""


@dataclass(frozen=True)
class _Recoded:
    """The rows of a quantized tensor as another type stores them."""

    stored: StoredTensor
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, start: int, stop: int) -> Any:
        assert self.stored.recode is not None
        found = self.stored.recode(self.kind, start, stop)
        if found is None:
            raise _OffGridError
        return found


def _recoder(rule: Rule, sources: Sequence[StoredTensor], heads: int) -> Recode:
    def recode(kind: str, start: int, stop: int) -> Bytes | None:
        try:
            found: Any = _reader(rule, [_Recoded(stored, kind) for stored in sources], heads)(start, stop)
        except _OffGridError:
            return None
        return np.ascontiguousarray(found, np.uint8)

    return recode


def _heads(config: Config, change: str, source: StoredTensor) -> int:
    name = "num_attention_heads" if change == "rope_rows_q" else "num_key_value_heads"
    heads = int(config.get(name) or config["num_attention_heads"])
    size = head_dimension(config)
    if source.shape[0] != heads * size or size % 2:
        reason = f"has {source.shape[0]} rows, which are not {heads} heads of {size} in pairs"
        raise SourceError(f"tensor {source.name}", reason, FETCH_AGAIN)
    return heads


def _all_experts(target: str, sources: dict[int, StoredTensor], config: Config) -> list[StoredTensor]:
    count = int(config.get("num_local_experts") or config.get("num_experts") or len(sources))
    missing = sorted(set(range(count)) ^ set(sources))
    if missing:
        reason = f"has {len(sources)} experts where config.json has {count}: expert {missing[0]}"
        raise SourceError(f"tensor {target}", reason, FETCH_AGAIN)
    experts = [sources[index] for index in range(count)]
    odd = _odd_one(experts)
    if odd:
        raise SourceError(f"tensor {odd.name}", f"is {odd.shape}, its neighbors {experts[0].shape}", FETCH_AGAIN)
    return experts


def _odd_one(experts: Iterable[StoredTensor]) -> StoredTensor | None:
    first, *others = experts
    return next((expert for expert in others if expert.shape != first.shape), None)


def _halved(source: StoredTensor) -> tuple[int, ...]:
    if len(source.shape) != 3 or source.shape[1] % 2:
        raise SourceError(f"tensor {source.name}", f"of shape {source.shape} holds no gate and up", FETCH_AGAIN)
    experts, fused, columns = source.shape
    return experts, fused // 2, columns
