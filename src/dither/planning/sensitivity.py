"""What the rounding of every tensor costs, measured once for a model, its evidence and a solver.

    a probe          the model rounded to about three bits, by the solver that will really be used
    divergences      of the original with one tensor at a time taken from the probe (`measuring.sensitivity`)
    ratios           of the errors that other types would make of the same tensor (`planning.errors`)

All of it stays beside the evidence (`planning.costs`), so that another size of the same model is planned in
a second and a run that was interrupted goes on.  What is measured is the model as it will be rounded: behind
the transforms, where there are some.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dither._version import __version__
from dither.containers.gguf_target import GGUFTarget
from dither.containers.target import Target
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.models.source import open_model
from dither.planning.costs import Costs
from dither.planning.error_ratios import error_ratios, relative_error
from dither.progress import Progress
from dither.quantizing.quantize import options_of, quantize
from dither.quantizing.rewriting import rewrite
from dither.types import EvidenceSource, Model, No, Solver, Tensor

if TYPE_CHECKING:
    from dither.measuring.text import Sequences
    from dither.models.blocks import Blocks

COARSER = ("Q4_0", "MXFP4", "Q2_K")  # for tensors of which the probe tells nothing
EXACT = 1e-6  # of what losing a tensor would be; 8 bits are at 3e-5
PROBE = "Q3_K_S"  # coarse enough that one tensor's rounding shows, fine enough that divergences add up


@dataclass(frozen=True)
class Ready:
    """A model as a plan sees it: opened, and behind its transforms."""

    opened: Model
    model: Model
    evidence: EvidenceSource
    known: frozenset[str]  # tensors of which it knows something
    transforms: tuple[str, ...]
    record: Mapping[str, Any]  # transform → what it chose, its numbers as long as they may get
    notes: tuple[str, ...]


def made_ready(opened: Model, store: EvidenceStore, transforms: Sequence[str], threads: int) -> Ready:
    """Raises UsageError and UnsupportedError for transforms that cannot be had."""
    if not transforms:
        return Ready(opened, opened, store, frozenset(store.tensors), (), {}, ())
    target = GGUFTarget(options_of(PROBE))
    found = rewrite(opened, store, store.tensors, transforms, target.mix(opened, store.tensors), target.mix, threads)
    matrices = [tensor.name for tensor in found.model.tensors if len(tensor.shape) > 1]
    # An embedding parted from the output, for one, has no inputs any more.
    known = frozenset(name for name in matrices if found.evidence(name) is not None)
    record = _longest(found.record)
    return Ready(opened, found.model, found.evidence, known, tuple(transforms), record, found.notes)


def _longest(record: Any) -> Any:
    """With every number as long as the six digits that transforms keep: other types choose other ones, and
    the header that a plan counts must hold them."""
    if isinstance(record, dict):
        return {key: _longest(value) for key, value in record.items()}
    return 0.123456 if isinstance(record, float) else record


def known_costs(
    ready: Ready,
    store: EvidenceStore,
    solver: Solver,
    allowed: Mapping[str, Sequence[str]],
    target: Target,
    threads: int,
    device: str,
    report: Progress,
) -> Costs:
    """Everything that was found out of the `allowed` types of tensors in this target, completed."""
    what = [ready.opened.fingerprint, store.sha256, solver.name, PROBE, __version__, *ready.transforms]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    costs = Costs.open(store.path / f"sensitivity.{key}.json")
    missing = [name for name in allowed if name not in costs.divergence or name not in costs.probe]
    if missing:
        from dither.models.blocks import open_blocks

        network = open_blocks(ready.model, device=device)  # tells of missing torch before it is imported
        from dither.measuring.sensitivity import affordable

        # As much text whether all are measured or the rest of them: the plan must be the same.
        text = affordable(halves(store)[0], len(allowed))
        _measure(ready, network, store, solver, missing, text, costs, threads, report)
    _all_ratios(ready, solver, allowed, target, costs, threads, report)
    return costs


def _measure(
    ready: Ready,
    network: Blocks,
    store: EvidenceStore,
    solver: Solver,
    names: Sequence[str],
    text: Sequences,
    costs: Costs,
    threads: int,
    report: Progress,
) -> None:
    from dither.measuring.sensitivity import divergences

    path = costs.path.with_suffix(".gguf")
    report.note(f"Measuring what the rounding of each of {len(names)} tensors costs (once for this evidence).")
    if not (path.is_file() and costs.probe):  # of an interrupted run: whole, or it would not have its name
        result = quantize(
            ready.opened,
            PROBE,
            path,
            evidence=store,
            solver=solver,
            transforms=ready.transforms,
            tensors=_coarser(ready, solver),
            threads=threads,
            force=True,
            progress=report,
        )
        costs.probe = {tensor.name: tensor.type for tensor in result.plan.tensors}
        costs.save()
    divergences(network, open_model(path), names, text, costs.found, report)
    path.unlink()


def _coarser(ready: Ready, solver: Solver) -> list[tuple[str, str]]:
    """Other types for tensors that the probe's gives back as they are, because a source that is quantized
    already was stored in it: no error tells nothing of what other types would cost."""
    target = GGUFTarget(options_of(PROBE))
    tensors = {tensor.name: tensor for tensor in ready.model.tensors}
    found = []
    for planned in target.mix(ready.model, ready.known).tensors:
        tensor = tensors[planned.name]
        if planned.type in FLOAT_TYPES or not _is_exact(tensor, planned.type, ready, solver):
            continue
        for kind in COARSER:
            able = not isinstance(target.can_hold(kind, tensor.shape), No)
            if able and not _is_exact(tensor, kind, ready, solver):
                found.append((rf"\A{re.escape(tensor.name)}\Z", kind))
                break
    return found


def _is_exact(tensor: Tensor, kind: str, ready: Ready, solver: Solver) -> bool:
    return relative_error(tensor, kind, ready.evidence, solver) < EXACT


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
    ready: Ready,
    solver: Solver,
    allowed: Mapping[str, Sequence[str]],
    target: Target,
    costs: Costs,
    threads: int,
    report: Progress,
) -> None:
    tensors = {tensor.name: tensor for tensor in ready.model.tensors}
    todo = {}
    for name, kinds in allowed.items():
        known = costs.ratios.setdefault(name, {})
        todo[name] = [kind for kind in kinds if kind not in known]
    report.start(sum(map(len, todo.values())), 0)
    for name, kinds in todo.items():
        if kinds:
            exact = [target.codec_of(tensors[name], kind) for kind in kinds]
            found = error_ratios(tensors[name], exact, costs.probe[name], ready.evidence, solver, threads)
            costs.ratios[name] |= {kind: found[codec] for kind, codec in zip(kinds, exact, strict=True)}
            costs.save()
            report.advance(len(kinds), f"what each type makes of {name}")
