"""Presets: what `Q4_K_M` means for each tensor of a model.

A preset names a mix.  Most matrices get its base type; those whose rounding hurts most (attention
values, the second FFN matrix, the output layer) get a better one in some layers, and matrices whose
rows are no multiple of the type's block get another type altogether.  The rules are llama.cpp's
(`llama_tensor_get_type` in `src/llama-quant.cpp`), so that a file made here has the tensor types one
expects of its name; the tests hold them against what llama-quantize reports.  Its rules are kept as
they are, quirks included: counters that skip overridden tensors, numbers tuned on the models of 2023.

They are written as a table (`preset_tables.py`, which says how it is read).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dither.codecs import all_codecs
from dither.containers.preset_tables import ALIASES, CATEGORIES, KEPT, KEPT_RWKV, LARGE, PRESETS, RULES
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES, Field
from dither.formats.tensor_names import EMBEDDING, OUTPUT, block_of


@dataclass(frozen=True)
class Wanted:
    """What a person asked of the types.

    `tensors` are (regular expression, type) pairs, the first that is found in a name wins over the preset's mix;
    `output_type` and `embedding_type` win over both.  `pure` gives every matrix the preset's base type.
    """

    to: str  # a preset's name
    tensors: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False


@dataclass(frozen=True)
class Assignment:
    """The type one tensor gets.  `wanted` is what the preset, or the person, asked for before rows
    that do not fit forced another; `reason` says why it is not simply the preset's choice, or ""."""

    tensor: str
    type: str
    wanted: str
    reason: str = ""


@dataclass(frozen=True)
class _Preset:
    base: str
    file_type: int
    output: str
    embedding: str
    sentence: str


@dataclass(frozen=True)
class _Model:
    """What the rules ask about a model."""

    arch: str
    layers: int
    gqa: int  # query heads per key/value head, of the first layer
    experts: int
    large: bool
    tied: bool
    attn_v: int  # how many such tensors there are
    imatrix: bool


@dataclass(frozen=True)
class _Place:
    """One tensor's position: `i` of `n`, and `counted`, how many of its kind came before it."""

    model: _Model
    i: int
    n: int
    counted: int


_CONDITIONS: dict[str, Callable[[_Place], bool]] = {
    "gqa4": lambda at: at.model.gqa >= 4,
    "experts4": lambda at: at.model.experts >= 4,
    "experts8": lambda at: at.model.experts == 8,
    "imatrix": lambda at: at.model.imatrix,
    "no_imatrix": lambda at: not at.model.imatrix,
    "falcon": lambda at: at.model.arch == "falcon",
    "not_falcon": lambda at: at.model.arch != "falcon",
    "first_two": lambda at: at.i < 2,
    "first_four": lambda at: at.i < 4,
    "first_sixteenth": lambda at: at.i < at.n // 16,
    "first_eighth": lambda at: at.i < at.n // 8,
    "counted_eighth": lambda at: at.counted < at.n // 8,
    "middle": lambda at: at.n // 8 <= at.i < 7 * at.n // 8,
    # Where a medium mix spends more: the first and last eighth, and every third between.
    "more_bits": lambda at: at.i < at.n // 8 or at.i >= 7 * at.n // 8 or (at.i - at.n // 8) % 3 == 2,
}


def _read_presets() -> dict[str, _Preset]:
    presets = {}
    for line in PRESETS.strip().splitlines():
        name, types, sentence = map(str.strip, line.split("|"))
        base, number, output, embedding = types.split()
        presets[name] = _Preset(base, int(number), output, embedding, sentence)
    return presets


def _read_rules() -> dict[tuple[str, str], list[tuple[list[str], str]]]:
    """(Preset, kind of matrix) → conditions and the type that they give, in order."""
    rules = {}
    for line in filter(None, RULES.splitlines()):
        presets, category, *choices = line.split()
        pairs = [choice.rpartition(":") for choice in choices]
        parsed = [(list(filter(None, left.split("&"))), right) for left, _, right in pairs]
        for preset in presets.split(","):
            rules[preset, category] = parsed
    return rules


_BY_NAME = _read_presets()
_BY_PLACE = _read_rules()


def preset_names() -> tuple[str, ...]:
    """Every preset, best first, then the aliases llama.cpp has."""
    return (*_BY_NAME, *ALIASES)


def quantized_types() -> tuple[str, ...]:
    """The tensor types an override may name."""
    return tuple(name for name in GGML_TYPES if name in all_codecs())


