"""Transforms: rewrite a model so that rounding hurts less, while it computes the same function.

    awq.py         per-channel scales, searched, folded into the norm or matrix before
    rotate.py      a random rotation of the residual stream
    wiring.py      who reads what in a given model
    rewrite.py     tensors and evidence rewritten while they are read
    orthogonal.py  Hadamard matrices of any width

They are found by iterating this folder: every module may define `TRANSFORM`, a class that takes its family's table
of feeds (`models.arch.feeds`), `threads` and `seed`, and never asks for the model's name.  A new transform is one
new file; its name has dashes where the module's has underscores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dither.system.discovery import defining, find_offered, room_path
from dither.types import Transform

if TYPE_CHECKING:
    from dither.transforms.wiring import Feeds

__path__ = room_path(__path__, __name__)


def transform_names() -> tuple[str, ...]:
    """The transforms that modules here define."""
    return tuple(defining(__name__, "TRANSFORM"))


def find_transform(name: str, feeds: Sequence[Feeds], *, threads: int = 1, seed: int = 0) -> Transform:
    """The transform of this name for a model whose family has these `feeds`.

    `threads` are for those that search, `seed` for those that draw.  Raises UsageError for a name that is not known.
    """
    found: Transform = find_offered(__name__, "TRANSFORM", "--transform", name)(feeds, threads=threads, seed=seed)
    return found
