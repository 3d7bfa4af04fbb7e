"""GGUF's names of tensors, taken apart in one place, and the parts that tensors play by name.

    blk.12.attn_q.weight   block 12, kind "attn_q", suffix "weight"
    output_norm.weight     in no block, kind "output_norm"

A kind says what a tensor does wherever it stands; everybody who treats some of them apart asks here.

Source: llama.cpp's `LLM_TENSOR_NAMES` in src/llama-arch.cpp.
"""

from __future__ import annotations

import re

EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
ROUTER = "ffn_gate_inp"  # a few thousand weights that choose each token's experts
# Tables of rotary frequencies, and the scaling in config.json that each stands for.
ROPE_TABLES = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": "longrope",
    "rope_factors_short.weight": "longrope",
}
# Kinds that read one and the same input, where a block has them.
READ_TOGETHER = (
    ("attn_q", "attn_k", "attn_v"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
    ("ffn_gate_exps", "ffn_up_exps"),
)
_OF_BLOCK = re.compile(r"^blk\.(\d{1,9})\.")
_FIRST_READER = {kind: kinds[0] for kinds in READ_TOGETHER for kind in kinds}


def block_of(name: str) -> int | None:
    """The number of a tensor's block, None where it is in none.

    >>> block_of("blk.12.attn_q.weight"), block_of("output_norm.weight")
    (12, None)
    """
    found = _OF_BLOCK.match(name)
    return int(found[1]) if found else None


def within_block(name: str) -> str:
    """A name without its block: what it is called in every one.

    >>> within_block("blk.12.attn_q.weight"), within_block("output_norm.weight")
    ('attn_q.weight', 'output_norm.weight')
    """
    return _OF_BLOCK.sub("", name)


def kind_of(name: str) -> str:
    """A name without its block and its suffix.

    >>> kind_of("blk.3.attn_v.bias"), kind_of("output_norm.weight"), kind_of("blk.0.ssm_a")
    ('attn_v', 'output_norm', 'ssm_a')
    """
    return within_block(name).removesuffix(".weight").removesuffix(".bias")


def in_every_block(name: str) -> str:
    """
    >>> in_every_block("blk.12.attn_q.weight")
    'blk.*.attn_q.weight'
    """
    return _OF_BLOCK.sub("blk.*.", name)


def block_prefix(index: int) -> str:
    """What the names of all tensors of a block begin with."""
    return f"blk.{index}."


def input_of(name: str) -> str:
    """The same text for tensors that read the same input: the name of the first of them.

    >>> input_of("blk.3.attn_v.weight"), input_of("blk.3.attn_output.weight")
    ('blk.3.attn_q.weight', 'blk.3.attn_output.weight')
    """
    kind = kind_of(name)
    return name.replace(kind, _FIRST_READER.get(kind, kind))


def is_expert_stack(name: str) -> bool:
    """Whether a tensor holds one matrix for each expert."""
    return "_exps." in name


def is_router(name: str) -> bool:
    return kind_of(name) == ROUTER
