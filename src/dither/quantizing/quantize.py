"""Quantize a model, by a type or by a plan: what people ask for, resolved and handed to `quantizing.job`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dither.containers.folders import find_scheme
from dither.containers.importance import check_evidence
from dither.containers.mix import Mix, Options
from dither.containers.nearest_preset import nearest_preset
from dither.containers.plan_file import PlanFile, plan_sha256, read_plan
from dither.containers.targets import target_of
from dither.errors import UsageError
from dither.formats.evidence import EvidenceStore, model_identity
from dither.models.source import opened
from dither.progress import Progress
from dither.quantizing.job import make
from dither.quantizing.request import AnyEvidence, Making, Running, choose_solver, open_evidence, options_of
from dither.quantizing.result import Result
from dither.quantizing.tensor_pass import prepare
from dither.types import Model, Solver
from dither.units import parse_bytes

__all__ = ["Result", "make_by_plan", "prepare", "preview", "quantize"]


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
    solver: str | None = None,
    measure: bool = False,
) -> Mix:
    """What `quantize` with the same arguments would write: every tensor's type and bytes, and the file's."""
    source = opened(model, pre)
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
    store = open_evidence(_one_of(evidence, imatrix))
    if store:
        store.check(source)
    target = target_of(options, source)
    mix = target.mix(source, store.tensors if store else ())
    check_evidence(mix, store)
    named = choose_solver(solver, store, 1).name
    return replace(mix, file_bytes=target.file_bytes(source, mix, store, named, measure))


def quantize(
    model: str | Path | Model,
    to: str | None = None,
    out: str | Path | None = None,
    *,
    plan: str | Path | PlanFile | None = None,
    evidence: str | Path | EvidenceStore | None = None,
    imatrix: str | Path | None = None,
    solver: str | Solver | None = None,
    transforms: Sequence[str] | None = None,
    statistics: str | None = None,
    measure: bool | str | Path = False,
    check: bool = False,
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
    max_memory: str | int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Writes `model` (a folder, a hub id, a GGUF) as a GGUF of type `to` (`Q4_K_M`, `IQ4_XS`, …), or as a
    checkpoint folder of a GPU format (`gptq`, `awq`, `w4a16`, `w8a8`, `fp8`, `nf4`, `mxfp4`, …).

    `out` defaults to `<model>-<TO>.gguf`, or a folder `<model>-<to>`, in the current folder; an existing one
    is replaced only with `force`, and the model's own files never.  An interrupted run of the same work
    continues where it stopped and writes the same bytes.

    `bits`, `group` (columns that share a scale, 0 for the whole row) and `sym` (around zero, or with zero
    points) choose the grid of a GPU format that leaves a choice; `act_order` forms GPTQ's groups by how
    much columns matter; `dtype` ("BF16", "F16", "F32") is what its numbers are stored as, by default what the
    model's are.

    `plan`, instead of `to` and everything else that chooses types, is a plan of `dither plan`: every tensor's
    type, the solver and the transforms.
    `evidence` is a folder of `dither calibrate` or an importance matrix (`imatrix` is its other name).
    `solver` is "nearest", "half-quadratic", "scales", "gptq" or "learned"; None takes gptq where the evidence
    holds Hessians.  `transforms` ("awq", "rotate") are applied in order; None makes what is called AWQ an
    AWQ file where there is evidence (its scales, then the solver), and is none elsewhere, as () is everywhere.
    `Result.method` and the file say what chose the codes.  `statistics` says where Hessians come from: "parallel"
    takes the folder's, "sequential" learns them anew behind layers already quantized.
    `max_memory` ("4GiB", or bytes) is what this process may hold while it rounds and measures, the model's files
    not counted: fewer chunks are in flight and less is kept, and what cannot fit is refused by name.
    `measure` adds the KL divergence against `model`, on the evidence's held-back text or on a text file.
    `check` loads the finished file for one token in the engine that runs it (llama.cpp, transformers with the format's
    package, or vLLM), before it gets its name.

    Raises UsageError (the request), SourceError (the model or the evidence), UnsupportedError (what those who run the
    file have no place for), OutputError (the disk): before anything is written wherever that can be known; EngineError
    where a checked file does not load.
    """
    source = opened(model, pre)
    running = Running.of(threads, device, force, progress)
    if max_memory is not None:
        running = replace(running, max_memory=parse_bytes(max_memory, "--max-memory", 1))
    making = Making(_one_of(evidence, imatrix), solver, transforms, None, statistics, measure, check)
    types: dict[str, Any] = {
        "tensors": tuple(tensors),
        "output_type": output_type,
        "embedding_type": embedding_type,
        "pure": pure,
        "bits": bits,
        "group": group,
        "sym": sym,
        "dtype": dtype,
        "act_order": act_order,
    }
    if plan is not None:
        _refuse_beside_plan({"to": to, **types})
        return make_by_plan(source, plan, making, running, out)
    if to is None:
        raise UsageError("the type", "is not said", "Name one with --to, such as Q4_K_M, or a plan with --plan.")
    return make(source, options_of(to, **types), making, running, out)


def make_by_plan(
    model: Model, plan: str | Path | PlanFile, making: Making, running: Running, out: str | Path | None
) -> Result:
    """What a plan asks for; a solver or transforms of `making` go before the plan's own.

    Raises UsageError where the plan is another model's.
    """
    known = plan if isinstance(plan, PlanFile) else read_plan(plan)
    if known.model_identity and known.model_identity != model_identity(model):
        reason = f"is for {known.model}, not for {model.name}"
        raise UsageError("--plan", reason, "Make one for this model: dither plan MODEL --size …")
    in_folder = bool(known.container)  # not by the name of `to`: a preset and a container may share one (mxfp4)
    if in_folder and find_scheme(known.container) is None:
        raise UsageError("--plan", f"is for {known.container}, which is no container here", "Plan again.")
    to = known.container or nearest_preset(model, known.tensor_bytes)
    options = Options(to, known.overrides(), plan=plan_sha256(known), folder=in_folder)
    solver = making.solver or known.solver or None
    transforms = known.transforms if making.transforms is None else tuple(making.transforms)
    return make(model, options, replace(making, solver=solver, transforms=transforms), running, out)


def _refuse_beside_plan(asked: Mapping[str, object]) -> None:
    """Raises UsageError for whatever else would choose types, or how a container stores them."""
    unasked = {field.name: field.default for field in fields(Options)} | {"to": None}
    given = ", ".join(f"`{name}`" for name, value in asked.items() if value != unasked[name])
    if given:
        reason = f"names every tensor's type already, so {given} cannot be given as well"
        raise UsageError("--plan", reason, "Edit the plan, or leave one of the two out.")


def _one_of(evidence: AnyEvidence, imatrix: AnyEvidence) -> AnyEvidence:
    """Raises UsageError where both names are used."""
    if evidence is not None and imatrix is not None:
        raise UsageError("--imatrix", "is another name of --evidence", "Give one of the two.")
    return evidence if evidence is not None else imatrix
