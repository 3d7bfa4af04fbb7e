"""Solvers by name, found by iterating this folder: every module may define `SOLVER`, a class that takes
the number of threads.  A new solver is one new file; its name has dashes where the module's has underscores.
"""

from __future__ import annotations

import importlib

from dither.errors import UsageError
from dither.system.discovery import module_names, room_path
from dither.types import Solver

__path__ = room_path(__path__, __name__)


def solver_names() -> tuple[str, ...]:
    """The modules here that hold a solver; their names are the solvers'."""
    return tuple(name.replace("_", "-") for name in module_names(__name__) if _has_solver(name))


def find_solver(name: str, threads: int = 1) -> Solver:
    """A solver that may use so many threads.  Raises UsageError for a name that is not known."""
    if name.replace("_", "-") not in solver_names():
        known = ", ".join(solver_names())
        raise UsageError(f"solver {name}", f"is not one of {known}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found: Solver = module.SOLVER(threads=threads)
    return found


def _has_solver(module: str) -> bool:
    return hasattr(importlib.import_module(f"{__name__}.{module}"), "SOLVER")
