"""`dither inspect` and `dither types`: what a file contains, and which types there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.options import ModelName
from dither.cli.screen import out, plain, print_json, stop_on_error, table
from dither.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

    from dither.reporting.inspect import Inspection


def inspect(
    model: ModelName,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    pre: Annotated[str | None, typer.Option(metavar="NAME", help="The pre-tokenizer, if it is not recognized.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a model or a file contains, and how it was made."""
    with stop_on_error(as_json):
        from dither.reporting.inspect import inspect as look

        found = look(model, pre=pre)
        if as_json:
            print_json({key: value for key, value in found.to_json().items() if tensors or key != "tensors"})
            return
        out.print(facts_table(found))
        for shown in (types_table(found), groups_table(found), *([tensors_table(found)] if tensors else [])):
            out.print()
            out.print(shown)


def facts_table(found: Inspection) -> Table:
    shown = table("", "", show_header=False)
    size = f"{format_bytes(found.bytes)}, {format_bytes(found.tensor_bytes)} of it tensors, "
    size += f"{found.bits_per_weight:.3f} bits per weight"
    facts = [
        ("model", f"{found.name} ({found.kind})"),
        ("architecture", _architecture(found)),
        ("parameters", format_count(found.parameters) + (f", {found.experts} experts" if found.experts else "")),
        ("size", size + (f", {found.file_type}" if found.file_type else "")),
        ("context", f"{found.context} tokens" if found.context else "not said"),
        ("tokenizer", _tokenizer(found)),
        ("chat template", "yes" if found.chat_template else "none: a base model, it continues text"),
        ("made by", _made_by(found.made_by)),
        ("measured", _measured(found.measurement)),
    ]
    for label, text in [*facts, *(("note", note) for note in found.notes)]:
        shown.add_row(f"[bold]{label}[/]", plain(text))
    return shown


def _architecture(found: Inspection) -> str:
    facts = [
        (found.blocks, f"{found.blocks} blocks"),
        (found.embedding, f"width {found.embedding}"),
        (found.heads, f"{_per_layer(found.heads)} heads"),
        (found.kv_heads, f"{_per_layer(found.kv_heads)} for keys and values"),
    ]
    return ", ".join([found.arch, *(text for value, text in facts if value is not None)])


def _per_layer(value: Any) -> str:
    """A number, or the range of those that differ from layer to layer."""
    if not isinstance(value, list) or not value:
        return str(value)
    return str(value[0]) if min(value) == max(value) else f"{min(value)} to {max(value)}"


def _tokenizer(found: Inspection) -> str:
    pre = f", pre-tokenizer {found.pre}" if found.pre else ""
    return f"{found.tokenizer}, {found.vocabulary} tokens{pre}" if found.tokenizer else "none in the file"


def _measured(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not in the file"
    low, high = found["kl_mean_low"], found["kl_mean_high"]
    between = "" if low is None else f" ({low:.4f} … {high:.4f})"
    return (
        f"KL divergence {found['kl_mean']:.4f}{between} "
        f"against {found['reference']}, same top token {100 * found['same_top']:.1f} %, "
        f"perplexity × {found['ppl_ratio']:.3f}, on {format_count(found['tokens'])} tokens of {found['data']}"
        + (", a thin proof" if found["thin"] else "")
    )


def _made_by(made: dict[str, Any]) -> str:
    parts = []
    for key, value in made.items():
        if key == "recipe" and isinstance(value, dict):
            value = ", ".join(f"{k} {_short(v)}" for k, v in value.items() if k not in ("source", "method"))
        parts.append(str(value) if key == "tool" else f"{key}: {value}")
    return "; ".join(parts) or "not said"


def _short(value: Any) -> str:
    """What stands in a recipe, without what only `--json` has room for."""
    if not isinstance(value, dict):
        return str(value)
    if "sha256" in value:
        return str(value.get("name") or value.get("data", {}).get("name", "")) + f" ({value['sha256'][:8]})"
    return ", ".join(map(str, value))


def types_table(found: Inspection) -> Table:
    shown = table("type", numbers=("tensors", "weights", "bytes", "bits/weight"))
    for kind, group in found.types.items():
        tensors, weights, size = (group[key] for key in ("tensors", "parameters", "bytes"))
        bits = f"{8 * size / max(1, weights):.2f}"
        shown.add_row(kind, str(tensors), format_count(weights), format_bytes(size), bits)
    return shown


def groups_table(found: Inspection) -> Table:
    shown = table("tensors", "types")
    for group, types in found.groups.items():
        shown.add_row(plain(group), ", ".join(f"{count} × {kind}" for kind, count in types.items()))
    return shown


def tensors_table(found: Inspection) -> Table:
    shown = table("tensor", "shape", "type", numbers=("bytes",))
    for tensor in found.tensors:
        shape = " × ".join(map(str, tensor["shape"]))
        shown.add_row(plain(tensor["name"]), shape, tensor["type"], format_bytes(tensor["bytes"]))
    return shown


def types(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the types that a model can be quantized to."""
    with stop_on_error(as_json):
        from dither.containers.folders import schemes
        from dither.containers.presets import describe, preset_names

        described = {name: describe(name) for name in preset_names()}
        described |= {name: scheme.words for name, scheme in schemes().items()}
        if as_json:
            print_json(described)
            return
        shown = table("type", "what it is")
        shown.columns[0].no_wrap = True
        for name, words in described.items():
            shown.add_row(name, plain(words))
        out.print(shown)


COMMANDS = {90: inspect, 100: types}
