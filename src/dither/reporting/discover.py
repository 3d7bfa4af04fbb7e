"""Finding runs: quantized files, their measurements, the original they were made of, evidence of plans.

    model.gguf, part 1 of a split one        a run
    folder/ with config.json and weights     a run where the weights are quantized, else an original
    folder/                                  all of these in it, and in its folders
    x.measure.json                           of the file beside it; a run of its own where that is gone
    x.gguf without a measurement             a run of weights alone

Files may come from strangers: nothing is executed, sizes are held against limits before anything is read,
and what cannot be read becomes a *problem*, a line of text, and stops nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from dither.errors import DitherError
from dither.formats.evidence import MANIFEST, EvidenceStore
from dither.formats.sidecars import first_fault
from dither.measuring import schema
from dither.models.checkpoint import INDEX
from dither.models.gguf_source import PART
from dither.planning.costs import Costs
from dither.reporting import recipes
from dither.reporting.choice import prepared
from dither.reporting.document import MOST_RUNS, Problem, Reference, RunRecord
from dither.reporting.runs import Facts, facts_of, run_of, run_of_measurement
from dither.reporting.tensors import with_costs
from dither.system.text import shown

DEPTH = 2  # folders below a named one that are looked into
MOST_ENTRIES = 4096  # of a folder that are looked at
_MOST_COSTS = 64 * 2**20  # bytes of what a plan keeps


@dataclass
class Discovered:
    """What there is.  `originals` are models that are not quantized, `evidence` folders of calibrations."""

    runs: list[RunRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    reference: Reference | None = None
    originals: list[Facts] = field(default_factory=list)
    evidence: list[Path] = field(default_factory=list)

    def refuse(self, path: Path | str, reason: str) -> None:
        self.problems.append(Problem(file=shown(str(path), 1000), reason=shown(reason, 2000)))


def find(paths: Iterable[str | Path], against: str | Path | None = None) -> Discovered:
    """All there is under `paths`.  `against` names the original, which is looked for beside the files
    otherwise, by the name that measurements and recipes give it.  Raises nothing for what it finds."""
    found = Discovered()
    named = [Path(path).expanduser() for path in paths]
    places: dict[Path, None] = {}
    for path in named:
        try:
            path.stat()
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            found.refuse(path, "no such file or folder" if missing else f"cannot be looked at ({error})")
            continue
        places |= dict.fromkeys(place.absolute() for place in _places(path, found))
    facts = _read(places, found)
    found.runs.sort(key=lambda run: (-run.bytes, run.file))
    if len(found.runs) > MOST_RUNS:
        found.refuse(named[0], f"{len(found.runs)} runs, of which the largest {MOST_RUNS} are shown")
        del found.runs[MOST_RUNS:]
    found.reference = _reference(found, facts, places, against)
    _add_costs(found, facts)
    found.runs = prepared(found.runs)
    return found


def _places(path: Path, found: Discovered, depth: int = DEPTH) -> Iterator[Path]:
    """Files and model folders that may be runs, or their measurements."""
    try:
        if path.is_file():
            yield from _of_file(path, found)
            return
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        found.refuse(path, f"cannot be read ({error.strerror})")
        return
    if len(entries) > MOST_ENTRIES:
        found.refuse(path, f"holds {len(entries)} entries, of which {MOST_ENTRIES} are looked at")
        del entries[MOST_ENTRIES:]
    if (path / MANIFEST).is_file():
        found.evidence.append(path)
        return
    if _is_checkpoint(path):
        yield path
    for entry in entries:
        if entry.is_dir():
            if depth and not entry.is_symlink() and not entry.name.endswith(".part"):
                yield from _places(entry, found, depth - 1)
        elif entry.name.endswith((".gguf", schema.SUFFIX)):
            yield from _of_file(entry, found)


def _of_file(path: Path, found: Discovered) -> Iterator[Path]:
    if path.suffix == ".safetensors":
        yield path.parent
    elif path.name.endswith(schema.SUFFIX):
        owner = path.with_name(path.name.removesuffix(schema.SUFFIX))
        yield owner if owner.exists() else path
    elif path.suffix == ".gguf":
        part = PART.fullmatch(path.name)
        if part and int(part[2]) != 1:
            path = path.with_name(f"{part[1]}-00001-of-{part[3]}.gguf")
        yield path
    else:
        found.refuse(path, "is neither a GGUF, a folder of safetensors nor a measurement")


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file() and ((path / INDEX).is_file() or any(path.glob("*.safetensors")))


def _read(places: Iterable[Path], found: Discovered) -> dict[str, Facts]:
    """Fills in runs and originals; run's id → its facts."""
    known: dict[str, Facts] = {}
    for place in places:
        try:
            if place.name.endswith(schema.SUFFIX):
                found.runs.append(run_of_measurement(schema.load(place), place))
                continue
            facts = facts_of(place)
            run, problems = run_of(facts)
        except (DitherError, OSError, ValueError, ArithmeticError) as error:
            found.refuse(place, _reason(error))
            continue
        for problem in problems:
            found.refuse(problem.thing, problem.reason)
        if facts.quantized or run.metrics:
            found.runs.append(run)
            known[run.id] = facts
        else:
            found.originals.append(facts)
    return known


