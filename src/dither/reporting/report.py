"""The report: everything known of some quantized files, as one document, one HTML file, one model card.

    find runs and their original → how they fit this machine → the page with the document inside

The live dashboard and the exported report show the same document; an exported one says nothing of where
files lie.

A page or a card that carries Dither's mark may be replaced, since it can be made again; any other file stays
unless it is forced, and the models that are shown stay in any case.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dither._version import __version__
from dither.capacity.constants import constants
from dither.capacity.fit import fit as fit_model
from dither.capacity.machine import Machine
from dither.capacity.result import Candidate, Fit
from dither.capacity.speed import active_bytes
from dither.errors import DitherError, OutputError, SourceError, UsageError
from dither.formats.tensor_names import is_expert_stack
from dither.models.source import open_headers
from dither.progress import Progress, Silent
from dither.reporting import charts, discover, frontier
from dither.reporting.card import MARK as CARD_MARK, PICTURE, card as model_card
from dither.reporting.document import Document, FitInput, Problem, RunRecord, Weights, WeightsQuality, now
from dither.reporting.glossary import glossary
from dither.reporting.guide import guide
from dither.reporting.notebook import Runs
from dither.reporting.recorded import recorded
from dither.reporting.runs import facts_of
from dither.reporting.single_file import assemble
from dither.reporting.tensors import with_errors
from dither.system.files import replace
from dither.system.text import shown

if TYPE_CHECKING:
    from pydantic import JsonValue

PAGE_MARK = 'id="dither-document"'  # in every page of ours
_LOOKED_AT = 64 * 2**20  # bytes; the mark of a page stands behind its style
_ELSEWHERE = "Choose another place."
MOST_COMPARED = 10**9  # weights; of models up to here, errors that no file keeps are counted for the report


@dataclass(frozen=True)
class Report:
    """What was written: the page, and the card with its picture where they were asked for."""

    path: str
    bytes: int
    card: str | None
    picture: str | None
    document: Document

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "bytes": self.bytes,
            "card": self.card,
            "picture": self.picture,
            "title": self.document.title,
            "runs": [run.file for run in self.document.runs],
            "frontier": [point["id"] for point in frontier.points(self.document.runs) if point["pareto"]],
            "problems": [problem.model_dump() for problem in self.document.problems],
        }


def report(
    runs: str | Path | Iterable[str | Path],
    out: str | Path = "report.html",
    *,
    card: str | Path | None = None,
    against: str | Path | None = None,
    title: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes everything known of `runs` (files, folders, measurements) as one HTML file that opens offline.

    `card` is where a model card goes (README.md), with the frontier's picture beside it.  `against` is the
    original, looked for beside the files by its name otherwise; where it is found, tiles of some tensors are
    recorded, and errors that files do not keep are counted.  A report or card of Dither's is replaced, any
    other file only with `force`.

    Raises SourceError where there is no run at all, OutputError where something cannot be written.
    """
    tell = (progress or Silent()).note
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    page, readme = Path(out).expanduser(), None if card is None else Path(card).expanduser()
    made = document(paths, against=against, title=title, compare=True)
    for problem in made.problems:
        tell(f"{problem.file}: {problem.reason}")
    if not made.runs:
        if len(paths) == 1 and Path(paths[0]).suffix == ".gguf" and Path(paths[0]).is_file():
            facts_of(Path(paths[0]))  # what is wrong with the one file is told with its own way out
        nothing = str(paths[0]) if paths else "dither report", "holds no quantized files"
        thing, reason = next(((problem.file, problem.reason) for problem in made.problems), nothing)
        raise SourceError(thing, reason, "Name files or folders that `dither quantize` wrote.")
    _check_writable(page, PAGE_MARK, made, force)
    if readme is not None:
        _check_writable(readme, CARD_MARK, made, force)
    shown_runs = made.exported()
    html = assemble(recorded(made, shown_runs).to_json()).encode()
    replace(page, html, _ELSEWHERE)
    picture = None
    if readme is not None:
        if len(frontier.points(shown_runs.runs)) > 1:  # else there is nothing to draw
            picture = readme.with_name(PICTURE)
            replace(picture, charts.png(frontier.chart(shown_runs.runs)), _ELSEWHERE)
        replace(readme, model_card(shown_runs, picture.name if picture else None).encode(), _ELSEWHERE)
    kept, drawn = (None if path is None else str(path) for path in (readme, picture))
    return Report(str(page), len(html), kept, drawn, shown_runs)


