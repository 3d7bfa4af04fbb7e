"""A plan held against what one would have made without it.

Two rivals of at most the plan's size, made with the same evidence and solver: the nearest preset (in a folder
one type throughout), and a random allocation of types.  All three are measured on text that neither Hessians
nor sensitivities have seen, and the best is what gets the name.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dither.containers.mix import Options
from dither.containers.nearest_preset import nearest_preset
from dither.containers.plan_file import PlanFile, write_plan
from dither.containers.target import Target
from dither.formats.evidence import EvidenceStore
from dither.measuring.schema import Measurement, path_for
from dither.planning.knapsack import random_allocation
from dither.planning.plan import Planned
from dither.planning.reach import Budget
from dither.planning.sensitivity import halves
from dither.progress import Progress
from dither.quantizing.job import make
from dither.quantizing.quantize import Result, make_by_plan
from dither.quantizing.request import Making, Running
from dither.types import Model, No

PLANNED = "plan"


@dataclass(frozen=True)
class Rival:
    """One contestant of a validation, measured on the text kept for it."""

    name: str  # "plan", "preset Q4_K_M", "random allocation"
    bytes: int
    kl: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hold_against(
    model: Model, wanted: Budget, target: Target, planned: Planned, result: Result, making: Making, running: Running
) -> tuple[Result, tuple[Rival, ...], str]:
    """The best of plan, preset and random allocation, all rivals, and the winner's name.

    The winner stands in the place of `result` afterwards, and the plan that made it in that of `planned`: no
    plan where it was a preset.
    """
    assert isinstance(making.evidence, EvidenceStore) and planned.path is not None
    store, place, beside = making.evidence, Path(result.path), Path(planned.path)
    running.progress.note("Holding the plan against the nearest preset and a random choice of types.")
    # What there is to say of a rival has been said of the plan already.
    quiet = replace(running, force=False, progress=_WithoutNotes(running.progress))
    contestants = {PLANNED: result}
    others = usual(model, target, planned, store) | {"random allocation": random_plan(planned)}
    # Beside the file, so that the winner is renamed and not copied.
    with tempfile.TemporaryDirectory(prefix=".dither-rivals-", dir=place.parent) as folder:
        for name, what in others.items():
            inside = Path(folder) / name.partition(" ")[0]
            inside.mkdir()
            out = inside / place.name
            if isinstance(what, PlanFile):
                contestants[name] = make_by_plan(model, what, making, quiet, out)
            else:
                solving = replace(making, solver=planned.plan.solver, transforms=planned.plan.transforms)
                # A preset, also where a folder's format is called the same (mxfp4).
                contestants[name] = make(model, Options(what), solving, quiet, out)
        rivals = tuple(Rival(name, r.bytes, judged(r.measurement, store)) for name, r in contestants.items())
        # A rival that is over the budget was not what was asked for, however good it is.
        able = [rival for rival in rivals if rival.name == PLANNED or excess(wanted, contestants[rival.name]) <= 0]
        winner = min(able, key=lambda rival: rival.kl).name
        if winner != PLANNED:
            kept, plan = Path(contestants[winner].path), others[winner]
            if place.is_dir():
                shutil.rmtree(place)
            kept.replace(place)
            path_for(kept).replace(path_for(place))
            if isinstance(plan, PlanFile):
                write_plan(beside, plan, force=True)
            else:
                beside.unlink()
    return replace(contestants[winner], path=str(place)), rivals, winner


def excess(wanted: Budget, result: Result) -> int:
    """Bytes beyond the budget."""
    if wanted.file is not None:
        return result.bytes - wanted.file
    return 0 if wanted.tensors is None else result.mix.tensor_bytes - wanted.tensors


def usual(model: Model, target: Target, planned: Planned, store: EvidenceStore) -> dict[str, str | PlanFile]:
    """What one would make in this size without a plan: the nearest preset, or in a folder one type for all
    matrices."""
    if not target.options.folder:
        preset = nearest_preset(model, planned.limit, store.tensors)
        return {f"preset {preset}": preset}
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    names = list(planned.plan.tensors)
    fixed = planned.plan.tensor_bytes - sum(entry.bytes for entry in planned.plan.tensors.values())
    # The bytes of every type that all matrices can take.
    sizes = {
        kind: fixed + sum(target.bytes_of(kind, shapes[name]) for name in names)
        for kind in target.types(model, None)
        if all(not isinstance(target.can_hold(kind, shapes[name]), No) for name in names)
    }
    # The largest within the budget; where none is, the smallest, which then cannot win.
    fitting = {kind: size for kind, size in sizes.items() if size <= planned.limit}
    kind = max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)
    tensors = {
        name: replace(entry, type=kind, bytes=target.bytes_of(kind, shapes[name]), kl=None)
        for name, entry in planned.plan.tensors.items()
    }
    return {f"{kind} throughout": replace(planned.plan, tensors=tensors, kl=None, tensor_bytes=sizes[kind], bytes=None)}


def random_plan(planned: Planned, seed: int = 0) -> PlanFile:
    """Another plan of about the same size, drawn blindly."""
    drawn = random_allocation(planned.items, planned.allowed, seed)
    pairs = zip(planned.items, drawn.chosen, strict=True)
    tensors = {name: planned.prices[name][choice.type] for item, choice in pairs for name in item.tensors}
    return replace(
        planned.plan, tensors={**planned.plan.tensors, **tensors}, kl=drawn.kl, tensor_bytes=planned.limit, bytes=None
    )


def judged(found: Measurement | None, store: EvidenceStore) -> float:
    """Mean divergence on the held-back sequences that no sensitivity was measured on."""
    assert found is not None
    first, second = halves(store)
    skip = len(first.lengths_S) if second is not first else 0
    kl_S, tokens_S = np.array(found.sequence_kl)[skip:], np.array(found.sequence_tokens)[skip:]
    return float(np.average(kl_S, weights=tokens_S))


def remove(path: Path) -> None:
    """A file or a folder of ours, no longer wanted."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _WithoutNotes:
    """A `Progress` of bars alone."""

    def __init__(self, progress: Progress) -> None:
        self.start, self.advance = progress.start, progress.advance

    def note(self, text: str) -> None:
        pass
