"""Plan: the type of every tensor, so that a file is of a size and loses as little as it can.

    evidence → what every tensor's rounding costs, in every type (`planning.sensitivity`)
             → the exact minimum under the budget (`planning.knapsack`) → plan.toml

Tensors that whoever runs the file wants of one type take it together.  Transforms go first: the plan is of
the model as it will be rounded, with the tensors that they add.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.containers.plan_file import PlanEntry, PlanFile, write_plan
from dither.containers.target import Target
from dither.containers.targets import target_of
from dither.display import table
from dither.errors import OutputError, UsageError
from dither.formats.evidence import MANIFEST, EvidenceStore, model_identity
from dither.measuring.calibrate import calibrate
from dither.models.source import opened
from dither.planning.candidates import candidates
from dither.planning.costs import Costs
from dither.planning.knapsack import Allocation, Item, TypeChoice, allocate, smallest
from dither.planning.reach import Allowed, Budget, around, check_reachable, check_room, room_of
from dither.planning.sensitivity import Ready, known_costs, made_ready
from dither.quantizing.paths import file_stem
from dither.quantizing.request import (
    AnyEvidence,
    Keywords,
    Making,
    Running,
    choose_solver,
    choose_transforms,
    open_evidence,
    options_of,
    records,
    with_keywords,
)
from dither.types import Model
from dither.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOST_BITS = 32
Prices = Mapping[str, Mapping[str, PlanEntry]]  # tensor → type → what it takes and costs alone


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was chosen from: `items` are every tensor's choices with their predicted costs."""

    plan: PlanFile
    path: str | None
    file_bytes: int  # of the file, header and tokenizer included; of a folder's files together
    parameters: int
    bound: float
    seconds: float
    notes: tuple[str, ...]
    items: tuple[Item, ...]
    allowed: int  # bytes that the items together may take
    limit: int  # bytes of all tensors that the budget allows
    evidence: str  # the folder it was learnt from
    prices: Prices

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.plan.tensor_bytes / self.parameters

    def by_type(self) -> list[tuple[str, int, int, float]]:
        """Type, its tensors, their bytes and predicted divergence; what takes most comes first."""
        groups = defaultdict[str, list[PlanEntry]](list)
        for entry in self.plan.tensors.values():
            groups[entry.type].append(entry)
        sums = [(k, len(g), sum(e.bytes for e in g), sum(e.kl or 0.0 for e in g)) for k, g in groups.items()]
        return sorted(sums, key=lambda group: -group[2])

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows = [(kind, count, format_bytes(size)) for kind, count, size, _ in self.by_type()]
        said = f"Predicted KL divergence: {self.plan.kl:.3g} nats per token, an estimate."
        title = f"Plan of {self.plan.model} for {self.plan.budget}: {format_bytes(self.file_bytes)}, "
        title += f"{self.bits_per_weight:.2f} bits per weight"
        return table(title, ("type", "tensors", "size"), rows, [said, *self.notes])

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "model": self.plan.model,
            "evidence": self.evidence,
            "solver": self.plan.solver,
            "transforms": list(self.plan.transforms),
            "budget": self.plan.budget,
            "bytes": self.file_bytes,
            "tensor_bytes": self.plan.tensor_bytes,
            "file_bytes": self.file_bytes,  # as earlier versions call it
            "bits_per_weight": self.bits_per_weight,
            "predicted_kl": self.plan.kl,
            "lower_bound": self.bound,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "tensors": {name: asdict(entry) for name, entry in self.plan.tensors.items()},
        }


