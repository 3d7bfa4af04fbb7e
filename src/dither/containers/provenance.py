"""What a quantized file says of its making, and what a person is told of its source.

Two formats of folders are called what a method is called: GPTQ, AWQ.  Any method's codes can be stored in them, so the
recipe names the method that chose the codes, and a file that is not what its name promises says so wherever a
person looks: while it is made, on its card, in `dither inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dither.containers.folders import find_scheme
from dither.containers.gguf import recipe_metadata
from dither.containers.mix import Mix, Options
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import STORED_FLOATS, Field, ValueType as V, array, string, u32
from dither.system.text import printable
from dither.types import Model

MEASUREMENT = "dither.measure"  # metadata key: the measurement's JSON
ERRORS = "dither.relative_errors"  # metadata key: √(Σ(w − ŵ)² / Σw²) of each tensor, in the file's order


PLAIN = "plain rounding"
COPIED = "codes taken over as they were"


def source_notes(model: Model, mix: Mix) -> list[str]:
    stored = {t.source_type for t in mix.tensors if len(t.shape) > 1}
    lossy = {name for name in stored if name not in STORED_FLOATS and not name.startswith("F8")}
    if not lossy:
        return []
    return [
        f"The source is quantized already ({', '.join(sorted(lossy))}): what it lost is not won back; "
        "quantize the original where you have it."
    ]


def method_in_words(solver: str, transforms: Iterable[str], informed: bool) -> str:
    """What chose the codes of a file; `informed` by evidence or not.

    >>> method_in_words("nearest", (), False), method_in_words("nearest", (), True)
    ('plain rounding', 'rounding weighed by importance')
    >>> method_in_words("gptq", ["awq"], True), method_in_words("nearest", ["awq"], True)
    ('awq + gptq', 'awq + nearest')
    """
    transforms = tuple(transforms)
    if solver == "nearest" and not transforms:
        return "rounding weighed by importance" if informed else PLAIN
    return " + ".join([*transforms, solver])


def method_of(recipe: Mapping[str, Any]) -> str:
    """The method that a recipe names; of a recipe that names none, what follows from its solver and transforms.

    A recipe is a stranger's: what has not the expected kind counts as absent.
    """
    named, solver = recipe.get("method"), recipe.get("solver")
    if isinstance(named, str) or not isinstance(solver, str):
        return printable(named) if isinstance(named, str) else ""
    to = str(recipe.get("to", ""))
    scheme = find_scheme(to)
    if to.upper() in STORED_FLOATS or (scheme is not None and not scheme.quantizes):
        return ""  # numbers alone
    informed = isinstance(recipe.get("evidence") or recipe.get("imatrix"), dict)
    return method_in_words(printable(solver), map(printable, _transforms(recipe)), informed)


def _transforms(recipe: Mapping[str, Any]) -> list[str]:
    found = recipe.get("transforms")
    return [name for name in found if isinstance(name, str)] if isinstance(found, (dict, list)) else []


def name_note(recipe: Mapping[str, Any]) -> str | None:
    """What a person should know of a file whose format is called after a method that did not choose its codes."""
    to, solver = (recipe.get(key) for key in ("to", "solver"))
    scheme = find_scheme(to) if isinstance(to, str) else None
    method = method_of(recipe)
    if scheme is None or not scheme.named_after or method in ("", COPIED):
        return None
    if scheme.named_after & {str(solver), *_transforms(recipe)}:
        return None
    told = f"Its layout is {scheme.title}'s, its codes are not: {method} chose them."
    if isinstance(recipe.get("evidence"), dict):
        return told
    lacks = "An importance matrix holds no Hessians" if recipe.get("imatrix") else "No evidence was given"
    return f"{told} {lacks}: {scheme.title} itself works from what `dither calibrate MODEL` learns (--evidence FOLDER)."


def recipe_json(
    model: Model,
    options: Options,
    mix: Mix,
    store: EvidenceStore | None,
    solver: str,
    transforms: Mapping[str, Any] | None = None,
    sequential: bool = False,
) -> str:
    """The recipe as it is kept in the file: enough to make it again, nothing of the machine."""
    recipe: dict[str, Any] = {"to": options.label, "solver": solver, "source": {"name": model.name, "kind": model.kind}}
    quantized = [tensor for tensor in mix.tensors if tensor.type not in STORED_FLOATS]
    if quantized:
        copied = all(tensor.type == tensor.source_type for tensor in quantized)
        recipe["method"] = COPIED if copied else method_in_words(solver, transforms or (), store is not None)
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
