"""Quantize a model: read rows, choose codes, write bytes, and remember what was lost.

Nothing holds more than a few chunks of rows, whatever the model's size: weights come from a memory
map a chunk at a time, go through the solver on one of several threads, and land at their place in
the part file.  The relative error of each tensor is counted on the way, from the numbers that a
decoder would read.

Legend: R rows of a chunk, C columns, N bytes of a packed row.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dither import __version__
from dither.codecs import codec as find_codec
from dither.containers.gguf import GGUFOutput
from dither.containers.importance import gather_evidence, matrix_notes
from dither.containers.journal import unfinished
from dither.containers.presets import preset_names
from dither.containers.provenance import output_metadata, recipe_json, source_notes
from dither.containers.recipe import Options, Plan, PlannedTensor, make_plan
from dither.errors import DitherError, OutputError, SourceError
from dither.executors import local
from dither.formats.imatrix import read_imatrix
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.solvers.nearest import Nearest
from dither.types import Bytes, Evidence, Floats, Model

CHUNK_WEIGHTS = 2**18  # 1 MiB of float32 for each thread, so that a chunk stays in its core's cache
_LARGEST_F16 = 65504.0
_LOST = 0.95  # one bit per weight still keeps relative errors near 0.6


@dataclass(frozen=True)
class Result:
    """What was written, and what rounding cost.

    `seconds` is reading, encoding and writing, without compiling kernels on their first use.
    `relative_error` is √(Σ(w − ŵ)² / Σw²) over the quantized matrices; `tensors` holds the same per
    tensor beside its type and bytes.
    """

    path: str
    plan: Plan
    bytes: int  # of the file
    seconds: float
    relative_error: float
    tensors: dict[str, dict[str, Any]]
    resumed: int  # tensors an interrupted run had finished
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight

    @property
    def compression(self) -> float:
        return self.plan.source_bytes / self.plan.bytes

    def to_json(self) -> dict[str, Any]:
        plan = self.plan.to_json()
        for tensor in plan["tensors"]:
            tensor["relative_error"] = self.tensors[tensor["name"]]["relative_error"]
        return {
            **plan,
            "path": self.path,
            "tensor_bytes": plan["bytes"],
            "bytes": self.bytes,
            "compression": self.compression,
            "seconds": self.seconds,
            "relative_error": self.relative_error,
            "resumed_tensors": self.resumed,
            "notes": list(self.notes),
        }


def preview(
    model: str | Path | Model,
    to: str,
    *,
    imatrix: str | Path | None = None,
    tensors: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    pre: str | None = None,
) -> Plan:
    """What `quantize` with the same arguments would write: every tensor's type and bytes."""
    opened = model if isinstance(model, Model) else open_model(model, pre=pre)
    options = Options(to, tuple(tensors), output_type, embedding_type, pure)
    matrix = read_imatrix(imatrix) if imatrix else None
    plan = make_plan(opened, options, matrix.means if matrix else ())
    gather_evidence(plan, matrix)
    return plan


