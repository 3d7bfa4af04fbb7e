"""What a family of models is: tables that say how a Hugging Face checkpoint becomes a GGUF.

A family names its tensors line by line, `source -> target [change]`, where `*` stands for the layer's
number and `#` for an expert's:

    model.layers.*.self_attn.q_proj.weight -> blk.*.attn_q.weight [rope_rows_q]

A change is something that must happen to the rows on the way; `rows.py` has one function for each.
Keys of config.json that become metadata are lines too, `GGUF key <- config key | other spelling [kind]`.

Two more tables keep a conversion honest.  `assumes` lists what llama.cpp's graph of this architecture
has built in (an activation, a pattern of layers): a checkpoint that says otherwise would run and be
wrong, so it is refused.  `defaults` are the values that transformers fills in for keys that a
config.json may leave out.

Source: transformers' model and configuration classes for the left sides, llama.cpp's model loader
(the tensors and keys it asks for) for the right sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

LAYER, EXPERT = "*", "#"


@dataclass(frozen=True)
class Rule:
    """One line of a tensor table.  `pattern` finds the source's names, the groups being its numbers."""

    source: str
    target: str
    change: str
    pattern: re.Pattern[str]

    @property
    def of_layers(self) -> bool:
        return LAYER in self.source


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

    Names lack the layer and the suffix: ("attn_norm", ("attn_q", "attn_k", "attn_v")).
    """

    source: str
    readers: tuple[str, ...]


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
    defaults: Config = field(default_factory=dict)
    assumes: Config = field(default_factory=dict)  # config key → the only value llama.cpp computes with
    assumes_of: Callable[[Config], Config] | None = None  # the same where it depends on the config
    scalings: tuple[str, ...] = ("linear", "yarn", "dynamic")  # kinds of RoPE scaling llama.cpp can do here
    ignores_window: bool = False  # llama.cpp's graph attends to everything, whatever sliding_window says
    prefixes: Mapping[str, str] = field(default_factory=dict)  # a text model's within a larger one → its own
    dropped: tuple[str, ...] = ()  # beginnings of names that are left out knowingly
    crop_embedding: bool = False  # rows past the tokenizer's last token are left out
    scaled_embedding: bool = False  # a token's row is multiplied by √hidden_size before the first layer


def rules(*tables: str) -> tuple[Rule, ...]:
    """Tables of `source -> target [change]` lines, in order."""
    return tuple(_rule(line) for table in tables for line in table.splitlines() if line.strip())


def _rule(line: str) -> Rule:
    source, rest = (part.strip() for part in line.split("->"))
    target, _, change = rest.partition("[")
    escaped = re.escape(source).replace(re.escape(LAYER), r"(?P<layer>\d+)")
    pattern = re.compile(escaped.replace(re.escape(EXPERT), r"(?P<expert>\d+)"))
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


def feeds(table: str) -> tuple[Feed, ...]:
    """A table of `source -> reader reader …` lines."""
    lines = [line.split("->") for line in table.splitlines() if line.strip()]
    return tuple(Feed(source.strip(), tuple(readers.split())) for source, readers in lines)


def linear(source: str, target: str, change: str = "") -> str:
    """The two table lines of a linear layer with an optional bias."""
    mark = f" [{change}]" if change else ""
    return "\n".join(f"{source}.{part} -> {target}.{part}{mark}" for part in ("weight", "bias"))


EMBEDDING = "model.embed_tokens.weight -> token_embd.weight [embedding]"
HEAD = """
model.norm.weight -> output_norm.weight
lm_head.weight -> output.weight [output]
"""
NORMS = """
model.layers.*.input_layernorm.weight -> blk.*.attn_norm.weight
model.layers.*.post_attention_layernorm.weight -> blk.*.ffn_norm.weight
"""
ATTENTION = "\n".join(
    linear(f"model.layers.*.self_attn.{source}_proj", f"blk.*.attn_{target}")
    for source, target in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
)
# Llama's checkpoints keep the two halves of a rotated pair d/2 rows apart; llama.cpp wants them adjacent.
ROTATED_ATTENTION = "\n".join(
    linear(f"model.layers.*.self_attn.{source}_proj", f"blk.*.attn_{target}", change)
    for source, target, change in (
        ("q", "q", "rope_rows_q"),
        ("k", "k", "rope_rows_k"),
        ("v", "v", ""),
        ("o", "output", ""),
    )
)
HEAD_NORMS = """
model.layers.*.self_attn.q_norm.weight -> blk.*.attn_q_norm.weight
model.layers.*.self_attn.k_norm.weight -> blk.*.attn_k_norm.weight
"""
FEED_FORWARD = "\n".join(
    linear(f"model.layers.*.mlp.{part}_proj", f"blk.*.ffn_{part}") for part in ("gate", "up", "down")
)
FUSED_EXPERTS = """
model.layers.*.mlp.experts.gate_up_proj -> blk.*.ffn_gate_exps.weight [expert_gate]
model.layers.*.mlp.experts.gate_up_proj -> blk.*.ffn_up_exps.weight [expert_up]
model.layers.*.mlp.experts.down_proj -> blk.*.ffn_down_exps.weight
"""

COMMON_KEYS = """
block_count <- num_hidden_layers [u32]
context_length <- max_position_embeddings [u32]
embedding_length <- hidden_size [u32]
feed_forward_length <- intermediate_size [u32]
attention.head_count <- num_attention_heads [u32]
attention.head_count_kv <- num_key_value_heads | num_attention_heads [u32]
attention.layer_norm_rms_epsilon <- rms_norm_eps [f32]
"""
EXPERT_KEYS = """
expert_count <- num_local_experts | num_experts [u32]
expert_used_count <- num_experts_per_tok [u32]
"""

DENSE_FEEDS = """
attn_norm -> attn_q attn_k attn_v
attn_v -> attn_output
ffn_norm -> ffn_gate ffn_up
ffn_up -> ffn_down
output_norm -> output
"""
EXPERT_FEEDS = """
attn_norm -> attn_q attn_k attn_v
attn_v -> attn_output
ffn_norm -> ffn_gate_inp ffn_gate_exps ffn_up_exps
ffn_up_exps -> ffn_down_exps
output_norm -> output
"""
