"""A ladder: several budgets of one model on the same evidence, which is the size-quality frontier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.containers.gguf_target import ANY_GGUF
from dither.errors import UsageError
from dither.models.source import opened
from dither.planning.budget import label, quantize_within
from dither.planning.reach import Budget, check_reachable
from dither.quantizing.job import make
from dither.quantizing.paths import output_path
from dither.quantizing.quantize import preview
from dither.quantizing.request import Keywords, options_of, records, with_keywords
from dither.system.files import make_folder
from dither.types import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Rung:
    """One file of a ladder."""

    wanted: str
    path: str
    bytes: int
    bits_per_weight: float
    kl: float
    kl_low: float | None  # None where one sequence alone was scored
    kl_high: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@with_keywords
def ladder(
    model: str | Path | Model, wanted: Sequence[Budget | str], out: str | Path | None = None, **how: Unpack[Keywords]
) -> list[Rung]:
    """Several files of one model, each measured: a planned one for every budget, and presets by name.

    `out` is a folder (the current one).  Evidence and sensitivities are learnt once.  A rung whose file
    exists is an OutputError before any work, unless `force`.
    """
    making, running = records(ladder, how)
    source = opened(model)
    folder = Path(out) if out is not None else Path()
    names = [rung.upper() if isinstance(rung, str) else label(rung) for rung in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("the ladder", f"has two rungs called {name}", "Leave one out.")
    for budget in (rung for rung in wanted if isinstance(rung, Budget)):
        check_reachable(source, budget, ANY_GGUF, making.types)
    for preset in (rung for rung in wanted if isinstance(rung, str)):
        if making.evidence is None:
            raise UsageError("--to", "is measured on held-back text: it needs --evidence FOLDER")
        preview(source, preset, evidence=making.evidence)
    make_folder(folder, "Choose another with -o.")
    for name in names:
        output_path(source, ANY_GGUF, folder, running.force, [Path(file) for file in source.files], name)
    found = []
    # Budgets first: planning learns what is missing, and the presets are then made of the same.
    for rung in sorted(wanted, key=lambda rung: isinstance(rung, str)):
        began = time.monotonic()
        if isinstance(rung, Budget):
            result, said = quantize_within(source, rung, folder, validate=False, **how).result, rung.said
        else:
            measured = replace(making, measure=True)
            result, said = make(source, options_of(rung), measured, running, folder), rung.upper()
        assert result.measurement is not None
        kl = result.measurement
        costs = kl.kl_mean, kl.kl_mean.low, kl.kl_mean.high, time.monotonic() - began
        found.append(Rung(said, result.path, result.bytes, result.bits_per_weight, *costs))
    return sorted(found, key=lambda rung: rung.bytes)