def quantize(
    model: str | Path | Model,
    to: str,
    out: str | Path | None = None,
    *,
    imatrix: str | Path | None = None,
    tensors: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    pre: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Writes `model` (a folder, a hub id, a GGUF) as a GGUF of type `to` (`Q4_K_M`, `IQ4_XS`, …).

    `out` defaults to `<model>-<TO>.gguf` in the current folder; an existing file is replaced only
    with `force`, and the model's own files never.  An interrupted run of the same work continues
    where it stopped and writes the same bytes.

    Raises UsageError (the request), SourceError (the model or the importance matrix), OutputError
    (the disk): before anything is written wherever that can be known.
    """
    started = time.monotonic()
    report = progress or Silent()
    opened = model if isinstance(model, Model) else open_model(model, pre=pre)
    options = Options(to, tuple(tensors), output_type, embedding_type, pure)
    matrix = read_imatrix(imatrix) if imatrix else None
    plan = make_plan(opened, options, matrix.means if matrix else ())
    evidence = gather_evidence(plan, matrix)
    inputs = [Path(file) for file in (*opened.files, *([imatrix] if imatrix else []))]
    path = output_path(opened, plan, out, force, inputs)
    notes = [*opened.notes, *source_notes(opened, plan), *plan.fallback_notes()]
    notes += matrix_notes(plan, matrix)
    for note in notes:
        report.note(note)

    solver = Nearest()
    recipe = recipe_json(opened, options, matrix, solver.name)
    metadata = output_metadata(opened, plan, recipe, matrix, __version__)
    identity = json.dumps([opened.fingerprint, recipe, [asdict(tensor) for tensor in plan.tensors]])
    entries = [(t.name, t.shape, t.type) for t in plan.tensors]
    with GGUFOutput(path, metadata, entries, identity) as output:
        resumed = len(output.finished)
        if resumed:
            report.note(f"Resuming: {resumed} of {len(entries)} tensors were already written.")
        elif output.discarded:
            report.note("An unfinished file of another recipe, or with a damaged journal, was discarded.")
        preparing = time.monotonic()
        prepare({tensor.type for tensor in plan.tensors}, bool(evidence), report)
        started += time.monotonic() - preparing
        run = _Run(opened, plan, evidence, output, solver, report, threads or local.available_cores())
        try:
            run.all()
        except OutputError:
            raise
        except DitherError:  # the weights themselves: no later run could continue this one
            output.discard()
            raise
        output.commit()
        records = {name: dict(record) for name, record in output.finished.items()}
        total = output.total
    for note in lost_notes(plan, records):
        report.note(note)
        notes.append(note)
    return Result(
        str(path), plan, total, time.monotonic() - started, _total_error(plan, records),
        records, resumed, tuple(notes),
    )  # fmt: skip


def prepare(types: Iterable[str], with_importance: bool = False, progress: Progress | None = None) -> None:
    """Gets encoders ready: seconds on their first use, and said when it is more than one.

    Kernels are compiled once per machine and kept on disk; ggml's lattice encoders build their
    tables anew in every process.
    """
    from dither.codecs.kernels import stats

    tell = (progress or Silent()).note
    slow = threading.Timer(1.0, tell, ("Preparing the encoders: kernels are compiled once per machine …",))
    slow.start()
    try:
        one = np.ones(1, dtype=np.float32)
        stats.sum_squared_difference(one, one)
        stats.sum_squares(one)
        for name in sorted(types):
            codec = find_codec(name)
            row = np.ones((1, codec.block), dtype=np.float32)
            importance = row[0] if with_importance or codec.needs_importance else None
            codec.decode(codec.encode(row, importance))
    finally:
        slow.cancel()


class _Run:
    """One pass over all tensors that are not finished yet."""

    def __init__(
        self, model: Model, plan: Plan, evidence: Mapping[str, Floats], output: GGUFOutput,
        solver: Nearest, report: Progress, threads: int,
    ) -> None:  # fmt: skip
        self.sources = {tensor.name: tensor for tensor in model.tensors}
        self.todo = [tensor for tensor in plan.tensors if tensor.name not in output.finished]
        self.plan, self.evidence, self.output = plan, evidence, output
        self.solver, self.report, self.threads = solver, report, threads

    def all(self) -> None:
        done = self.plan.parameters - sum(tensor.size for tensor in self.todo)
        self.report.start(self.plan.parameters, done)
        sums: dict[str, list[tuple[float, float]]] = {tensor.name: [] for tensor in self.todo}
        left = {tensor.name: self._chunk_count(tensor) for tensor in self.todo}
        # Closed in any case, so that no thread writes on after the file below it is.
        with closing(local.run(self._work, self._chunks(), self.threads)) as results:
            for chunk, error, norm in results:
                name = chunk.tensor.name
                sums[name].append((error, norm))
                left[name] -= 1
                self.report.advance((chunk.stop - chunk.start) * self.sources[name].columns, name)
                if left[name] == 0:
                    self.output.finish(name, _record(sums.pop(name)))

    def _rows_per_chunk(self, tensor: PlannedTensor) -> int:
        return max(1, CHUNK_WEIGHTS // self.sources[tensor.name].columns)

    def _expert_rows(self, tensor: PlannedTensor) -> int:
        return tensor.shape[-2] if len(tensor.shape) > 2 else self.sources[tensor.name].rows

    def _chunk_count(self, tensor: PlannedTensor) -> int:
        experts = self.sources[tensor.name].rows // self._expert_rows(tensor)
        return experts * math.ceil(self._expert_rows(tensor) / self._rows_per_chunk(tensor))

    def _chunks(self) -> Iterator[_Chunk]:
        for tensor in self.todo:
            step, expert_rows = self._rows_per_chunk(tensor), self._expert_rows(tensor)
            for expert, first in enumerate(range(0, self.sources[tensor.name].rows, expert_rows)):
                for start in range(first, first + expert_rows, step):
                    yield _Chunk(tensor, expert, start, min(start + step, first + expert_rows))

    def _work(self, chunk: _Chunk) -> tuple[_Chunk, float, float]:
        """One chunk from source to file: (chunk, Σ(w − ŵ)², Σw²)."""
        source, tensor = self.sources[chunk.tensor.name], chunk.tensor
        if source.stored == tensor.type and source.read_raw is not None:
            raw_RN = source.read_raw(chunk.start, chunk.stop)
            _check_finite(tensor.name, source.read(chunk.start, chunk.stop), chunk.start)
            self.output.write_rows(tensor.name, chunk.start, raw_RN)
            return chunk, 0.0, 0.0
        w_RC = source.read(chunk.start, chunk.stop)
        norm = _check_finite(tensor.name, w_RC, chunk.start)
        if tensor.type == "F16" and float(np.abs(w_RC).max()) > _LARGEST_F16:
            raise SourceError(
                tensor.name, f"holds {float(np.abs(w_RC).max()):.4g}, beyond F16's {_LARGEST_F16:.0f}",
                f"Keep it wider: --tensor '^{tensor.name}$=BF16'.",
            )  # fmt: skip
        raw_RN, error = self._solve(w_RC, tensor, chunk.expert)
        self.output.write_rows(tensor.name, chunk.start, raw_RN)
        return chunk, error, norm

    def _solve(self, w_RC: Floats, tensor: PlannedTensor, expert: int) -> tuple[Bytes, float]:
        from dither.codecs.kernels.stats import sum_squared_difference

        codec = find_codec(tensor.type)
        means = self.evidence.get(tensor.name)
        evidence = None if means is None else Evidence(0, means[min(expert, len(means) - 1)])
        raw_RN = self.solver(w_RC, codec, evidence)
        if tensor.type == "F32":
            return raw_RN, 0.0
        error = sum_squared_difference(w_RC.reshape(-1), codec.decode(raw_RN).reshape(-1))
        if not math.isfinite(error):
            raise DitherError(tensor.name, f"became NaN or infinite as {tensor.type}", "Please report this.")
        return raw_RN, error


@dataclass(frozen=True)
class _Chunk:
    tensor: PlannedTensor
    expert: int
    start: int
    stop: int


def _check_finite(name: str, w_RC: Floats, start: int) -> float:
    """Σw², or SourceError naming the first weight that is no number."""
    from dither.codecs.kernels.stats import sum_squares

    norm = float(sum_squares(w_RC.reshape(-1)))
    if math.isfinite(norm):
        return norm
    row, column = np.argwhere(~np.isfinite(w_RC))[0]
    raise SourceError(
        name, f"holds {w_RC[row, column]} at row {start + row}, column {column}",
        "The checkpoint is damaged: fetch or export it again.",
    )  # fmt: skip


def _record(sums: list[tuple[float, float]]) -> dict[str, Any]:
    error, norm = math.fsum(e for e, _ in sums), math.fsum(n for _, n in sums)
    relative = math.sqrt(error / norm) if norm > 0 else 0.0
    return {"squared_error": error, "squared_norm": norm, "relative_error": relative}


def lost_notes(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tensors of which next to nothing is left: their values are out of the type's reach."""
    return [
        f"{tensor.name}: relative weight error {records[tensor.name]['relative_error']:.0%}, "
        f"its values are beyond what {tensor.type} can hold."
        for tensor in plan.tensors
        if records[tensor.name]["relative_error"] > _LOST
    ]


def _total_error(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> float:
    quantized = [records[tensor.name] for tensor in plan.tensors if len(tensor.shape) > 1]
    norm = math.fsum(record["squared_norm"] for record in quantized)
    error = math.fsum(record["squared_error"] for record in quantized)
    return math.sqrt(error / norm) if norm > 0 else 0.0


def file_stem(model: Model) -> str:
    """The model's name for a file: that of its folder, file or repository, without an old type."""
    last = Path(model.origin).name or Path(model.origin).resolve().name
    last = re.split(r"[@:]", last)[0]
    if last.endswith(".gguf"):
        last = re.sub(r"-\d{5}-of-\d{5}$", "", last.removesuffix(".gguf"))
        last = re.sub(rf"[-._](?:{'|'.join(preset_names())})$", "", last, flags=re.IGNORECASE)
    return last or model.name


def output_path(
    model: Model, plan: Plan, out: str | Path | None, force: bool, inputs: Sequence[Path] = ()
) -> Path:
    """Where the result goes.  Raises OutputError: an input, an existing file, no such folder."""
    name = f"{file_stem(model)}-{plan.to}.gguf"
    path = Path(out) if out is not None else Path(name)
    try:
        if path.is_dir() or (out is not None and os.fspath(out).endswith("/")):
            path = path / name
        _refuse_inputs(path, inputs)
        if path.exists() and not force:
            raise OutputError(str(path), "exists already", "Choose another name with -o, or pass --force.")
        if not path.parent.is_dir():
            raise OutputError(str(path.parent), "is no folder", "Make it first, or choose another with -o.")
    except OSError as error:  # a name too long, a folder that may not be searched
        reason = f"cannot be written ({error.strerror})"
        raise OutputError(str(path), reason, "Choose another name with -o.") from None
    return path


def _refuse_inputs(path: Path, inputs: Sequence[Path]) -> None:
    """Neither the result nor what it grows in may be a file that is read."""
    for place in (path, *unfinished(path)):
        if any(place.exists() and file.exists() and place.samefile(file) for file in inputs):
            raise OutputError(
                str(place), "is the model itself or read with it", "Choose another name with -o."
            )
