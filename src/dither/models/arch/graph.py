"""What llama.cpp's graph of a family takes, held against a GGUF's list of tensors.

llama.cpp creates every tensor of an architecture by name and shape and then counts: with one tensor more in the file
than it created it gives up ("wrong number of tensors"), with one less too.  Both show minutes after a file was
written, unless somebody asks before: a family's table (`Family.graph`) says what there may be.

Sizes, by name: vocabulary (tokens), hidden (the residual stream), query and key (all heads of one kind side by side),
head (one of them), inner (the feed-forward layer), experts, expert_inner, half_rotated (pairs of dimensions that
rotary embedding turns), frequencies and long_frequencies (the same where rotary factors are of the one kind or the
other, else 0), labels, dense_out, dense_in.  A product of a number and a size is written 2*inner, a sum query+2*key.
A tensor with a size of 0 is not taken; a size that the metadata do not say is not compared.

Of an architecture that no family here has, nothing is known, and nothing is said.

Source: llama.cpp's model loader (src/llama-model.cpp, src/models/*.cpp); the matrices' scales: the generic pass there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import block_of, within_block
from dither.models.arch.family import Family, Taken
from dither.system.text import shown
from dither.types import Model

Shape = tuple[int, ...]
Sizes = Mapping[str, "int | None"]
_BLOCK = "blk.*."
# Any matrix of a block may have a factor beside it, any stack one for each expert.
_SCALED = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output",
    "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip
_SCALES = ("scale", "input_scale")
_LISTED = 4
REFUSED = "wrong number of tensors"  # in llama.cpp's own words


@dataclass(frozen=True)
class Faults:
    """How a list of tensors differs from what the graph takes."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, Shape, tuple[int | None, ...]]] = field(default_factory=list)  # name, is, should be

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.misshapen)


def check_graph(model: Model, families: Iterable[Family]) -> None:
    """Holds a model's tensors against the graph of its architecture.

    Raises UnsupportedError for tensors that llama.cpp has no place for, SourceError where one is missing or of
    another shape than the metadata make it.
    """
    candidates = [family for family in families if family.arch == model.arch and family.graph]
    if not candidates:
        return
    found = {family.name: faults(family, model) for family in candidates}
    name = min(found, key=lambda name: found[name].count)
    if found[name].count:
        raise _refusal(name, model, found[name])


def _refusal(family: str, model: Model, found: Faults) -> SourceError | UnsupportedError:
    graph = f"llama.cpp's graph of {family}"
    if found.missing:
        is_missing = "is missing" if len(found.missing) == 1 else "are missing"
        reason = f"{is_missing}: {graph} needs {_them(found.missing)}, and llama.cpp would not load the file"
        return SourceError(_named(found.missing), reason, "Take the model from its authors again.")
    if found.unknown:
        have = "has" if len(found.unknown) == 1 else "have"
        reason = f'{have} no place in {graph}, which would not load the file ("{REFUSED}")'
        way_out = "Write a folder instead (--to w4a16, fp8, …), or take a model without them."
        return UnsupportedError(_named(found.unknown), reason, way_out)
    name, shape, expected = found.misshapen[0]
    reason = f"has shape {list(shape)}, but {graph} takes {_shape(expected)}: llama.cpp would not load the file"
    way_out = "Check the metadata, or the config.json it was made from."
    return SourceError(f"tensor {shown(name)}", reason, way_out)


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _named(names: Sequence[str]) -> str:
    listed = shown(", ".join(names[:_LISTED]), 300)
    if len(names) == 1:
        return f"tensor {listed}"
    return f"{len(names)} tensors ({listed}{', …' if len(names) > _LISTED else ''})"


