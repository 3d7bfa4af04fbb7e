"""The waist: the few types that every room shares.

Legend of shape suffixes: R rows (out features, experts flattened in), C columns (in features),
B the weights of one block, K some neighboring columns of a block, N bytes of a packed row,
H input rows held back from calibration, K diagonal blocks of O rows each.
Arrays are numpy's: a room that needs torch wraps them without copying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[Any]  # integers, one per weight; a codec chooses the dtype
Grid = Any  # a codec's own record of scales for R rows of one block: opaque to everybody else


@dataclass(frozen=True)
class Evidence:
    """What calibration learnt about one linear layer's input x, and of the pull g of a loss at its output.

    With `output_KOO`, tokens are weighed by Σ g² in the Hessian and among the rows held back, and
    ½ tr(G E H Eᵀ) estimates the KL divergence, in nats per token, that an error E of the weights causes.
    """

    tokens: int  # token positions seen
    mean_square_C: Floats  # E[x_c²]: llama.cpp's importance matrix
    hessian_CC: Floats | None = None  # E[x xᵀ], without the tokens held back
    held_HC: Floats | None = None  # inputs held back from the Hessian, to judge its solution by
    data_sha256: str = ""
    output_KOO: Floats | None = None  # E[g gᵀ] over the layer's rows, as diagonal blocks


Recode = Callable[[str, int, int], "Bytes | None"]


class EvidenceSource(Protocol):
    """Evidence by tensor: of `expert` where each has inputs of its own, None where nothing is known."""

    def __call__(self, tensor: str, expert: int = 0) -> Evidence | None: ...


class Codec(Protocol):
    """A set of numbers a weight may become, and how they are stored as bytes.

    Every array may hold any number of rows; blocks of one row are contiguous along the columns.
    Implementations import no torch, hold no state, and release the GIL in their loops, so that
    callers may run them on several threads.
    """

    @property
    def name(self) -> str: ...  # the field's name: "Q4_K", "int4-g128"
    @property
    def block(self) -> int: ...  # weights that share one set of scales; rows are a multiple of it
    @property
    def block_bytes(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...  # exact, scales included
    @property
    def snap_columns(self) -> int: ...  # fewest neighboring columns `snap` takes: 1, or a lattice's
    @property
    def needs_importance(self) -> bool: ...  # refuses to encode without evidence
    @property
    def rows_together(self) -> int: ...  # neighboring rows that share scales: encode whole multiples, or all

    def fit(self, w_RB: Floats, importance_B: Floats | None) -> Grid:
        """Scales for R rows of one block that keep Σ importance · (w − ŵ)² small.

        `importance_B` is float32 of shape (B,) or (R, B), all ones when None.
        """

    def snap(self, w_RK: Floats, grid: Grid, at: slice) -> Codes:
        """The nearest code of each weight in the block's columns `at`, under a fitted grid."""

    def value(self, codes_RK: Codes, grid: Grid, at: slice) -> Floats:
        """The float32 numbers those codes stand for, exactly as a decoder computes them."""

    def pack(self, codes_RB: Codes, grid: Grid) -> Bytes:
        """Stored bytes of one block per row: uint8 (R, block_bytes)."""

    def unpack(self, raw_RN: Bytes) -> tuple[Codes, Grid]:
        """The inverse of `pack`, for one block per row."""

    def encode(self, w_RC: Floats, importance_C: Floats | None = None) -> Bytes:
        """Whole rows through fit, snap and pack in one fused pass: uint8 (R, C // block · block_bytes)."""

    def decode(self, raw_RN: Bytes) -> Floats:
        """Whole rows back to float32 (R, C)."""


class Solver(Protocol):
    """Chooses which of a codec's numbers each weight becomes.

    One that needs a Hessian is given all rows of a layer (or of one expert) at once; any other may be
    given some of them.
    """

    name: str
    needs: frozenset[str]  # of "mean_square", "hessian" and, for a `BlockSolver`, "block"

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved: ...


