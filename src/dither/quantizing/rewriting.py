"""Transforms applied one after another, each to what the one before it left.

A transform has to know the type each tensor will have, and may add a tensor (an output matrix untied
from the embedding), so types are chosen anew after each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from dither.codecs import codec as find_codec
from dither.containers.mix import Mix
from dither.errors import UsageError
from dither.models.arch import feeds
from dither.transforms import find_transform
from dither.types import EvidenceSource, Model


@dataclass(frozen=True)
class Rewritten:
    """A model ready to be rounded, its evidence and what its tensors become."""

    model: Model
    evidence: EvidenceSource
    mix: Mix
    record: dict[str, Any] = field(default_factory=dict)  # transform → what it chose
    notes: tuple[str, ...] = ()


def rewrite(
    model: Model,
    evidence: EvidenceSource,
    known: Collection[str],
    transforms: Sequence[str],
    mix: Mix,
    mix_of: Callable[[Model, Collection[str]], Mix],
    threads: int,
) -> Rewritten:
    """`model`, of which `mix` says what its tensors become, through `transforms` in order.  `known` names
    the tensors that have importance; `mix_of` chooses the types of what a transform has made.

    Raises UsageError for a transform that is unknown or named twice.
    """
    made = [find_transform(name, feeds(model.arch), threads=threads) for name in transforms]
    for name in transforms:
        if transforms.count(name) > 1:
            raise UsageError(f"--transform {name}", "is given twice", "Give it once.")
    record: dict[str, Any] = {}
    notes: list[str] = []
    for transform in made:
        codecs = {tensor.name: find_codec(tensor.type, tensor.shape[-1]) for tensor in mix.tensors}
        done = transform(model, evidence, codecs.get)
        model, evidence = done.model, done.evidence
        record[transform.name] = done.record
        notes.extend(done.notes)
        mix = mix_of(model, known)
    return Rewritten(model, evidence, mix, record, tuple(notes))
