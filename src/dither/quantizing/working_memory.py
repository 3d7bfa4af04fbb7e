"""What a run takes of memory, told from shapes before it starts, so that a limit is kept and not met by luck.

    limit − what the program holds when the pass begins = what the pass may take
    the largest of: chunks in flight · one matrix with its Hessian in a solver · one decoder block, where text runs

What fits decides how many chunks are in flight and how much evidence is kept for the next layer that shares it.
What cannot fit is refused before anything is written, by the name of what is too large.  The numbers of `Working`
are measured (docs/quantize.md says how), and rounded up.  While the pass runs, the memory really held is compared
with the limit after each piece: a run that would go beyond stops, keeps its work, and says so.

Legend: R rows, C columns, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dither.codecs import codec as find_codec
from dither.containers.mix import Mix, MixTensor
from dither.errors import OutputError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.mapped import KEPT_BYTES
from dither.formats.tensor_names import block_of
from dither.quantizing.request import Running
from dither.system.memory import own_memory
from dither.types import Evidence, Keeps, Model, Solver, Working
from dither.units import format_bytes

CHUNK_WEIGHTS = 2**18  # of one piece of work: 1 MiB of float32 for each thread, so that it stays in its core's cache
_CHUNK_FLOATS = 20  # float32 numbers per weight of a chunk: source, weights, codes, what is decoded again, scratch
_CAUTIOUS = Working(6, 8, 8)  # of a solver that does not say
_BLOCK = 12  # float32 numbers per weight of a block that text runs through twice, or that is trained
_LEAST = 16 * 2**20  # of small things around any piece of work
_TRIAL = 256


@dataclass(frozen=True)
class Need:
    """The smallest working set of one part of the work."""

    what: str
    bytes: int
    way_out: str


def fitted(
    limit: int, running: Running, mix: Mix, model: Model, solver: Solver, store: EvidenceStore | None, text: int
) -> Running:
    """`running` with as many threads as `limit` has room for; the caches of `solver` and `store` are bounded.

    `text` counts the tokens that run through blocks meanwhile, 0 where none do.
    Raises UsageError where the smallest working set is too large, naming it.
    """
    packed = any(tensor.recode is not None for tensor in model.tensors)
    base, columns = own_memory() + packed * KEPT_BYTES, {tensor.name: tensor.columns for tensor in model.tensors}
    chunk = max((_chunk_bytes(tensor, columns[tensor.name]) for tensor in mix.tensors), default=0)
    needs = [Need("one chunk of rows", 2 * chunk, "")]  # one that is worked on, and one that waits
    needs += _wholes(mix, columns, solver, store)
    needs += _blocks(model, text, store is not None and "block" in solver.needs)
    largest = max(needs, key=lambda need: need.bytes)
    least = base + _LEAST + largest.bytes
    if least > limit:
        reason = f"is too little: {largest.what} needs {format_bytes(largest.bytes + _LEAST)}"
        reason += f", and the program itself holds {format_bytes(base)}"
        way_out = f"Give at least --max-memory {_mebibytes(least)}{largest.way_out}."
        raise UsageError(f"--max-memory {format_bytes(limit)}", reason, way_out)
    spare = limit - least
    if store is not None:
        store.kept_bytes = min(store.kept_bytes, spare // 2)
    if isinstance(solver, Keeps):
        solver.kept_bytes = min(solver.kept_bytes, spare // 4)
    # The next item waits beside those that are worked on.
    fitting = max(1, (limit - base - _LEAST) // max(1, chunk) - 1)
    return replace(running, threads=min(running.threads, fitting), max_memory=limit)


def check(limit: int | None) -> None:
    """Raises OutputError, after which work is kept, where more than `limit` is held by now."""
    if limit is not None and (held := own_memory()) > limit:
        reason = f"is exceeded: {format_bytes(held)} are held, more than was foreseen"
        way_out = "Give more, or --threads 1; the same command continues where this stopped."
        raise OutputError(f"--max-memory {format_bytes(limit)}", reason, way_out)


def warm(solver: Solver, types: Iterable[str]) -> None:
    """Has a solver load what it loads on first use, so that it is held before the rest is counted."""
    rng = np.random.default_rng(0)
    for name in sorted(set(types).difference(FLOAT_TYPES)):
        codec = find_codec(name, _TRIAL)
        columns = max(_TRIAL, codec.block)
        w_RC = rng.standard_normal((4 * codec.rows_together, columns)).astype(np.float32)
        solver(w_RC, codec, Evidence(1, np.ones(columns, np.float32), np.eye(columns, dtype=np.float32), None, ""))


def _chunk_bytes(tensor: MixTensor, columns: int) -> int:
    together = find_codec(tensor.type, columns).rows_together
    return 4 * _CHUNK_FLOATS * max(CHUNK_WEIGHTS, columns * together)


def _wholes(mix: Mix, columns: dict[str, int], solver: Solver, store: EvidenceStore | None) -> list[Need]:
    """Every matrix that is solved as a whole, with its evidence."""
    if store is None or "hessian" not in solver.needs:
        return []
    working = getattr(solver, "working", _CAUTIOUS)
    found = []
    for tensor in mix.tensors:
        known = store.bytes_of(tensor.name) if tensor.type not in FLOAT_TYPES else None
        if known is None:
            continue
        R, C = tensor.shape[-2], columns[tensor.name]
        # The weights are there as they were read and as they are rounded.
        floats = (2 + working.weight) * R * C + working.square * C * C + working.outputs * R * R * known.has_outputs
        what = f"{tensor.name} ({R} × {C}) with its Hessian"
        found.append(Need(what, int(4 * floats) + 2 * known.bytes, ", or --solver nearest, which needs no Hessians"))
    return found


def _blocks(model: Model, text: int, trained: bool) -> list[Need]:
    """Every decoder block, where text runs through it: its weights, and what comes out of it."""
    if not text:
        return []
    weights = defaultdict[int, int](int)
    for tensor in model.tensors:
        if (block := block_of(tensor.name)) is not None:
            weights[block] += tensor.size
    width = int(model.value(f"{model.arch}.embedding_length", 0))
    vocabulary = len(model.value("tokenizer.ggml.tokens", ()))
    states = 4 * 4 * width * text
    way_out = ", or leave out what runs text through the model (--measure, learned, sequential)"
    found = [
        Need(f"block {block} with {text} tokens of text", 4 * (_BLOCK if trained else 3) * size + states, way_out)
        for block, size in weights.items()
    ]
    return [*found, Need("the output matrix", 4 * 3 * width * vocabulary + states, way_out)]


def _mebibytes(size: int) -> str:
    """As it can be given again: no digit is lost upwards."""
    return f"{-(-size // 2**20)}MiB"
