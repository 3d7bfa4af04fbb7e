"""The card of a model's folder: what a person finds who opens it, every figure from the run that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dither._version import __version__
from dither.containers.mix import Mix, Options
from dither.containers.provenance import method_of, name_note
from dither.system.text import printable
from dither.types import Model
from dither.units import format_bytes, format_count


def card(model: Model, options: Options, mix: Mix, recipe: str, size: int, measured: Any = None) -> str:
    """README.md.  `measured` is the run's measurement, if there was one."""
    rows = [
        ("made from", model.name),
        ("weights", format_count(mix.parameters)),
        ("size", format_bytes(size)),
        ("bits per weight", f"{mix.bits_per_weight:.2f}"),
        ("types", ", ".join(f"{group['tensors']} × {kind}" for kind, group in mix.by_type().items())),
    ]
    known = json.loads(recipe)
    rows += [("method", method)] if (method := method_of(known)) else []
    if measured is not None:
        rows += measured_rows(measured)
    made = json.dumps(known, indent=2)
    beware = f"\n\n{note}" if (note := name_note(known)) else ""
    front = f"---\nbase_model: {json.dumps(model.name)}\ntags:\n- quantized\n- dither\n---\n"
    return (
        f"{front}\n# {cell(model.name)}, {cell(options.label)}\n\n{table(rows)}{beware}\n\n"
        f"Made by Dither {__version__}; the recipe:\n\n```json\n{made}\n```\n"
    )


def measured_rows(measured: Any) -> list[tuple[str, str]]:
    """What a file lost, a row each, from its measurement (`measuring.schema.Measurement`)."""
    ends = measured.kl_mean.both
    between = f" ({ends[0]:.4f} … {ends[1]:.4f})" if ends else ""
    return [
        ("KL divergence from the original", f"{measured.kl_mean:.4f} nats per token{between}"),
        ("same most likely token", f"{100 * measured.same_top:.1f} %"),
        ("measured on", measured.text),
    ]


def renewed_card(text: str, measured: Any) -> str:
    """A card of ours with another measurement; a stranger's is left as it is.

    >>> class Measured:
    ...     kl_mean, same_top, text = type("Kl", (float,), {"both": None})(0.5), 0.9, "4096 tokens of a.txt"
    >>> print(renewed_card("| | |\\n|---|---|\\n| size | 1 |\\n| measured on | x |\\n\\nMade by Dither 1", Measured))
    | | |
    |---|---|
    | size | 1 |
    | KL divergence from the original | 0.5000 nats per token |
    | same most likely token | 90.0 % |
    | measured on | 4096 tokens of a.txt |
    <BLANKLINE>
    Made by Dither 1
    """
    head, rule, rest = text.partition("\n|---|---|\n")
    if not rule or "\nMade by Dither " not in rest:
        return text
    rows, below = rest.split("\n\n", 1)
    new = measured_rows(measured)
    kept = [row for row in rows.split("\n") if not any(row.startswith(f"| {key} |") for key, _ in new)]
    shown = [f"| {cell(key)} | {cell(value)} |" for key, value in new]
    return head + rule + "\n".join([*kept, *shown]) + "\n\n" + below


def cell(text: str) -> str:
    """Text of strangers inside a table."""
    return printable(text, " ").replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def table(rows: Iterable[tuple[str, str]]) -> str:
    """What is known of a file, a row each."""
    return "| | |\n|---|---|\n" + "\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in rows)
