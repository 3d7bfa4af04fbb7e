"""Quantize a model: rewrite it, choose codes, write bytes, and remember what was lost.

    open → evidence → transforms → plan → one pass over the tensors (`quantizing.run`) → measure → rename

Nothing holds more than a few chunks of rows without a Hessian, or one layer and its Hessian with one.
The relative error of each tensor is counted on the way, from the numbers that a decoder would read; the
KL divergence, where it is asked for, from the file as it stands before it gets its name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.containers.card import card
from dither.containers.folders import find_scheme
from dither.containers.importance import check_evidence, evidence_notes
from dither.containers.mix import Mix, Options, check_patterns
from dither.containers.nearest_preset import nearest_preset
from dither.containers.part_output import PartOutput
from dither.containers.plan_file import PlanFile, plan_sha256, read_plan
from dither.containers.provenance import ERRORS, MEASUREMENT, recipe_json, source_notes
from dither.containers.target import OutputSettings, Target
from dither.containers.targets import target_of
from dither.errors import DitherError, OutputError, UsageError
from dither.formats.evidence import EvidenceStore, model_identity
from dither.formats.ggml import FLOAT_TYPES
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.quantizing.act_order import ActOrder
from dither.quantizing.paths import output_path
from dither.quantizing.result import Result, solver_counts, tensor_notes, total_error
from dither.quantizing.rewriting import Rewritten, rewrite
from dither.quantizing.run import Run, no_evidence, prepare
from dither.solvers import find_solver
from dither.solvers.learned import Learned
from dither.system.cores import available_cores
from dither.types import EvidenceSource, Model, Solved, Solver

if TYPE_CHECKING:
    from dither.measuring.schema import Measurement

__all__ = ["Result", "prepare", "preview", "quantize"]

STATISTICS = ("parallel", "sequential")


def preview(
    model: str | Path | Model,
    to: str,
    *,
    evidence: str | Path | EvidenceStore | None = None,
    imatrix: str | Path | None = None,
    tensors: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    bits: int | None = None,
    group: int | None = None,
    sym: bool | None = None,
    pre: str | None = None,
) -> Mix:
    """What `quantize` with the same arguments would write: every tensor's type and bytes."""
    opened = model if isinstance(model, Model) else open_model(model, pre=pre)
    options = options_of(
        to,
        tensors=tuple(tensors),
        output_type=output_type,
        embedding_type=embedding_type,
        pure=pure,
        bits=bits,
        group=group,
        sym=sym,
    )
    store = open_evidence(evidence, imatrix)
    if store:
        store.check(opened)
    plan = target_of(options, opened).mix(opened, store.tensors if store else ())
    check_evidence(plan, store)
    return plan


