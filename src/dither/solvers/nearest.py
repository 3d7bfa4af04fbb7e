"""Nearest rounding: every weight takes the closest number of a grid that was searched for it.

No weight knows of its neighbours' errors; what can be learnt about the inputs enters through the
importance E[x²] of each column, which the codec's scale search minimizes against:
Σ_c E[x_c²] · (w_c − ŵ_c)², the expected squared output error if inputs were uncorrelated.  What that takes from a
block's length some types give back (`codecs/kernels/length.py`).  `scales` does
the same with what a Hessian knows of their correlations.
"""

from __future__ import annotations

from dither.types import Codec, Evidence, Floats, Solved


class Nearest:
    """Importance-weighted search when there is evidence, plain squared error when there is none."""

    name = "nearest"
    needs: frozenset[str] = frozenset()

    def __init__(self, *, threads: int = 1) -> None:
        """`threads` change nothing: rows are independent, and the caller spreads them."""

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        importance_C = None if evidence is None else evidence.mean_square_C
        return Solved(codec.encode(w_RC, importance_C), self.name)


SOLVER = Nearest
