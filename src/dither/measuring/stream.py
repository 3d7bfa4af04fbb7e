"""The reference and its quantized files, side by side through one block at a time.

Other tools first write the reference's logits to disk: a vocabulary's worth of numbers per token, 37 GB for a
common test set.  Here nothing is written.  The hidden states of all sequences stay in memory; each block of each
model is loaded once, computes all sequences, and is dropped; at the end both output matrices are applied to a few
positions at a time.  At any moment memory holds one block (or two output matrices), the hidden states of each
model, and one chunk of logits.

After every block the hidden states of both models are compared: where the drift jumps, bits are missing.

Sequences are padded on the right.  Under causal attention no real position sees the padding, and a padded
position is never scored.

Legend: S sequences, T positions, H hidden width, N scored positions, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dither.errors import DitherError
from dither.formats.tensor_names import block_of
from dither.measuring.metrics import gather, rows_per_chunk, score
from dither.measuring.per_token import PerToken, scored_positions
from dither.measuring.text import BATCH_TOKENS
from dither.models.blocks import Blocks, open_blocks
from dither.progress import Progress, Silent
from dither.system import native
from dither.system.files import writing
from dither.types import Model
from dither.units import format_bytes

Tokens = npt.NDArray[np.int32]
Step = Callable[[torch.Tensor], torch.Tensor]

MEMORY = 4 * 2**30  # bytes of hidden states, of all models together, above which they are kept on disk
_REFERENCE = None  # the reference's key among the hidden states; the others are names of files


class Stages(Protocol):
    """A model in pieces; `models.blocks.Blocks` is one."""

    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor: ...

    def load(self, index: int) -> Step: ...

    def head(self) -> Step: ...


def measure_stream(
    blocks: Blocks,
    files: Mapping[str, Model | Blocks],
    tokens_ST: Tokens,
    lengths_S: npt.ArrayLike,
    *,
    skip: int | None = None,
    progress: Progress | None = None,
) -> dict[str, PerToken]:
    """Runs int32 tokens (S, T), right-padded to T, through `blocks` and every file: values by the file's name.

    Each file runs with its own metadata, so that a wrong rope base in it is measured as well.  The first `skip`
    positions of each sequence are not scored; None skips its first half.  Hidden states that do not fit into
    memory go to an unnamed file in the system's temporary folder.
    Raises DitherError if a model computes NaN, OutputError if the disk is too small.
    """
    stages: dict[str, Stages] = {
        name: file if isinstance(file, Blocks) else open_blocks(file, device=str(blocks.device))
        for name, file in files.items()
    }
    run = Lockstep(blocks, list(files), tokens_ST, lengths_S, skip=skip, progress=progress)
    run.through(stages)
    return run.finish(stages)


class Lockstep:
    """The same pass, driven by the caller: `embed`, `step` for each block, `finish`.

    A file's block may be written between two steps, as it is while a model is quantized.
    """

    def __init__(
        self,
        reference: Blocks,
        names: Sequence[str],
        tokens_ST: Tokens,
        lengths_S: npt.ArrayLike,
        *,
        skip: int | None = None,
        memory: int = MEMORY,
        progress: Progress | None = None,
    ) -> None:
        self.reference, self.progress = reference, progress or Silent()
        self.tokens_ST = torch.from_numpy(np.ascontiguousarray(tokens_ST, dtype=np.int64))
        self.lengths_S = np.asarray(lengths_S, dtype=np.int64)
        self.sequence_N, self.position_N = scored_positions(self.lengths_S, skip)
        shape = (*self.tokens_ST.shape, reference.width)
        fits = 4 * np.prod(shape, dtype=np.int64) * (1 + len(names)) <= memory
        self.hidden: dict[str | None, torch.Tensor] = {
            name: torch.empty(shape) if fits else spilled(shape) for name in (_REFERENCE, *names)
        }
        self.drift: dict[str, list[float]] = {name: [] for name in names}

    def through(self, files: Mapping[str, Stages]) -> None:
        """All of it but `finish`, with the progress told how much work there is."""
        sizes = sum(self._block_weights(index) for index in range(self.reference.count))
        self.progress.start(sizes * (1 + len(files)) + len(files) * self._head_weights(), 0)
        self.embed(files)
        for index in range(self.reference.count):
            self.step(index, files)

    @torch.no_grad()
    def embed(self, files: Mapping[str, Stages]) -> None:
        for name, stages in ((_REFERENCE, self.reference), *files.items()):
            for batch, length in self._batches():
                self.hidden[name][batch, :length] = stages.embed(self.tokens_ST[batch, :length]).cpu().float()

    @torch.no_grad()
    def step(self, index: int, files: Mapping[str, Stages]) -> None:
        """Runs the reference and every file through block `index`, and keeps how far they drifted."""
        for name, stages in ((_REFERENCE, self.reference), *files.items()):
            block = stages.load(index)
            for batch, length in self._batches():
                # In place: from here on nobody needs what entered the block.
                hidden_STH = self.hidden[name][batch, :length].to(self.reference.device)
                self.hidden[name][batch, :length] = block(hidden_STH).cpu().float()
            del block  # before the next one is loaded
            self._compare_hidden(name, index)
            self.progress.advance(self._block_weights(index), f"block {index}")

    @torch.no_grad()
    def finish(self, files: Mapping[str, Stages]) -> dict[str, PerToken]:
        """Scores every file against the reference, and forgets the hidden states."""
        found = {}
        for name, stages in files.items():
            scores = [score(*chunk) for chunk in self.logits(name, stages)]
            found[name] = gather(scores, self.sequence_N, self.drift[name])
            for values_N, whose in ((found[name].nll_reference_N, "the reference"), (found[name].kl_N, name)):
                if not np.isfinite(values_N).all():
                    way_out = "Its output matrix is damaged: fetch or make the file again."
                    raise DitherError(whose, "gives logits that are NaN or infinite", way_out)
        self.hidden.clear()
        return found

    @torch.no_grad()
    def logits(self, name: str, stages: Stages) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The reference's logits (N, V), those of a file, and the tokens that came next (N,), chunk by chunk."""
        heads = ((_REFERENCE, self.reference.head()), (name, stages.head()))
        for chunk in self._chunks():
            at = (self.sequence_N[chunk], self.position_N[chunk])
            reference_NV, logits_NV = (
                head(self.hidden[lane][at].to(self.reference.device)[None])[0] for lane, head in heads
            )
            yield reference_NV, logits_NV, self.tokens_ST[at[0], at[1] + 1]
        self.progress.advance(self._head_weights(), "output")

    def _compare_hidden(self, name: str | None, index: int) -> None:
        """Appends to the file's drift; of the reference, checks only that its numbers are finite."""
        total = 0.0
        for chunk in self._chunks():
            at = (self.sequence_N[chunk], self.position_N[chunk])
            reference_NH = self.hidden[_REFERENCE][at].double()
            size_N = reference_NH.norm(dim=-1)
            if name is _REFERENCE:
                total += float(size_N.sum())
                continue
            away_N = (self.hidden[name][at].double() - reference_NH).norm(dim=-1)
            total += float((away_N / size_N.clamp_min(torch.finfo(torch.float32).tiny)).sum())
        if not np.isfinite(total):
            way_out = "Its weights are damaged, or too large for float32: fetch or make it again."
            raise DitherError(name or "the reference", f"computes NaN or infinity in block {index}", way_out)
        if name is not _REFERENCE:
            self.drift[name].append(total / max(1, len(self.sequence_N)))

    def _batches(self) -> Iterator[tuple[slice, int]]:
        """Sequences that go through a block together, and their longest: no position beyond it is computed."""
        step = max(1, BATCH_TOKENS // self.tokens_ST.shape[1])
        for start in range(0, len(self.lengths_S), step):
            yield slice(start, start + step), int(self.lengths_S[start : start + step].max())

    def _chunks(self) -> Iterator[slice]:
        step = rows_per_chunk(self.reference.vocabulary)
        for start in range(0, len(self.sequence_N), step):
            yield slice(start, start + step)

    def _block_weights(self, index: int) -> int:
        return sum(tensor.size for tensor in self.reference.model.tensors if block_of(tensor.name) == index)

    def _head_weights(self) -> int:
        """Of both output matrices."""
        return 2 * self.reference.width * self.reference.vocabulary


def spilled(shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros, float32, in an unnamed file that vanishes with the tensor.

    The disk space is claimed at once: a process is killed if a mapped file runs out of it later.
    Raises OutputError if there is too little.
    """
    size, folder = 4 * int(np.prod(shape, dtype=np.int64)), Path(tempfile.gettempdir())
    failed = f"cannot hold {format_bytes(size)} of hidden states"
    with tempfile.TemporaryFile() as file:
        with writing(folder, "Take fewer tokens, or set TMPDIR to a larger disk.", failed):
            native.claim(file.fileno(), size)
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))
