"""What a quantized file says of its making, and what a person is told of its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dither.containers.gguf import recipe_metadata
from dither.containers.mix import Mix, Options
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import STORED_FLOATS, Field, ValueType as V, array, string, u32
from dither.types import Model

MEASUREMENT = "dither.measure"  # metadata key: the measurement's JSON
ERRORS = "dither.relative_errors"  # metadata key: √(Σ(w − ŵ)² / Σw²) of each tensor, in the file's order


def source_notes(model: Model, mix: Mix) -> list[str]:
    stored = {t.source_type for t in mix.tensors if len(t.shape) > 1}
    lossy = {name for name in stored if name not in STORED_FLOATS and not name.startswith("F8")}
    if not lossy:
        return []
    return [
        f"The source is quantized already ({', '.join(sorted(lossy))}): what it lost is not won back; "
        "quantize the original where you have it."
    ]


def recipe_json(
    model: Model,
    options: Options,
    store: EvidenceStore | None,
    solver: str,
    transforms: Mapping[str, Any] | None = None,
    sequential: bool = False,
) -> str:
    """The recipe as it is kept in the file: enough to make it again, nothing of the machine."""
    recipe: dict[str, Any] = {"to": options.label, "solver": solver, "source": {"name": model.name, "kind": model.kind}}
    if options.plan:
        recipe["plan"] = options.plan
    elif options.tensors:
        recipe["tensors"] = [list(pair) for pair in options.tensors]
    for key in ("output_type", "embedding_type", "pure", "bits", "group", "sym", "dtype", "act_order"):
        if getattr(options, key) not in (None, False) or (key == "sym" and options.sym is False):
            recipe[key] = getattr(options, key)
    if sequential:
        recipe["statistics"] = "sequential"
    if transforms:
        recipe["transforms"] = dict(transforms)
    if store is not None and store.matrix is not None:
        recipe["imatrix"] = {"name": store.matrix.name, "sha256": store.sha256}
    elif store is not None:
        recipe["evidence"] = {"data": store.manifest["data"], "sha256": store.sha256}
        if store.manifest.get("gradients"):
            recipe["evidence"]["gradients"] = True
    return json.dumps(recipe)


def output_metadata(model: Model, mix: Mix, recipe: str, store: EvidenceStore | None) -> dict[str, Field]:
    metadata = {key: value for key, value in model.metadata.items() if not key.startswith("quantize.")}
    metadata.update(recipe_metadata(mix.file_type, recipe))
    for key in (MEASUREMENT, ERRORS):  # of the source, if it had them
        metadata.pop(key, None)
    matrix = store.matrix if store else None
    if matrix is not None:
        metadata["quantize.imatrix.file"] = string(matrix.name)
        metadata["quantize.imatrix.entries_count"] = u32(len(matrix.means))
        metadata["quantize.imatrix.chunks_count"] = u32(matrix.chunks)
        if matrix.datasets:
            metadata["quantize.imatrix.datasets"] = array(V.STRING, matrix.datasets)
    return metadata
