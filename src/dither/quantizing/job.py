"""One file's making, from an opened model to a name on the disk.

    evidence → transforms → mix of types → one pass over the tensors (`quantizing.tensor_pass`) → measure → rename

Nothing holds more than a few chunks of rows without a Hessian, or one layer and its Hessian with one.
The relative error of each tensor is counted on the way, from the numbers that a decoder would read; the
KL divergence, where it is asked for, from the file as it stands before it gets its name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dither.containers.card import card
from dither.containers.importance import check_evidence, evidence_notes
from dither.containers.mix import Mix, Options, check_patterns
from dither.containers.part_output import PartOutput
from dither.containers.provenance import ERRORS, MEASUREMENT, method_of, name_note, recipe_json, source_notes
from dither.containers.target import OutputSettings, Target
from dither.containers.targets import target_of
from dither.engines import check as engines
from dither.engines.check import Checked
from dither.errors import DitherError, OutputError, UnreadableError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.models.arch import feeds
from dither.models.source import open_model
from dither.quantizing import working_memory
from dither.quantizing.act_order import ActOrder
from dither.quantizing.carried import carried_notes
from dither.quantizing.paths import output_path
from dither.quantizing.request import Making, Running, choose_solver, choose_transforms, open_evidence
from dither.quantizing.result import Result, solver_counts, tensor_notes, total_error
from dither.quantizing.rewriting import Rewritten, rewrite
from dither.quantizing.tensor_pass import TensorPass, no_evidence, prepare
from dither.transforms import find_transform
from dither.types import BlockSolver, EvidenceSource, Model, Solved, Solver

if TYPE_CHECKING:
    from dither.measuring.schema import Measurement

STATISTICS = ("parallel", "sequential")


def make(source: Model, options: Options, making: Making, running: Running, out: str | Path | None) -> Result:
    """`source` with the types of `options`, at `out` or under its own name in the current folder.

    Raises UsageError, SourceError and OutputError as `dither.quantize` does.
    """
    target = target_of(options, source)
    store = open_evidence(making.evidence)
    making = replace(making, transforms=choose_transforms(making.transforms, options, store))
    job = _Job(source, target, making, running, store, choose_solver(making.solver, store, running.threads))
    job.check()
    inputs = [*map(Path, source.files), *([store.path] if store else [])]
    return job.write(output_path(source, target, out, running.force, inputs))


@dataclass
class _Job:
    """What is known before the first byte, and what there was to say."""

    source: Model
    target: Target
    making: Making
    running: Running
    store: EvidenceStore | None
    solver: Solver
    notes: list[str] = field(default_factory=list)
    not_counted: float = 0.0  # seconds
    started: float = field(default_factory=time.monotonic)
    engine: str = ""  # that loads the file once, where that is asked for

    @property
    def transforms(self) -> Sequence[str]:
        return self.making.transforms or ()

    @property
    def sequential(self) -> bool:
        return self.making.statistics == "sequential"

    @property
    def by_blocks(self) -> bool:
        return "block" in self.solver.needs

    def say(self, *notes: str) -> None:
        for note in notes:
            self.running.progress.note(note)
            self.notes.append(note)

    @contextmanager
    def _not_counting(self) -> Iterator[None]:
        """What compiling and measuring take is no part of the seconds that quantizing takes."""
        started = time.monotonic()
        yield
        self.not_counted += time.monotonic() - started

    def check(self) -> None:
        """Whatever can be refused before weights are read."""
        making, statistics = self.making, self.making.statistics
        if making.check:
            self.engine = engines.choose(*self.target.engines(self.source))
        self.say(*self.source.notes, *carried_notes(self.source, is_folder=self.target.options.folder))
        with self._not_counting():
            self.say(*self.target.check_network(self.source))
        if self.store:
            self.say(*self.store.check(self.source), *self.store.notes)
        if statistics not in (None, *STATISTICS):
            raise UsageError(f"--statistics {statistics}", f"is not one of {', '.join(STATISTICS)}")
        has_text = self.store is not None and self.store.matrix is None
        if self.sequential and not (has_text and "hessian" in self.solver.needs):
            reason = "is for solvers that use Hessians, with their calibration text"
            way_out = "Pass --solver gptq and --evidence FOLDER of `dither calibrate`."
            raise UsageError("--statistics sequential", reason, way_out)
        if making.measure is True and not has_text:
            reason = "has no held-back text: there is no evidence folder"
            raise UsageError("--measure", reason, "Name a text with --measure-data FILE, or pass --evidence FOLDER.")
        if self.target.options.act_order and (self.store is None or self.sequential or self.by_blocks):
            reason = "needs evidence, and a solver that takes one matrix at a time"
            way_out = "Pass --evidence FOLDER, and neither --statistics sequential nor --solver learned."
            raise UsageError("--act-order", reason, way_out)
        for name in self.transforms if self.store is None else ():
            if find_transform(name, feeds(self.source.arch)).needs:
                way_out = "Pass --evidence FOLDER of `dither calibrate`."
                raise UsageError(f"--transform {name}", "needs evidence", way_out)
        if self.sequential or self.by_blocks or making.measure:
            from dither.models.blocks import open_blocks

            open_blocks(self.source, device=self.running.device)  # what cannot run is an error now, not hours later

    def write(self, path: Path) -> Result:
        rewritten = self._rewritten()
        if self.running.max_memory is not None:
            self.running = self._within(self.running.max_memory, rewritten)
        mix, options = rewritten.mix, self.target.options
        solver, record = self.solver.name, rewritten.record
        recipe = recipe_json(self.source, options, mix, self.store, solver, record, self.sequential)
        self.say(*filter(None, [name_note(json.loads(recipe))]))
        identity = json.dumps([self.source.fingerprint, recipe, [asdict(tensor) for tensor in mix.tensors]])
        order = None
        if options.act_order:
            by_size = ActOrder(rewritten.evidence, {t.name for t in mix.tensors if t.type not in FLOAT_TYPES})
            model = by_size.model(rewritten.model)
            rewritten, order = replace(rewritten, model=model, evidence=by_size.evidence), by_size.order
        settings = OutputSettings(recipe, identity, self.store, bool(self.making.measure), order)
        with self.target.open(path, rewritten.model, mix, settings) as output:
            return self._fill(output, path, rewritten, recipe)

    def _rewritten(self) -> Rewritten:
        """The model behind its transforms, with the mix of types that is to be written."""
        evidence: EvidenceSource = no_evidence if self.store is None else self.store
        known = self.store.tensors if self.store else ()
        transforms = self.transforms
        first = (self._mix_so_far if transforms else self.target.mix)(self.source, known)
        self.say(*source_notes(self.source, first))
        with self._not_counting():
            prepare({tensor.type for tensor in first.tensors}, self.store is not None, self.running.progress)
        found = rewrite(self.source, evidence, known, transforms, first, self._mix_so_far, self.running.threads)
        self.target.check(found.model)
        if transforms:
            check_patterns(found.model, self.target.options)  # all that a plan names is there by now
        check_evidence(found.mix, self.store)
        self.say(*found.notes, *found.mix.notes(), *evidence_notes(found.mix, self.store))
        return found

    def _within(self, limit: int, rewritten: Rewritten) -> Running:
        """How to run so that no more memory is held.  Raises UsageError where there is no such way."""
        with self._not_counting():
            working_memory.warm(self.solver, {tensor.type for tensor in rewritten.mix.tensors})
        text = self.store.tokens()[0].size if self.store and (self.sequential or self.by_blocks) else 0
        if self.making.measure:
            from dither.measuring.embedded import TOKENS

            text = max(text, TOKENS)
        model, mix = rewritten.model, rewritten.mix
        found = working_memory.fitted(limit, self.running, mix, model, self.solver, self.store, text)
        if found.threads < self.running.threads:
            self.say(f"--max-memory leaves room for {found.threads} of {self.running.threads} threads.")
        return found

    def _mix_so_far(self, model: Model, known: Collection[str]) -> Mix:
        """While transforms are at work: a plan may name tensors that they are yet to add."""
        options = self.target.options
        if options.plan:
            names = [tensor.name for tensor in model.tensors]
            there = [pair for pair in options.tensors if any(re.search(pair[0], name) for name in names)]
            options = replace(options, tensors=tuple(there))
        return target_of(options, self.source).mix(model, known)

    def _fill(self, output: PartOutput, path: Path, rewritten: Rewritten, recipe: str) -> Result:
        resumed, mix, tell = len(output.finished), rewritten.mix, self.running.progress.note
        if resumed:
            tell(f"Resuming: {resumed} of {len(mix.tensors)} tensors were already written.")
        elif output.discarded:
            tell("An unfinished file was discarded: its recipe or its model was another, or its journal is damaged.")
        work = TensorPass(
            rewritten.model, mix, rewritten.evidence, output, self.solver, self.running, self._hessians(rewritten)
        )
        if self.sequential or self.by_blocks:
            self._enliven(work, rewritten, output)
        try:
            work.all()
        except (OutputError, UnreadableError):  # what was made is good, and the same command goes on with it
            raise
        except DitherError:  # the weights themselves: no later run could continue this one
            output.discard()
            raise
        records = {name: dict(record) for name, record in output.finished.items()}
        self.say(*tensor_notes(mix, records))
        output.keep_errors(ERRORS, {t.name: records[t.name]["relative_error"] for t in mix.tensors})
        measurement = self._measure(output, path) if self.making.measure else None
        output.describe(card(self.source, self.target.options, mix, recipe, output.total, measurement))
        self.target.check_written(output.part)
        checked = self._load(output) if self.engine else None
        output.commit()
        return Result(
            path=str(path),
            mix=mix,
            bytes=output.total,
            seconds=time.monotonic() - self.started - self.not_counted,
            relative_error=total_error(mix, records),
            tensors=records,
            resumed=resumed,
            notes=tuple(self.notes),
            method=method_of(json.loads(recipe)),
            solver=self.solver.name,
            solvers=solver_counts(records),
            transforms=rewritten.record,
            measurement=measurement,
            checked=checked,
        )

    def _load(self, output: PartOutput) -> Checked:
        """Raises EngineError where the engine does not run the file, which is then kept without a name."""
        self.running.progress.advance(0, f"loading it in {self.engine}")
        with self._not_counting():
            return engines.check(self.engine, output.part, self.running.threads)

    def _hessians(self, rewritten: Rewritten) -> frozenset[str]:
        """Tensors that may have a Hessian: those of the evidence, and what a transform added."""
        if self.store is None or not self.store.has_hessians:
            return frozenset()
        before, after = ({t.name for t in m.tensors} for m in (self.source, rewritten.model))
        return frozenset({*self.store.tensors, *(after - before)})

    def _enliven(self, work: TensorPass, rewritten: Rewritten, output: PartOutput) -> None:
        """Lets the calibration text follow the pass through the blocks it has written."""
        from dither.measuring.live import BlockTasks, LiveEvidence, Passage
        from dither.models.blocks import open_blocks

        assert self.store is not None
        blocks, text = open_blocks(rewritten.model, device=self.running.device), self.store.tokens()
        behind = Passage(blocks, *text, lambda: open_model(output.part))
        if self.sequential:
            work.evidence = LiveEvidence(behind, rewritten.evidence, work.hessians, work.written, self.store.sha256)
        if self.by_blocks:
            solver = cast(BlockSolver, self.solver)
            tasks = BlockTasks(behind, Passage(blocks, *text, None), rewritten.evidence)

            def refine(number: int, *found: Any) -> Mapping[str, Solved]:
                def step(done: int, _loss: float) -> None:
                    self.running.progress.advance(0, f"block {number}, step {done} of {solver.steps}")

                return solver.refine(tasks(number, *found), step)

            work.refine = refine

    def _measure(self, output: PartOutput, path: Path) -> Measurement:
        from dither.measuring.embedded import measure_written

        data = None if self.making.measure is True else str(self.making.measure)
        device, progress = self.running.device, self.running.progress
        with self._not_counting():
            part = open_model(output.part)
            found = measure_written(self.source, part, path, self.store, data, device=device, progress=progress)
            self.say(*found.measurement.notes)
            if not output.fill(MEASUREMENT, found.embedded):
                self.say("The measurement is too long for the file's metadata: it stands in its JSON file alone.")
            found.save()
        return found.measurement