def budget(
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    weights: int | None = None,
    max_kld: float | None = None,
    parameters: int,
) -> Budget:
    """Raises UsageError unless exactly one is given, and makes sense."""
    given = [value for value in (size, bpw, weights, max_kld) if value is not None]
    if len(given) != 1:
        reason = "wants exactly one of --size, --bpw, --memory and --max-kld"
        raise UsageError("the budget", reason, "For example --size 4.2GiB.")
    for name, value in (("--bpw", bpw), ("--max-kld", max_kld)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} {value:g}", "is no positive number")
    if bpw is not None and bpw > _MOST_BITS:
        raise UsageError(f"--bpw {bpw:g}", f"is more than a weight can have ({_MOST_BITS})")
    if size is not None:
        count = parse_bytes(size, "--size", 1)
        return Budget(f"a file of {format_bytes(count)}", file=count)
    if bpw is not None:
        return Budget(f"{bpw:g} bits per weight", tensors=int(bpw * parameters / 8))
    if weights is not None:
        return Budget(f"{format_bytes(weights)} of memory for weights", tensors=weights)
    return Budget(f"a KL divergence of at most {max_kld:g}", max_kl=max_kld)


@with_keywords
def plan(
    model: str | Path | Model,
    wanted: Budget | None = None,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    max_kld: float | None = None,
    to: str | None = None,
    group: int | None = None,
    sym: bool | None = None,
    out: str | Path | None = None,
    **how: Unpack[Keywords],
) -> Planned:
    """Chooses the type of every tensor of `model` under a budget, and writes it to `out` where that is given.

    `to` names a GPU format that mixes types ("gptq", "w4a16"), with its `group` and `sym`; GGUF otherwise.

    The budget is one of `size` (of the file: "4.2GiB" or bytes), `bpw` (bits per weight) and `max_kld` (the
    smallest file of a predicted divergence), or a `Budget`.  `evidence` is a folder of `dither calibrate`;
    without one it is learnt first, beside the output, from the model's own writing.  `types` limits the
    choice.  With `transforms` it is the rewritten model that is planned, with awq's scales as they suit about
    three bits.

    Raises UsageError (the request, a budget that cannot be met), SourceError, OutputError: before any work
    wherever that can be known.
    """
    making, running = records(plan, how)
    # Where the plan could not be written is an error now, not after hours of measuring.
    if out is not None and Path(out).exists() and not running.force:
        raise OutputError(str(out), "exists already", "Choose another name with -o, or pass --force.")
    if out is not None and not Path(out).parent.is_dir():
        raise OutputError(str(Path(out).parent), "is no folder", "Make it first, or choose another with -o.")
    source = opened(model)
    target = planned_target(source, to, group, sym)
    wanted = wanted or budget(size=size, bpw=bpw, max_kld=max_kld, parameters=source.parameters)
    return plan_for(source, wanted, target, making, running, out)


def plan_for(
    source: Model, wanted: Budget, target: Target, making: Making, running: Running, out: str | Path | None
) -> Planned:
    """`plan` of an opened model, for one container."""
    started = time.monotonic()
    if making.evidence is None:
        check_reachable(source, wanted, target, making.types)
    store = _evidence(source, making.evidence, out, running)
    solver = choose_solver(making.solver, store, running.threads)
    transforms = choose_transforms(making.transforms, target.options, store)
    ready = made_ready(source, store, solver, transforms, running.threads)
    allowed = candidates(ready.model, importance=ready.known, types=making.types, target=target)
    # What is taken whatever is chosen: the header, and tensors that no plan decides about.
    kept, taken = around(ready.model, target, target.header_bytes(ready.model, store, solver.name, ready.record))
    room = room_of(wanted, kept, taken)
    # Before the costs are measured: that may take hours, and this needs nothing but sizes.
    check_room(ready.model, wanted, allowed, target, kept, taken)
    # A cost is a tensor's own; what several tensors must take together costs the sum.
    prices = _prices(ready.model, allowed, known_costs(ready, allowed, target, running), target)
    items = _items(source, prices, target)
    if room is not None:
        allocation = allocate(items, room)
    else:
        assert wanted.max_kl is not None
        allocation = smallest(items, wanted.max_kl)
    found = _plan_file(ready, target, allocation, items, prices, kept)
    found = replace(found, bytes=taken + allocation.bytes, budget=None if room is None else taken + room)
    if out is not None:
        write_plan(Path(out), found, force=running.force)
    return Planned(
        plan=found,
        path=None if out is None else str(out),
        file_bytes=taken + allocation.bytes,
        parameters=source.parameters,
        bound=allocation.bound,
        seconds=time.monotonic() - started,
        notes=(*ready.notes, *_more_than_all(wanted, items, room, taken + allocation.bytes)),
        items=items,
        allowed=room or allocation.bytes,
        limit=(room or allocation.bytes) + kept,
        evidence=str(store.path),
        prices=prices,
    )


