"""Options that commands share, each declared once.

A record of options is a frozen dataclass whose fields are declarations for typer.  A command takes whole
records; `spread` shows typer a signature in which a record's options stand in the record's place, and hands
the command its records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from dither.system.discovery import defining
from dither.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from dither.containers.target import Target
    from dither.planning.reach import Budget
    from dither.types import Model


def _one_of(room: str, attribute: str) -> str:
    """What a room offers, in words."""
    *others, last = defining(f"dither.{room}", attribute)
    return f"{', '.join(others)} or {last}"


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a .gguf file, or a hub id (org/name).")
]
Evidence = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Of `dither calibrate`; learnt first where none is given.")
]
Types = Annotated[str | None, typer.Option(metavar="A,B,…", help="Choose among these types only.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: the cores at hand.")]
Check = Annotated[bool, typer.Option("--check", help="Load the finished file once in the engine that runs it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class GridOptions:
    """The grid of a GPU format that leaves a choice."""

    group: Annotated[int | None, typer.Option(help="Columns that share a scale in a GPU format; 0: the whole row.")] = (
        None
    )
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Integers around zero, or with zero points.")] = None


@dataclass(frozen=True)
class BudgetOptions:
    """How large or how good: one of four, and what decides how much memory leaves for weights."""

    size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the file: 4.2GiB, 900MB.")] = None
    bpw: Annotated[float | None, typer.Option(help="Bits per weight, scales included.")] = None
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the running model may take, context included.")
    ] = None
    context: Annotated[int, typer.Option("-c", "--context", min=1, help="With --memory: tokens of context.")] = 8192
    kv: Annotated[str, typer.Option(help="With --memory: type of the KV cache: f16, q8_0, q4_0.")] = "f16"
    slots: Annotated[int, typer.Option(min=1, help="With --memory: conversations at once.")] = 1
    max_kld: Annotated[float | None, typer.Option(help="The smallest file of at most this KL divergence.")] = None

    @property
    def count(self) -> int:
        """How many of the four were given."""
        return sum(given is not None for given in (self.size, self.bpw, self.memory, self.max_kld))

    def wanted(self, model: Model) -> Budget:
        """The one budget that was asked for.  Raises UsageError for none or several."""
        from dither.planning.plan import budget

        memory = weights = beside = None
        if self.memory is not None:
            from dither.capacity.memory import needed, weights_budget
            from dither.capacity.shape import shape_of

            memory, shape = parse_bytes(self.memory, "--memory", 1), shape_of(model)[0]
            beside = needed(shape, 0, self.context, self.kv, self.slots).total
            weights = weights_budget(memory, shape, self.context, self.kv, self.slots)
        parameters = model.parameters
        found = budget(size=self.size, bpw=self.bpw, weights=weights, max_kld=self.max_kld, parameters=parameters)
        return found if memory is None else replace(found, said=f"{format_bytes(memory)} of memory", beside=beside)

    def check_on_hub(self, model: str, to: str | None, grid: GridOptions, types: str | None) -> None:
        """Refuses an impossible budget before a model is fetched for it.  Raises UsageError."""
        if self.max_kld is not None:
            return
        from dither.planning.plan import planned_target
        from dither.planning.reach import check_on_hub

        def target(outline: Model) -> Target:
            return planned_target(outline, to, grid.group, grid.sym)

        check_on_hub(model, [self.wanted], target, split_types(types))


NONE = "none"  # instead of a transform


@dataclass(frozen=True)
class SolvingOptions:
    """How codes are chosen."""

    solver: Annotated[
        str | None, typer.Option(help=f"{_one_of('solvers', 'SOLVER')}. Default: gptq where there are Hessians.")
    ] = None
    transform: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Rewrite the model first: {_one_of('transforms', 'TRANSFORM')}; repeatable, in order. "
            "Default: awq for --to awq with evidence, else none."
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        asked = self.transform or None  # typer's empty list is nothing that was asked for
        return {"solver": self.solver, "transforms": () if asked == [NONE] else asked}


@dataclass(frozen=True)
class RunningOptions:
    """How to run; their names are those of Python's keywords."""

    threads: Threads = None
    device: Annotated[str, typer.Option(help="Where the model runs when it is measured: cpu, cuda.")] = "cpu"


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command of records as typer reads it: of options alone, in their order."""

    @wraps(command)
    def called(**given: Any) -> None:
        _gathered(command, given)

    cast(Any, called).__signature__ = Signature(list(_options(command)))
    return called


def _options(taker: Callable[..., Any]) -> Iterator[Parameter]:
    """What a function or a record takes, and what its records take in their places."""
    hints = get_type_hints(taker, include_extras=True)
    for name, parameter in signature(taker).parameters.items():
        if is_dataclass(hints[name]):
            yield from _options(hints[name])
        else:
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])


def _gathered(taker: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """`taker` called with its options and its records."""
    hints = get_type_hints(taker)
    return taker(
        **{
            name: _gathered(hints[name], given) if is_dataclass(hints[name]) else given[name]
            for name in signature(taker).parameters
        }
    )


def split_types(text: str | None) -> list[str] | None:
    """
    >>> split_types("Q4_K, Q6_K"), split_types(None)
    (['Q4_K', 'Q6_K'], None)
    """
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