def bare_types() -> dict[str, int]:
    """The types that are no preset, but may stand for one in which every matrix gets them: file types by name."""
    kinds = (GGML_TYPES[name] for name in quantized_types())
    return {kind.name: kind.file_type for kind in kinds if kind.file_type is not None}


def canonical(preset: str) -> str:
    """The preset's own name: any case, aliases resolved.  Raises UsageError with names close to it."""
    name = preset.upper()
    name = ALIASES.get(name, name)
    if name in _BY_NAME or name in bare_types():
        return name
    raise _unknown("type", preset, (*preset_names(), *bare_types()))


def file_type(preset: str) -> int:
    """llama.cpp's `general.file_type` for a preset."""
    name = canonical(preset)
    return _BY_NAME[name].file_type if name in _BY_NAME else bare_types()[name]


def preset_of(number: object) -> str | None:
    """The preset of a `general.file_type`; None where there is none of that number."""
    return next((name for name in preset_names() if file_type(name) == number), None)


def describe(preset: str) -> str:
    """One sentence for somebody who has never heard of it."""
    name = canonical(preset)
    if name in _BY_NAME:
        return _BY_NAME[name].sentence
    kind = GGML_TYPES[name]
    return f"{name} for every matrix: {kind.words}, {kind.bits_per_weight:g} bits a weight."


def assign(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    wanted: Wanted,
    *,
    arch: str,
    metadata: Mapping[str, Field],
    has_imatrix: bool,
) -> list[Assignment]:
    """The type of each tensor, in the order given.

    `tensors` are names and shapes, columns last; `metadata` is the model's, for its layers, heads
    and experts.  Vectors, norms and routers stay F32 whatever is asked.  Raises UsageError for an
    unknown preset or type, a pattern that is no regular expression or matches nothing to quantize.
    """
    patterns = _patterns(wanted.tensors, tensors)
    named = {"output": wanted.output_type, "token_embd": wanted.embedding_type}
    fixed = {category: kind and _type(kind) for category, kind in named.items()}
    preset = canonical(wanted.to)
    model = _model(tensors, arch, metadata, has_imatrix)
    chooser = _Chooser(preset, model, wanted.pure or preset not in _BY_NAME)
    assigned = {}
    # Block by block, as llama.cpp counts them; what is in no block comes first.
    visited = [(-1 if (block := block_of(name)) is None else block, name, shape) for name, shape in tensors]
    for _, tensor, shape in sorted(visited):
        kept = _kept(tensor, shape)
        if kept:
            assigned[tensor] = Assignment(tensor, "F32", "F32", kept)
            continue
        category = _category(tensor)
        explicit = fixed.get(category) or next((kind for found, kind in patterns if found.search(tensor)), None)
        if explicit is None and category == "token_embd" and model.tied:
            explicit = fixed["output"]
        chosen = explicit or chooser.choose(tensor, shape, category)
        reason, misfit = "override" if explicit else "", chooser.misfit(category, chosen)
        assigned[tensor] = _fit(tensor, shape, chosen, reason, misfit)
    return [assigned[tensor] for tensor, _ in tensors]


class _Chooser:
    """A preset at work on one model: llama.cpp counts attn_v and ffn_down tensors as it meets them."""

    def __init__(self, name: str, model: _Model, pure: bool) -> None:
        self.name, self.model, self.pure = name, model, pure
        self.base = _BY_NAME[name].base if name in _BY_NAME else name
        self.met: Counter[str] = Counter()

    def choose(self, tensor: str, shape: tuple[int, ...], category: str) -> str:
        if self.pure or self.base in ("F32", "F16", "BF16"):
            return self.base
        preset = _BY_NAME[self.name]
        if category == "output" or (category == "token_embd" and self.model.tied):
            return "Q8_0" if self.model.arch == "falcon" else preset.output
        if self.name == "MXFP4_MOE":
            return "MXFP4" if len(shape) == 3 and shape[0] > 1 else "Q8_0"
        if category == "token_embd":
            return preset.embedding
        return self._by_rule(tensor, category)

    def misfit(self, category: str, wanted: str) -> str | None:
        """The output layer of a K or IQ mix goes straight to 8 bits where its rows do not fit."""
        is_output = category == "output" or (category == "token_embd" and self.model.tied)
        mixed = not self.pure and GGML_TYPES[self.base].block == 256
        return "Q8_0" if is_output and mixed and wanted == _BY_NAME[self.name].output else None

    def _by_rule(self, tensor: str, category: str) -> str:
        counted, values = self.met[category], category == "attn_v"
        self.met[category] += 1
        block = None if values or self.model.experts <= 1 else block_of(tensor)
        layers = self.model.attn_v if values else self.model.layers
        at = _Place(self.model, counted if block is None else block, layers, counted)
        choices = _BY_PLACE.get((self.name, category)) or _BY_PLACE.get(("*", category), [])
        holding = (kind for conditions, kind in choices if all(_CONDITIONS[each](at) for each in conditions))
        chosen = next(holding, self.base)
        very_low = self.name.startswith(("IQ1", "IQ2"))
        return "Q5_K" if values and self.model.large and chosen in ("Q3_K", "Q4_K") and not very_low else chosen


