"""Measurements of a model that lie beside it: its own, and those of files that were made of it.

Whose they are is judged by the reference's name and the number of weights, since comparing contents would
mean to read them.  What is no measurement, or not this model's, is passed over: nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dither.containers.provenance import MEASUREMENT
from dither.errors import DitherError
from dither.formats.gguf import read_header
from dither.measuring.schema import SUFFIX, Measurement, load, parse, path_for
from dither.types import Model

_MOST = 64  # files of a folder that are looked at


def of_file(model: Model) -> tuple[Measurement, str] | None:
    """The file's own measurement, and where it is kept: beside it, else inside."""
    path = Path(model.origin)
    beside = path_for(path)
    if beside.is_file():
        found = _load(beside)
        if found and found.file == path.name and _same_size(found, model):
            return found, beside.name
    field = model.metadata.get(MEASUREMENT)
    found = _parse(str(field.value)) if field else None
    return (found, path.name) if found else None


def by_type(model: Model) -> dict[str, tuple[Measurement, str]]:
    """Type → a measurement of such a file made of this very model, and where it is kept."""
    return {found.type: (found, where) for found, where in _neighbors(Path(model.origin), model)}


def _neighbors(path: Path, model: Model) -> Iterator[tuple[Measurement, str]]:
    if not path.exists():
        return
    path = path.resolve()
    for folder in [path, path.parent] if path.is_dir() else [path.parent]:
        files = sorted(file for file in folder.iterdir() if file.name.endswith((SUFFIX, ".gguf")))
        for file in files[:_MOST]:
            found = _embedded(file) if file.suffix == ".gguf" else _load(file)
            if found and found.type and found.reference == path.name and _same_size(found, model):
                yield found, file.name


def _same_size(found: Measurement, model: Model) -> bool:
    parameters = 8 * found.bytes / found.bpw if found.bpw else 0
    return abs(parameters - model.parameters) <= 0.01 * model.parameters


def _load(path: Path) -> Measurement | None:
    try:
        return load(path)
    except DitherError:
        return None


def _parse(text: str) -> Measurement | None:
    if text.strip() in ("", "{}"):
        return None
    try:
        return parse(text, MEASUREMENT)
    except DitherError:
        return None


def _embedded(path: Path) -> Measurement | None:
    try:
        field = read_header(path).metadata.get(MEASUREMENT)
    except DitherError:
        return None
    return _parse(str(field.value)) if field else None
