"""Statistics of the inputs of a block's linear layers, summed while text goes through it.

For every distinct input x of C columns, over all tokens but padding:

    E[x_c²]      mean squares, llama.cpp's importance matrix
    E[x xᵀ]      the Hessian of ½‖(w − ŵ)ᵀx‖² up to a factor (GPTQ, arXiv:2210.17323, section 3), over the
                 sequences that are not held back
    x itself     some rows of the held-back sequences, to validate a solution on inputs it was not fitted to

If the gradient g of a loss at the outputs is known (`models.blocks.Pull`), a token is weighted in E[x xᵀ] and in
the rows held back by λ = Σ g² over the outputs of all matrices that read x (as GuidedQuant does for groups of
outputs, Kim et al. 2025, arXiv:2505.07004), scaled to a mean weight of 1, and every matrix has

    E[g gᵀ]      the *output Hessian* G, tokens weighted by Σ x²: how errors of its outputs add up or cancel

The two are Kronecker factors of the Fisher information (Martens and Grosse 2015, arXiv:1503.05671; for
rounding: YAQA, Tseng et al. 2025, arXiv:2505.22988), scaled so that ½ tr(G E H Eᵀ) is the KL divergence, in
nats per token, which an error E of the weights would cause if nothing else changed.  Of matrices with many
rows only diagonal blocks of G are kept, of the output matrix the diagonal alone.

Sums of squares are float64 in the end.  Hessians are matrix products in float32, a panel of columns at a time,
and only on and above the diagonal: with four panels that is five eighths of the work.

Experts see the tokens routed to them, and each has its own counts.  An expert with few tokens is filled up from
its layer's pool, the tokens of all experts together: with n tokens of its own, of N wanted, it gets

    (n · own + (N − n) · pool) / N

so that it goes from the pool to its own statistics without a jump.  N is 256 for mean squares; a Hessian, which
has C² numbers and is singular below C tokens, wants C tokens if that is more.

Which rows are kept is decided by a permutation of all positions, drawn with a fixed seed: those of the held-back
positions that come first in it, so that the choice is spread evenly and does not depend on the order of batches.

Legend: N tokens of a batch, C columns, R rows, E experts, H rows held back, S sequences, T token positions,
K diagonal blocks of O rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dither.errors import DitherError
from dither.formats.evidence import GroupStatistics
from dither.measuring.schema import THIN_TOKENS
from dither.types import Floats

if TYPE_CHECKING:
    from dither.models.blocks.watch import Pull

FEW = 256  # tokens below which an expert's mean squares are filled up from the pool
HELD_EVERY = 8  # one of eight sequences is held back
HELD_ROWS = 1024
_HELD_ROWS_PER_EXPERT = 256
WIDEST = 4096  # rows of a diagonal block of an output Hessian
_PANEL, _WIDE_PANEL = 128, 512  # columns, on a CPU and on a GPU, which small products would leave mostly idle
_RUN = 64  # rows whose squares are added in float32
_SEED = 0x5EED


def held_back(sequences: int) -> torch.Tensor:
    """Which sequences are held back from the Hessians, bool (S,): every eighth; of four to seven the last; of fewer
    none."""
    held_S = torch.zeros(sequences, dtype=torch.bool)
    held_S[HELD_EVERY - 1 :: HELD_EVERY] = True
    if 4 <= sequences < HELD_EVERY:
        held_S[-1] = True
    return held_S


def spare_sequences(sequences: int, context: int) -> int:
    """How many sequences more than those that are run it takes for a measurement that is not thin: with those held
    back they are as many as `THIN_TOKENS` scored tokens want; no more than a quarter of what is run."""
    wanted = -(-THIN_TOKENS // max(1, context - 1 - context // 2)) - int(held_back(sequences).sum())
    return max(0, min(wanted, sequences // 4))


@dataclass
class _Sums:
    """The sums of one expert, or of a layer without experts."""

    squares_C: torch.Tensor  # float64
    tokens: int = 0
    hessian_CC: torch.Tensor | None = None  # Σ x xᵀ: the upper triangle, and below it only its panel
    hessian_tokens: int = 0
    weight: float = 0.0  # Σλ of these tokens, if they are weighted
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # matrix → Σ (x·x) g gᵀ, (K, O, O)
    held_HC: torch.Tensor | None = None
    held_rank_H: torch.Tensor | None = None

    @property
    def per_weight(self) -> float:
        """The factor that gives the weights a mean of 1."""
        return self.hessian_tokens / self.weight if self.weight else 1.0


@dataclass
class _LayerInput:
    """One input, and the tensors that read it."""

    tensors: tuple[str, ...]
    columns: int
    experts: dict[int, _Sums] = field(default_factory=dict)
    routed: bool = False


class Collector:
    """Sums the inputs of one block.

    `experts` says how many matrices each tensor stacks.  Call `batch` before each batch of sequences goes through
    the block with `see` as its watcher, and `finish` after the last one.
    """

    def __init__(self, experts: dict[str, int], *, sequences: int, context: int, hessians: bool) -> None:
        self.experts, self.hessians = experts, hessians
        self.held_S = held_back(sequences) if hessians else torch.zeros(sequences, dtype=torch.bool)
        generator = torch.Generator().manual_seed(_SEED)
        self._rank_P = torch.randperm(sequences * context, generator=generator)
        self._context = context
        self._inputs: dict[tuple[str, ...], _LayerInput] = {}
        self._valid_N = self._held_N = self._batch_rank_N = torch.zeros(0)
        self._all_valid = False

    def batch(self, index_B: Sequence[int], lengths_B: Sequence[int], device: Any = "cpu") -> None:
        """Announces the next sequences: their numbers and lengths."""
        chosen_B, length_B = torch.tensor(list(index_B)), torch.tensor(list(lengths_B))
        valid_BT = torch.arange(self._context)[None, :] < length_B[:, None]
        held_BT = self.held_S[chosen_B][:, None] & valid_BT
        self._all_valid = bool(valid_BT.all())
        self._any_held = bool(held_BT.any())
        rank_BT = self._rank_P.reshape(-1, self._context)[chosen_B]
        flat = [part.reshape(-1).to(device) for part in (valid_BT, held_BT, rank_BT)]
        self._valid_N, self._held_N, self._batch_rank_N = flat

    def see(
        self,
        names: tuple[str, ...],
        x_NC: torch.Tensor,
        position_N: torch.Tensor,
        expert: int | None,
        pull: Pull | None = None,
    ) -> None:
        """Adds one input of this batch (`models.blocks.See`): rows x_NC at `position_N` of the flattened batch."""
        held_N, rank_N = self._held_N[position_N], self._batch_rank_N[position_N]
        if not self._all_valid:  # padding is no input
            valid_N = self._valid_N[position_N]
            x_NC, held_N, rank_N = x_NC[valid_N], held_N[valid_N], rank_N[valid_N]
            if pull is not None:
                gradients = {name: g_NR[valid_N] for name, g_NR in pull.gradients.items()}
                pull = replace(pull, weight_N=pull.weight_N[valid_N], gradients=gradients)
        known = self._inputs.setdefault(names, _LayerInput(names, x_NC.shape[-1]))
        known.routed = known.routed or expert is not None
        if not len(x_NC):
            return
        sums = known.experts.setdefault(
            expert or 0, _Sums(torch.zeros(known.columns, dtype=torch.float64, device=x_NC.device))
        )
        x_NC = x_NC.detach().float()
        sums.squares_C += sum_of_squares(x_NC)
        sums.tokens += len(x_NC)
        if self.hessians:
            # √λ on either side of x xᵀ is a weight of λ; the rows held back are weighted alike.
            weighed_NC = x_NC if pull is None else x_NC * pull.weight_N.sqrt()[:, None]
            seen_NC = weighed_NC[~held_N] if self._any_held else weighed_NC
            if sums.hessian_CC is None:
                sums.hessian_CC = torch.zeros(known.columns, known.columns, device=x_NC.device)
            add_products(sums.hessian_CC, seen_NC)
            sums.hessian_tokens += len(seen_NC)
            if pull is not None:
                self._add_outputs(sums, x_NC, held_N, pull)
            if self._any_held:
                limit = HELD_ROWS if expert is None else _HELD_ROWS_PER_EXPERT
                _keep(sums, weighed_NC[held_N], rank_N[held_N], limit)

    def _add_outputs(self, sums: _Sums, x_NC: torch.Tensor, held_N: torch.Tensor, pull: Pull) -> None:
        sums.weight += float(pull.weight_N[~held_N].sum(dtype=torch.float64))
        # A token's gradients are scaled by ‖x‖, so that g gᵀ is weighted by Σ x²; by 0 where it is held back.
        size_N = torch.linalg.vector_norm(x_NC, dim=1).masked_fill(held_N, 0)
        for name, g_NR in pull.gradients.items():
            parts = g_NR.shape[1] if pull.apart else diagonal_blocks(g_NR.shape[1])
            if name not in sums.outputs:
                rows = g_NR.shape[1] // parts
                sums.outputs[name] = torch.zeros(parts, rows, rows, device=x_NC.device)
            if pull.apart:  # the output matrix's diagonal alone
                sums.outputs[name] += (size_N.square() @ g_NR.square())[:, None, None]
                continue
            weighed_NR = g_NR * size_N[:, None]
            for sum_OO, weighed_NO in zip(sums.outputs[name], weighed_NR.chunk(parts, dim=1), strict=True):
                add_products(sum_OO, weighed_NO)

    def finish(self) -> tuple[list[GroupStatistics], dict[str, list[int]]]:
        """The statistics of every input, and for each layer the experts that saw fewer than 256 tokens.

        Raises DitherError naming the tensor if its inputs are not finite, or all zero.
        """
        groups = [self._group(known) for known in self._inputs.values()]
        few = {}
        for group, known in zip(groups, self._inputs.values(), strict=True):
            experts = np.flatnonzero(group.counts_E < FEW).tolist()
            if known.routed and experts:
                few[group.tensors[0]] = experts
        return groups, few

    def _group(self, known: _LayerInput) -> GroupStatistics:
        count = self.experts.get(known.tensors[0], 1) if known.routed else 1
        empty = _Sums(torch.zeros(known.columns, dtype=torch.float64))
        sums_E = [known.experts.get(expert, empty) for expert in range(count)]
        counts_E = np.array([sums.tokens for sums in sums_E], dtype=np.int64)
        mean_EC = _means(np.stack([sums.squares_C.cpu().numpy() for sums in sums_E]), counts_E, FEW)
        if not np.isfinite(mean_EC).all():
            way_out = "The weights are damaged, or too large for float32: `dither inspect` looks at them."
            raise DitherError(known.tensors[0], "its inputs became NaN or infinite", way_out)
        if not mean_EC.any(axis=-1).all():
            way_out = "The weights before it are damaged or zero."
            raise DitherError(known.tensors[0], "its inputs are zero throughout", way_out)
        none_HC = torch.zeros(0, known.columns)
        held = [none_HC if sums.held_HC is None else sums.held_HC * sums.per_weight**0.5 for sums in sums_E]
        held_EHC = [rows_HC.cpu().numpy() for rows_HC in held] if self.hessians else None
        hessian_ECC = self._hessians(sums_E, known.columns)
        outputs = _outputs(sums_E, hessian_ECC)
        return GroupStatistics(known.tensors, mean_EC.astype(np.float32), counts_E, hessian_ECC, held_EHC, outputs)

    def _hessians(self, sums_E: list[_Sums], columns: int) -> Any:
        if not self.hessians:
            return None
        counts_E = np.array([sums.hessian_tokens for sums in sums_E], dtype=np.int64)
        if not counts_E.any():
            return None
        hessian_ECC = np.zeros((len(sums_E), columns, columns), dtype=np.float32)
        for sums, target_CC in zip(sums_E, hessian_ECC, strict=True):
            if sums.hessian_CC is not None:
                target_CC[:] = sums.hessian_CC.cpu().numpy()
                sums.hessian_CC = None
                mirror(target_CC)
                target_CC *= np.float32(sums.per_weight)
        return _divide(hessian_ECC, counts_E, max(FEW, columns))


def diagonal_blocks(rows: int) -> int:
    """Into how many equal diagonal blocks an output Hessian is cut, so that none is wider than 4096 rows.

    >>> diagonal_blocks(4096), diagonal_blocks(14336), diagonal_blocks(4097)
    (1, 4, 17)
    """
    parts = -(-rows // WIDEST)
    while rows % parts:
        parts += 1
    return parts


def _outputs(sums_E: list[_Sums], hessian_ECC: Any) -> dict[str, Floats] | None:
    """E[g gᵀ] of each matrix, (E, K, O, O), divided by tr H, the part of the scale that the Hessian already has."""
    names = list(dict.fromkeys(name for sums in sums_E for name in sums.outputs))
    if not names or hessian_ECC is None:
        return None
    counts_E = np.array([sums.hessian_tokens for sums in sums_E], dtype=np.int64)
    found: dict[str, Floats] = {}
    for name in names:
        shape = next(sums.outputs[name].shape for sums in sums_E if name in sums.outputs)
        stack_EKOO = np.zeros((len(sums_E), *shape), dtype=np.float32)
        for sums, target_KOO in zip(sums_E, stack_EKOO, strict=True):
            if name in sums.outputs:
                target_KOO[:] = sums.outputs.pop(name).cpu().numpy()
                for target_OO in target_KOO if shape[-1] > 1 else ():
                    mirror(target_OO)
        found[name] = _divide(stack_EKOO, counts_E, max(FEW, shape[-1]))
        for target_KOO, hessian_CC in zip(found[name], hessian_ECC, strict=True):
            target_KOO /= max(float(np.trace(hessian_CC, dtype=np.float64)), np.finfo(np.float32).tiny)
    return found


def sum_of_squares(x_NC: torch.Tensor) -> torch.Tensor:
    """Σ x² of each column, float64: short runs of rows are summed in float32, which is four times faster, and the
    runs in float64, which keeps seven digits."""
    square_NC = x_NC.square()
    whole = len(x_NC) // _RUN * _RUN
    runs_RC = square_NC[:whole].reshape(-1, _RUN, x_NC.shape[-1]).sum(dim=1)
    rest_C = square_NC[whole:].sum(dim=0, dtype=torch.float64)
    return runs_RC.sum(dim=0, dtype=torch.float64) + rest_C


def add_products(sums_CC: torch.Tensor, x_NC: torch.Tensor) -> None:
    """sums += xᵀx on and above the diagonal, a panel of rows at a time; below it only within a panel."""
    columns = x_NC.shape[-1]
    panel = _PANEL if x_NC.device.type == "cpu" else _WIDE_PANEL
    for start in range(0, columns, panel):
        stop = min(start + panel, columns)
        sums_CC[start:stop, start:].addmm_(x_NC[:, start:stop].T, x_NC[:, start:])


def mirror(hessian_CC: Any) -> None:
    """Copies what is above the diagonal below it, in place."""
    columns = len(hessian_CC)
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        hessian_CC[stop:, start:stop] = hessian_CC[start:stop, stop:].T
        block = hessian_CC[start:stop, start:stop]
        block[:] = np.triu(block) + np.triu(block, 1).T


def _means(sums_EC: Any, counts_E: Any, wanted: int) -> Any:
    """Σ/n, float64; in a stack, experts with n < wanted are filled up from the pool."""
    if len(counts_E) == 1:
        return sums_EC / max(1, counts_E[0])
    pool_C = sums_EC.sum(axis=0) / max(1, counts_E.sum())
    filled_E = np.maximum(wanted, counts_E)
    missing_E = filled_E - counts_E
    return (sums_EC + missing_E[:, None] * pool_C) / filled_E[:, None]


def _divide(sums_ECC: Any, counts_E: Any, wanted: int) -> Any:
    """`_means` in place, in float32: a stack of Hessians is too large for a copy."""
    if len(counts_E) == 1:
        sums_ECC /= np.float32(max(1, counts_E[0]))
        return sums_ECC
    pool_CC = sums_ECC.sum(axis=0) / np.float32(max(1, counts_E.sum()))
    for sums_CC, count in zip(sums_ECC, counts_E, strict=True):
        missing = max(0, wanted - int(count))
        if missing:
            sums_CC += np.float32(missing) * pool_CC
        sums_CC /= np.float32(int(count) + missing)
    return sums_ECC


def _keep(sums: _Sums, x_HC: torch.Tensor, rank_H: torch.Tensor, limit: int) -> None:
    """Keeps the `limit` rows of lowest rank, of those kept so far and these, in the order of their rank."""
    if sums.held_HC is not None and sums.held_rank_H is not None:
        x_HC, rank_H = torch.cat([sums.held_HC, x_HC]), torch.cat([sums.held_rank_H, rank_H])
    order_H = rank_H.argsort()[:limit]
    sums.held_HC, sums.held_rank_H = x_HC[order_H].clone(), rank_H[order_H].clone()
