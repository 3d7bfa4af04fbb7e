"""`dither quantize`: a checkpoint or a GGUF goes in, a GGUF or a folder for GPU engines comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dither.cli.plan import (
    Bpw,
    Context,
    Group,
    Kv,
    MaxKld,
    Memory,
    Size,
    Slots,
    Sym,
    Types,
    budget_of,
    print_validation,
    split_types,
)
from dither.cli.screen import Meter, copyable, err, out, plain, print_json, stop_on_error
from dither.errors import UsageError
from dither.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from dither.measuring.schema import Measurement
    from dither.types import Model


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a .gguf file, or a hub id (org/name).")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="A GGUF type, such as Q4_K_M, or a GPU format, such as gptq, awq, w4a16, fp8 or nf4; "
            "`dither types` lists them all.",
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a GPU format's integers.")] = None,
    group: Group = None,
    sym: Sym = None,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="GPTQ's groups by what columns matter; slower in some engines.")
    ] = False,
    size: Size = None,
    bpw: Bpw = None,
    memory: Memory = None,
    context: Context = 8192,
    kv: Kv = "f16",
    slots: Slots = 1,
    max_kld: MaxKld = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="A plan of `dither plan`, replayed.")
    ] = None,
    types: Types = None,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="With a budget: do not hold the plan against other files.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="PATH", help="Default: <model>-<TYPE>.gguf or <model>-<to>/."),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            "--evidence",
            "--imatrix",
            metavar="PATH",
            help="A folder of `dither calibrate`, or an importance matrix (.gguf, .dat).",
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="nearest, half-quadratic, scales, gptq or learned. Default: gptq where there are Hessians."),
    ] = None,
    transform: Annotated[
        list[str] | None, typer.Option(help="Rewrite the model first: awq, rotate; repeatable, in order.")
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="Hessians of the original's inputs (parallel), or behind quantized layers (sequential)."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the KL divergence and keep it in the file.")
    ] = False,
    measure_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure on (or self). Default: what calibration held back."),
    ] = None,
    tensor: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=TYPE", help="A type for tensors by name; repeatable.")
    ] = None,
    output_type: Annotated[str | None, typer.Option(help="Type of the output matrix.")] = None,
    embedding_type: Annotated[str | None, typer.Option(help="Type of the token embedding.")] = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices, no mix.")] = False,
    pre: Annotated[str | None, typer.Option(metavar="NAME", help="The pre-tokenizer, where unknown.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores at hand.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs when it is measured: cpu, cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Quantize a model, for llama.cpp or for GPUs: to a type, within a budget, or by a plan."""
    with stop_on_error(as_json, resumable=not dry_run):
        from dither.containers.folders import find_scheme
        from dither.containers.provenance import source_notes
        from dither.models.source import open_model
        from dither.quantizing import quantize as job

        budgets = (size, bpw, memory, max_kld)
        budgeted = sum(given is not None for given in budgets)
        named = sum(given is not None for given in (to, plan))
        mixes = budgeted == 1 and plan is None and to is not None and find_scheme(to) is not None
        if budgeted + named != 1 and not mixes:
            raise UsageError(
                "the request",
                "wants one of --to, --plan, --size, --bpw, --memory and --max-kld",
                "For example --to Q4_K_M, or --size 4.2GiB.",
            )
        if budgeted:
            others = (dry_run, tensor, output_type, embedding_type, pure, statistics, measure_data, bits, act_order)
            if any(others):
                raise UsageError(
                    "a budget",
                    "leaves every choice of types to the plan, which is always measured",
                    "Use `dither plan`, edit what it writes, and pass --plan.",
                )
            _within_budget(
                open_model(model, pre=pre),
                budgets,
                (context, kv, slots),
                as_json,
                output,
                evidence=evidence,
                solver=solver,
                transforms=transform or (),
                types=split_types(types),
                to=to,
                group=group,
                sym=sym,
                validate=not no_validate,
                threads=threads,
                device=device,
                force=force,
            )
            return

        if types is not None or no_validate:
            raise UsageError(
                "--types" if types is not None else "--no-validate",
                "goes with a budget",
                "Add --size, --bpw, --memory or --max-kld, or leave it out.",
            )
        overrides = [parse_override(text) for text in tensor or ()]
        common = {
            "evidence": evidence,
            "tensors": overrides,
            "output_type": output_type,
            "embedding_type": embedding_type,
            "pure": pure,
            "pre": pre,
            "bits": bits,
            "group": group,
            "sym": sym,
        }
        if dry_run:
            if to is None:
                raise UsageError("--dry-run", "prints a preset's plan", "A plan file can be read as it is.")
            opened = open_model(model, pre=pre)
            mix = job.preview(opened, to, **common)  # type: ignore[arg-type]
            notes = [*opened.notes, *source_notes(opened, mix), *mix.notes()]
            print_json({**mix.to_json(), "notes": notes}) if as_json else print_mix(mix, notes)
            return
        with Meter() as meter:
            result = job.quantize(
                model,
                to,
                output,
                plan=plan,
                solver=solver,
                transforms=transform or (),
                statistics=statistics,
                measure=measure_data or measure,
                threads=threads,
                device=device,
                force=force,
                progress=meter,
                act_order=act_order,
                **common,  # type: ignore[arg-type]
            )
        print_json(result.to_json()) if as_json else print_result(result)


