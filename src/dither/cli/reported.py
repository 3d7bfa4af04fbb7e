"""Progress for another process that watches.

Where DITHER_PROGRESS names a file, a command keeps in it where it stands: one small JSON object, replaced as
a whole, so that a reader never sees half of one and the file never grows.

    {"done": 120, "total": 300, "what": "blk.3.ffn_down", "left": 41.5, "at": 1767225600.0}

`left` is an estimate in seconds, null at first; `at` is the time of writing (seconds since 1970).  A file,
not a pipe: the watching process may end and start again while the command runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from dither.errors import OutputError
from dither.system.files import replacing

VARIABLE = "DITHER_PROGRESS"
_EVERY = 0.25  # seconds between two writings


class Reported:
    """Writes how far the work is, if asked to.  Never stops the work: a full disk is ignored."""

    def __init__(self, path: str | None = None) -> None:
        named = os.environ.get(VARIABLE) if path is None else path
        self._path = Path(named) if named else None
        self._spoke = float("-inf")

    def tell(self, done: int, total: int, what: str, left: float | None) -> None:
        now = time.monotonic()
        if self._path is None or (now - self._spoke < _EVERY and 0 < done < total):
            return
        self._spoke = now
        said = {"done": done, "total": total, "what": what[:500], "left": left, "at": time.time()}
        with contextlib.suppress(OutputError), replacing(self._path, sync=False) as file:
            file.write(json.dumps(said).encode())
