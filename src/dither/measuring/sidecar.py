"""Measurements that lie beside a model: its own, and those of files that were made of it.

Which model they belong to is judged by the reference's name and the number of weights, because comparing contents
would mean reading them.  A file that is not a measurement, or not of this model, is ignored: nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dither.containers.provenance import MEASUREMENT
from dither.errors import DitherError
from dither.formats.gguf import read_header
from dither.measuring.proof import read
from dither.measuring.schema import SUFFIX, Measurement, load, path_for
from dither.types import Model

_MOST = 64  # files looked at in a folder


def of_file(model: Model) -> tuple[Measurement, str] | None:
    """The file's own measurement, and where it is kept: beside it, else inside."""
    path = Path(model.origin)
    found = _read(path_for(path))
    if found and found.file == path.name and _same_size(found, model):
        return found, path_for(path).name
    found = _embedded(model.metadata)
    return (found, path.name) if found else None


def by_type(model: Model) -> dict[str, tuple[Measurement, str]]:
    """Type → a measurement of such a file made of this very model, and where it is kept."""
    if not Path(model.origin).exists():
        return {}
    path, known = Path(model.origin).resolve(), {}
    for folder in [path, path.parent] if path.is_dir() else [path.parent]:
        files = sorted(file for file in folder.iterdir() if file.name.endswith((SUFFIX, ".gguf")))
        for file in files[:_MOST]:
            found = _read(file)
            if found and found.type and found.reference == path.name and _same_size(found, model):
                known[found.type] = (found, file.name)
    return known


def _same_size(found: Measurement, model: Model) -> bool:
    parameters = 8 * found.tensor_bytes / found.bpw if found.bpw else 0
    return abs(parameters - model.parameters) <= 0.01 * model.parameters


def _read(path: Path) -> Measurement | None:
    """A `.measure.json`, or the measurement in a GGUF; None if there is none that can be read."""
    with suppress(DitherError):
        return _embedded(read_header(path).metadata) if path.suffix == ".gguf" else load(path)
    return None


def _embedded(metadata: Mapping[str, Any]) -> Measurement | None:
    field = metadata.get(MEASUREMENT)
    with suppress(DitherError):
        return read(str(field.value), MEASUREMENT) if field else None
    return None
