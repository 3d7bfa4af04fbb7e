"""What the rounding of every tensor costs, measured once for a model, its evidence and a solver.

    a probe          the model rounded to about three bits, by the solver that will really be used
    divergences      of the original with one tensor at a time taken from the probe (`measuring.sensitivity`)
    ratios           of the errors that other types would make of the same tensor (`planning.error_ratios`)

All of it stays beside the evidence (`planning.costs`), so that another size of the same model is planned in
a second and a run that was interrupted goes on.  What is measured is the model as it will be rounded: behind
the transforms, where there are some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dither._version import __version__
from dither.containers.gguf_target import GGUFTarget
from dither.containers.mix import exactly
from dither.containers.target import Target
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.models.source import open_model
from dither.planning.costs import Costs
from dither.planning.error_ratios import error_ratios, relative_error
from dither.quantizing.job import make
from dither.quantizing.request import Making, Running, options_of
from dither.quantizing.rewriting import rewrite
from dither.types import EvidenceSource, Model, No, Solver, Tensor

if TYPE_CHECKING:
    from dither.measuring.text import Sequences
    from dither.models.blocks import Blocks

COARSER = ("Q4_0", "MXFP4", "Q2_K")  # for tensors of which the probe tells nothing
EXACT = 1e-6  # of what losing a tensor would be; 8 bits are at 3e-5
PROBE = "Q3_K_S"  # coarse enough that one tensor's rounding shows, fine enough that divergences add up
_AS_LONG_AS_ANY = 0.123456  # transforms keep six digits of a number, and this one has all six


@dataclass(frozen=True)
class Ready:
    """A model as a plan sees it: opened, and behind its transforms."""

    opened: Model
    store: EvidenceStore
    solver: Solver  # that will round it
    model: Model
    evidence: EvidenceSource
    known: frozenset[str]  # tensors of which it knows something
    transforms: tuple[str, ...] = ()
    # transform → what it chose, its numbers as long as they may get
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def made_ready(opened: Model, store: EvidenceStore, solver: Solver, transforms: Sequence[str], threads: int) -> Ready:
    """Raises UsageError and UnsupportedError for transforms that cannot be had."""
    if not transforms:
        return Ready(opened, store, solver, opened, store, frozenset(store.tensors))
    target = GGUFTarget(options_of(PROBE))
    found = rewrite(opened, store, store.tensors, transforms, target.mix(opened, store.tensors), target.mix, threads)
    matrices = [tensor.name for tensor in found.model.tensors if len(tensor.shape) > 1]
    # An embedding parted from the output, for one, has no inputs any more.
    known = frozenset(name for name in matrices if found.evidence(name) is not None)
    record = _longest(found.record)
    return Ready(opened, store, solver, found.model, found.evidence, known, tuple(transforms), record, found.notes)


def _longest(record: Any) -> Any:
    """With every number as long as it may get: other types choose other numbers, and the header whose bytes
    a plan counts must hold those as well."""
    if isinstance(record, dict):
        return {key: _longest(value) for key, value in record.items()}
    return _AS_LONG_AS_ANY if isinstance(record, float) else record


def known_costs(ready: Ready, allowed: Mapping[str, Sequence[str]], target: Target, running: Running) -> Costs:
    """The costs of the `allowed` types of tensors in this target: those known, and measured now those missing."""
    # Whatever changes a cost is in the file's name, so that no cost is ever taken for another's.
    what = [ready.opened.fingerprint, ready.store.sha256, ready.solver.name, PROBE, __version__, *ready.transforms]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    costs = Costs.open(ready.store.path / f"sensitivity.{key}.json", running.progress)
    missing = [name for name in allowed if name not in costs.divergence or name not in costs.probe]
    if missing:
        from dither.models.blocks import open_blocks

        network = open_blocks(ready.model, device=running.device)  # tells of missing torch before it is imported
        from dither.measuring.sensitivity import affordable

        # As much text whether all are measured or the rest of them: the plan must be the same.
        text = affordable(halves(ready.store)[0], len(allowed))
        _measure(ready, network, missing, text, costs, running)
    # Ratios come last: they are of errors over the probe type's, which is only known by now.
    _all_ratios(ready, allowed, target, costs, running)
    return costs


def _measure(
    ready: Ready, network: Blocks, names: Sequence[str], text: Sequences, costs: Costs, running: Running
) -> None:
    from dither.measuring.sensitivity import divergences

    path, report = costs.path.with_suffix(".gguf"), running.progress
    report.note(f"Measuring what the rounding of each of {len(names)} tensors costs (once for this evidence).")
    if not (path.is_file() and costs.probe):  # of an interrupted run: whole, or it would not have its name
        options = options_of(PROBE, tensors=_coarser(ready))
        making = Making(ready.store, ready.solver, ready.transforms)
        result = make(ready.opened, options, making, Running(running.threads, force=True, progress=report), path)
        # The probe's types are kept before anything is measured of them: without, a probe is made again.
        costs.probe = {tensor.name: tensor.type for tensor in result.mix.tensors}
        costs.save()
    divergences(network, open_model(path), names, text, costs.found, report)
    path.unlink()


def _coarser(ready: Ready) -> tuple[tuple[str, str], ...]:
    """Other types for tensors that the probe's gives back as they are, because a source that is quantized
    already was stored in it: an error of zero says nothing about what other types would cost."""
    target = GGUFTarget(options_of(PROBE))
    tensors = {tensor.name: tensor for tensor in ready.model.tensors}

    def is_exact(tensor: Tensor, kind: str) -> bool:
        return relative_error(tensor, kind, ready.evidence, ready.solver) < EXACT

    found = []
    for planned in target.mix(ready.model, ready.known).tensors:
        tensor = tensors[planned.name]
        if planned.type not in FLOAT_TYPES and is_exact(tensor, planned.type):
            # The first that this tensor's rows fit and that does round it.
            fitting = (kind for kind in COARSER if not isinstance(target.can_hold(kind, tensor.shape), No))
            kind = next((kind for kind in fitting if not is_exact(tensor, kind)), None)
            found += [(exactly(tensor.name), kind)] if kind else []
    return tuple(found)


def halves(store: EvidenceStore) -> tuple[Sequences, Sequences]:
    """The text that calibration held back: what sensitivities are measured on, what plans are judged by.
    One sequence alone serves for both."""
    from dither.measuring.embedded import held_back_text

    text = held_back_text(store)
    middle = max(1, len(text.lengths_S) // 2)
    first = replace(text, tokens_ST=text.tokens_ST[:middle], lengths_S=text.lengths_S[:middle])
    if middle == len(text.lengths_S):
        return first, first
    return first, replace(text, tokens_ST=text.tokens_ST[middle:], lengths_S=text.lengths_S[middle:])


def _all_ratios(
    ready: Ready, allowed: Mapping[str, Sequence[str]], target: Target, costs: Costs, running: Running
) -> None:
    tensors = {tensor.name: tensor for tensor in ready.model.tensors}
    known = {name: costs.ratios.setdefault(name, {}) for name in allowed}
    todo = {name: new for name, kinds in allowed.items() if (new := [k for k in kinds if k not in known[name]])}
    running.progress.start(sum(map(len, todo.values())), 0)
    for name, kinds in todo.items():
        # A folder's type may be another codec in this tensor than in the next one.
        exact = [target.codec_of(tensors[name], kind) for kind in kinds]
        found = error_ratios(tensors[name], exact, costs.probe[name], ready.evidence, ready.solver, running.threads)
        known[name] |= {kind: found[codec] for kind, codec in zip(kinds, exact, strict=True)}
        # On the disk tensor by tensor, so that a run that is interrupted loses one tensor's at most.
        costs.save()
        running.progress.advance(len(kinds), f"what each type makes of {name}")
