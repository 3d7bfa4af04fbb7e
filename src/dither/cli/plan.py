"""`dither plan` and `dither ladder`: the type of every tensor for a size, and several sizes at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dither.cli.measure import short
from dither.cli.screen import Meter, copyable, err, out, plain, print_json, stop_on_error
from dither.errors import UsageError
from dither.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from dither.planning.budget import Rung, Within
    from dither.planning.plan import Budget, Planned
    from dither.types import Model

Size = Annotated[str | None, typer.Option("--size", metavar="SIZE", help="Of the file: 4.2GiB, 900MB.")]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Bits per weight, scales included.")]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="What the running model may take, context included.")
]
Context = Annotated[int, typer.Option("-c", "--context", min=1, help="With --memory: tokens of context.")]
Kv = Annotated[str, typer.Option("--kv", help="With --memory: type of the KV cache: f16, q8_0, q4_0.")]
Slots = Annotated[int, typer.Option("--slots", min=1, help="With --memory: conversations at once.")]
MaxKld = Annotated[float | None, typer.Option("--max-kld", help="The smallest file of at most this KL divergence.")]
Evidence = Annotated[
    Path | None,
    typer.Option("--evidence", metavar="FOLDER", help="Of `dither calibrate`; learnt first where none is given."),
]
Solver = Annotated[
    str | None, typer.Option(help="nearest, half-quadratic, scales, gptq or learned. Default: gptq where it can.")
]
Transform = Annotated[list[str] | None, typer.Option(help="Rewrite the model first: awq, rotate.")]
Types = Annotated[str | None, typer.Option("--types", metavar="A,B,…", help="Choose among these types only.")]
Container = Annotated[
    str | None,
    typer.Option("--to", metavar="FORMAT", help="A GPU format that mixes types: gptq, w4a16. Default: GGUF."),
]
Group = Annotated[
    int | None, typer.Option("--group", help="Columns that share a scale in a GPU format; 0: the whole row.")
]
Sym = Annotated[bool | None, typer.Option("--sym/--asym", help="Integers around zero, or with zero points.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: the cores at hand.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a .gguf file, or a hub id (org/name).")
]


def plan(
    model: ModelName,
    size: Size = None,
    bpw: Bpw = None,
    memory: Memory = None,
    context: Context = 8192,
    kv: Kv = "f16",
    slots: Slots = 1,
    max_kld: MaxKld = None,
    evidence: Evidence = None,
    solver: Solver = None,
    transform: Transform = None,
    types: Types = None,
    to: Container = None,
    group: Group = None,
    sym: Sym = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the plan goes.")] = Path(
        "plan.toml"
    ),
    threads: Threads = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose every tensor's type for a size, from measured sensitivities."""
    with stop_on_error(as_json, resumable=True):
        from dither.models.source import open_model
        from dither.planning import plan as job

        opened = open_model(model)
        wanted = budget_of(opened, size, bpw, memory, context, kv, slots, max_kld)
        with Meter() as meter:
            found = job.plan(
                opened,
                wanted,
                evidence=evidence,
                solver=solver,
                transforms=transform or (),
                types=split_types(types),
                to=to,
                group=group,
                sym=sym,
                out=output,
                threads=threads,
                device=device,
                force=force,
                progress=meter,
            )
        if as_json:
            print_json(found.to_json())
            return
        print_plan(found, wanted)
        words = " ".join(["dither quantize", copyable(model), "--plan", copyable(str(output))])
        out.print(f"Make it:  {words} --evidence {copyable(found.evidence)}", soft_wrap=True)


def ladder(
    model: ModelName,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="A,B,…", help="Files of these sizes: 3GiB,4GiB,5GiB.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="A,B,…", help="And of these presets: Q4_K_M,Q5_K_M.")
    ] = None,
    evidence: Evidence = None,
    solver: Solver = None,
    transform: Transform = None,
    types: Types = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where files go.")] = Path(),
    threads: Threads = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make several sizes of a model on the same evidence, and show what each costs."""
    with stop_on_error(as_json, resumable=True):
        from dither.models.source import open_model
        from dither.planning import budget as budgets
        from dither.planning import plan as job

        opened = open_model(model)
        wanted: list[Any] = [job.budget(size=size, parameters=opened.parameters) for size in split_types(sizes) or ()]
        wanted += split_types(to) or ()
        if not wanted:
            raise UsageError("the ladder", "has no rungs", "Name some: --sizes 3GiB,4GiB or --to Q4_K_M,Q5_K_M.")
        with Meter() as meter:
            rungs = budgets.ladder(
                opened,
                wanted,
                output,
                evidence=evidence,
                solver=solver,
                transforms=transform or (),
                types=split_types(types),
                threads=threads,
                device=device,
                force=force,
                progress=meter,
            )
        print_json([rung.to_json() for rung in rungs]) if as_json else out.print(rungs_table(rungs))


def budget_of(
    model: Model,
    size: str | None,
    bpw: float | None,
    memory: str | None,
    context: int,
    kv: str,
    slots: int,
    max_kld: float | None,
) -> Budget:
    """The one budget that was asked for.  Raises UsageError for none or several."""
    from dither.planning.plan import budget

    weights = None
    if memory is not None:
        from dither.capacity.memory import weights_budget
        from dither.capacity.shape import shape_of

        weights = weights_budget(parse_bytes(memory), shape_of(model)[0], context, kv, slots)
    return budget(size=size, bpw=bpw, weights=weights, max_kld=max_kld, parameters=model.parameters)


def split_types(text: str | None) -> list[str] | None:
    """
    >>> split_types("Q4_K, Q6_K"), split_types(None)
    (['Q4_K', 'Q6_K'], None)
    """
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def print_plan(found: Planned, wanted: Budget) -> None:
    counted = Counter(tensor.type for tensor in found.plan.tensors.values())
    size = Counter[str]()
    for tensor in found.plan.tensors.values():
        size[tensor.type] += tensor.bytes
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("type")
    for heading in ("tensors", "bytes", "of the file", "predicted KL"):
        table.add_column(heading, justify="right")
    for kind, total in size.most_common():
        kl = sum(t.kl or 0.0 for t in found.plan.tensors.values() if t.type == kind)
        share = f"{100 * total / found.plan.bytes:.1f} %"
        table.add_row(kind, str(counted[kind]), format_bytes(total), share, short(kl) if kl else "")
    out.print(table)
    out.print(
        f"For {plain(wanted.said)}: [bold]{format_bytes(found.file_bytes)}[/], "
        f"{found.bits_per_weight:.2f} bits per weight, predicted KL divergence "
        f"{short(found.plan.kl or 0.0)}; {format_seconds(found.seconds)}"
    )
    for note in found.notes:
        err.print(f"[yellow]note:[/] {plain(note)}")


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
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    for heading in ("size", "bpw", "KL", "95 % interval", "made in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rung in rungs:
        table.add_row(
            plain(Path(rung.path).name),
            format_bytes(rung.bytes),
            f"{rung.bits_per_weight:.2f}",
            short(rung.kl),
            f"{short(rung.kl_low)}–{short(rung.kl_high)}",
            format_seconds(rung.seconds),
        )
    return table


COMMANDS = {30: plan, 40: ladder}
