"""Plan: the type of every tensor, so that a file is of a size and loses as little as it can.

    evidence → what every tensor's rounding costs, in every type (`_sensitivity`)
             → the exact minimum under the budget (`planning.knapsack`) → plan.toml

Tensors that whoever runs the file wants of one type take it together.  Transforms go first: the plan is of
the model as it will be rounded, with the tensors that they add.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.containers.plan_file import PlanEntry, PlanFile, write_plan
from dither.containers.target import Target
from dither.containers.targets import target_of
from dither.display import table
from dither.errors import OutputError, UsageError
from dither.formats.evidence import MANIFEST, EvidenceStore, model_identity
from dither.measuring.calibrate import calibrate
from dither.models.source import open_model
from dither.planning.candidates import candidates
from dither.planning.costs import Costs
from dither.planning.knapsack import Allocation, Choice, Item, allocate, smallest
from dither.planning.sensitivity import known_costs, made_ready
from dither.progress import Progress, Silent
from dither.quantizing.paths import file_stem
from dither.quantizing.quantize import choose_solver, open_evidence, options_of
from dither.system.cores import available_cores
from dither.types import Model
from dither.units import format_bytes, parse_bytes

_MOST_BITS = 32


@dataclass(frozen=True)
class Budget:
    """One of three: bytes of the file, bytes of the tensors, or the divergence at most."""

    said: str  # as a person reads it
    file: int | None = None
    tensors: int | None = None
    max_kl: float | None = None


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was chosen from: `items` are every tensor's choices with their predicted costs."""

    plan: PlanFile
    path: str | None
    file_bytes: int
    parameters: int
    bound: float
    seconds: float
    notes: tuple[str, ...]
    items: tuple[Item, ...]
    allowed: int  # bytes that the items together may take
    limit: int  # bytes of all tensors that the budget allows
    evidence: str  # the folder it was learnt from
    prices: Mapping[str, Mapping[str, PlanEntry]]  # tensor → type → what it takes and costs alone

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.plan.bytes / self.parameters

    def _repr_html_(self) -> str:
        """In a notebook."""
        count, size = Counter[str](), Counter[str]()
        for tensor in self.plan.tensors.values():
            count[tensor.type] += 1
            size[tensor.type] += tensor.bytes
        rows = [(kind, count[kind], format_bytes(taken)) for kind, taken in size.most_common()]
        said = f"Predicted KL divergence: {self.plan.kl:.3g} nats per token, an estimate."
        title = f"Plan of {self.plan.model} for {self.plan.budget}: {format_bytes(self.file_bytes)}, "
        title += f"{self.bits_per_weight:.2f} bits per weight"
        return table(title, ("type", "tensors", "size"), rows, [said, *self.notes])

    def to_json(self) -> dict[str, Any]:
        tensors = {name: {"type": t.type, "bytes": t.bytes, "kl": t.kl} for name, t in self.plan.tensors.items()}
        return {
            "path": self.path,
            "model": self.plan.model,
            "evidence": self.evidence,
            "solver": self.plan.solver,
            "transforms": list(self.plan.transforms),
            "budget": self.plan.budget,
            "bytes": self.plan.bytes,
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "predicted_kl": self.plan.kl,
            "lower_bound": self.bound,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "tensors": tensors,
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
        raise UsageError(
            "the budget", "wants exactly one of --size, --bpw, --memory and --max-kld", "For example --size 4.2GiB."
        )
    for name, value in (("--bpw", bpw), ("--max-kld", max_kld)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} {value:g}", "is no positive number")
    if bpw is not None and bpw > _MOST_BITS:
        raise UsageError(f"--bpw {bpw:g}", f"is more than a weight can have ({_MOST_BITS})")
    if size is not None:
        count = parse_bytes(size) if isinstance(size, str) else size
        if count <= 0:
            raise UsageError(f"--size {size}", "is nothing", "Write it like 4.2GiB.")
        return Budget(f"a file of {format_bytes(count)}", file=count)
    if bpw is not None:
        return Budget(f"{bpw:g} bits per weight", tensors=int(bpw * parameters / 8))
    if weights is not None:
        return Budget(f"{format_bytes(weights)} of memory for weights", tensors=weights)
    return Budget(f"a KL divergence of at most {max_kld:g}", max_kl=max_kld)


def plan(
    model: str | Path | Model,
    wanted: Budget | None = None,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    max_kld: float | None = None,
    evidence: str | Path | EvidenceStore | None = None,
    solver: str | None = None,
    transforms: Sequence[str] = (),
    types: Sequence[str] | None = None,
    to: str | None = None,
    group: int | None = None,
    sym: bool | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
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
    started, report = time.monotonic(), progress or Silent()
    if out is not None:
        _check_place(Path(out), force)
    opened = model if isinstance(model, Model) else open_model(model)
    target = planned_target(opened, to, group, sym)
    wanted = wanted or budget(size=size, bpw=bpw, max_kld=max_kld, parameters=opened.parameters)
    threads = threads or available_cores()
    store = _evidence(opened, evidence, out, device, threads, report)
    chosen = choose_solver(solver, store, threads)
    ready = made_ready(opened, store, transforms, threads)
    allowed = candidates(ready.model, importance=ready.known, types=types, target=target)
    kept = target.fixed(ready.model)
    header = target.header_bytes(ready.model, store, chosen.name, ready.record)
    kept_bytes = sum(tensor.bytes for tensor in kept.values())
    kept_padded = sum(target.aligned(opened, tensor.bytes) for tensor in kept.values())
    room = _room(wanted, header, kept_padded, kept_bytes)
    if room is not None:
        _check_room(ready.model, wanted, allowed, room, header + kept_padded, kept_bytes, target)
    costs = known_costs(ready, store, chosen, allowed, target, threads, device, report)
    prices = _prices(ready.model, allowed, costs, target)
    items = _items(opened, prices, target)
    if wanted.max_kl is None:
        assert room is not None
        allocation = allocate(items, room)
    else:
        allocation = smallest(items, wanted.max_kl)
    found = _plan_file(opened, wanted, store, chosen.name, transforms, allocation, items, prices, kept_bytes, target)
    if out is not None:
        write_plan(Path(out), found, force=force)
    file_bytes = header + allocation.bytes + kept_padded
    return Planned(
        found,
        None if out is None else str(out),
        file_bytes,
        opened.parameters,
        allocation.bound,
        time.monotonic() - started,
        ready.notes,
        items,
        room or allocation.bytes,
        (room or allocation.bytes) + kept_bytes,
        str(store.path),
        prices,
    )


def _check_place(out: Path, force: bool) -> None:
    """Raises OutputError where a plan could not be written: now, not after hours of measuring."""
    if out.exists() and not force:
        raise OutputError(str(out), "exists already", "Choose another name with -o, or pass --force.")
    if not out.parent.is_dir():
        raise OutputError(str(out.parent), "is no folder", "Make it first, or choose another with -o.")


def _check_room(
    model: Model,
    wanted: Budget,
    allowed: Mapping[str, Sequence[str]],
    room: int,
    around: int,
    kept: int,
    target: Target,
) -> None:
    """Raises UsageError, with the smallest budget that would do, where not even the smallest types fit."""
    shapes = {tensor.name: tensor for tensor in model.tensors}
    least = sum(
        min(target.aligned(model, target.bytes_of(kind, shapes[name].shape)) for kind in kinds)
        for name, kinds in allowed.items()
    )
    if least <= room:
        return
    if wanted.file is not None:
        needed = f"a file of {format_bytes(least + around)}"
        way_out = f"Ask for at least --size {least + around}"
    else:
        bits = math.ceil(1000 * 8 * (least + kept) / model.parameters) / 1000
        needed = f"{format_bytes(least + kept)} of weights, {bits:.3f} bits for each"
        way_out = f"Ask for at least --bpw {bits:.3f}, or for as much more memory"
    raise UsageError(
        wanted.said,
        f"is too small: the smallest types make {needed}",
        f"{way_out}, or allow smaller types with --types.",
    )


def _evidence(
    model: Model,
    given: str | Path | EvidenceStore | None,
    out: str | Path | None,
    device: str,
    threads: int,
    report: Progress,
) -> EvidenceStore:
    """The evidence; learnt now, or taken from an earlier run's folder, where none is named."""
    if given is None:
        folder = (Path(out).parent if out is not None else Path()) / f"{file_stem(model)}-evidence"
        if not (folder / MANIFEST).is_file():
            report.note(f"No evidence is given: it is learnt first, from the model's own writing ({folder}).")
            calibrate(model, gradients=True, out=folder, device=device, threads=threads, progress=report)
        given = folder
    store = open_evidence(given)
    assert store is not None
    if store.matrix is not None:
        raise UsageError(
            str(store.path),
            "is an importance matrix, and planning runs a calibration's text",
            "Learn one with `dither calibrate MODEL --gradients -o evidence`.",
        )
    store.check(model)
    return store


def _prices(
    model: Model, allowed: Mapping[str, Sequence[str]], costs: Costs, target: Target
) -> dict[str, dict[str, PlanEntry]]:
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    return {
        name: {
            kind: PlanEntry(kind, target.bytes_of(kind, shapes[name]), costs.predicted(name, kind)) for kind in kinds
        }
        for name, kinds in allowed.items()
    }


def _items(model: Model, prices: Mapping[str, Mapping[str, PlanEntry]], target: Target) -> tuple[Item, ...]:
    """What takes one type together, with the types that all of it may take."""

    def item(names: tuple[str, ...], kinds: Sequence[str]) -> Item:
        choices = (
            Choice(
                kind,
                sum(target.aligned(model, prices[name][kind].bytes) for name in names),
                math.fsum(prices[name][kind].kl or 0.0 for name in names),
            )
            for kind in kinds
        )
        return Item(names, tuple(choices))

    items: list[Item] = []
    for names in target.together(list(prices)):
        common = [kind for kind in prices[names[0]] if all(kind in prices[name] for name in names)]
        if common:
            items.append(item(names, common))
        else:  # each by itself: whoever writes such a file says that they are apart
            items += (item((name,), list(prices[name])) for name in names)
    return tuple(items)


def planned_target(model: Model, to: str | None, group: int | None = None, sym: bool | None = None) -> Target:
    """The container a plan is for.  Raises UsageError for a type, which leaves nothing to plan."""
    options = options_of(to or "F16", group=group, sym=sym)
    if to is not None and not options.folder:
        raise UsageError(
            f"--to {to}",
            "names one type, and a budget chooses among them",
            "Name a GPU format that mixes types, such as gptq or w4a16, or leave --to out.",
        )
    return target_of(options, model)


def _room(wanted: Budget, header: int, kept_padded: int, kept: int) -> int | None:
    """Bytes that the tensors to choose for may take."""
    if wanted.file is not None:
        return wanted.file - header - kept_padded
    return None if wanted.tensors is None else wanted.tensors - kept


def _plan_file(
    model: Model,
    wanted: Budget,
    store: EvidenceStore,
    solver: str,
    transforms: Sequence[str],
    allocation: Allocation,
    items: Sequence[Item],
    prices: Mapping[str, Mapping[str, PlanEntry]],
    kept_bytes: int,
    target: Target,
) -> PlanFile:
    kinds = {name: choice.type for item, choice in zip(items, allocation.chosen, strict=True) for name in item.tensors}
    tensors = {name: prices[name][kinds[name]] for name in prices}
    return PlanFile(
        model=model.name,
        model_identity=model_identity(model),
        evidence=store.sha256,
        solver=solver,
        transforms=tuple(transforms),
        budget=wanted.file or wanted.tensors,
        bytes=sum(t.bytes for t in tensors.values()) + kept_bytes,
        kl=allocation.kl,
        tensors=tensors,
        notes=(),
        container=target.options.to.lower() if target.options.folder else "",
    )