def _model(
    tensors: Sequence[tuple[str, tuple[int, ...]]], arch: str, metadata: Mapping[str, Field], imatrix: bool
) -> _Model:
    names = [name for name, _ in tensors]
    in_names = 1 + max((block for block in map(block_of, names) if block is not None), default=-1)
    layers = _first(metadata, f"{arch}.block_count", in_names)
    heads = _first(metadata, f"{arch}.attention.head_count", 0)
    key_values = _first(metadata, f"{arch}.attention.head_count_kv", heads)
    experts = _first(metadata, f"{arch}.expert_count", 0)
    llama_70b = arch in ("llama", "llama-embed") and layers == 80 and heads != key_values and experts != 8
    return _Model(
        arch=arch,
        layers=layers,
        gqa=heads // key_values if key_values else 0,
        experts=experts,
        large=llama_70b or (arch, layers) in LARGE,
        tied=OUTPUT not in names,
        attn_v=sum(_category(name) == "attn_v" for name in names),
        imatrix=imatrix,
    )


def _first(metadata: Mapping[str, Field], key: str, default: int) -> int:
    """A number, or the first layer's where the model gives one per layer."""
    if key not in metadata:
        return default
    value = metadata[key].value
    return int(value[0]) if hasattr(value, "__len__") and len(value) else int(value)


def _category(name: str) -> str:
    if name == OUTPUT:
        return "output"
    if name in (EMBEDDING, "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in CATEGORIES if part in name), "other")


def _kept(name: str, shape: tuple[int, ...]) -> str:
    """Why a tensor is not quantized, or ""."""
    leading = next((axis for axis, size in enumerate(shape) if size > 1), len(shape))
    if len(shape) - leading < 2:
        return "1-D"
    if not name.endswith("weight"):
        return "bias"
    if KEPT_RWKV.search(name):
        return "small"
    return next((reason for part, reason in KEPT.items() if part in name), "")


def _fit(tensor: str, shape: tuple[int, ...], wanted: str, reason: str, misfit: str | None) -> Assignment:
    columns, block = shape[-1], GGML_TYPES[wanted].block
    if columns % block == 0:
        return Assignment(tensor, wanted, wanted, reason)
    kind = misfit or GGML_TYPES[wanted].fallback
    if columns % GGML_TYPES[kind].block:
        kind = "F16"
    return Assignment(tensor, kind, wanted, f"{columns} columns are not a multiple of {block}")


def _patterns(
    overrides: Sequence[tuple[str, str]], tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> list[tuple[re.Pattern[str], str]]:
    names = [name for name, shape in tensors if not _kept(name, shape)]
    compiled = []
    for expression, kind in overrides:
        thing = f"--tensor {expression}={kind}"
        try:
            pattern = re.compile(expression)
        except re.error as error:
            reason = f"is no regular expression ({error})"
            raise UsageError(thing, reason, "Escape special signs with a backslash.") from None
        if not any(map(pattern.search, names)):
            way_out = "`dither inspect --tensors` lists the names; vectors, norms and routers stay F32."
            raise UsageError(thing, "matches no matrix that could be quantized", way_out)
        compiled.append((pattern, _type(kind)))
    return compiled


def _type(name: str) -> str:
    if name.upper() in quantized_types():
        return name.upper()
    raise _unknown("tensor type", name, quantized_types())


def _unknown(what: str, name: str, known: Sequence[str]) -> UsageError:
    close = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose one of {', '.join(known)}."
    return UsageError(f"{what} {name}", "is not known", hint)
