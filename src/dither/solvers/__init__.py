"""Solvers by name, found by iterating this folder: every module may define `SOLVER`, a class that takes
the number of threads.  A new solver is one new file; its name has dashes where the module's has underscores.
"""

from __future__ import annotations

from dither.system.discovery import defining, find_offered, room_path
from dither.types import Solver

__path__ = room_path(__path__, __name__)


def solver_names() -> tuple[str, ...]:
    """The solvers that modules here define."""
    return tuple(defining(__name__, "SOLVER"))


def find_solver(name: str, threads: int = 1) -> Solver:
    """A solver that may use so many threads.  Raises UsageError for a name that is not known."""
    found: Solver = find_offered(__name__, "SOLVER", "solver", name)(threads=threads)
    return found
