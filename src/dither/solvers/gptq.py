"""GPTQ: error feedback for every codec, with scales and codes refitted in the Hessian's metric.

A layer's expected squared output error is tr(E H Eᵀ), with E = W − Ŵ and H = E[x xᵀ] of its inputs.  Nearest
rounding minimizes it as if inputs were uncorrelated.  GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one
column at a time and moves the columns that are still free so that they make up for the error.  This file is
the conductor; the steps are in `feedback/`, which says in what order to read them.  Beyond the paper, scales are
fitted to what earlier blocks left, and refitted with the codes once all is rounded.

Rows are independent given H alone, so they go through threads in chunks of fixed size: bytes do not depend
on the number of threads.  With an output Hessian they are independent a portion at a time.

Feedback learns from few tokens what does not hold for others: its answer must be better than nearest rounding
on inputs that it has not seen (`feedback/validation`).

Legend: R rows, C columns, N bytes of a packed row, K diagonal blocks of O rows each, P rows of a portion.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from dither.codecs.base import LevelCodec
from dither.solvers.feedback.cholesky import portions
from dither.solvers.feedback.column_feedback import round_again, round_rows
from dither.solvers.feedback.factor_cache import FactorCache, Factors
from dither.solvers.feedback.hessian import check_layer, needed_hessian
from dither.solvers.feedback.refit import refit_rows
from dither.solvers.feedback.row_feedback import check_output, solve_in_turn
from dither.solvers.feedback.validation import EXACT, SHARED, exact, validated
from dither.system.cores import available_cores
from dither.types import Bytes, Codec, Evidence, Floats, Solved, Working

ROWS = 128  # rows of one task: enough for a matrix product, few enough that all cores have some
MOST_ROWS, FEWEST_ROWS = 64, 16  # of one task where rows come in portions: threads for wide matrices,
ENOUGH = 2**16  # weights of one task, and no more calls than needed for narrow ones


class Gptq:
    """Error feedback (see the module).  Safe to call from several threads; each call uses `threads`."""

    name = "gptq"
    needs: frozenset[str] = frozenset({"hessian"})
    working = Working(3.5, 6, 4.5)

    def __init__(
        self,
        *,
        damping: float = 0.05,
        act_order: bool = True,
        fits: int = 4,
        scale_rounds: int = 1,
        refit_rounds: int = 3,
        passes: int = 1,
        threads: int | None = None,
    ) -> None:
        """`damping`: λ over the mean of H's diagonal, raised tenfold where H + λI cannot be factored.
        `act_order`: columns by falling E[x²], as far as blocks allow; otherwise as stored.
        `fits`: weightings of the columns under which scales are fitted, 1 … 4.
        `scale_rounds`: improvements of a block's scales before the next one's turn.
        `refit_rounds`: sweeps over all blocks afterwards, at most.
        `passes`: times that feedback is repeated under the refitted scales, and refitted again: only where
        there is refitting, and for codecs of scaled levels, as others have no scales to keep.
        `threads`: all cores of this process by default.
        """
        self.damping, self.act_order = damping, act_order
        self.fits, self.scale_rounds, self.refit_rounds = fits, scale_rounds, refit_rounds
        self.passes = passes
        self.threads = threads or available_cores()
        self._factors = FactorCache(damping, act_order)

    @property
    def kept_bytes(self) -> int:
        """Of factored Hessians that are kept for the next layer that shares them, at most."""
        return self._factors.kept_bytes

    @kept_bytes.setter
    def kept_bytes(self, size: int) -> None:
        self._factors.kept_bytes = size

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        """Bytes of R rows.  The record's objectives are tr(E H Eᵀ), or tr(G E H Eᵀ) with an output Hessian.

        Raises UsageError without a Hessian or where columns are no whole blocks, DitherError for a Hessian
        that is none.
        """
        hessian_CC = needed_hessian(evidence, self.name)
        assert evidence is not None
        if codec.rows_together > 1:
            # Feedback moves each row by its own errors, and so would pull apart rows that must share a scale.
            raw_RN = codec.encode(w_RC, evidence.mean_square_C)
            return Solved(raw_RN, "nearest", notes=(SHARED,))
        check_layer(w_RC.shape[1], codec, hessian_CC)
        if evidence.output_KOO is not None:
            check_output(evidence.output_KOO, len(w_RC))
        w_RC = np.ascontiguousarray(w_RC, dtype=np.float32)
        # A source that is quantized already may lie on the grid: whatever feedback found would be worse than that.
        same_RN = exact(w_RC, codec, evidence.mean_square_C)
        if same_RN is not None:
            return Solved(same_RN, "nearest", {"objective": 0.0, "nearest_objective": 0.0}, (EXACT,))
        # Rows are spread over threads here; a matrix product that did the same would sum in another order.
        with threadpool_limits(1, user_api="blas"):
            raw_RN, damping = self._solve(w_RC, codec, hessian_CC, evidence.output_KOO)
            notes: tuple[str, ...] = ()
            if damping > self.damping:
                notes = (f"Hessian near singular: damping raised from {self.damping:g} to {damping:g}",)
            solved = Solved(raw_RN, self.name, {"damping": damping}, notes)
            return validated(solved, "error feedback", w_RC, codec, evidence, self.threads)

    def _solve(self, w_RC: Floats, codec: Codec, hessian_CC: Floats, output_KOO: Floats | None) -> tuple[Bytes, float]:
        """The bytes of all rows, and the damping that the factor needed."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="gptq") as pool:
            factors = self._factors(hessian_CC, codec, pool.map)

            def all_rows(w_RC: Floats, rows: int) -> Bytes:
                parts = pool.map(lambda at: self._rows(w_RC[at], codec, factors), portions(len(w_RC), rows))
                empty = np.empty((0, w_RC.shape[1] // codec.block * codec.block_bytes), np.uint8)
                return np.concatenate([empty, *parts])

            def portion(w_PC: Floats) -> tuple[Bytes, Floats]:
                rows = max(FEWEST_ROWS, min(MOST_ROWS, ENOUGH // w_PC.shape[1]))
                raw_PN = all_rows(w_PC, rows)
                return raw_PN, codec.decode(raw_PN)

            if output_KOO is None or output_KOO.shape[1] == 1:  # rows that know nothing of each other
                return all_rows(w_RC, ROWS), factors.factored.damping
            # Portions follow one another, each moved by the errors of those before it; rows of one go side by side.
            return solve_in_turn(w_RC, output_KOO, portion, pool.map), factors.factored.damping

    def _rows(self, w_RC: Floats, codec: Codec, factors: Factors) -> Bytes:
        here, damped_CC = factors.column_blocks, factors.factored.damped_CC
        w_RC = w_RC.take(factors.order_C, axis=1)  # indexing would lay columns out in memory, not rows
        blocks = round_rows(w_RC, codec, here, factors.upper_CC, self.fits, self.scale_rounds)
        if self.refit_rounds:
            # Looking back: each block was rounded before it was known what those after it would leave.
            loss_R = refit_rows(w_RC, blocks, here, damped_CC, self.refit_rounds)
            for _ in range(self.passes if isinstance(codec, LevelCodec) else 0):
                # Refitted scales are better ones to begin with: feedback again under them, the better answer per row.
                others = round_again(w_RC, blocks, here, factors.upper_CC)
                other_R = refit_rows(w_RC, others, here, damped_CC, self.refit_rounds)
                for block, other in zip(blocks, others, strict=True):
                    block.take(other, other_R < loss_R)
                loss_R = np.minimum(loss_R, other_R)
        # Blocks were rounded in an order of their own; they are written in that of the row.
        stored = np.argsort([factors.order_C[place.at].min() for place in here])
        return np.concatenate([blocks[i].pack() for i in stored], axis=1)


SOLVER = Gptq
