"""What is asked of a run, as two records that travel whole: what to make, and how to run.

The types of tensors are a third (`containers.mix.Options`).  Public functions take the records' fields as
keyword arguments; `Keywords` names those that several of them share, for type checkers, and `with_keywords`
shows them in a function's signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from dither.containers.folders import find_scheme
from dither.containers.mix import Options
from dither.errors import UsageError
from dither.formats.evidence import EvidenceStore
from dither.progress import Progress, Silent
from dither.solvers import find_solver
from dither.system.cores import available_cores
from dither.system.keywords import refuse_unknown
from dither.types import Solver

AnyEvidence = str | Path | EvidenceStore | None  # a folder's or a file's name, or what is open already
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Making:
    """What to make of a model: how its codes are chosen, from what, and what is kept of that."""

    evidence: AnyEvidence = None
    solver: str | Solver | None = None  # None: gptq where the evidence holds Hessians, else nearest
    transforms: Sequence[str] | None = None  # None: those of the method that a folder's format is called after
    types: Sequence[str] | None = None  # that a plan chooses among; None: all that are sensible
    statistics: str | None = None  # "parallel" (None) or "sequential"
    measure: bool | str | Path = False  # on held-back text (True), or on a file
    check: bool = False  # load the file once in the engine that runs it, before it gets its name


@dataclass(frozen=True)
class Running:
    """How to run.  No byte written depends on it, except what torch computes (`learned`, sequential statistics)."""

    threads: int = field(default_factory=available_cores)
    device: str = "cpu"
    force: bool = False  # replace what stands there
    progress: Progress = field(default_factory=Silent)
    max_memory: int | None = None  # bytes that this process may hold while it rounds and measures

    @classmethod
    def of(
        cls, threads: int | None = None, device: str = "cpu", force: bool = False, progress: Progress | None = None
    ) -> Running:
        """As people ask for it, who leave out what they do not mind."""
        return cls(threads or available_cores(), device, force, progress or Silent())


class Keywords(TypedDict, total=False):
    """The keyword arguments that `plan`, `quantize_within` and `ladder` share."""

    evidence: AnyEvidence
    solver: str | None
    transforms: Sequence[str] | None
    types: Sequence[str] | None
    threads: int | None
    device: str
    force: bool
    progress: Progress | None


def with_keywords(function: Function) -> Function:
    """A function of `**how: Unpack[Keywords]` in whose signature, and so in whose help, these keywords stand."""
    known = {**signature(Making).parameters, **signature(Running.of).parameters}
    own = [one for one in signature(function).parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
    shared = [known[name].replace(kind=Parameter.KEYWORD_ONLY) for name in Keywords.__annotations__]
    cast(Any, function).__signature__ = Signature([*own, *shared])
    return function


def records(function: Callable[..., object], how: Mapping[str, Any]) -> tuple[Making, Running]:
    """The two records of a function's `how`.  Raises TypeError for a keyword that is none of `Keywords`."""
    refuse_unknown(function.__name__, how, Keywords.__annotations__)
    running = {name: how[name] for name in signature(Running.of).parameters if name in how}
    return Making(**{name: how[name] for name in how if name not in running}), Running.of(**running)


def options_of(to: str, **options: Any) -> Options:
    """What is asked for, of a GGUF type or of a folder's container."""
    return Options(to, folder=find_scheme(to) is not None, **options)


def open_evidence(evidence: AnyEvidence) -> EvidenceStore | None:
    return EvidenceStore.open(evidence) if isinstance(evidence, (str, Path)) else evidence


def choose_transforms(wanted: Sequence[str] | None, options: Options, store: EvidenceStore | None) -> tuple[str, ...]:
    """What was asked for; else, where there is evidence, what makes a folder of the method it is called after."""
    scheme = find_scheme(options.to) if options.folder else None
    if wanted is not None or scheme is None or store is None:
        return tuple(wanted or ())
    return scheme.transforms


def choose_solver(wanted: str | Solver | None, store: EvidenceStore | None, threads: int) -> Solver:
    """Raises UsageError where a solver is unknown, or needs what the evidence does not hold."""
    has_hessians = store is not None and store.has_hessians
    if wanted is None:
        wanted = "gptq" if has_hessians else "nearest"
    solver = find_solver(wanted, threads) if isinstance(wanted, str) else wanted
    if "hessian" in solver.needs and not has_hessians:
        reason = "needs Hessians, and there are none"
        way_out = "Learn them with `dither calibrate MODEL -o evidence`, and pass --evidence evidence."
        raise UsageError(f"solver {solver.name}", reason, way_out)
    return solver
