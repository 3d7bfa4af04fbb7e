"""One pass over a model's tensors: read rows, choose codes, write bytes, count the error.

Two kinds of work.  *Chunks*: some rows of a matrix, for solvers that need no Hessian; memory stays at a
few chunks whatever the tensor's size, and chunks go through threads.  *Wholes*: all rows of a layer, or
of one expert, for solvers that do need one; they run one after another and use the cores themselves.

Legend: R rows, C columns, N bytes of a packed row.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import numpy as np

from dither.codecs import codec as find_codec
from dither.containers.mix import Mix, MixTensor
from dither.errors import DitherError, SourceError
from dither.executors import local
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.tensor_names import EMBEDDING, block_of, kind_of
from dither.progress import Progress, Silent
from dither.quantizing.request import Running
from dither.quantizing.working_memory import CHUNK_WEIGHTS, check
from dither.solvers.nearest import Nearest
from dither.types import Evidence, EvidenceSource, Floats, Model, Output, Solved, Solver

_LARGEST_F16 = 65504.0
_TRIAL_COLUMNS = 128  # of a row that kernels are compiled on, where a block is a whole row


def no_evidence(tensor: str, expert: int = 0) -> Evidence | None:
    """An `EvidenceSource` that knows nothing."""
    return None


def prepare(types: Iterable[str], with_importance: bool = False, progress: Progress | None = None) -> None:
    """Gets encoders ready: seconds on their first use, and said when it is more than one.

    Kernels are compiled once per machine and kept on disk; ggml's lattice encoders build their
    tables anew in every process.
    """
    from dither.codecs.kernels import SET, THIS_RUN, stats

    tell = (progress or Silent()).note
    how = "once per machine …" if THIS_RUN is None else f"anew in every run, as they can be kept nowhere. {SET}."
    slow = threading.Timer(1.0, tell, (f"Preparing the encoders: kernels are compiled {how}",))
    slow.start()
    try:
        one = np.ones(1, dtype=np.float32)
        stats.sum_squared_difference(one, one)
        stats.sum_squares(one)
        for name in sorted(types):
            codec = find_codec(name, _TRIAL_COLUMNS)
            row = np.ones((1, codec.block), dtype=np.float32)
            importance = row[0] if with_importance or codec.needs_importance else None
            codec.decode(codec.encode(row, importance))
    finally:
        slow.cancel()


@dataclass(frozen=True)
class _Piece:
    """Rows of one tensor that are solved together."""

    tensor: MixTensor
    expert: int
    start: int
    stop: int


Refine = Callable[[int, Mapping[str, Floats], Mapping[str, str], Mapping[str, Solved]], Mapping[str, Solved]]


@dataclass(frozen=True)
class _Done:
    piece: _Piece
    error: float  # Σ(w − ŵ)²
    norm: float  # Σw²
    solved: Solved | None  # None where codes were carried over


@dataclass
class TensorPass:
    """All tensors of a mix that `output` does not have yet, through one solver.

    A tensor without the evidence that `solver` needs is rounded to nearest, and its record says so.
    `hessians` names the tensors that may have one: evidence is read, or learnt, only when its turn comes.
    `written` is kept up to date with the tensors whose bytes are in the file.  `refine`, where there is
    one, is given a block's number, its matrices as they were read and as they were solved, and gives them
    back better; then a block is finished as a whole or not at all.
    """

    model: Model
    mix: Mix
    evidence: EvidenceSource
    output: Output
    solver: Solver
    running: Running
    hessians: Collection[str] = ()
    refine: Refine | None = None

    def __post_init__(self) -> None:
        self.written = set(self.output.finished)
        self.sources = {tensor.name: tensor for tensor in self.model.tensors}
        self._nearest = Nearest()

    def all(self) -> None:
        wholes = [tensor for tensor in self.mix.tensors if self._is_whole(tensor)]
        blocks = [list(group) for _, group in groupby(in_order_of_flow(wholes), lambda tensor: block_of(tensor.name))]
        names = {tensor.name for tensor in wholes}
        chunked = self._unfinished(tensor for tensor in self.mix.tensors if tensor.name not in names)
        blocks = [todo for block in blocks if (todo := self._unfinished_of_block(block))]
        left = sum(tensor.size for tensor in [*chunked, *chain.from_iterable(blocks)])
        self.running.progress.start(self.mix.parameters, self.mix.parameters - left)
        self._in_chunks(chunked)
        for block in blocks:
            self._in_wholes(block)

    def _unfinished(self, tensors: Iterable[MixTensor]) -> list[MixTensor]:
        return [tensor for tensor in tensors if tensor.name not in self.output.finished]

    def _unfinished_of_block(self, block: list[MixTensor]) -> list[MixTensor]:
        """What is to do in a block: where it is refined as a whole, all of it if any is missing."""
        todo = self._unfinished(block)
        if todo and self.refine and block_of(block[0].name) is not None:
            todo = block
            self.written -= {tensor.name for tensor in block}
        return todo

    def _in_chunks(self, todo: list[MixTensor]) -> None:
        done = defaultdict[str, list[_Done]](list)
        left = Counter(tensor.name for tensor in todo for _ in self._chunks(tensor))
        pieces = (piece for tensor in todo for piece in self._chunks(tensor))
        # Closed in any case, so that no thread writes on after the file below it is.
        with closing(local.run(self._work, pieces, self.running.threads)) as results:
            for result in results:
                name = result.piece.tensor.name
                done[name].append(result)
                left[name] -= 1
                self._advance(result.piece)
                if left[name] == 0:
                    self._finish(result.piece.tensor, done.pop(name))

    def _in_wholes(self, block: list[MixTensor]) -> None:
        number = block_of(block[0].name)
        refine = None if number is None else self.refine
        solved = defaultdict[str, list[_Done]](list)
        for tensor in block:
            for piece in self._wholes(tensor):
                solved[tensor.name].append(self._work(piece, keep=refine is not None))
                self._advance(piece)
            self.written.add(tensor.name)
            if refine is None:
                self._finish(tensor, solved[tensor.name])
        if refine is not None and number is not None:
            self._refine_block(refine, number, block, solved)

    def _refine_block(
        self, refine: Refine, number: int, block: list[MixTensor], solved: Mapping[str, list[_Done]]
    ) -> None:
        weights = {t.name: self.sources[t.name].read(0, self.sources[t.name].rows).reshape(t.shape) for t in block}
        start = {name: _joined(results) for name, results in solved.items()}
        found = refine(number, weights, {t.name: t.type for t in block}, start)
        for tensor in block:
            better, w_RC = found[tensor.name], weights[tensor.name].reshape(-1, tensor.shape[-1])
            self.output.write_rows(tensor.name, 0, better.raw_RN)
            whole = _Piece(tensor, 0, 0, len(w_RC))
            norm = math.fsum(result.norm for result in solved[tensor.name])
            self._finish(tensor, [_Done(whole, self._error(w_RC, tensor, better), norm, better)])

    def _finish(self, tensor: MixTensor, done: list[_Done]) -> None:
        self.output.finish(tensor.name, _record(done))
        self.written.add(tensor.name)

    def _advance(self, piece: _Piece) -> None:
        name = piece.tensor.name
        check(self.running.max_memory)
        self.running.progress.advance((piece.stop - piece.start) * self.sources[name].columns, name)

    def _is_whole(self, tensor: MixTensor) -> bool:
        solved = tensor.type not in FLOAT_TYPES and not self._is_copy(tensor)
        return solved and "hessian" in self.solver.needs and tensor.name in self.hessians

    def _is_copy(self, tensor: MixTensor) -> bool:
        source = self.sources[tensor.name]
        return source.stored == tensor.type and source.read_raw is not None

    def _wholes(self, tensor: MixTensor) -> Iterator[_Piece]:
        every = self.sources[tensor.name].rows
        rows = tensor.shape[-2] if len(tensor.shape) > 2 else every  # of one expert
        for expert, first in enumerate(range(0, every, rows)):
            yield _Piece(tensor, expert, first, first + rows)

    def _chunks(self, tensor: MixTensor) -> Iterator[_Piece]:
        columns = self.sources[tensor.name].columns
        together = find_codec(tensor.type, columns).rows_together
        step = max(1, CHUNK_WEIGHTS // columns // together) * together
        for whole in self._wholes(tensor):
            for start in range(whole.start, whole.stop, step):
                yield replace(whole, start=start, stop=min(start + step, whole.stop))

    def _work(self, piece: _Piece, keep: bool = False) -> _Done:
        """One piece from source to file; its bytes are let go unless they are to be kept."""
        source, tensor = self.sources[piece.tensor.name], piece.tensor
        if self._is_copy(tensor) and source.read_raw is not None:
            raw_RN = source.read_raw(piece.start, piece.stop)
            _check_finite(tensor.name, source.read(piece.start, piece.stop), piece.start)
            self.output.write_rows(tensor.name, piece.start, raw_RN)
            return _Done(piece, 0.0, 0.0, None)
        w_RC = source.read(piece.start, piece.stop)
        norm = _check_finite(tensor.name, w_RC, piece.start)
        same_RN = source.recode(tensor.type, piece.start, piece.stop) if source.recode else None
        if same_RN is not None:
            self.output.write_rows(tensor.name, piece.start, same_RN)
            return _Done(piece, self._error(w_RC, tensor, Solved(same_RN, "copy")), norm, None)
        if tensor.type == "F16" and (largest := float(np.abs(w_RC).max())) > _LARGEST_F16:
            reason = f"holds {largest:.4g}, beyond F16's {_LARGEST_F16:.0f}"
            raise SourceError(tensor.name, reason, f"Keep it wider: --tensor '^{tensor.name}$=BF16'.")
        solved = self._solve(w_RC, piece)
        self.output.write_rows(tensor.name, piece.start, solved.raw_RN)
        error = self._error(w_RC, tensor, solved)
        return _Done(piece, error, norm, solved if keep else replace(solved, raw_RN=np.zeros((0, 0), np.uint8)))

    def _solve(self, w_RC: Floats, piece: _Piece) -> Solved:
        codec = find_codec(piece.tensor.type, w_RC.shape[1])
        evidence = self.evidence(piece.tensor.name, piece.expert)
        if evidence is not None:
            # A column that no input ever reached still has a scale to share.
            floor = np.float32(evidence.mean_square_C.mean() * 1e-8)
            if evidence.mean_square_C.min() < floor:
                evidence = replace(evidence, mean_square_C=np.maximum(evidence.mean_square_C, floor))
            # Importance that is the same everywhere, as of an expert that saw no token, says nothing.
            if evidence.hessian_CC is None and not codec.needs_importance and not np.ptp(evidence.mean_square_C):
                evidence = None
        hessian = evidence is not None and evidence.hessian_CC is not None
        able = piece.tensor.type not in FLOAT_TYPES and (hessian or "hessian" not in self.solver.needs)
        return (self.solver if able else self._nearest)(w_RC, codec, evidence)

    def _error(self, w_RC: Floats, tensor: MixTensor, solved: Solved) -> float:
        from dither.codecs.kernels.stats import sum_squared_difference

        if tensor.type == "F32":
            return 0.0
        decoded_RC = find_codec(tensor.type, w_RC.shape[1]).decode(solved.raw_RN)
        error = float(sum_squared_difference(w_RC.reshape(-1), decoded_RC.reshape(-1)))
        if not math.isfinite(error):
            raise DitherError(tensor.name, f"became NaN or infinite as {tensor.type}", "Please report this.")
        return error


def in_order_of_flow(tensors: Sequence[MixTensor]) -> list[MixTensor]:
    """The order in which activations meet them, where names tell it: the embedding, blocks by number and
    within a block attention, its output, feed-forward, its way down; the output matrix last."""

    def place(tensor: MixTensor) -> tuple[int, int]:
        block, kind = block_of(tensor.name), kind_of(tensor.name)
        if block is None:
            return (-1, 0) if tensor.name == EMBEDDING else (2**31, 0)
        stages = ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
        return block, next((i + 1 for i, s in enumerate(stages) if kind.startswith(s)), 0)

    return sorted(tensors, key=place)


def _check_finite(name: str, w_RC: Floats, start: int) -> float:
    """Σw², or SourceError naming the first weight that is NaN or infinite."""
    from dither.codecs.kernels.stats import sum_squares

    norm = float(sum_squares(w_RC.reshape(-1)))
    if math.isfinite(norm):
        return norm
    row, column = np.argwhere(~np.isfinite(w_RC))[0]
    reason = f"holds {w_RC[row, column]} at row {start + row}, column {column}"
    raise SourceError(name, reason, "The checkpoint is damaged: fetch or export it again.")


def _joined(results: list[_Done]) -> Solved:
    """The answers for all experts of a stack as one."""
    solved = [result.solved for result in results if result.solved is not None]
    notes = dict.fromkeys(note for s in solved for note in s.notes)
    solver = Counter(s.solver for s in solved).most_common(1)[0][0]
    return Solved(np.concatenate([s.raw_RN for s in solved]), solver, _summed(solved), tuple(notes))


def _summed(solved: list[Solved]) -> dict[str, float]:
    """Objectives added up, the worst damping."""
    values = defaultdict[str, list[float]](list)
    for key, value in chain.from_iterable(s.record.items() for s in solved):
        values[key].append(value)
    return {key: max(found) if key == "damping" else math.fsum(found) for key, found in values.items()}


def _kept_by(done: list[_Done]) -> dict[str, int]:
    """Who kept how many layers: each expert is one, and was solved by whoever solved most of its pieces."""
    votes = defaultdict[int, Counter[str]](Counter)
    for result in done:
        if result.solved is not None:
            votes[result.piece.expert][result.solved.solver] += 1
    return dict(Counter(vote.most_common(1)[0][0] for vote in votes.values()))


def _record(done: list[_Done]) -> dict[str, Any]:
    """What is kept of a tensor: its error, who solved it, and sums of what solvers counted."""
    error, norm = math.fsum(d.error for d in done), math.fsum(d.norm for d in done)
    record: dict[str, Any] = {
        "squared_error": error,
        "squared_norm": norm,
        "relative_error": math.sqrt(error / norm) if norm > 0 else 0.0,
    }
    solved = [d.solved for d in done if d.solved is not None]
    if any(s.record for s in solved):
        record["solvers"] = _kept_by(done)
        record |= _summed(solved)
    notes = list(dict.fromkeys(note for s in solved for note in s.notes))
    return {**record, "notes": notes} if notes else record
