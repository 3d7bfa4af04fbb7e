"""The hidden states between two blocks: in memory, or on disk where they are too many.

Between blocks a run is nothing but these S × T × H numbers, so they are also what an interrupted run
continues from.  Kept in memory they are replaced in place, batch by batch, and copied to `hidden.K.npy`,
K being the number of blocks they went through, when enough time has gone into them since the last copy;
kept on disk, a block reads one memory-mapped file and writes another, which takes that name when the
block is done; the embedding is K = 0.  Either way the file is synced and renamed: it is whole or it is
not there.  A walk that comes back keeps the file of every K, and its gradients are states like any other,
named `back.K.npy`.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from dither.errors import OutputError
from dither.types import Floats
from dither.units import format_bytes

IN_MEMORY = 2 * 2**30  # bytes above which hidden states live on disk
SNAPSHOT_SECONDS = 20.0  # work that an interruption may cost


class Hidden:
    """Float32 (S, T, H), read and written by rows of sequences; `finished` ends the embedding or a block."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, name: str = "hidden", keep: int = 0) -> None:
        """`keep`: how many states there will be, if all of them are to stay on disk."""
        self._folder, self._shape, self._name, self._keep = folder, shape, name, keep
        self.bytes = 4 * int(np.prod(shape))
        self.on_disk = self.bytes > IN_MEMORY or keep > 0
        self._source: Floats | None = None
        self._target: Floats | None = None
        self._saved_at = time.monotonic()

    def resume(self, finished_blocks: int) -> int:
        """Continues from the last copy that lies behind finished blocks only and is of the right shape:
        the number of blocks that need not be run again."""
        for blocks, path in sorted(self._copies(), reverse=True):
            if blocks > finished_blocks:
                continue
            try:
                kept = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                continue
            if kept.shape == self._shape and kept.dtype == np.float32:
                self._source = kept if self.on_disk else np.array(kept)
                return blocks
        return 0

    def go_to(self, blocks: int) -> None:
        """What is read from now on is a kept state."""
        self._source = np.load(self._path(blocks), mmap_mode="r", allow_pickle=False)

    def read(self, index_B: Any) -> Floats:
        assert self._source is not None
        return np.asarray(self._source[index_B])

    def write(self, index_B: Any, hidden_BTH: Floats) -> None:
        if self._target is None:
            # In memory a batch replaces the very rows it was computed from.
            self._target = self._new_file() if self.on_disk else self._in_place()
        self._target[index_B] = hidden_BTH

    def finished(self, blocks: int) -> bool:
        """All rows behind so many blocks are written; whether a copy of them is on disk now."""
        if self.on_disk:
            self._flush()
            self._publish(blocks)
            self.go_to(blocks)
            self._target = None
            return True
        self._source, self._target = self._target, None
        if time.monotonic() - self._saved_at < SNAPSHOT_SECONDS:
            return False
        assert self._source is not None
        try:
            with self._part.open("wb") as file:
                np.save(file, self._source, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self._publish(blocks)
        self._saved_at = time.monotonic()
        return True

    def remove(self) -> None:
        """Takes the copies away."""
        self._source = self._target = None
        for _, path in self._copies():
            path.unlink()
        self._part.unlink(missing_ok=True)

    @property
    def disk_bytes(self) -> int:
        """The most that this needs on disk: what is read and what is written, or the copy beside the last."""
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

    def _in_place(self) -> Floats:
        return np.empty(self._shape, np.float32) if self._source is None else self._source

    def _new_file(self) -> Floats:
        try:
            return np.lib.format.open_memmap(self._part, mode="w+", dtype=np.float32, shape=self._shape)
        except OSError as error:
            raise self._unwritable(error) from None

    def _flush(self) -> None:
        assert isinstance(self._target, np.memmap)
        self._target.flush()

    def _publish(self, blocks: int) -> None:
        older = self._copies()
        self._part.replace(self._path(blocks))
        for number, path in older:
            if number != blocks and not self._keep:
                path.unlink()

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            str(self._part),
            f"{format_bytes(self.bytes)} of hidden states cannot be written ({error.strerror})",
            "Free some space, or ask for fewer tokens.",
        )
