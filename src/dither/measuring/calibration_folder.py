"""The folder that a calibration writes: one run at a time, and no file of anybody else's is touched.

Until a run is finished, `run.json` says what it was asked for (its *request*), which text it runs and which blocks
are done.  The same request continues it; another one starts over and says so.  A folder with `evidence.json` is
finished, and replaced only by force.  The lock is held on the folder itself, so that it leaves no file behind and
is released when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from dither.errors import OutputError
from dither.formats.evidence import MANIFEST
from dither.measuring.written import WRITTEN
from dither.system import native
from dither.system.files import replace, writing
from dither.units import format_bytes

RUN = "run.json"
WRITER = "writer-"  # a temporary folder that a killed run of an earlier version could not remove
WRITER_FILE = "writer.gguf"  # the copy of the model that writes the text, until the text is written
_OURS = re.compile(
    r"((blk\.\d+|output|tokens)\.npz|imatrix\.gguf|(evidence|run)\.json|written\.jsonl)((\.\d+)?\.part)?|"
    r"writer\.gguf(\.part(\.journal)?)?|(hidden|back|sensitivity)\..*"
)


class Folder(AbstractContextManager["Folder"]):
    """An evidence folder, locked while this object is entered; `state` is what an earlier run left.

    Raises OutputError if the folder cannot be made, holds other files, or is finished and may not be replaced.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path = path
        self.state: dict[str, Any] = {}
        self.discarded = False
        self._made = not path.exists()
        with writing(path, "Choose another with -o.", "cannot be made a folder"):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = native.open_folder(path)
        try:
            self._claim(force)
        except BaseException:
            os.close(self._lock)
            raise

    def _claim(self, force: bool) -> None:
        try:
            native.lock(self._lock)
        except OSError:
            way_out = "Wait for it or choose another with -o."
            raise OutputError(str(self.path), "is being written by another run", way_out) from None
        for entry in self.path.glob(WRITER + "*"):
            shutil.rmtree(entry, ignore_errors=True)
        names = {entry.name for entry in self.path.iterdir()}
        strangers = sorted(name for name in names if not _OURS.fullmatch(name))
        if strangers and not {RUN, MANIFEST} & names:
            reason = f"holds files that are no evidence ({strangers[0]})"
            raise OutputError(str(self.path), reason, "Choose another folder with -o.")
        if MANIFEST in names:
            if not force:
                if RUN in names:  # of a run that was killed when all was done but this
                    self.tidy()
                raise OutputError(str(self.path), "holds evidence already", "Choose another folder, or give --force.")
            self.clear()
        with suppress(OSError, ValueError):
            state = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if isinstance(state, dict) and {"request", "files", "few"} <= set(state):
                self.state = state

    def continues(self, request: Mapping[str, Any]) -> bool:
        """Whether the run in this folder had the same request; one with another request is removed."""
        if self.state and self.state.get("request") == json.loads(json.dumps(request)):
            return True
        self.discarded = bool(self.state)
        self.clear()
        self.state = {"request": dict(request), "files": {}, "few": {}}
        return False

    def save(self) -> None:
        """What is done so far, to the disk.  Raises OutputError."""
        replace(self.path / RUN, json.dumps(self.state).encode(), "Free some space and run it again.")
        os.fsync(self._lock)

    def need(self, size: int) -> None:
        """Raises OutputError unless so many more bytes are free."""
        free = shutil.disk_usage(self.path).free
        held = sum(entry.stat().st_size for entry in self._ours())
        if size > free + held:
            reason = f"needs {format_bytes(size)} and has {format_bytes(free + held)} free"
            way_out = "Free some space, choose another place with -o, or leave the Hessians out: --no-hessians."
            raise OutputError(str(self.path), reason, way_out)

    def clear(self) -> None:
        """Removes what runs wrote here, the manifest first: half a folder must not look complete."""
        for name in (MANIFEST, RUN):
            (self.path / name).unlink(missing_ok=True)
        for entry in self._ours():
            entry.unlink()

    def forget_writing(self) -> None:
        """Removes what the model's own text was written with: it is whole, and `state` knows it."""
        for name in (WRITTEN, WRITER_FILE):
            (self.path / name).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what only a continued run would need: this one is finished."""
        (self.path / RUN).unlink(missing_ok=True)
        # Of runs that were killed while they wrote, and the states that an interrupted walk would go on from.
        for left in [*self.path.glob("*.part"), *self.path.glob("hidden.*"), *self.path.glob("back.*")]:
            left.unlink(missing_ok=True)
        os.fsync(self._lock)

    def _ours(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if _OURS.fullmatch(entry.name)]

    def __exit__(self, *exception: object) -> None:
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()  # a refused request leaves nothing behind
        os.close(self._lock)