def quantize(
    model: str | Path | Model,
    to: str | None = None,
    out: str | Path | None = None,
    *,
    plan: str | Path | PlanFile | None = None,
    evidence: str | Path | EvidenceStore | None = None,
    imatrix: str | Path | None = None,
    solver: str | Solver | None = None,
    transforms: Sequence[str] = (),
    statistics: str | None = None,
    measure: bool | str | Path = False,
    tensors: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    bits: int | None = None,
    group: int | None = None,
    sym: bool | None = None,
    act_order: bool = False,
    dtype: str | None = None,
    pre: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Writes `model` (a folder, a hub id, a GGUF) as a GGUF of type `to` (`Q4_K_M`, `IQ4_XS`, …), or as a
    checkpoint folder of a GPU format (`gptq`, `awq`, `w4a16`, `w8a8`, `fp8`, `nf4`, `mxfp4`, …).

    `out` defaults to `<model>-<TO>.gguf`, or a folder `<model>-<to>`, in the current folder; an existing one
    is replaced only with `force`, and the model's own files never.  An interrupted run of the same work
    continues where it stopped and writes the same bytes.

    `bits`, `group` (columns that share a scale, 0 for the whole row) and `sym` (around zero, or with zero
    points) choose the grid of a GPU format that leaves a choice; `act_order` forms GPTQ's groups by what
    columns matter; `dtype` ("BF16", "F16", "F32") is what its numbers are stored as, by default what the
    model's are.

    `plan`, instead of `to`, is a plan of `dither plan`: every tensor's type, the solver and the transforms.
    `evidence` is a folder of `dither calibrate` or an importance matrix (`imatrix` is its other name).
    `solver` is "nearest", "half-quadratic", "scales", "gptq" or "learned"; None takes gptq where the evidence
    holds Hessians.  `transforms` ("awq", "rotate") are applied in order.  `statistics` says where Hessians
    come from: "parallel" takes the folder's, "sequential" learns them anew behind layers already quantized.
    `measure` adds the KL divergence against `model`, on the evidence's held-back text or on a text file.

    Raises UsageError (the request), SourceError (the model or the evidence), OutputError (the disk):
    before anything is written wherever that can be known.
    """
    started = time.monotonic()
    report = progress or Silent()
    opened = model if isinstance(model, Model) else open_model(model, pre=pre)
    if plan is not None:
        others = [tensors, output_type, embedding_type, pure, bits, group, sym is not None]
        options, solver, transforms = _planned(opened, plan, to, others, solver, transforms)
    else:
        options = options_of(
            _named(to),
            tensors=tuple(tensors),
            output_type=output_type,
            embedding_type=embedding_type,
            pure=pure,
            bits=bits,
            group=group,
            sym=sym,
            dtype=dtype,
            act_order=act_order,
        )
    target = target_of(options, opened)
    store = open_evidence(evidence, imatrix)
    threads = threads or available_cores()
    job = _Job(opened, target, store, choose_solver(solver, store, threads), threads, device, report)
    job.check(transforms, statistics, measure)
    path = output_path(opened, target, out, force, job.inputs())
    written = job.write(path, tuple(transforms), statistics, measure)
    seconds = time.monotonic() - started - job.not_counted
    return Result(
        str(path),
        written.plan,
        written.bytes,
        seconds,
        total_error(written.plan, written.records),
        written.records,
        written.resumed,
        tuple(job.notes),
        job.solver.name,
        solver_counts(written.records),
        written.transforms,
        written.measurement,
    )


def options_of(to: str, **options: Any) -> Options:
    """What is asked for, of a GGUF type or of a folder's container."""
    return Options(to, folder=find_scheme(to) is not None, **options)


def _named(to: str | None) -> str:
    if to is None:
        raise UsageError("the type", "is not said", "Name one with --to, such as Q4_K_M, or a plan with --plan.")
    return to


def _planned(
    model: Model,
    plan: str | Path | PlanFile,
    to: str | None,
    others: Sequence[object],
    solver: str | Solver | None,
    transforms: Sequence[str],
) -> tuple[Options, str | Solver | None, Sequence[str]]:
    """What a plan asks for; a solver or transforms named beside it go before its own.

    Raises UsageError where types are named twice, or the plan is another model's.
    """
    if to is not None or any(others):
        raise UsageError("--plan", "names every tensor's type already", "Edit the plan, or leave it out.")
    known = plan if isinstance(plan, PlanFile) else read_plan(plan)
    if known.model_identity and known.model_identity != model_identity(model):
        reason = f"is for {known.model}, not for {model.name}"
        raise UsageError("--plan", reason, "Make one for this model: dither plan MODEL --size …")
    sha256 = plan_sha256(known)
    if known.container:
        if find_scheme(known.container) is None:
            raise UsageError("--plan", f"is for {known.container}, which is no container here", "Plan again.")
        options = Options(known.container, known.overrides(), plan=sha256, folder=True)
    else:
        options = Options(nearest_preset(model, known.bytes), known.overrides(), plan=sha256)
    return options, solver or known.solver or None, tuple(transforms) or known.transforms


def open_evidence(
    evidence: str | Path | EvidenceStore | None, imatrix: str | Path | None = None
) -> EvidenceStore | None:
    """Raises UsageError where both names are used."""
    if evidence is not None and imatrix is not None:
        raise UsageError("--imatrix", "is another name of --evidence", "Give one of the two.")
    given = evidence if evidence is not None else imatrix
    return EvidenceStore.open(given) if isinstance(given, (str, Path)) else given


def choose_solver(wanted: str | Solver | None, store: EvidenceStore | None, threads: int) -> Solver:
    """Raises UsageError where a solver is unknown, or needs what the evidence does not hold."""
    has_hessians = store is not None and store.has_hessians
    if wanted is None:
        wanted = "gptq" if has_hessians else "nearest"
    solver = find_solver(wanted, threads) if isinstance(wanted, str) else wanted
    if "hessian" in solver.needs and not has_hessians:
        raise UsageError(
            f"solver {solver.name}",
            "needs Hessians, and there are none",
            "Learn them with `dither calibrate MODEL -o evidence`, and pass --evidence evidence.",
        )
    return solver


@dataclass(frozen=True)
class _Written:
    plan: Mix
    bytes: int
    records: dict[str, dict[str, Any]]
    resumed: int
    transforms: dict[str, Any]
    measurement: Measurement | None


@dataclass
class _Job:
    """One file's making, with what is known before its first byte."""

    opened: Model
    target: Target
    store: EvidenceStore | None
    solver: Solver
    threads: int
    device: str
    report: Progress
    notes: list[str] = field(default_factory=list)
    not_counted: float = 0.0  # seconds

    def say(self, *notes: str) -> None:
        for note in notes:
            self.report.note(note)
            self.notes.append(note)

    def inputs(self) -> list[Path]:
        return [*map(Path, self.opened.files), *([self.store.path] if self.store else [])]

    def check(self, transforms: Sequence[str], statistics: str | None, measure: bool | str | Path) -> None:
        """Whatever can be refused before weights are read."""
        self.say(*self.opened.notes)
        if self.store:
            self.say(*self.store.check(self.opened), *self.store.notes)
        if statistics not in (None, *STATISTICS):
            raise UsageError(f"--statistics {statistics}", f"is not one of {', '.join(STATISTICS)}")
        has_text = self.store is not None and self.store.matrix is None
        if statistics == "sequential" and not (has_text and "hessian" in self.solver.needs):
            raise UsageError(
                "--statistics sequential",
                "is for solvers that use Hessians, with their calibration text",
                "Pass --solver gptq and --evidence FOLDER of `dither calibrate`.",
            )
        if measure is True and not has_text:
            raise UsageError(
                "--measure",
                "has no held-back text: there is no evidence folder",
                "Name a text with --measure-data FILE, or pass --evidence FOLDER.",
            )
        if self.target.options.act_order and (
            self.store is None or statistics == "sequential" or isinstance(self.solver, Learned)
        ):
            raise UsageError(
                "--act-order",
                "needs evidence, and a solver that takes one matrix at a time",
                "Pass --evidence FOLDER, and neither --statistics sequential nor --solver learned.",
            )
        if "awq" in transforms and self.store is None:
            raise UsageError("--transform awq", "needs evidence", "Pass --evidence FOLDER of `dither calibrate`.")
        if statistics == "sequential" or measure or isinstance(self.solver, Learned):
            from dither.models.blocks import open_blocks

            open_blocks(self.opened, device=self.device)  # what cannot run is an error now, not hours later

    def write(
        self, path: Path, transforms: tuple[str, ...], statistics: str | None, measure: bool | str | Path
    ) -> _Written:
        evidence: EvidenceSource = no_evidence
        if self.store is not None:
            evidence = self.store
        known = self.store.tensors if self.store else ()
        first = (self._plan_so_far if transforms else self.target.mix)(self.opened, known)
        self.say(*source_notes(self.opened, first))
        prepare_started = time.monotonic()
        prepare({tensor.type for tensor in first.tensors}, self.store is not None, self.report)
        self.not_counted += time.monotonic() - prepare_started
        rewritten = rewrite(self.opened, evidence, known, transforms, first, self._plan_so_far, self.threads)
        plan = rewritten.plan
        if transforms:
            check_patterns(rewritten.model, self.target.options)  # all that a plan names is there by now
        check_evidence(plan, self.store)
        self.say(*rewritten.notes, *plan.notes(), *evidence_notes(plan, self.store))
        sequential = statistics == "sequential"
        recipe = recipe_json(
            self.opened, self.target.options, self.store, self.solver.name, rewritten.record, sequential
        )
        identity = json.dumps([self.opened.fingerprint, recipe, [asdict(tensor) for tensor in plan.tensors]])
        order = None
        if self.target.options.act_order:
            by_size = ActOrder(rewritten.evidence, {t.name for t in plan.tensors if t.type not in FLOAT_TYPES})
            model = by_size.model(rewritten.model)
            rewritten, order = replace(rewritten, model=model, evidence=by_size.evidence), by_size.order
        settings = OutputSettings(recipe, identity, self.store, bool(measure), order)
        with self.target.open(path, rewritten.model, plan, settings) as output:
            return self._fill(output, path, rewritten, recipe, sequential, measure)

    def _plan_so_far(self, model: Model, known: Collection[str]) -> Mix:
        """While transforms are at work: a plan may name tensors that they are yet to add."""
        options = self.target.options
        if options.plan:
            names = [tensor.name for tensor in model.tensors]
            there = [pair for pair in options.tensors if any(re.search(pair[0], name) for name in names)]
            options = replace(options, tensors=tuple(there))
        return target_of(options, self.opened).mix(model, known)

    def _fill(
        self,
        output: PartOutput,
        path: Path,
        rewritten: Rewritten,
        recipe: str,
        sequential: bool,
        measure: bool | str | Path,
    ) -> _Written:
        resumed, plan = len(output.finished), rewritten.plan
        if resumed:
            self.report.note(f"Resuming: {resumed} of {len(plan.tensors)} tensors were already written.")
        elif output.discarded:
            self.report.note("An unfinished file of another recipe, or with a damaged journal, was discarded.")
        run = Run(
            rewritten.model,
            plan,
            rewritten.evidence,
            output,
            self.solver,
            self.report,
            self.threads,
            hessians=self._hessians(rewritten),
        )
        if sequential or isinstance(self.solver, Learned):
            self._enliven(run, rewritten, output, sequential)
        try:
            run.all()
        except OutputError:
            raise
        except DitherError:  # the weights themselves: no later run could continue this one
            output.discard()
            raise
        records = {name: dict(record) for name, record in output.finished.items()}
        self.say(*tensor_notes(plan, records))
        output.keep_errors(ERRORS, {t.name: records[t.name]["relative_error"] for t in plan.tensors})
        measurement = self._measure(output, path, measure) if measure else None
        output.describe(card(self.opened, self.target.options, plan, recipe, output.total, measurement))
        output.commit()
        return _Written(plan, output.total, records, resumed, rewritten.record, measurement)

    def _hessians(self, rewritten: Rewritten) -> frozenset[str]:
        """Tensors that may have a Hessian: those of the evidence, and what a transform added."""
        if self.store is None or not self.store.has_hessians:
            return frozenset()
        before, after = ({t.name for t in m.tensors} for m in (self.opened, rewritten.model))
        return frozenset({*self.store.tensors, *(after - before)})

    def _enliven(self, run: Run, rewritten: Rewritten, output: PartOutput, sequential: bool) -> None:
        """Lets the calibration text follow the run through the blocks it has written."""
        from dither.measuring.live import BlockTasks, LiveEvidence, Passage
        from dither.models.blocks import open_blocks

        assert self.store is not None
        blocks, text = open_blocks(rewritten.model, device=self.device), self.store.tokens()
        behind = Passage(blocks, *text, lambda: open_model(output.part))
        if sequential:
            run.evidence = LiveEvidence(behind, rewritten.evidence, run.hessians, run.written, self.store.sha256)
        if isinstance(self.solver, Learned):
            solver, tasks = self.solver, BlockTasks(behind, Passage(blocks, *text, None), rewritten.evidence)

            def refine(number: int, *found: Any) -> Mapping[str, Solved]:
                def step(done: int, _loss: float) -> None:
                    self.report.advance(0, f"block {number}, step {done} of {solver.steps}")

                return solver.refine(tasks(number, *found), step)

            run.refine = refine

    def _measure(self, output: PartOutput, path: Path, data: bool | str | Path) -> Measurement:
        from dither.measuring.embedded import prove

        started = time.monotonic()
        found = prove(
            self.opened,
            open_model(output.part),
            path,
            self.store,
            None if data is True else str(data),
            device=self.device,
            progress=self.report,
        )
        self.say(*found.measurement.notes)
        if not output.fill(MEASUREMENT, found.embedded):
            self.say("The measurement is too long for the file's metadata: it stands in its JSON file alone.")
        found.save()
        self.not_counted += time.monotonic() - started
        return found.measurement