def _within_budget(
    model: Model,
    budgets: tuple[Any, ...],
    running: tuple[int, str, int],
    as_json: bool,
    output: str | None,
    **options: Any,
) -> None:
    from dither.planning import budget as job

    size, bpw, memory, max_kld = budgets
    wanted = budget_of(model, size, bpw, memory, *running, max_kld)
    with Meter() as meter:
        found = job.quantize_within(model, wanted, output, progress=meter, **options)
    if as_json:
        print_json(found.to_json())
        return
    print_result(found.result)
    print_validation(found)


def parse_override(text: str) -> tuple[str, str]:
    """`REGEX=TYPE` split at its last `=`.  Raises UsageError where there is none."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise UsageError(f"--tensor {text}", "is not REGEX=TYPE", r"For example --tensor 'ffn_down=Q6_K'.")
    return pattern, kind if "-" in kind else kind.upper()


def print_mix(plan: object, notes: list[str]) -> None:
    from dither.containers.mix import Mix

    assert isinstance(plan, Mix)
    out.print(types_table(plan))
    for note in notes:
        err.print(f"[yellow]note:[/] {plain(note)}")
    out.print(
        f"{format_count(plan.parameters)} parameters, {plan.bits_per_weight:.2f} bits per weight: "
        f"{format_bytes(plan.bytes)} of tensors, from {format_bytes(plan.source_bytes)}. Nothing was written."
    )


def types_table(plan: object) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("type")
    for heading in ("tensors", "weights", "bytes", "bits/weight", "of the file"):
        table.add_column(heading, justify="right")
    for kind, group in plan.by_type().items():  # type: ignore[attr-defined]
        table.add_row(
            kind,
            str(group["tensors"]),
            format_count(group["parameters"]),
            format_bytes(group["bytes"]),
            f"{8 * group['bytes'] / group['parameters']:.2f}",
            f"{100 * group['bytes'] / plan.bytes:.1f} %",  # type: ignore[attr-defined]
        )
    return table


def print_result(result: object) -> None:
    from dither.quantizing.quantize import Result

    assert isinstance(result, Result)
    out.print(types_table(result.plan))
    out.print(
        f"[bold]{plain(result.path)}[/]: {format_bytes(result.bytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight, {against_source(result.compression)}, "
        f"relative weight error {100 * result.relative_error:.2f} %, {format_seconds(result.seconds)}"
    )
    if result.solvers:
        kept = ", ".join(f"{count} by {name}" for name, count in result.solvers.items())
        out.print(f"Layers solved: {kept}.")
    if result.measurement:
        out.print(measured(result.measurement))
    if result.path.endswith(".gguf"):
        out.print(f"Talk to it:  {copyable('dither', 'chat', result.path)}", soft_wrap=True)
    else:
        out.print(f"Look at it:  {copyable('dither', 'inspect', result.path)}", soft_wrap=True)


def measured(found: Measurement) -> str:
    return (
        f"KL divergence {found.kl_mean:.4f} ({found.kl_mean.low:.4f} … {found.kl_mean.high:.4f}), "
        f"same top token {100 * found.same_top:.1f} %, perplexity × {found.ppl_ratio:.3f}, "
        f"on {format_count(found.tokens)} tokens of text {plain(found.data)}"
    )


def against_source(compression: float) -> str:
    """
    >>> against_source(3.3), against_source(0.93)
    ('3.30× smaller than the source', 'larger than the source (0.93×)')
    """
    if compression < 1:
        return f"larger than the source ({compression:.2f}×)"
    return f"{compression:.2f}× smaller than the source"


COMMANDS = {10: quantize}
HIDDEN = {"quantise": quantize}  # as it is spelled elsewhere