def _more_than_all(wanted: Budget, items: Sequence[Item], room: int | None, size: int) -> list[str]:
    """A note where the budget is larger than all that could be chosen."""
    most = sum(max(choice.bytes for choice in item.choices) for item in items)
    if room is None or room <= most:
        return []
    return [f"There is nothing larger to choose: {wanted.said} is allowed, and the file is of {format_bytes(size)}."]


def _evidence(model: Model, given: AnyEvidence, out: str | Path | None, running: Running) -> EvidenceStore:
    """The evidence; learnt now, or taken from an earlier run's folder, where none is named."""
    if given is None:
        folder = (Path(out).parent if out is not None else Path()) / f"{file_stem(model)}-evidence"
        if not (folder / MANIFEST).is_file():
            report, device, threads = running.progress, running.device, running.threads
            report.note(f"No evidence is given: it is learnt first, from the model's own writing ({folder}).")
            calibrate(model, gradients=True, out=folder, device=device, threads=threads, progress=report)
        given = folder
    store = open_evidence(given)
    assert store is not None
    if store.matrix is not None:
        reason = "is an importance matrix, and planning runs a calibration's text"
        raise UsageError(str(store.path), reason, "Learn one with `dither calibrate MODEL --gradients -o evidence`.")
    store.check(model)
    return store


def _prices(model: Model, allowed: Allowed, costs: Costs, target: Target) -> Prices:
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    return {
        name: {
            kind: PlanEntry(kind, target.bytes_of(kind, shapes[name]), costs.predicted(name, kind)) for kind in kinds
        }
        for name, kinds in allowed.items()
    }


def _items(model: Model, prices: Prices, target: Target) -> tuple[Item, ...]:
    """What takes one type together, with the types that all of it may take."""

    def common(names: tuple[str, ...]) -> list[str]:
        return [kind for kind in prices[names[0]] if all(kind in prices[name] for name in names)]

    def choice(names: tuple[str, ...], kind: str) -> TypeChoice:
        entries = [prices[name][kind] for name in names]
        size = sum(target.aligned(model, entry.bytes) for entry in entries)
        return TypeChoice(kind, size, math.fsum(entry.kl or 0.0 for entry in entries))

    # Without a type in common each goes by itself: whoever writes such a file says that they are apart.
    groups = (
        group
        for names in target.together(list(prices))
        for group in ([names] if common(names) else [(name,) for name in names])
    )
    return tuple(Item(names, tuple(choice(names, kind) for kind in common(names))) for names in groups)


def planned_target(model: Model, to: str | None, group: int | None = None, sym: bool | None = None) -> Target:
    """The container a plan is for.  Raises UsageError for a type, which leaves nothing to plan."""
    options = options_of(to or "F16", group=group, sym=sym)
    if to is not None and not options.folder:
        reason = "names one type, and a budget chooses among them"
        way_out = "Name a GPU format that mixes types, such as gptq or w4a16, or leave --to out."
        raise UsageError(f"--to {to}", reason, way_out)
    return target_of(options, model)


def _plan_file(
    ready: Ready, target: Target, found: Allocation, items: Sequence[Item], prices: Prices, kept: int
) -> PlanFile:
    kinds = {name: choice.type for item, choice in zip(items, found.chosen, strict=True) for name in item.tensors}
    tensors = {name: prices[name][kinds[name]] for name in prices}
    return PlanFile(
        model=ready.opened.name,
        model_identity=model_identity(ready.opened),
        evidence=ready.store.sha256,
        solver=ready.solver.name,
        transforms=ready.transforms,
        budget=None,
        bytes=None,
        tensor_bytes=sum(entry.bytes for entry in tensors.values()) + kept,
        kl=found.kl,
        tensors=tensors,
        notes=(),
        container=target.options.to.lower() if target.options.folder else "",
    )
