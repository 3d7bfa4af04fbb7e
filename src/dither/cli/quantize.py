"""`dither quantize`: a checkpoint or a GGUF goes in, a GGUF or a folder for GPU engines comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.options import (
    BudgetOptions,
    Check,
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
from dither.cli.plan import print_validation
from dither.cli.screen import Meter, copyable, out, plain, print_json, print_notes, stop_on_error, table
from dither.errors import UsageError
from dither.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from dither.containers.mix import Mix
    from dither.measuring.schema import Measurement
    from dither.quantizing.result import Result


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `dither quantize` may be asked."""

    to: Annotated[
        str | None,
        typer.Option(
            help="A GGUF type, such as Q4_K_M, or a GPU format, such as gptq, awq, w4a16, fp8 or nf4; "
            "`dither types` lists them all."
        ),
    ] = None
    bits: Annotated[int | None, typer.Option(help="Bits of a GPU format's integers.")] = None
    grid: GridOptions
    act_order: Annotated[
        bool, typer.Option("--act-order", help="GPTQ's groups by how much columns matter; slower in some engines.")
    ] = False
    budget: BudgetOptions
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan of `dither plan`, replayed.")] = None
    types: Types = None
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="With a budget: do not hold the plan against other files.")
    ] = False
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="PATH", help="Default: <model>-<TYPE>.gguf or <model>-<to>/."),
    ] = None
    evidence: Annotated[
        Path | None,
        typer.Option(
            "--evidence",
            "--imatrix",
            metavar="PATH",
            help="A folder of `dither calibrate`, or an importance matrix (.gguf, .dat).",
        ),
    ] = None
    solving: SolvingOptions
    statistics: Annotated[
        str | None,
        typer.Option(help="Hessians of the original's inputs (parallel), or behind quantized layers (sequential)."),
    ] = None
    measure: Annotated[bool, typer.Option("--measure", help="Measure the KL divergence and keep it in the file.")] = (
        False
    )
    measure_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure on (or self). Default: what calibration held back."),
    ] = None
    check: Check = False
    tensor: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=TYPE", help="A type for tensors by name; repeatable.")
    ] = None
    output_type: Annotated[str | None, typer.Option(help="Type of the output matrix.")] = None
    embedding_type: Annotated[str | None, typer.Option(help="Type of the token embedding.")] = None
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices, no mix.")] = False
    pre: Annotated[str | None, typer.Option(metavar="NAME", help="The pre-tokenizer, where unknown.")] = None
    running: RunningOptions
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What this run may hold in memory, its files not counted.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False
    force: Force = False
    as_json: Json = False

    def types_of_tensors(self) -> dict[str, Any]:
        """What chooses types, as keywords of `dither.quantize` and `dither.preview`."""
        return {
            "evidence": self.evidence,
            "tensors": [parse_override(text) for text in self.tensor or ()],
            "output_type": self.output_type,
            "embedding_type": self.embedding_type,
            "pure": self.pure,
            "pre": self.pre,
            "bits": self.bits,
            **vars(self.grid),
        }


@spread
def quantize(model: ModelName, asked: Request) -> None:
    """Quantize a model: to a type, within a budget, or by a plan."""
    with stop_on_error(asked.as_json, resumable=not asked.dry_run):
        _program(asked)(model, asked)


def _program(asked: Request) -> Callable[[str, Request], None]:
    """Raises UsageError unless one thing is asked for: a type, a plan, or a budget, which a container may go with."""
    from dither.containers.folders import find_scheme

    named = sum(given is not None for given in (asked.to, asked.plan))
    mixes = asked.plan is None and asked.to is not None and find_scheme(asked.to) is not None
    if asked.budget.count + named != 1 and not (asked.budget.count == 1 and mixes):
        reason = "wants one of --to, --plan, --size, --bpw, --memory and --max-kld"
        raise UsageError("the request", reason, "For example --to Q4_K_M, or --size 4.2GiB.")
    if asked.budget.count:
        return _by_budget
    if asked.types is not None or asked.no_validate:
        reason, way_out = "goes with a budget", "Add --size, --bpw, --memory or --max-kld, or leave it out."
        raise UsageError("--types" if asked.types is not None else "--no-validate", reason, way_out)
    return _dry_run if asked.dry_run else _by_type_or_plan


def _by_budget(model: str, asked: Request) -> None:
    from dither.models.source import open_model
    from dither.planning import budget as job

    others = (asked.dry_run, asked.tensor, asked.output_type, asked.embedding_type, asked.pure, asked.statistics)
    if asked.max_memory is not None:
        reason = "bounds one quantizing, and a budget calibrates, plans and makes several files"
        raise UsageError("--max-memory", reason, "Use `dither plan`, and pass --max-memory beside --plan.")
    if any(others) or asked.measure_data or asked.bits is not None or asked.act_order:
        reason = "leaves every choice of types to the plan, which is always measured"
        raise UsageError("a budget", reason, "Use `dither plan`, edit what it writes, and pass --plan.")
    asked.budget.check_on_hub(model, asked.to, asked.grid, asked.types)
    source = open_model(model, pre=asked.pre)
    wanted = asked.budget.wanted(source)
    with Meter() as meter:
        found = job.quantize_within(
            source,
            wanted,
            asked.output,
            to=asked.to,
            evidence=asked.evidence,
            types=split_types(asked.types),
            validate=not asked.no_validate,
            check=asked.check,
            force=asked.force,
            progress=meter,
            **asked.solving.keywords(),
            **vars(asked.grid),
            **vars(asked.running),
        )
    if asked.as_json:
        print_json(found.to_json())
        return
    print_result(found.result)
    print_validation(found)