def _check_writable(path: Path, mark: str, made: Document, force: bool) -> None:
    """Raises UsageError or OutputError where `path` is not to be written."""
    models = [run.path for run in made.runs] + [made.reference and made.reference.path]
    if any(model and path.absolute() == Path(model) for model in models):
        raise UsageError(str(path), "is one of the files that are shown", "Choose another name.")
    if path.is_dir():
        raise OutputError(str(path), "is a folder", "Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(str(path.parent), "is no folder", "Make it first, or choose another place.")
    if path.exists() and not force and not _holds(path, mark):
        raise OutputError(str(path), "exists and was not written by Dither", "Choose another name, or pass --force.")


def _holds(path: Path, mark: str) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return mark.encode() in file.read(_LOOKED_AT)
    return False


def runs(paths: str | Path | Iterable[str | Path], *, against: str | Path | None = None) -> Runs:
    """What is known of quantized files under `paths` (files, folders, measurements), read from headers alone.

    `against` is the original, looked for beside the files otherwise.  What cannot be read is among the
    document's problems.
    """
    named = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return Runs(document(named, against=against, fit=False))


def document(
    paths: Iterable[str | Path],
    *,
    against: str | Path | None = None,
    title: str | None = None,
    live: bool = False,
    machine: Machine | None = None,
    compare: bool = False,
    fit: bool = True,
) -> Document:
    """All that is known of the runs under `paths` (files, folders, measurements); reads headers alone.

    `against` is the original, looked for beside the files where it is not named.  With `compare`, relative
    errors that files do not keep are counted against the original, which reads weights.  Without `fit`
    this machine is left out.  What cannot be read is among the document's problems.
    """
    found = discover.find(paths, against)
    if compare and found.reference is not None and found.reference.path is not None:
        found.runs = [_compared(run, found.reference.path) for run in found.runs]
    judged, problems = _fit_input(found, machine) if fit else (None, [])
    return Document(
        tool=f"dither {__version__}",
        made=now(),
        live=live,
        title=shown(title or _title(found), 400),
        reference=found.reference,
        runs=tuple(found.runs),
        frontier=frontier.shipped(found.runs),
        fit=judged,
        guide=guide(),
        speed=tuple(run.timed for run in found.runs if run.timed is not None),
        glossary=cast("JsonValue", glossary()),
        problems=(*found.problems, *problems),
    )


def _title(found: discover.Discovered) -> str:
    names = [found.reference.name] if found.reference else []
    names += [run.reference for run in found.runs if run.reference]
    return next(iter([*names, *(run.file for run in found.runs)]), "No files yet")


def _compared(run: RunRecord, original: str) -> RunRecord:
    """A run whose file keeps no errors, with those counted against the original."""
    missing = any(row.relative_error is None for row in run.tensors)
    if run.path is None or not missing or run.parameters > MOST_COMPARED:
        return run
    try:
        with open_headers(Path(run.path)) as found, open_headers(Path(original)) as other:
            return run.model_copy(update={"tensors": with_errors(run.tensors, found[0], other[0])})
    except DitherError as error:
        note = f"Its errors could not be counted: {shown(str(error), 1000)}"
        return run.model_copy(update={"notes": (*run.notes, note)})


def _fit_input(found: discover.Discovered, machine: Machine | None) -> tuple[FitInput | None, list[Problem]]:
    """What the page needs to judge the files, and the types that could be made, on this machine."""
    paths = [found.reference.path if found.reference else None, *(run.path for run in found.runs[:1])]
    path = next(filter(None, paths), None)
    if path is None:
        return None, []
    try:
        return fit_input(fit_model(path, machine=machine), found.runs), []
    except DitherError as error:
        return None, [Problem(file=shown(path, 1000), reason=shown(error.reason, 2000))]


def fit_input(judged: Fit, runs: Iterable[RunRecord] = ()) -> FitInput:
    """A fit as the page's arithmetic takes it: no verdicts, but all that they are computed from.  The files that
    llama.cpp runs stand for their types."""
    own = [_of_run(run, judged.shape.experts_used) for run in runs if run.container == "gguf" and run.tensors]
    known = {weights.type for weights in own}
    made = [_of_candidate(each) for each in judged.candidates if each.file is None and each.type not in known]
    shape = asdict(judged.shape)
    return FitInput(
        machine=judged.to_json()["machine"],
        model=shown(judged.model, 1000),
        architecture=judged.arch,
        parameters=judged.parameters,
        shape={**shape, "layers": list(shape["layers"])},
        weights=(*own, *made),
        notes=tuple(shown(note, 1000) for note in judged.notes),
        defaults={"context": judged.context, "kv": judged.kv, "slots": judged.slots},
        constants=constants(),
    )


def _of_run(run: RunRecord, experts_used: int) -> Weights:
    kl = run.metrics.get("kl_mean")
    source = f"{run.file}, on {run.measured_on.data}" if run.measured_on else ""
    sizes = [(row.name, row.bytes) for row in run.tensors]
    matrices = dict(sizes)
    experts = max((row.shape[0] for row in run.tensors if is_expert_stack(row.name) and row.shape), default=0)
    return Weights(
        type=run.type,
        run=run.id,
        file=True,
        bytes=run.tensor_bytes,
        bpw=run.bpw,
        active=active_bytes(sizes, experts, experts_used),
        embedding=matrices.get("token_embd.weight", 0) if "output.weight" in matrices else 0,
        quality=None if kl is None else WeightsQuality(kl=kl.value, tag=kl.tag, source=source),
    )


def _of_candidate(candidate: Candidate) -> Weights:
    quality = candidate.quality
    return Weights(
        type=candidate.type,
        bytes=candidate.memory.weights,
        bpw=candidate.bits_per_weight,
        active=candidate.active,
        embedding=candidate.embedding,
        needs_importance=candidate.needs_importance,
        quality=None if quality is None else WeightsQuality.model_validate(quality, from_attributes=True),
        notes=tuple(shown(note, 1000) for note in candidate.notes),
    )