class Working(NamedTuple):
    """What a solver holds beside its weights and its evidence, in float32 numbers: for each weight, each pair of
    columns, and, with an output Hessian, each pair of rows.  One that solves whole layers says so as `working`."""

    weight: float
    square: float
    outputs: float


@runtime_checkable
class Keeps(Protocol):
    """A solver that keeps things for the next layer that shares them."""

    kept_bytes: int


class BlockSolver(Solver, Protocol):
    """One that needs "hessian" and "block": it solves every matrix, and then refines decoder blocks as wholes."""

    steps: int  # of one block's refinement

    def refine(self, task: Any, report: Callable[[int, float], None] | None = None) -> Mapping[str, Solved]:
        """Better bytes of all matrices of a block (`measuring.live.BlockTasks`) together; `report` hears of
        every step's number and loss."""


@dataclass(frozen=True)
class Solved:
    """A solver's answer: the bytes, who found them, and what a person should know about it."""

    raw_RN: Bytes
    solver: str  # the one whose codes were kept: "gptq", or "nearest" where that was better
    record: Mapping[str, float] = field(default_factory=dict)  # "objective", "damping", …
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A tensor of a source, not yet read.

    `read(start, stop)` gives float32 (stop − start, C) of the rows when all dimensions but the last
    are flattened; a 1-D tensor is one row.  `read_raw`, where the source stores these very rows in
    a codec of ours, gives their bytes untouched as uint8 (stop − start, N).
    """

    name: str  # GGUF's name: "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # columns last
    stored: str  # the type in the source: "BF16", "Q4_1"
    stored_bytes: int
    read: Callable[[int, int], Floats]
    read_raw: Callable[[int, int], Bytes] | None = None
    recode: Recode | None = None

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.size // self.columns

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A checkpoint, opened but not read: GGUF's metadata and names, tensors still on disk."""

    name: str
    arch: str  # GGUF's name of the architecture: "llama", "qwen3moe"
    metadata: Mapping[str, Any]  # key → formats.gguf.Field
    tensors: tuple[Tensor, ...]
    origin: str  # the path or hub id that was opened
    kind: str  # "safetensors" or "gguf"
    files: tuple[str, ...]  # every file that is read, so that none is overwritten
    fingerprint: str  # sha256 over the headers and the files' sizes and times
    notes: tuple[str, ...] = field(default=())  # what a person should know about how it was read

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """What the metadata say under `key`."""
        field = self.metadata.get(key)
        return default if field is None else field.value


@dataclass(frozen=True)
class Transformed:
    """A model rewritten to compute the same function, and the evidence its layers would now give."""

    model: Model
    evidence: EvidenceSource
    record: Mapping[str, Any]  # what was chosen, for the file's recipe
    notes: tuple[str, ...] = ()


class Transform(Protocol):
    """Rewrites a model so that rounding hurts less; tensors stay lazy."""

    name: str
    needs: frozenset[str]  # {"mean_square"}: of the layers' inputs, refused without; {}: works without evidence

    def __call__(self, model: Model, evidence: EvidenceSource, codec_of: Callable[[str], Codec | None]) -> Transformed:
        """`codec_of` names the codec each tensor will be stored in, floats included; None where unknown."""


@dataclass(frozen=True)
class Yes:
    pass


@dataclass(frozen=True)
class No:
    reason: str  # as a person reads it


class Output(Protocol):
    """A file being written: rows arrive in any order, from any thread; nothing shows until `commit`."""

    @property
    def finished(self) -> Mapping[str, Mapping[str, Any]]: ...  # what an interrupted run already wrote

    def write_rows(self, tensor: str, start: int, raw_RN: Bytes) -> None: ...

    def finish(self, tensor: str, record: Mapping[str, Any]) -> None: ...

    def commit(self) -> None: ...

    def discard(self) -> None: ...  # leaves nothing behind
