"""Within a budget: plan, quantize, measure, and see whether the plan was worth it, in one go.

A plan is a prediction.  So the file it made is held against two others of at most its size, made with the
same evidence and solver: the nearest preset, and a random allocation of types.  All three are measured on
text that neither Hessians nor sensitivities have seen, and the best is what gets the name.

A *ladder* is several budgets of one model on the same evidence: the size-quality frontier.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dither.containers.gguf_target import ANY_GGUF
from dither.containers.journal import unfinished
from dither.containers.nearest_preset import nearest_preset
from dither.containers.plan_file import PlanFile, write_plan
from dither.containers.target import Target
from dither.errors import OutputError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.measuring.schema import Measurement, path_for
from dither.models.source import open_model
from dither.planning.knapsack import random_allocation
from dither.planning.plan import Budget, Planned, plan, planned_target
from dither.planning.sensitivity import halves
from dither.progress import Progress, Silent
from dither.quantizing.paths import output_path
from dither.quantizing.quantize import Result, preview, quantize
from dither.types import Model, No
from dither.units import format_bytes

ROUNDS = 3  # of coming closer to a divergence asked for
PLANNED = "plan"
_CAUTION = 0.97  # of the divergence that is aimed at, so that rounds come to an end


@dataclass(frozen=True)
class Rival:
    """One contestant of a validation, measured on the text kept for it."""

    name: str  # "plan", "preset Q4_K_M", "random"
    bytes: int
    kl: float

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Within:
    """A file within its budget.  Without validation there are no `rivals`; `winner` names the one kept."""

    result: Result
    planned: Planned
    rivals: tuple[Rival, ...]
    winner: str
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.result.to_json(),
            "plan": self.planned.to_json(),
            "winner": self.winner,
            "validation": [rival.to_json() for rival in self.rivals],
            "total_seconds": self.seconds,
            "notes": list(self.notes),
        }


def quantize_within(
    model: str | Path | Model,
    wanted: Budget,
    out: str | Path | None = None,
    *,
    evidence: str | Path | EvidenceStore | None = None,
    solver: str | None = None,
    transforms: Sequence[str] = (),
    types: Sequence[str] | None = None,
    to: str | None = None,
    group: int | None = None,
    sym: bool | None = None,
    validate: bool = True,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Within:
    """The best file of `model` within a budget (`dither.budget`), measured.

    A GGUF, or with `to` a folder of a GPU format that mixes types (see `dither.plan`).

    With `validate` (the default) the nearest preset and a random allocation of at most the same size are made
    too, and the best of the three is kept; `notes` say so where that is not the plan.  A budget on the
    divergence is met as measured: where the prediction was too hopeful, a larger file is planned.

    Raises what `plan` and `quantize` raise; OutputError before any work where the output exists.
    """
    started, report = time.monotonic(), progress or Silent()
    opened = model if isinstance(model, Model) else open_model(model)
    target = planned_target(opened, to, group, sym)
    place = output_path(opened, target, out, force, [Path(file) for file in opened.files], label(wanted))
    beside = place.with_name(place.name.removesuffix(".gguf") + ".toml")
    if beside.exists() and not force and not any(path.exists() for path in unfinished(place)):
        raise OutputError(str(beside), "exists already", "Choose another name with -o, or pass --force.")
    common: dict[str, Any] = {"threads": threads, "device": device, "progress": progress}

    def planned_for(budget: Budget) -> Planned:
        return plan(
            opened,
            budget,
            evidence=evidence,
            solver=solver,
            transforms=transforms,
            types=types,
            to=to,
            group=group,
            sym=sym,
            out=beside,
            force=True,
            **common,
        )

    planned = planned_for(wanted)
    store = evidence if isinstance(evidence, EvidenceStore) else EvidenceStore.open(planned.evidence)
    making = {**common, "evidence": store, "measure": True}

    def written(planned: Planned) -> Result:
        return quantize(opened, plan=planned.plan, out=place, force=force, **making)

    result = written(planned)
    notes: list[str] = []
    for _ in range(ROUNDS):  # what transforms add, tensors and records of theirs, is seen in the file alone
        over = excess(wanted, result)
        if over <= 0:
            break
        limit = planned.limit - over
        planned = planned_for(replace(wanted, file=None, tensors=limit))
        remove(Path(result.path))
        result = written(planned)
    if wanted.max_kl is not None:
        planned, result = _closer(wanted, planned, result, planned_for, notes, written)
    rivals: tuple[Rival, ...] = ()
    winner = PLANNED
    if validate:
        result, rivals, winner = _validated(opened, wanted, planned, result, store, (place, beside), target, making)
    if winner != PLANNED:
        notes.append(f"The plan lost to the {winner} on text kept for judging, which was written instead.")
        planned = replace(planned, path=str(beside) if beside.exists() else None)
    for note in notes:
        report.note(note)
    return Within(result, planned, rivals, winner, time.monotonic() - started, (*result.notes, *notes))


def excess(wanted: Budget, result: Result) -> int:
    """Bytes beyond the budget."""
    if wanted.file is not None:
        return result.bytes - wanted.file
    return 0 if wanted.tensors is None else result.plan.bytes - wanted.tensors


def label(wanted: Budget) -> str:
    """What stands in a file's name.

    >>> label(Budget("", file=4 * 2**30)), label(Budget("", max_kl=0.01))
    ('4.00GiB', 'kld0.01')
    """
    if wanted.max_kl is not None:
        return f"kld{wanted.max_kl:g}"
    return format_bytes(wanted.file or wanted.tensors or 0).replace(" ", "")


def _closer(
    wanted: Budget,
    planned: Planned,
    result: Result,
    plan_for: Callable[[Budget], Planned],
    notes: list[str],
    written: Callable[[Planned], Result],
) -> tuple[Planned, Result]:
    """Larger files until the divergence that was asked for is the one measured."""
    assert wanted.max_kl is not None
    aim = wanted.max_kl
    for _ in range(ROUNDS):
        assert result.measurement is not None
        found = result.measurement.kl_mean
        if found <= wanted.max_kl:
            return planned, result
        aim *= _CAUTION * wanted.max_kl / found
        try:
            planned = plan_for(replace(wanted, max_kl=aim))
        except UsageError:  # no types are predicted to come that close
            notes.append(
                f"The divergence is {found:.4g}, above {wanted.max_kl:g}, and no choice of types is "
                "predicted to lose less: allow larger ones with --types, or ask for a size."
            )
            return planned, result
        remove(Path(result.path))
        result = written(planned)
    assert result.measurement is not None
    if result.measurement.kl_mean > wanted.max_kl:
        notes.append(
            f"After {ROUNDS} rounds the divergence is {result.measurement.kl_mean:.4g}, still above "
            f"{wanted.max_kl:g}: ask for less, or for a size."
        )
    return planned, result


def _validated(
    model: Model,
    wanted: Budget,
    planned: Planned,
    result: Result,
    store: EvidenceStore,
    places: tuple[Path, Path],
    target: Target,
    common: dict[str, Any],
) -> tuple[Result, tuple[Rival, ...], str]:
    """The best of plan, preset and random allocation; it stands at the first of `places` afterwards, and the
    plan that made it at the second, where one did."""
    place, beside = places
    report = common["progress"] or Silent()
    report.note("Holding the plan against the nearest preset and a random choice of types.")
    common = {**common, "progress": _Unsaid(report)}
    contestants = {PLANNED: result}
    others = dict([usual(model, target, planned, store)])
    others["random allocation"] = {"plan": random_plan(planned)}
    with tempfile.TemporaryDirectory(prefix=".dither-rivals-", dir=place.parent) as folder:
        for name, what in others.items():
            inside = Path(folder) / name.partition(" ")[0]
            inside.mkdir()
            contestants[name] = quantize(model, out=inside / place.name, **what, **common)
        rivals = tuple(
            Rival(name, found.plan.bytes, judged(found.measurement, store)) for name, found in contestants.items()
        )
        able = [rival for rival in rivals if rival.name == PLANNED or excess(wanted, contestants[rival.name]) <= 0]
        winner = min(able, key=lambda rival: rival.kl).name
        if winner != PLANNED:
            kept = Path(contestants[winner].path)
            if place.is_dir():
                shutil.rmtree(place)
            kept.replace(place)
            path_for(kept).replace(path_for(place))
            if "plan" in others[winner]:
                write_plan(beside, others[winner]["plan"], force=True)
            else:
                beside.unlink()
    return replace(contestants[winner], path=str(place)), rivals, winner


def usual(model: Model, target: Target, planned: Planned, store: EvidenceStore) -> tuple[str, dict[str, Any]]:
    """What one would make in this size without a plan, by the same solver: the nearest preset, or in a folder
    one type for all matrices."""
    solving = {"solver": planned.plan.solver, "transforms": planned.plan.transforms}
    if not target.options.folder:
        preset = nearest_preset(model, planned.limit, store.tensors)
        return f"preset {preset}", {"to": preset, **solving}
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    fixed = planned.plan.bytes - sum(t.bytes for t in planned.plan.tensors.values())

    def size(kind: str) -> int:
        return fixed + sum(target.bytes_of(kind, shapes[name]) for name in planned.plan.tensors)

    kinds = [
        kind
        for kind in target.types(model, None)
        if all(not isinstance(target.can_hold(kind, shapes[name]), No) for name in planned.plan.tensors)
    ]
    fitting = [kind for kind in kinds if size(kind) <= planned.limit]
    kind = max(fitting, key=size) if fitting else min(kinds, key=size)
    tensors = {
        name: replace(t, type=kind, bytes=target.bytes_of(kind, shapes[name]), kl=None)
        for name, t in planned.plan.tensors.items()
    }
    return f"{kind} throughout", {"plan": replace(planned.plan, tensors=tensors, kl=None, bytes=size(kind))}


def remove(path: Path) -> None:
    """A file or a folder of ours, no longer wanted."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Unsaid:
    """Progress without notes: what there is to say of a rival has been said of the plan."""

    def __init__(self, progress: Progress) -> None:
        self.start, self.advance = progress.start, progress.advance

    def note(self, text: str) -> None:
        pass


