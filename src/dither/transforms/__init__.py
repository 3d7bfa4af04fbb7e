"""Transforms: rewrite a model so that rounding hurts less, while it computes the same function.

    awq.py         per-channel scales, searched, folded into the norm or matrix before
    rotate.py      a random rotation of the residual stream
    wiring.py      who reads what in a given model
    rewrite.py     tensors and evidence rewritten while they are read
    orthogonal.py  Hadamard matrices of any width

A transform is given its family's table of feeds (`models.arch.feeds`); it never asks for the model's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from dither.errors import UsageError
from dither.transforms.awq import Awq
from dither.transforms.rotate import Rotate
from dither.transforms.wiring import Feeds
from dither.types import Solver, Transform

TRANSFORMS = ("awq", "rotate")


def transform(
    name: str, feeds: Sequence[Feeds], *, threads: int = 1, seed: int = 0, solver: Solver | None = None
) -> Transform:
    """The transform called `name`.  `threads` and `solver` (the one that will round, unless that is
    nearest) are for awq's search, `seed` draws rotate's matrix.

    Raises UsageError naming those that exist.
    """
    if name == "awq":
        return Awq(feeds, threads=threads, solver=solver)
    if name == "rotate":
        return Rotate(feeds, seed=seed)
    known = ", ".join(TRANSFORMS)
    raise UsageError(f"transform {name}", "is not known", f"Choose one of {known}.")
