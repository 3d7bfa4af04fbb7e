"""What the model has written so far, kept so that an interrupted run need not write it again.

One JSON line for every request to llama.cpp: what was asked, as a hash, and the token ids of the answers, synced
before the next is asked for.  A later run of the same work asks the same, because everything it asks hangs on the seed
and on the answers before: it is given the kept answers, and goes on where they end.  A request begins without
anything of earlier ones in llama.cpp's memory, so that the rest comes out as it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dither.system.files import replace

WRITTEN = "written.jsonl"
_Texts = list[list[int]]


class Written:
    """The answers kept in a folder; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / WRITTEN
        self._kept = [] if self._path is None else _lines(self._path)
        self._next = 0
        self.replayed = 0  # tokens that need not be written again

    def answers(self, asked: dict[str, Any], write: Callable[[], _Texts]) -> _Texts:
        """The kept answers to `asked`; where there are none, those that `write` gives, which are kept.

        Raises OutputError where the disk refuses.
        """
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if self._next < len(self._kept) and self._kept[self._next]["asked"] == key:
            found: _Texts = self._kept[self._next]["written"]
            self._next += 1
            self.replayed += sum(map(len, found))
            return found
        found = write()
        self._append({"asked": key, "written": found})
        return found

    def _append(self, line: dict[str, Any]) -> None:
        """Behind the answers that were given out: what may stand after them answered something else."""
        if self._path is None:
            return
        self._kept = [*self._kept[: self._next], line]
        self._next += 1
        text = "".join(json.dumps(kept) + "\n" for kept in self._kept)
        replace(self._path, text.encode(), "Free some space and run it again.")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, up to the first that is none of ours."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for text in path.read_bytes().splitlines():
            line = json.loads(text)
            if not (isinstance(line, dict) and isinstance(line.get("asked"), str) and _are_texts(line.get("written"))):
                break
            found.append(line)
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(text, list) and all(type(token) is int for token in text) for text in value
    )
