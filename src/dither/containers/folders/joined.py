"""Matrices that a server computes as one, and so reads in one type.

vLLM and SGLang stack what reads the same input, queries, keys and values, gate and up, and give all experts
of a layer one kernel; they refuse a file in which the parts of a stack were quantized differently.
transformers keeps them apart and reads any file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dither.formats.tensor_names import READ_TOGETHER, block_of, kind_of

# All matrices of the experts are one kernel's.
_STACKS = tuple((*kinds, "ffn_down_exps") if "ffn_gate_exps" in kinds else kinds for kinds in READ_TOGETHER)
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip
_STACK_OF = {part: stack for stack in _STACKS for part in stack}


def stacks(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names in their order, those of one stack together at the place of the first.

    >>> stacks(["blk.0.attn_k.weight", "blk.0.ffn_down.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias"])
    [('blk.0.attn_k.weight', 'blk.0.attn_q.weight'), ('blk.0.ffn_down.weight',), ('blk.0.attn_q.bias',)]
    """
    found: dict[object, list[str]] = {}
    for name in names:
        stack = _STACK_OF.get(kind_of(name)) if name.endswith(".weight") else None
        found.setdefault((block_of(name), stack) if stack else name, []).append(name)
    return [tuple(group) for group in found.values()]


def fused_modules(kinds: Mapping[str, str]) -> dict[str, str]:
    """A checkpoint's modules → kind, by the names of the stacks that a server makes of them; without those
    whose parts differ.

    >>> fused_modules({"l.0.q_proj": "a", "l.0.k_proj": "a", "l.0.o_proj": "b", "l.0.mlp.experts.1.w1": "c"})
    {'l.0.qkv_proj': 'a', 'l.0.mlp.experts': 'c'}
    """
    found: dict[str, set[str]] = {}
    for module, kind in kinds.items():
        head, _, last = module.rpartition(".")
        if ".experts." in module:
            found.setdefault(f"{module.partition('.experts.')[0]}.experts", set()).add(kind)
        elif last in _FUSED:
            found.setdefault(f"{head}.{_FUSED[last]}", set()).add(kind)
    return {name: own.pop() for name, own in found.items() if len(own) == 1}


def parted(types: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The stacks whose parts are not of one type, given each tensor's."""
    return [group for group in stacks(types) if len({types[name] for name in group}) > 1]