def _reason(error: Exception) -> str:
    if isinstance(error, DitherError):
        return error.reason
    if isinstance(error, ValidationError):
        return first_fault(error)
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) and error.strerror else str(error)


def _reference(
    found: Discovered, facts: dict[str, Facts], places: Iterable[Path], against: str | Path | None
) -> Reference | None:
    if against is not None:
        path = Path(against).expanduser()
        try:
            return _described(facts_of(path), path.absolute())
        except (DitherError, OSError) as error:
            found.refuse(path, _reason(error))
            return None
    names = dict.fromkeys(run.reference for run in found.runs if run.reference)
    names |= dict.fromkeys(source for f in facts.values() if (source := recipes.source_of(f.recipe)))
    sizes = {run.parameters for run in found.runs}
    nearby = [*found.originals, *_beside(names, places)]
    fitting = [original for original in nearby if original.parameters in sizes or not sizes]
    by_name = [original for original in fitting if original.path.name in names or original.name in names]
    best = next(iter(by_name or fitting), None)
    return None if best is None else _described(best, best.path)


def _beside(names: Iterable[str | None], places: Iterable[Path]) -> Iterator[Facts]:
    """Originals of these names in the folders of the files, and one above."""
    folders = dict.fromkeys(folder for place in places for folder in list(place.parents)[:2])
    for name in names:
        if not name or Path(name).name != name or name in (".", ".."):
            continue  # a name, not a way to somewhere
        for folder in folders:
            for path in (folder / name, folder / f"{name}.gguf"):
                with suppress(DitherError, OSError):
                    if (path.is_file() or _is_checkpoint(path)) and not (facts := facts_of(path.absolute())).quantized:
                        yield facts


def _described(facts: Facts, path: Path) -> Reference:
    return Reference(
        name=path.name,
        architecture=facts.arch,
        parameters=facts.parameters,
        bytes=facts.bytes,
        bits_per_weight=8 * facts.tensor_bytes / max(1, facts.parameters),
        path=str(path),
        license=facts.license,
    )


def _add_costs(found: Discovered, facts: dict[str, Facts]) -> None:
    """What plans measured of single tensors, where the evidence is the run's or a model's of its name."""
    known = [(store, costs) for path in found.evidence for store, costs in _costs(path, found)]
    for at, run in enumerate(found.runs):
        if run.id not in facts:
            continue
        recipe = facts[run.id].recipe
        sha256, names = recipes.evidence_sha256(recipe), {run.reference, recipes.source_of(recipe)}
        for store, costs in sorted(known, key=lambda pair: pair[0].sha256 != sha256):
            if store.sha256 == sha256 or store.manifest.get("model") in names:
                found.runs[at] = run.model_copy(update={"tensors": with_costs(run.tensors, costs)})
                break


def _costs(path: Path, found: Discovered) -> Sequence[tuple[EvidenceStore, Costs]]:
    """An evidence folder and the newest costs in it; ordinary files alone: reading a pipe would wait for ever."""
    named = path.glob("sensitivity.*.json")
    kept = [file for file in named if file.is_file() and file.stat().st_size <= _MOST_COSTS]
    if not kept:
        return ()
    try:
        store = EvidenceStore.open(path)
    except DitherError as error:
        found.refuse(path, error.reason)
        return ()
    costs = Costs.open(max(kept, key=lambda file: file.stat().st_mtime_ns))
    return [(store, costs)] if costs.divergence else ()