def _dry_run(model: str, asked: Request) -> None:
    from dither.containers.provenance import source_notes
    from dither.models.source import open_model
    from dither.quantizing import quantize as job

    if asked.to is None:
        raise UsageError("--dry-run", "prints a preset's plan", "A plan file can be read as it is.")
    source = open_model(model, pre=asked.pre)
    measure = bool(asked.measure or asked.measure_data)
    mix = job.preview(source, asked.to, solver=asked.solving.solver, measure=measure, **asked.types_of_tensors())
    notes = [*source.notes, *source_notes(source, mix), *mix.notes()]
    print_json({**mix.to_json(), "notes": notes}) if asked.as_json else print_mix(mix, notes)


def _by_type_or_plan(model: str, asked: Request) -> None:
    from dither.quantizing import quantize as job

    with Meter() as meter:
        result = job.quantize(
            model,
            asked.to,
            asked.output,
            plan=asked.plan,
            statistics=asked.statistics,
            measure=asked.measure_data or asked.measure,
            check=asked.check,
            act_order=asked.act_order,
            max_memory=asked.max_memory,
            force=asked.force,
            progress=meter,
            **asked.types_of_tensors(),
            **asked.solving.keywords(),
            **vars(asked.running),
        )
    print_json(result.to_json()) if asked.as_json else print_result(result)


def parse_override(text: str) -> tuple[str, str]:
    """`REGEX=TYPE` split at its last `=`.  Raises UsageError where there is none."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise UsageError(f"--tensor {text}", "is not REGEX=TYPE", r"For example --tensor 'ffn_down=Q6_K'.")
    return pattern, kind if "-" in kind else kind.upper()


def print_mix(mix: Mix, notes: list[str]) -> None:
    out.print(types_table(mix))
    print_notes(notes)
    out.print(
        f"{format_count(mix.parameters)} parameters, {mix.bits_per_weight:.2f} bits per weight: "
        f"{format_bytes(mix.file_bytes or 0)}, {format_bytes(mix.tensor_bytes)} of it tensors, from "
        f"{format_bytes(mix.source_bytes)} of tensors. Nothing was written."
    )


def types_table(mix: Mix) -> Table:
    shown = table("type", numbers=("tensors", "weights", "bytes", "bits/weight", "of tensors"))
    for kind, group in mix.by_type().items():
        shown.add_row(
            kind,
            str(group["tensors"]),
            format_count(group["parameters"]),
            format_bytes(group["bytes"]),
            f"{8 * group['bytes'] / group['parameters']:.2f}",
            f"{100 * group['bytes'] / mix.tensor_bytes:.1f} %",
        )
    return shown


def print_result(result: Result) -> None:
    out.print(types_table(result.mix))
    out.print(
        f"[bold]{plain(result.path)}[/]: {format_bytes(result.bytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight, {against_source(result.compression)}, "
        f"relative weight error {100 * result.relative_error:.2f} %, {format_seconds(result.seconds)}"
    )
    kept = ", ".join(f"{count} by {name}" for name, count in (result.solvers or {}).items())
    said = [f"Method: {plain(result.method)}." if result.method else "", f"Layers solved: {kept}." if kept else ""]
    if any(said):
        out.print(" ".join(filter(None, said)))
    if result.measurement:
        out.print(measured(result.measurement))
    if result.checked:
        out.print(f"{result.checked.engine} loaded it before it got its name, and computed a token with it.")
    advice, command = ("Talk to it", "chat") if result.path.endswith(".gguf") else ("Look at it", "inspect")
    out.print(f"{advice}:  {copyable('dither', command, result.path)}", soft_wrap=True)


def measured(found: Measurement) -> str:
    ends = found.kl_mean.both
    return (
        f"KL divergence {found.kl_mean:.4f}{f' ({ends[0]:.4f} … {ends[1]:.4f})' if ends else ''}, "
        f"same top token {100 * found.same_top:.1f} %, perplexity × {found.ppl_ratio:.3f}, "
        f"on {plain(found.text)}"
    )


def against_source(compression: float) -> str:
    """
    >>> against_source(3.3), against_source(0.93)
    ('3.30× smaller than the source', 'larger than the source (0.93×)')
    """
    times = f"{compression:.2f}×"
    return f"larger than the source ({times})" if compression < 1 else f"{times} smaller than the source"


COMMANDS = {10: quantize}
HIDDEN = {"quantise": quantize}  # as it is spelled elsewhere
