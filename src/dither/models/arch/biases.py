"""Biases of zeros, which some quantizers wrote beside every matrix: left out where a family has none.

AutoGPTQ gave every layer a bias, and what was de-quantized from its files kept them.  Zeros change nothing, but
llama.cpp does not load a file with a tensor that its graph has no place for, and transformers' network has no
parameter for them.  So they are left out, aloud.  One that is not zero throughout is somebody's: it stays, and is
refused where it cannot go.

Where config.json switches biases on (Qwen3's attention_bias) all of the switch's layers have them or none has:
they go together, and only where each is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dither.formats.tensor_names import within_block
from dither.models.arch.family import Config, Family
from dither.models.arch.graph import takes
from dither.models.contradictions import note
from dither.models.stored import StoredTensor

_BIAS, _WEIGHT = ".bias", ".weight"
_BLOCK = "blk.*."


@dataclass(frozen=True)
class _Kind:
    """The same bias of every layer."""

    name: str  # "attn_output"
    members: tuple[str, ...]  # as the checkpoint calls them
    has_place: bool  # in transformers' network and in llama.cpp's graph
    switch: str | None  # of config.json, where that is what gives transformers' network this bias


def without_zero_biases(
    family: Family, config: Config, tensors: Mapping[str, StoredTensor]
) -> tuple[Mapping[str, StoredTensor], list[str]]:
    """The tensors of a checkpoint without those biases, and a note on them."""
    kinds = list(_kinds(family, config, tensors))
    gone = [kind for kind in kinds if _may_go(kind, kinds) and _are_zero(kind, kinds, tensors)]
    names = {name for kind in gone for name in kind.members}
    if not names:
        return tensors, []
    where = ", ".join(kind.name for kind in gone)
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    return kept, [note("biases denied", count=len(names), where=where, family=family.name)]


def switched_on(family: Family, config: Config) -> dict[str, str]:
    """Kind → the switch ("" for always) by which transformers' network has a bias there."""
    return {
        kind: switch for switch, kinds in family.biases.items() if not switch or config.get(switch) for kind in kinds
    }


def _kinds(family: Family, config: Config, tensors: Mapping[str, StoredTensor]) -> Iterator[_Kind]:
    on = switched_on(family, config)
    members: dict[str, list[str]] = {}
    for stored in tensors:
        if stored.endswith(_BIAS) and (kind := _kind(family, stored)):
            members.setdefault(kind, []).append(stored)
    for kind, names in members.items():
        has_place = kind in on and takes(family, f"{_BLOCK}{kind}{_BIAS}")
        yield _Kind(kind, tuple(names), has_place, on.get(kind) or None)


def _kind(family: Family, stored: str) -> str | None:
    """What the family calls the matrix that a bias stands beside: "attn_q"; None where it knows no such matrix."""
    name = family.own_name(stored.removesuffix(_BIAS) + _WEIGHT)
    rule = next((rule for rule in family.rules if rule.pattern.fullmatch(name)), None)
    target = "" if rule is None else rule.target
    return within_block(target.replace("*", "0")).removesuffix(_WEIGHT) if target.startswith(_BLOCK) else None


def _fellows(kind: _Kind, kinds: Sequence[_Kind]) -> list[_Kind]:
    """Those that come and go with it."""
    return [other for other in kinds if other.switch == kind.switch] if kind.switch else [kind]


def _may_go(kind: _Kind, kinds: Sequence[_Kind]) -> bool:
    return not all(other.has_place for other in _fellows(kind, kinds))


def _are_zero(kind: _Kind, kinds: Sequence[_Kind], tensors: Mapping[str, StoredTensor]) -> bool:
    names = (name for other in _fellows(kind, kinds) for name in other.members)
    return not any(tensors[name].read(0, 1).any() for name in names)
