"""`dither plan` and `dither ladder`: the type of every tensor for a size, and several sizes at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.measure import between, short
from dither.cli.options import (
    BudgetOptions,
    Evidence,
    Force,
    GridOptions,
    Json,
    ModelName,
    RunningOptions,
    SolvingOptions,
    Types,
    split_types,
    spread,
)
from dither.cli.screen import Meter, copyable, out, plain, print_json, print_notes, stop_on_error, table
from dither.errors import UsageError
from dither.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from dither.planning.budget import Within
    from dither.planning.ladder import Rung
    from dither.planning.plan import Planned
    from dither.planning.reach import Budget


@spread
def plan(
    *,
    model: ModelName,
    budget: BudgetOptions,
    evidence: Evidence = None,
    solving: SolvingOptions,
    types: Types = None,
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="A GPU format that mixes types: gptq, w4a16. Default: GGUF.")
    ] = None,
    grid: GridOptions,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the plan goes.")] = Path(
        "plan.toml"
    ),
    running: RunningOptions,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose every tensor's type for a size, by measured sensitivity."""
    with stop_on_error(as_json, resumable=True):
        from dither.models.source import open_model
        from dither.planning import plan as job

        budget.check_on_hub(model, to, grid, types)
        opened = open_model(model)
        wanted = budget.wanted(opened)
        with Meter() as meter:
            found = job.plan(
                opened,
                wanted,
                evidence=evidence,
                types=split_types(types),
                to=to,
                out=output,
                force=force,
                progress=meter,
                **solving.keywords(),
                **vars(grid),
                **vars(running),
            )
        if as_json:
            print_json(found.to_json())
            return
        print_plan(found, wanted)
        words = " ".join(["dither quantize", copyable(model), "--plan", copyable(str(output))])
        out.print(f"Make it:  {words} --evidence {copyable(found.evidence)}", soft_wrap=True)


_LEFT = "finished files stay, and what was learnt: leave their rungs out, or pass --force"  # of a ladder


@spread
def ladder(
    *,
    model: ModelName,
    sizes: Annotated[str | None, typer.Option(metavar="A,B,…", help="Files of these sizes: 3GiB,4GiB,5GiB.")] = None,
    to: Annotated[str | None, typer.Option(metavar="A,B,…", help="And of these presets: Q4_K_M,Q5_K_M.")] = None,
    evidence: Evidence = None,
    solving: SolvingOptions,
    types: Types = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where files go.")] = Path(),
    running: RunningOptions,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make several sizes of a model, and show what each costs."""
    with stop_on_error(as_json, resumable=_LEFT):
        from dither.models.source import open_model
        from dither.planning import ladder as job
        from dither.planning.plan import budget

        for size in split_types(sizes) or ():
            BudgetOptions(size=size).check_on_hub(model, None, GridOptions(), types)
        opened = open_model(model)
        wanted: list[Any] = [budget(size=size, parameters=opened.parameters) for size in split_types(sizes) or ()]
        wanted += split_types(to) or ()
        if not wanted:
            raise UsageError("the ladder", "has no rungs", "Name some: --sizes 3GiB,4GiB or --to Q4_K_M,Q5_K_M.")
        with Meter() as meter:
            rungs = job.ladder(
                opened,
                wanted,
                output,
                evidence=evidence,
                types=split_types(types),
                force=force,
                progress=meter,
                **solving.keywords(),
                **vars(running),
            )
        print_json([rung.to_json() for rung in rungs]) if as_json else out.print(rungs_table(rungs))


def print_plan(found: Planned, wanted: Budget) -> None:
    shown = table("type", numbers=("tensors", "bytes", "of tensors", "predicted KL"))
    for kind, count, total, kl in found.by_type():
        share = f"{100 * total / found.plan.tensor_bytes:.1f} %"
        shown.add_row(kind, str(count), format_bytes(total), share, short(kl) if kl else "")
    out.print(shown)
    out.print(
        f"For {plain(wanted.said)}: [bold]{format_bytes(found.file_bytes)}[/], "
        f"{found.bits_per_weight:.2f} bits per weight, predicted KL divergence "
        f"{short(found.plan.kl or 0.0)}; {format_seconds(found.seconds)}"
    )
    print_notes(found.notes)


def print_validation(found: Within) -> None:
    """What the plan was held against."""
    if not found.rivals:
        return
    parts = [f"{plain(rival.name)} {short(rival.kl)}" for rival in found.rivals]
    out.print(f"On text kept for judging, KL divergence: {', '.join(parts)}. Kept: [bold]{plain(found.winner)}[/].")
    predicted, measured = found.planned.plan.kl, found.result.measurement
    if predicted is not None and measured is not None and found.winner == "plan":
        out.print(f"Predicted {short(predicted)}, measured {short(measured.kl_mean)}.")


def rungs_table(rungs: list[Rung]) -> Table:
    shown = table("file", numbers=("size", "bpw", "KL", "95 % interval", "made in"))
    for rung in rungs:
        shown.add_row(
            plain(Path(rung.path).name),
            format_bytes(rung.bytes),
            f"{rung.bits_per_weight:.2f}",
            short(rung.kl),
            between(rung.kl_low, rung.kl_high),
            format_seconds(rung.seconds),
        )
    return shown


COMMANDS = {30: plan, 40: ladder}
