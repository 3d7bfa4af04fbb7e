"""What a family of models is: tables that say how a Hugging Face checkpoint becomes a GGUF.

A family names its tensors line by line, `source -> target [change]`, where `*` stands for the layer's
number and `#` for an expert's:

    model.layers.*.self_attn.q_proj.weight -> blk.*.attn_q.weight [rope_rows_q]

A change is something that must happen to the rows on the way; `changes.py` has an object for each, a family may
bring its own.  Keys of config.json that become metadata are lines too, `GGUF key <- config key | other spelling
[kind]`, and so are `feeds`: which tensor's output which matrices read.

More tables keep a conversion honest.  `assumes` lists what llama.cpp's graph of this architecture
has built in (an activation, a pattern of layers): a checkpoint that says otherwise would run and be
wrong, so it is refused.  `defaults` are the values that transformers fills in for keys that a
config.json may leave out.  `graph` lists every tensor that llama.cpp's loader creates, and so counts: a file
with one more or one less does not load.  `biases` says which layers have a bias in transformers' network.

Source: transformers' model and configuration classes for the left sides, llama.cpp's model loader
(the tensors and keys it asks for) for the right sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dither.models.arch.changes import CHANGES, Change
from dither.models.tokenizers.pre import Chain

Config = Mapping[str, Any]

LAYER, EXPERT = "*", "#"


@dataclass(frozen=True)
class Rule:
    """One line of a tensor table.  `pattern` finds the source's names, the groups being its numbers."""

    source: str
    target: str
    change: str
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Key:
    """One line of a metadata table: the first of `sources` that config.json has, written as `kind`."""

    name: str
    sources: tuple[str, ...]
    kind: str  # "u32" or "f32"
    fallback: str | None  # written where config.json has none; "" leaves the key out, None refuses


@dataclass(frozen=True)
class Feed:
    """Linear layers that read the same activations, and the tensor whose output rows those are.

    Names lack the layer and the suffix: ("attn_norm", ("attn_q", "attn_k", "attn_v")).  Without readers it names a
    norm that stands in nobody's way: scales of channels pass it by, for it comes after q, k or a block's last matrix.
    """

    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """A tensor that llama.cpp's loader creates for this architecture; `graph.py` says what sizes are."""

    name: str  # "blk.*.attn_q.weight"
    sizes: tuple[str, ...]  # columns last
    optional: bool
    unless: str = ""  # the tensor in whose presence this one is neither needed nor taken
    beside: str = ""  # the tensor without which this one is not taken


@dataclass(frozen=True)
class Family:
    """Everything that sets one family apart."""

    name: str
    arch: str  # GGUF's general.architecture
    architectures: tuple[str, ...]  # what config.json may say under "architectures"
    model_types: tuple[str, ...]  # and under "model_type", where the first is missing
    rules: tuple[Rule, ...]
    feeds: tuple[Feed, ...]
    keys: tuple[Key, ...]
    graph: tuple[Taken, ...] = ()
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # config key, or "" for always → kinds
    query_is_hidden: bool = False  # llama.cpp's loader wants heads × their size to be the hidden width
    defaults: Config = field(default_factory=dict)
    assumes: Config = field(default_factory=dict)  # config key → the only value llama.cpp computes with
    assumes_of: Callable[[Config], Config] | None = None  # the same where it depends on the config
    changes: Mapping[str, Change] = field(default_factory=dict)  # the family's own, beside `changes.CHANGES`
    chains: tuple[Chain, ...] = ()  # its own pre-tokenizers, or its own name for a known one: looked at first
    scalings: tuple[str, ...] = ("linear", "yarn", "dynamic")  # kinds of RoPE scaling llama.cpp can do here
    ignores_window: bool = False  # llama.cpp's graph attends to everything, whatever sliding_window says
    window_period: int | None = None  # with a window: every so many-th layer attends to everything all the same
    prefixes: Mapping[str, str] = field(default_factory=dict)  # a text model's within a larger one → its own
    dropped: tuple[str, ...] = ()  # beginnings of names that are left out knowingly
    crop_embedding: bool = False  # rows past the tokenizer's last token are left out
    scaled_embedding: bool = False  # a token's row is multiplied by √hidden_size before the first layer

    def own_name(self, stored: str) -> str:
        """A tensor's name in the text model, which may lie within a larger one."""
        prefix = next(filter(stored.startswith, self.prefixes), "")
        return self.prefixes.get(prefix, "") + stored.removeprefix(prefix)

    def change_of(self, rule: Rule) -> Change:
        return self.changes[rule.change] if rule.change in self.changes else CHANGES[rule.change]

    def variant(self, name: str, architecture: str, model_type: str, **differences: Any) -> Family:
        """A family that differs in what is given; `defaults` and `assumes` are added to this one's."""
        added = {table: {**getattr(self, table), **differences.get(table, {})} for table in ("defaults", "assumes")}
        named = {"name": name, "architectures": (architecture,), "model_types": (model_type,)}
        return replace(self, **{**differences, **named, **added})


def rules(*tables: str) -> tuple[Rule, ...]:
    """Tables of `source -> target [change]` lines, in order."""
    return tuple(_rule(line) for table in tables for line in table.splitlines() if line.strip())


def _rule(line: str) -> Rule:
    source, rest = (part.strip() for part in line.split("->"))
    target, _, change = rest.partition("[")
    escaped = re.escape(source).replace(re.escape(LAYER), r"(?P<layer>\d{1,9})")
    pattern = re.compile(escaped.replace(re.escape(EXPERT), r"(?P<expert>\d{1,9})"))
    return Rule(source, target.strip(), change.rstrip("] "), pattern)


def keys(*tables: str) -> tuple[Key, ...]:
    """Tables of `name <- config key | other spelling [kind]` lines.  After the kind, `?` marks a key
    that may be left out and `=0` what is written where config.json has no value."""
    return tuple(_key(line) for table in tables for line in table.splitlines() if line.strip())


def _key(line: str) -> Key:
    name, rest = (part.strip() for part in line.split("<-"))
    sources, _, kind = rest.rstrip("] ").partition("[")
    kind, equals, fallback = kind.partition("=")
    names = tuple(source.strip() for source in sources.split("|"))
    optional = kind.endswith("?")
    return Key(name, names, kind.rstrip("?"), fallback if equals or optional else None)


def feeds(*tables: str) -> tuple[Feed, ...]:
    """Tables of `source -> reader reader …` lines; for one without readers see `Feed`."""
    lines = [line.split("->") for table in tables for line in table.splitlines() if line.strip()]
    return tuple(Feed(source.strip(), tuple(readers.split())) for source, readers in lines)


def graph(*tables: str) -> tuple[Taken, ...]:
    """Tables of `name = size size …` lines, with ` unless other` or ` beside other` behind where another tensor
    decides; `?` after a name marks one that may be left out."""
    return tuple(_taken(line) for table in tables for line in table.splitlines() if line.strip())


def _taken(line: str) -> Taken:
    name, rest = (part.strip() for part in line.split("="))
    rest, _, beside = rest.partition(" beside ")
    sizes, _, unless = rest.partition(" unless ")
    return Taken(name.rstrip("?"), tuple(sizes.split()), name.endswith("?"), unless.strip(), beside.strip())


def linear(source: str, target: str, change: str = "") -> str:
    """The two table lines of a linear layer with an optional bias."""
    mark = f" [{change}]" if change else ""
    return "\n".join(f"{source}.{part} -> {target}.{part}{mark}" for part in ("weight", "bias"))
