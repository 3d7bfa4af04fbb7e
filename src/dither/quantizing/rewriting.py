"""Transforms applied one after another, each to what the one before it left.

A transform has to know the type each tensor will have, and may add a tensor (an output matrix untied
from the embedding), so the plan is made anew after each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dither.codecs import codec as find_codec
from dither.containers.mix import Mix
from dither.errors import UsageError
from dither.models.arch import feeds
from dither.transforms import find_transform
from dither.types import Codec, EvidenceSource, Model


@dataclass(frozen=True)
class Rewritten:
    """A model ready to be rounded, its evidence and its plan."""

    model: Model
    evidence: EvidenceSource
    plan: Mix
    record: dict[str, Any] = field(default_factory=dict)  # transform → what it chose
    notes: tuple[str, ...] = ()


def rewrite(
    model: Model,
    evidence: EvidenceSource,
    known: Collection[str],
    transforms: Sequence[str],
    plan: Mix,
    plan_of: Callable[[Model, Collection[str]], Mix],
    threads: int,
) -> Rewritten:
    """`model`, of which `plan` says what its tensors become, through `transforms` in order.  `known` names
    the tensors that have importance; `plan_of` plans what a transform has made.

    Raises UsageError for a transform that is unknown or named twice.
    """
    made = [find_transform(name, feeds(model.arch), threads=threads) for name in transforms]
    for name in transforms:
        if transforms.count(name) > 1:
            raise UsageError(f"--transform {name}", "is given twice", "Give it once.")
    record: dict[str, Any] = {}
    notes: list[str] = []
    for transform in made:
        types = {tensor.name: (tensor.type, tensor.shape[-1]) for tensor in plan.tensors}
        done = transform(model, evidence, partial(_codec, types))
        model, evidence = done.model, done.evidence
        record[transform.name] = done.record
        notes.extend(done.notes)
        plan = plan_of(model, known)
    return Rewritten(model, evidence, plan, record, tuple(notes))


def _codec(types: dict[str, tuple[str, int]], tensor: str) -> Codec | None:
    if tensor not in types:
        return None
    kind, columns = types[tensor]
    return find_codec(kind, columns)
