"""The folder that a calibration grows in: one run at a time, nothing of a stranger's touched.

While a run lives or is interrupted, `run.json` says what it was asked (its *request*), which text it runs
and which blocks are done.  The same request continues; another one starts over and says so.  A folder
with `evidence.json` is finished and replaced only by force.  The lock is held on the folder itself, so
that it leaves no file behind and ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import OutputError
from dither.formats.evidence import IMATRIX, MANIFEST, TOKENS
from dither.system.files import replace
from dither.units import format_bytes

RUN = "run.json"
WRITER = "writer-"  # a temporary folder that a killed run could not take away
_OURS = re.compile(
    r"((blk\.\d+|output|tokens)\.npz|imatrix\.gguf|(evidence|run)\.json)((\.\d+)?\.part)?|"
    r"(hidden|back|sensitivity)\..*"
)


class Folder:
    """An evidence folder, locked while this object is entered; `state` is what an earlier run left.

    Raises OutputError where the folder cannot be had, is somebody else's, or is finished and not to
    be replaced.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path = path
        self.state: dict[str, Any] = {}
        self.discarded = False
        self._made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise OutputError(
                str(path), f"cannot be made a folder ({error.strerror})", "Choose another with -o."
            ) from None
        try:
            self._claim(force)
        except BaseException:
            os.close(self._lock)
            raise

    def _claim(self, force: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                str(self.path), "is being written by another run", "Wait for it or choose another with -o."
            ) from None
        for entry in self.path.glob(WRITER + "*"):
            shutil.rmtree(entry, ignore_errors=True)
        names = [entry.name for entry in self.path.iterdir()]
        strangers = sorted(name for name in names if not _OURS.fullmatch(name))
        if strangers and not {RUN, MANIFEST} & set(names):
            raise OutputError(
                str(self.path), f"holds files that are no evidence ({strangers[0]})", "Choose another folder with -o."
            )
        if MANIFEST in names:
            if not force:
                raise OutputError(str(self.path), "holds evidence already", "Choose another folder, or give --force.")
            self.clear()
        try:
            self.state = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}
        if not isinstance(self.state, dict) or not {"request", "files", "few"} <= set(self.state):
            self.state = {}

    def continues(self, request: Mapping[str, Any]) -> bool:
        """Whether what is here was begun with the same request; what was begun with another goes."""
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
        held = sum(entry.stat().st_size for entry in self.path.iterdir() if _OURS.fullmatch(entry.name))
        if size > free + held:
            raise OutputError(
                str(self.path),
                f"needs {format_bytes(size)} and has {format_bytes(free + held)} free",
                "Free some space, choose another place with -o, or leave the Hessians out: --no-hessians.",
            )

    def clear(self) -> None:
        """Takes away what runs wrote here, the manifest first: half a folder must not look whole."""
        for name in (MANIFEST, IMATRIX, TOKENS, RUN):
            (self.path / name).unlink(missing_ok=True)
        for entry in list(self.path.iterdir()):
            if _OURS.fullmatch(entry.name):
                entry.unlink()

    def tidy(self) -> None:
        """The run is over: what only a later run of it would need goes."""
        (self.path / RUN).unlink(missing_ok=True)
        for part in self.path.glob("*.part"):  # of runs that were killed while they wrote
            part.unlink(missing_ok=True)
        os.fsync(self._lock)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()  # a request that was refused leaves nothing behind
        os.close(self._lock)