def _shape(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def faults(family: Family, model: Model) -> Faults:
    """What llama.cpp would say of a model's tensors, taken for one of this family."""
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    sizes = _sizes(family, model)
    places = _places(family, shapes, _blocks(model), sizes)
    needed = [name for name, (_, optional) in places.items() if not optional]
    misshapen = [
        (name, shape, places[name][0])
        for name, shape in shapes.items()
        if name in places and not _fits(shape, places[name][0])
    ]
    return Faults(
        missing=[name for name in needed if name not in shapes],
        unknown=[name for name in shapes if name not in places],
        misshapen=misshapen,
    )


def takes(family: Family, kind: str) -> bool:
    """Whether the graph has a place for tensors of this name, `blk.*.` before those of a block.

    >>> from dither.models.arch.qwen2 import QWEN2
    >>> takes(QWEN2, "blk.*.attn_q.bias"), takes(QWEN2, "blk.*.attn_output.bias")
    (True, False)
    """
    return any(taken.name == kind for taken in family.graph)


def _fits(shape: Shape, expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size is None or size == own for own, size in zip(shape, expected, strict=True)
    )


def _places(
    family: Family, names: Iterable[str], blocks: int, sizes: Sizes
) -> dict[str, tuple[tuple[int | None, ...], bool]]:
    """Every tensor that the loader would create beside `names`: its shape, and whether it may be left out."""
    here = set(names)
    found: dict[str, tuple[tuple[int | None, ...], bool]] = {}
    for taken in (*family.graph, *_scales(family)):
        shape = tuple(size_of(term, sizes) for term in taken.sizes)
        if 0 in shape:
            continue
        inside = taken.name.startswith(_BLOCK)
        for block in range(blocks) if inside else (0,):
            numbered = {one: one.replace(_BLOCK, f"blk.{block}.") for one in (taken.name, taken.unless, taken.beside)}
            if numbered[taken.unless] in here or (taken.beside and numbered[taken.beside] not in here):
                continue
            found[numbered[taken.name]] = shape, taken.optional
    return found


def _scales(family: Family) -> list[Taken]:
    """Factors of matrices, one each or one for every expert."""
    matrices = [taken for taken in family.graph if _is_scaled(taken.name)]
    return [
        Taken(
            f"{taken.name.removesuffix('weight')}{scale}",
            ("experts" if "_exps." in taken.name else "one",),
            True,
            beside=taken.name,
        )
        for taken in matrices
        for scale in _SCALES
    ]


def _is_scaled(name: str) -> bool:
    return within_block(name.replace("*", "0")).removesuffix(".weight") in _SCALED and name.endswith(".weight")


def _blocks(model: Model) -> int:
    """As many as the metadata count; where they do not say, as many as there are."""
    stated = model.value(f"{model.arch}.block_count")
    if type(stated) is int:
        return min(stated, len(model.tensors))  # each has several: no count of a stranger's makes a long list
    return 1 + max((block for tensor in model.tensors if (block := block_of(tensor.name)) is not None), default=-1)


def _sizes(family: Family, model: Model) -> dict[str, int | None]:
    def whole(key: str, default: int | None = None) -> int | None:
        value = model.value(f"{model.arch}.{key}", default)
        return value if type(value) is int else None  # an array holds a number for each layer

    tokens = model.value("tokenizer.ggml.tokens")
    labels = model.value(f"{model.arch}.classifier.output_labels")
    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head = whole("attention.key_length", hidden // heads if hidden and heads else None)
    of_keys = whole("attention.head_count_kv", heads)
    inner, experts, used = whole("feed_forward_length"), whole("expert_count", 0), whole("expert_used_count")
    shared = inner // used if inner is not None and used else None
    half = None if (turned := whole("rope.dimension_count", head)) is None else turned // 2
    is_long = model.value(f"{model.arch}.rope.scaling.type") == "longrope"
    return {
        "one": 1,
        "vocabulary": len(tokens) if tokens is not None else whole("vocab_size"),
        "hidden": hidden,
        "query": hidden if family.query_is_hidden else _product(heads, head),
        "key": _product(of_keys, head),
        "head": head,
        "inner": inner,
        "experts": experts,
        "expert_inner": whole("expert_feed_forward_length") or shared,
        "half_rotated": half,
        "frequencies": 0 if is_long else half,
        "long_frequencies": half if is_long else 0,
        "labels": 1 if labels is None else len(labels),
        "dense_out": whole("dense_2_feat_out", 0),
        "dense_in": whole("dense_3_feat_in", 0),
    }


def _product(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


def size_of(term: str, sizes: Sizes) -> int | None:
    """
    >>> size_of("query+2*key", {"query": 64, "key": 16}), size_of("2*inner", {"inner": None})
    (96, None)
    """
    total = 0
    for part in term.split("+"):
        factor, _, name = part.rpartition("*")
        size = sizes.get(name)
        if size is None:
            return None
        total += int(factor or 1) * size
    return total
