"""The report: everything known of some quantized files, as one document, one HTML file, one model card.

    find runs and their original → how they fit this machine → the page with the document inside

The live dashboard and the exported report show the same document; an exported one says nothing of where
files lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from dither import __version__, _fit
from dither.errors import DitherError
from dither.fitting.constants import constants
from dither.fitting.machine import Machine
from dither.fitting.result import Fit
from dither.fitting.speed import active_bytes
from dither.formats.mapped import shown
from dither.models.outline import outline
from dither.models.source import open_headers
from dither.showing import discover
from dither.showing.document import Document, FitInput, Problem, Run, Weights, WeightsQuality, now
from dither.showing.fit import fit_part
from dither.showing.tensors import with_errors

MOST_COMPARED = 10**9  # weights; of models up to here, errors that no file keeps are counted for the report


def document(
    paths: Iterable[str | Path],
    *,
    against: str | Path | None = None,
    title: str | None = None,
    live: bool = False,
    machine: Machine | None = None,
    compare: bool = False,
) -> Document:
    """All that is known of the runs under `paths` (files, folders, measurements); reads headers alone.

    `against` is the original, looked for beside the files where it is not named.  With `compare`, relative
    errors that files do not keep are counted against the original, which reads weights.  What cannot be
    read is among the document's problems.
    """
    found = discover.find(paths, against)
    if compare and found.reference is not None and found.reference.path is not None:
        found.runs = [_compared(run, found.reference.path) for run in found.runs]
    fit, problems = _fit_input(found, machine)
    return Document(
        tool=f"dither {__version__}", made=now(), live=live, title=shown(title or _title(found), 400),
        reference=found.reference, runs=tuple(found.runs), fit=fit, guide=_content("guide", "GUIDE"),
        glossary=_content("glossary", "GLOSSARY"), problems=(*found.problems, *problems),
    )  # fmt: skip


def _title(found: discover.Found) -> str:
    if found.reference is not None:
        return found.reference.name
    names = [run.reference for run in found.runs if run.reference]
    return names[0] if names else found.runs[0].file if found.runs else "No files yet"


def _content(module: str, name: str) -> Any:
    """Text that belongs to the page: the guide and the glossary."""
    try:
        return getattr(import_module(f"dither.showing.{module}"), name)
    except ModuleNotFoundError:
        return None


def _compared(run: Run, original: str) -> Run:
    """A run whose file keeps no errors, with those counted against the original."""
    missing = any(row.relative_error is None for row in run.tensors)
    if run.path is None or not missing or run.parameters > MOST_COMPARED:
        return run
    try:
        with open_headers(Path(run.path), outline) as found, open_headers(Path(original), outline) as other:
            return run.model_copy(update={"tensors": with_errors(run.tensors, found[0], other[0])})
    except DitherError as error:
        note = f"Its errors could not be counted: {shown(str(error), 1000)}"
        return run.model_copy(update={"notes": (*run.notes, note)})


def _fit_input(found: discover.Found, machine: Machine | None) -> tuple[FitInput | None, list[Problem]]:
    """What the page needs to judge the files, and the types that could be made, on this machine."""
    paths = [found.reference.path] if found.reference else []
    paths += [run.path for run in found.runs[:1]]
    for path in filter(None, paths):
        try:
            judged = _fit.fit(path, machine=machine)
        except DitherError as error:
            return None, [Problem(file=shown(path, 1000), reason=shown(error.reason, 2000))]
        return fit_input(judged, found.runs), []
    return None, []


def fit_input(judged: Fit, runs: Iterable[Run] = ()) -> FitInput:
    """A fit as the page's arithmetic takes it.  The files that llama.cpp runs stand for their types."""
    own = [_of_run(run, judged.shape.experts_used) for run in runs if run.container == "gguf" and run.tensors]
    made = {weights.type for weights in own}
    part = fit_part(judged, constants())
    listed = [weights for weights in part["weights"] if not weights["file"] and weights["type"] not in made]
    return FitInput(**{**part, "weights": (*own, *(Weights(**weights) for weights in listed))})


def _of_run(run: Run, experts_used: int) -> Weights:
    kl = run.metrics.get("kl_mean")
    source = f"{run.file}, on {run.measured_on.data}" if run.measured_on else ""
    sizes = [(row.name, row.bytes) for row in run.tensors]
    experts = max((row.shape[0] for row in run.tensors if "_exps." in row.name and row.shape), default=0)
    tied = all(name != "output.weight" for name, _ in sizes)
    return Weights(
        type=run.type, run=run.id, file=True, bytes=run.bytes, bpw=run.bpw,
        active=active_bytes(sizes, experts, experts_used),
        embedding=0 if tied else sum(size for name, size in sizes if name == "token_embd.weight"),
        quality=None if kl is None else WeightsQuality(kl=kl.value, tag=kl.tag, source=source),
    )  # fmt: skip
