"""The hidden states between two blocks: in memory, or on disk if they are too many.

Between two blocks these S × T × H numbers are all there is of a run, so an interrupted run continues from them.
In memory they are replaced in place, batch by batch, and copied to `hidden.K.npy`, where K is the number of blocks
they went through (0 for the embedding), when enough time has passed since the last copy.  On disk, a block reads
one memory-mapped file and writes another, which gets that name when the block is done.  Either way the file is
synced and renamed: it is complete or it is not there.  A walk that comes back keeps the file of every K; its
gradients are states like any other, named `back.K.npy`.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dither.system.files import writing
from dither.types import Floats
from dither.units import format_bytes

IN_MEMORY = 2 * 2**30  # bytes above which hidden states live on disk
SNAPSHOT_SECONDS = 20.0  # of work that an interruption may lose


class Hidden:
    """Float32 (S, T, H), read and written by rows of sequences; `finished` ends the embedding or a block."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, name: str = "hidden", keep: int = 0) -> None:
        """`keep`: the number of states, if all of them shall stay on disk."""
        self._folder, self._shape, self._name, self._keep = folder, shape, name, keep
        self.bytes = 4 * int(np.prod(shape))
        self.on_disk = self.bytes > IN_MEMORY or keep > 0
        self._source: Floats | None = None
        self._target: Floats | None = None
        self._saved_at = time.monotonic()

    def resume(self, finished_blocks: int) -> int:
        """Continues from the last copy that was taken within the finished blocks and has the right shape; returns how
        many blocks need not be run again."""
        for blocks, path in sorted((copy for copy in self._copies() if copy[0] <= finished_blocks), reverse=True):
            with suppress(OSError, ValueError, EOFError):
                kept = np.load(path, mmap_mode="r", allow_pickle=False)
                if kept.shape == self._shape and kept.dtype == np.float32:
                    self._source = kept if self.on_disk else np.array(kept)
                    return blocks
        return 0

    def go_to(self, blocks: int) -> None:
        """From now on the state behind so many blocks is read."""
        self._source = np.load(self._path(blocks), mmap_mode="r", allow_pickle=False)

    def read(self, index_B: Any) -> Floats:
        assert self._source is not None
        return np.asarray(self._source[index_B])

    def write(self, index_B: Any, hidden_BTH: Floats) -> None:
        if self._target is None and not self.on_disk:
            # In memory a batch replaces the rows it was computed from.
            self._target = np.empty(self._shape, np.float32) if self._source is None else self._source
        elif self._target is None:
            with self._writing():
                self._target = np.lib.format.open_memmap(self._part, mode="w+", dtype=np.float32, shape=self._shape)
        self._target[index_B] = hidden_BTH

    def finished(self, blocks: int) -> None:
        """Says that all rows behind so many blocks are written."""
        if self.on_disk:
            assert isinstance(self._target, np.memmap)
            self._target.flush()
            self._publish(blocks)
            self.go_to(blocks)
            self._target = None
            return
        self._source, self._target = self._target, None
        if time.monotonic() - self._saved_at < SNAPSHOT_SECONDS:
            return
        assert self._source is not None
        with self._writing(), self._part.open("wb") as file:
            np.save(file, self._source, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        self._publish(blocks)
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        self._source = self._target = None
        for _, path in self._copies():
            path.unlink()
        self._part.unlink(missing_ok=True)

    @property
    def disk_bytes(self) -> int:
        """The most that this needs on disk: the file that is read and the one that is written."""
        return max(self._keep, 2) * self.bytes

    @property
    def _part(self) -> Path:
        return self._folder / f"{self._name}.part"

    def _path(self, blocks: int) -> Path:
        return self._folder / f"{self._name}.{blocks}.npy"

    def _copies(self) -> list[tuple[int, Path]]:
        pattern = re.compile(rf"{self._name}\.(\d+)\.npy")
        matches = ((pattern.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match[1]), path) for match, path in matches if match]

    def _publish(self, blocks: int) -> None:
        older = self._copies()
        self._part.replace(self._path(blocks))
        for number, path in older:
            if number != blocks and not self._keep:
                path.unlink()

    def _writing(self) -> AbstractContextManager[None]:
        failed = f"{format_bytes(self.bytes)} of hidden states cannot be written"
        return writing(self._part, "Free some space, or ask for fewer tokens.", failed)
