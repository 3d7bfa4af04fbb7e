"""Within a budget: plan, quantize, measure, and see whether the plan was worth it, in one go.

A plan is a prediction, so the file it made is held against others of its size (`planning.rivals`).  A budget
on the divergence is met as measured: where the prediction was too hopeful, a larger file is planned.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.containers.journal import unfinished
from dither.containers.target import Target
from dither.errors import OutputError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.models.source import opened
from dither.planning.plan import Planned, plan_for, planned_target
from dither.planning.reach import Budget
from dither.planning.rivals import PLANNED, Rival, excess, hold_against, remove
from dither.quantizing.paths import output_path
from dither.quantizing.quantize import Result, make_by_plan
from dither.quantizing.request import Keywords, Making, Running, open_evidence, records, with_keywords
from dither.system.files import replace as replace_file
from dither.types import Model
from dither.units import format_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROUNDS = 3  # of coming closer to what was asked for
_CAUTION = 0.97  # of the divergence that is aimed at, so that rounds come to an end


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


@with_keywords
def quantize_within(
    model: str | Path | Model,
    wanted: Budget,
    out: str | Path | None = None,
    *,
    to: str | None = None,
    group: int | None = None,
    sym: bool | None = None,
    validate: bool = True,
    check: bool = False,
    **how: Unpack[Keywords],
) -> Within:
    """The best file of `model` within a budget (`dither.budget`), measured.

    A GGUF, or with `to` a folder of a GPU format that mixes types (see `dither.plan`).

    With `validate` (the default) the nearest preset and a random allocation of at most the same size are made
    too, and the best of the three is kept; `notes` say so where that is not the plan.  A budget on the
    divergence is met as measured: where the prediction was too hopeful, a larger file is planned.  `check` loads
    every file for one token in its engine, as `quantize` does.

    Raises what `plan` and `quantize` raise; OutputError before any work where the output exists.
    """
    making, running = records(quantize_within, how)
    started, source = time.monotonic(), opened(model)
    target = planned_target(source, to, group, sym)
    inputs = [Path(file) for file in source.files]
    place = output_path(source, target, out, True, inputs, label(wanted))
    judging = _Judging(place)
    if judging.was_interrupted:
        running = replace(running, force=True)
    force = running.force
    place = output_path(source, target, out, force, inputs, label(wanted))
    beside = place.with_name(place.name.removesuffix(".gguf") + ".toml")
    if beside.exists() and not force and not any(path.exists() for path in unfinished(place)):
        raise OutputError(str(beside), "exists already", "Choose another name with -o, or pass --force.")
    work = _Work(source, wanted, target, replace(making, check=check), running, place, beside)
    work.fit()
    if wanted.max_kl is not None:
        work.come_closer(wanted.max_kl)
    result, planned = work.result, work.planned
    rivals: tuple[Rival, ...] = ()
    winner = PLANNED
    if validate:
        with judging:
            result, rivals, winner = hold_against(source, wanted, target, planned, result, work.measured, running)
    if winner != PLANNED:
        work.notes.append(f"The plan lost to the {winner} on text kept for judging, which was written instead.")
        planned = replace(planned, path=str(beside) if beside.exists() else None)
    for note in work.notes:
        running.progress.note(note)
    return Within(result, planned, rivals, winner, time.monotonic() - started, (*result.notes, *work.notes))


class _Judging:
    """While a finished file is held against others, a mark beside it says so: an interrupted run finds its own file
    under the name that it wants, and would be refused.  The mark names that very file and no other."""

    def __init__(self, place: Path) -> None:
        self._place, self._mark = place, place.with_name(place.name + ".judging")

    def _state(self) -> str:
        found = self._place.stat()
        return f"{found.st_ino} {found.st_mtime_ns}"

    @property
    def was_interrupted(self) -> bool:
        with suppress(OSError):
            return self._mark.read_text() == self._state()
        return False

    def __enter__(self) -> None:
        replace_file(self._mark, self._state().encode(), "Free some space and run it again.")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._mark.unlink(missing_ok=True)


class _Work:
    """A plan and its file, made again where the file is not what the plan promised."""

    def __init__(
        self, source: Model, wanted: Budget, target: Target, making: Making, running: Running, place: Path, beside: Path
    ) -> None:
        self.source, self.wanted, self.target = source, wanted, target
        self.making, self.running, self.place, self.beside = making, running, place, beside
        self.notes: list[str] = []
        self.planned = self._plan(wanted)
        given = making.evidence
        store = given if isinstance(given, EvidenceStore) else open_evidence(self.planned.evidence)
        self.measured = Making(store, measure=True, check=making.check)  # solver and transforms are the plan's
        self.result = self._write()

    def _plan(self, wanted: Budget) -> Planned:
        return plan_for(self.source, wanted, self.target, self.making, replace(self.running, force=True), self.beside)

    def _write(self) -> Result:
        return make_by_plan(self.source, self.planned.plan, self.measured, self.running, self.place)

    def _again(self, wanted: Budget) -> None:
        """Another plan in the place of the last.  Where there is none, what stands there stays."""
        self.planned = self._plan(wanted)
        remove(Path(self.result.path))
        self.result = self._write()

    def fit(self) -> None:
        """What transforms add, tensors and records of theirs, is seen in the file alone: a smaller plan makes
        up for it."""
        for _ in range(ROUNDS):
            over = excess(self.wanted, self.result)
            if over <= 0:
                return
            # As a budget of tensors, whose bytes are predicted exactly, whatever else the file holds.
            self._again(replace(self.wanted, file=None, tensors=self.planned.limit - over))

    def come_closer(self, limit: float) -> None:
        """Larger files until the divergence that was asked for is the one measured."""
        aim = limit
        for _ in range(ROUNDS):
            found = self._divergence()
            if found <= limit:
                return
            # Prediction and measurement are about proportional: aim lower by as much as it was missed by.
            aim *= _CAUTION * limit / found
            try:
                self._again(replace(self.wanted, max_kl=aim))
            except UsageError:  # no types are predicted to come that close
                self.notes.append(
                    f"The divergence is {found:.4g}, above {limit:g}, and no choice of types is "
                    "predicted to lose less: allow larger ones with --types, or ask for a size."
                )
                return
        found = self._divergence()
        if found > limit:
            self.notes.append(
                f"After {ROUNDS} rounds the divergence is {found:.4g}, still above {limit:g}: "
                "ask for less, or for a size."
            )

    def _divergence(self) -> float:
        assert self.result.measurement is not None
        return self.result.measurement.kl_mean


def label(wanted: Budget) -> str:
    """What stands in a file's name.

    >>> label(Budget("", file=4 * 2**30)), label(Budget("4.5 bits per weight", tensors=9))
    ('4.00GiB', '4.5bpw')
    """
    if wanted.max_kl is not None:
        return f"kld{wanted.max_kl:g}"
    if wanted.file is not None:
        return format_bytes(wanted.file).replace(" ", "")
    # What was asked for is no size of the file, and must not read as one.
    said = wanted.said.replace(" bits per weight", "bpw").replace(" of memory for weights", "-weights")
    return said.replace(" of memory", "-memory").replace(" ", "")
