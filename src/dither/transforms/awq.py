"""AWQ: spread the columns that matter, by scales that cost nothing at run time.

A block of weights shares one scale, so a column that meets large inputs is rounded as coarsely as one
that meets small ones, and its error weighs more.  Multiply that column by s before rounding and divide
its input by s: the layer computes the same, the column's rounding error shrinks by s as long as the
block's largest weight stays what it was.  The division is folded into whatever made the input, a norm's
gain or rows of the matrix before (`wiring.py`), and no trace of it is left in the file.

    s_c = E[x_c²]^(α/2)   scaled to geometric mean 1, α found by trying 0, 0.05, … 1

The objective is the expected squared error of the group's outputs, summed over its readers:

    Σ_readers tr(E H Eᵀ),  E = decode(encode(W·s)) / s − W,  H = E[x xᵀ]  (or its diagonal alone)

with the codec each reader will really be stored in, importance included, on some of its rows.  The α that
won must then also beat α = 0 on more rows, and on held-back inputs where there are some; otherwise the
group stays as it is.  Dividing by the weights' own size as well (AutoAWQ's "duo scaling") lowered this
objective a little more and the KL divergence of whole models no further, so it is not searched.  Rounding in
the search is nearest whatever solver follows: judged by the solver itself, scales were no better (`docs/log.md`).

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978, sections 3.2 and 4.

Legend: R rows of a reader, C columns, E experts, G rows (or gains) of the source, H held-back inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from dither.errors import UsageError
from dither.transforms.rewrite import ScaledEvidence, Scaling, digest, rewritten_model
from dither.transforms.wiring import Feeds, InputGroup, Rows, by_name, feeding_rows, groups, strangers
from dither.types import Codec, Evidence, EvidenceSource, Floats, Model, Tensor, Transformed

Doubles = npt.NDArray[np.float64]
CodecOf = Callable[[str], "Codec | None"]
Tensors = Mapping[str, Tensor]

ALPHAS = tuple(step / 20 for step in range(21))
_SEARCH_WEIGHTS, _CHECK_WEIGHTS = 2**19, 2**21  # per reader: the rows whose errors are counted
_MOST_ROWS, _RUN = 512, 16  # rows of the search; rows read side by side
_EXPERTS = 8  # of a stack, those that stand for all in the search
_FLOOR = 1e-3  # of an input's overall size: a channel that never fires is no reason for a huge scale
_NO_INPUTS = "nothing is known of its readers' inputs"


@dataclass(frozen=True)
class Sample:
    """Some rows of one reader, or of one expert of it, and what is known of its input.

    `weight` makes experts count by the tokens they see.
    """

    w_RC: Floats
    codec: Codec
    seen: Evidence
    weight: float
    expert: int = 0

    def error(self, s_C: Floats, on_held: bool = False) -> float:
        """Σ over the rows of e H eᵀ for scales s; held-back inputs stand for H where asked for and known."""
        scaled_RC = np.ascontiguousarray(self.w_RC * s_C)
        raw_RN = self.codec.encode(scaled_RC, self.seen.mean_square_C / s_C**2)
        e_RC = self.codec.decode(raw_RN) / s_C - self.w_RC
        held_HC = self.seen.held_HC
        if on_held and held_HC is not None and len(held_HC):
            square = float(np.square(e_RC @ held_HC.T).sum(dtype=np.float64))
            return self.weight * square / len(held_HC)
        if self.seen.hessian_CC is None:
            return self.weight * float((np.square(e_RC) @ self.seen.mean_square_C).sum(dtype=np.float64))
        return self.weight * float(((e_RC @ self.seen.hessian_CC) * e_RC).sum(dtype=np.float64))


@dataclass(frozen=True)
class GroupScales:
    """The scales of one group, and why."""

    rows_C: Rows  # the row of the source that each column reads
    s_EC: Floats  # s for its readers, (E or 1, C)
    alpha: float
    ratio: float  # the objective on the rows of the check, over what it is without scales


class Awq:
    """Searches per-channel scales for every group of layers with one input, and folds them away.

    `feeds` is the family's table of sources and readers; `threads` try candidates at once.
    Raises UsageError where there is no evidence at all.
    """

    name = "awq"
    needs: frozenset[str] = frozenset({"mean_square"})

    def __init__(self, feeds: Sequence[Feeds], *, threads: int = 1, seed: int = 0) -> None:
        """`seed` changes nothing: nothing is drawn."""
        self._feeds, self._threads = feeds, threads

    def __call__(self, model: Model, evidence: EvidenceSource, codec_of: CodecOf) -> Transformed:
        tensors = by_name(model)
        strange = strangers(model, self._feeds)
        scalings: dict[str, Scaling] = {}
        scales: dict[str, Floats] = {}
        record: dict[str, dict[str, float]] = {}
        skipped: dict[str, list[str]] = {}
        with ThreadPoolExecutor(self._threads) as pool, threadpool_limits(1 if self._threads > 1 else None):
            for group in groups(model, self._feeds):
                search = _search_of(group, tensors, model, evidence, codec_of)
                if group.layer in strange:
                    search = f"{strange[group.layer][0]} stands beside it and no table says what it reads"
                found = search if isinstance(search, str) else search.best(pool)
                if isinstance(found, str):
                    skipped.setdefault(found, []).append(group.source)
                    continue
                kept = found.ratio < 1
                alpha, ratio = (found.alpha, found.ratio) if kept else (0.0, 1.0)
                record[group.source] = {"alpha": round(alpha, 6), "objective_ratio": round(ratio, 6)}
                if kept:
                    s_EC = storable(group, tensors, found.s_EC, codec_of)
                    scales.update(dict.fromkeys(group.readers, s_EC))
                    fold(group, tensors, s_EC, found.rows_C, scalings)
        if not record and _NO_INPUTS in skipped:
            raise UsageError(
                "awq",
                "there is no evidence for any layer, and scales follow the inputs",
                "Calibrate first: dither calibrate MODEL -o evidence/, then --evidence evidence/.",
            )
        sha256 = digest(*(scales[name] for name in sorted(scales)))
        whole = {"name": self.name, "groups": record, "scales_sha256": sha256}
        rows = {name: s.rows_R for name, s in scalings.items() if s.rows_R is not None}
        changed = tuple(scalings[t.name].of(t) if t.name in scalings else t for t in model.tensors)
        scaled, notes = ScaledEvidence(evidence, scales, rows), tuple(_notes(record, skipped))
        return Transformed(rewritten_model(model, changed, whole), scaled, whole, notes)


@dataclass(frozen=True)
class _AlphaSearch:
    """What the search of one group's scales looks at."""

    readers: list[tuple[Tensor, Codec]]  # those that will be quantized
    rows_C: Rows
    mean_square_EC: Floats  # E[x²] of each input of its own
    own: bool  # each expert's input has a source of its own, and so scales of its own
    evidence: EvidenceSource

    def best(self, pool: ThreadPoolExecutor) -> GroupScales | str:
        """The scales that won, with what they gain where it was not searched; a reason where none can be found."""
        columns = self.readers[0][0].columns
        searched = list(self._samples(min(_SEARCH_WEIGHTS, _MOST_ROWS * columns), first=0))
        if not searched:
            return "of none of the experts that stand for all anything is known"
        errors = list(pool.map(lambda alpha: self._error(searched, self._scales(alpha)), ALPHAS))
        alpha = ALPHAS[int(np.argmin(errors))]
        s_EC = self._scales(alpha)
        if alpha == 0:
            return GroupScales(self.rows_C, s_EC, 0.0, 1.0)
        # The best of 21 on a few rows is partly luck: other rows, and other inputs, decide whether it stays.
        more = list(self._samples(_CHECK_WEIGHTS, first=_RUN))
        before, after = (self._error(more, s, on_held=True) for s in (np.ones_like(s_EC), s_EC))
        return GroupScales(self.rows_C, s_EC, alpha, after / before if before > 0 else 1.0)

    def _error(self, samples: list[Sample], s_EC: Floats, on_held: bool = False) -> float:
        return math.fsum(sample.error(s_EC[sample.expert if self.own else 0], on_held) for sample in samples)

    def _scales(self, alpha: float) -> Floats:
        """s as (E or 1, C): equal wherever columns read the same row of the source."""
        s_EC = _tied(self.mean_square_EC, self.rows_C) ** (alpha / 2)
        # Only ratios between columns matter to blocks; a geometric mean of 1 keeps weights at their size.
        s_EC /= np.exp(np.log(s_EC).mean(axis=1, keepdims=True))
        return s_EC.astype(np.float32)

    def _samples(self, weights: int, first: int) -> Iterator[Sample]:
        """Rows of every quantized reader; `first` shifts which rows are taken."""
        for tensor, codec in self.readers:
            count = _experts(tensor)
            experts = sorted({round(i) for i in np.linspace(0, count - 1, min(count, _EXPERTS))})
            known = [(x, e) for x in experts if (e := self.evidence(tensor.name, x)) is not None]
            total = sum(max(seen.tokens, 1) for _, seen in known)
            for expert, seen in known:
                rows = tensor.rows // count
                wanted = max(_RUN, weights // tensor.columns // len(known))
                w_RC = spread_rows(tensor, expert * rows, rows, wanted, first)
                yield Sample(w_RC, codec, seen, max(seen.tokens, 1) / total, expert)


def _search_of(
    group: InputGroup, tensors: Tensors, model: Model, evidence: EvidenceSource, codec_of: CodecOf
) -> _AlphaSearch | str:
    """The search of a group's scales, or in words why it can have none."""
    codecs = {name: codec_of(name) for name in group.readers}
    readers = [(tensors[name], codec) for name, codec in codecs.items() if codec and codec.bits_per_weight < 16]
    rows_C = feeding_rows(group, tensors, model)
    if isinstance(rows_C, str):
        return rows_C
    if not readers:
        return "none of its readers is quantized"
    if _experts(tensors[group.source]) > 1 and _bias_of(group.source) in tensors:
        return "a stack of experts with biases is not known here"
    own = group.kind == "up" and _experts(readers[0][0]) > 1
    mean_square_EC = _mean_squares([tensor for tensor, _ in readers], own, evidence)
    return _NO_INPUTS if mean_square_EC is None else _AlphaSearch(readers, rows_C, mean_square_EC, own, evidence)


def _mean_squares(readers: list[Tensor], own: bool, evidence: EvidenceSource) -> Floats | None:
    """E[x²] per input of its own: (1, C), or (E, C) where each expert's input has its own source."""
    for tensor in readers:  # one of them is enough: they read the same
        seen = [evidence(tensor.name, expert) for expert in range(_experts(tensor))]
        known = [(e.mean_square_C, max(e.tokens, 1)) for e in seen if e is not None]
        if own:
            blank_C = np.zeros(tensor.columns, np.float32)
            return np.stack([blank_C if e is None else e.mean_square_C for e in seen]) if known else None
        if known:
            means, tokens = zip(*known, strict=True)
            return np.average(means, axis=0, weights=tokens)[None].astype(np.float32)
    return None


def _experts(tensor: Tensor) -> int:
    return tensor.shape[0] if len(tensor.shape) > 2 else 1


def _bias_of(weight: str) -> str:
    return f"{weight.rpartition('.')[0]}.bias"


def _tied(values_EC: npt.NDArray[Any], rows_C: Rows) -> Doubles:
    """Column statistics averaged over the columns that read the same row; none is far below the rest."""
    # Columns that read the same row must share its factor (grouped queries): the mean of what they would have.
    group_C = rows_C - rows_C.min()
    counts_G = np.bincount(group_C)
    floor_E1 = np.maximum(values_EC.mean(axis=1, keepdims=True) * _FLOOR**2, 1e-30)
    tied = [(np.bincount(group_C, weights=v_C) / np.maximum(counts_G, 1))[group_C] for v_C in values_EC]
    return np.asarray(np.maximum(np.stack(tied), floor_E1))


def spread_rows(tensor: Tensor, start: int, rows: int, wanted: int, first: int) -> Floats:
    """About `wanted` of the `rows` rows from `start` on, in runs of neighbors spread evenly; the runs for
    `first` = 16 lie beside those for 0.  All rows where that is no more than wanted."""
    if rows <= wanted:
        return np.array(tensor.read(start, start + rows), dtype=np.float32)
    # Rows of one head resemble each other, so a few are taken everywhere rather than all in one place.
    runs = max(1, wanted // _RUN)
    begins = np.linspace(0, rows - min(2 * _RUN, rows), runs).astype(int)
    spans = ((start + b + first, start + min(b + first + _RUN, rows)) for b in begins)
    return np.concatenate([tensor.read(a, b) for a, b in spans if a < b]).astype(np.float32)


def storable(group: InputGroup, tensors: Tensors, s_EC: Floats, codec_of: CodecOf) -> Floats:
    """Scales by which a norm's gains can be divided and stored without rounding, the closest to these.

    Gains that are kept in a short float (a checkpoint's, unlike a GGUF's) would each be rounded after the
    division, and nothing downstream would know: a factor on a whole channel.  So they are rounded first, and
    the scale is what that leaves to the readers.
    """
    codec = codec_of(group.source)
    if group.kind != "norm" or codec is None or codec.bits_per_weight >= 32:
        return s_EC
    source = tensors[group.source]
    gain_1C = source.read(0, source.rows)
    # g / s as it will be stored, and from it the s that makes up for its rounding: s = g / stored.
    stored_1C = codec.decode(codec.encode(np.asarray(gain_1C / s_EC, np.float32)))
    exact_EC = np.divide(gain_1C, stored_1C, out=s_EC.copy(), where=stored_1C != 0)
    return np.where(gain_1C != 0, exact_EC, s_EC).astype(np.float32)


def fold(group: InputGroup, tensors: Tensors, s_EC: Floats, rows_C: Rows, scalings: dict[str, Scaling]) -> None:
    """Adds to `scalings`: readers' columns times s, the source's gains or rows (and biases) divided by s."""

    def put(name: str, scaling: Scaling) -> None:
        scalings[name] = scalings.get(name, Scaling()).merged(scaling)

    # A tensor may be in two groups, as reader of one and source of the other: its factors multiply.
    for name in group.readers:
        put(name, Scaling(columns_EC=s_EC))
    source, norm = tensors[group.source], group.kind == "norm"
    rows = source.columns if norm else source.shape[-2]
    # Rows that no column reads keep their size: of fused matrices, those of queries and keys, or the gate's half.
    inverse_ER = np.ones((len(s_EC), rows), np.float32)
    inverse_ER[:, rows_C] = 1 / s_EC
    put(group.source, Scaling(columns_EC=inverse_ER) if norm else Scaling(rows_R=inverse_ER.reshape(-1)))
    if _bias_of(group.source) in tensors:
        put(_bias_of(group.source), Scaling(columns_EC=inverse_ER))


def _notes(record: Mapping[str, Mapping[str, float]], skipped: dict[str, list[str]]) -> Iterable[str]:
    ratios = [group["objective_ratio"] for group in record.values()]
    changed = [ratio for ratio in ratios if ratio < 1]
    if ratios:
        mean = math.exp(math.fsum(map(math.log, changed)) / len(changed)) if changed else 1.0
        yield (
            f"awq: {len(changed)} of {len(ratios)} groups of layers scaled; their expected squared output "
            f"error becomes {mean:.3f} of what it was."
        )
    for reason, sources in skipped.items():
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        yield f"awq: {sources[0]}{more} left as it was: {reason}."


TRANSFORM = Awq