def random_plan(planned: Planned, seed: int = 0) -> PlanFile:
    """Another plan of about the same size, drawn blindly."""
    drawn = random_allocation(planned.items, planned.allowed, seed)
    tensors = dict(planned.plan.tensors)
    for item, choice in zip(planned.items, drawn.chosen, strict=True):
        for name in item.tensors:
            tensors[name] = planned.prices[name][choice.type]
    return replace(planned.plan, tensors=tensors, kl=drawn.kl, bytes=planned.limit)


def judged(found: Measurement | None, store: EvidenceStore) -> float:
    """Mean divergence on the held-back sequences that no sensitivity was measured on."""
    assert found is not None
    first, second = halves(store)
    skip = len(first.lengths_S) if second is not first else 0
    kl_S, tokens_S = np.array(found.sequence_kl)[skip:], np.array(found.sequence_tokens)[skip:]
    return float(np.average(kl_S, weights=tokens_S))


@dataclass(frozen=True)
class Rung:
    """One file of a ladder."""

    wanted: str
    path: str
    bytes: int
    bits_per_weight: float
    kl: float
    kl_low: float
    kl_high: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def ladder(
    model: str | Path | Model,
    wanted: Sequence[Budget | str],
    out: str | Path | None = None,
    *,
    evidence: str | Path | EvidenceStore | None = None,
    solver: str | None = None,
    transforms: Sequence[str] = (),
    types: Sequence[str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> list[Rung]:
    """Several files of one model, each measured: a planned one for every budget, and presets by name.

    `out` is a folder (the current one).  Evidence and sensitivities are learnt once.  A rung whose file
    exists is an OutputError before any work, unless `force`.
    """
    opened = model if isinstance(model, Model) else open_model(model)
    folder = Path(out) if out is not None else Path()
    names = [rung.upper() if isinstance(rung, str) else label(rung) for rung in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("the ladder", f"has two rungs called {name}", "Leave one out.")
    for rung in wanted:
        if isinstance(rung, str):
            if evidence is None:
                raise UsageError("--to", "is measured on held-back text: it needs --evidence FOLDER")
            preview(opened, rung, evidence=evidence)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be made a folder ({error.strerror})"
        raise OutputError(str(folder), reason, "Choose another with -o.") from None
    for name in names:
        output_path(opened, ANY_GGUF, folder, force, [Path(file) for file in opened.files], name)
    common: dict[str, Any] = {
        "evidence": evidence,
        "solver": solver,
        "transforms": transforms,
        "threads": threads,
        "device": device,
        "force": force,
        "progress": progress,
    }
    found = []
    for rung in sorted(wanted, key=lambda rung: isinstance(rung, str)):  # planning learns what is missing
        began = time.monotonic()
        if isinstance(rung, Budget):
            within = quantize_within(opened, rung, folder, types=types, validate=False, **common)
            result, said = within.result, rung.said
        else:
            result, said = quantize(opened, rung, folder, measure=True, **common), rung.upper()
        assert result.measurement is not None
        kl = result.measurement
        found.append(
            Rung(
                said,
                result.path,
                result.bytes,
                result.bits_per_weight,
                kl.kl_mean,
                kl.kl_mean.low,
                kl.kl_mean.high,
                time.monotonic() - began,
            )
        )
    return sorted(found, key=lambda rung: rung.bytes)
