"""The part of the results document by which the page judges a machine: view 2, "Does it fit my machine?".

The page does not ask Python again when a slider moves: it computes, with `page/js/memory.js`, what
`fitting/memory.py` and `fitting/advice.py` compute.  So it needs what they need: the model's shape, what each
type weighs, the machine, and every constant.  Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a neighboring room: what it found is handed in
    from dither.fitting.result import Candidate, Fit


def fit_part(
    found: Fit,
    constants: Mapping[str, Any],
    runs: Mapping[str, str] | None = None,
    default_context: int = 8192,
) -> dict[str, Any]:
    """What `dither.fit` found, as the document's `fit`.

    `constants` are `dither.fitting.constants.constants()`; `runs` gives the id of the run of a type, where one
    was made, so that the page can say which of the weights are a file already.  `default_context` bounds the
    context that the slider starts from; a model trained on less starts from its own.
    """
    ids = runs or {}
    return {
        "machine": found.to_json()["machine"],
        "model": found.model,
        "architecture": found.arch,
        "parameters": found.parameters,
        "shape": shape_part(asdict(found.shape)),
        "weights": [_weights(candidate, ids.get(candidate.type)) for candidate in found.candidates],
        "defaults": {"context": min(found.context, default_context), "kv": found.kv, "slots": found.slots},
        "constants": dict(constants),
        "notes": list(found.notes),
    }


def shape_part(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A shape with alike neighbors among its layers counted instead of repeated, as in `golden.json`."""
    return {**shape, "layers": _counted(shape["layers"])}


def _counted(layers: Iterable[Mapping[str, int]]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for layer in layers:
        if groups and groups[-1]["layer"] == layer:
            groups[-1]["count"] += 1
        else:
            groups.append({"count": 1, "layer": dict(layer)})
    return groups


def _weights(candidate: Candidate, run: str | None) -> dict[str, Any]:
    quality = candidate.quality
    return {
        "type": candidate.type,
        "run": run,
        "file": candidate.file is not None,
        "bytes": candidate.memory.weights,
        "active": candidate.active,
        "embedding": candidate.embedding,
        "bpw": candidate.bits_per_weight,
        "needs_importance": candidate.needs_importance,
        "quality": {"kl": quality.kl, "tag": quality.tag, "source": quality.source} if quality else None,
        "notes": list(candidate.notes),
    }
