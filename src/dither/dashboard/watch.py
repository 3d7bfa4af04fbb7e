"""Notices that a measurement, an answer or a model has come, gone or changed.

Polling of names, sizes and times: a few system calls a second, the same on every system and on network
drives, where change notifications are none of these.  A file that is still being copied changes with every
look, so a change counts once two looks in a row agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

DEPTH = 2  # folders below a named one, as `reporting.discover` looks
MOST_ENTRIES = 4096  # of a folder
_BESIDE = (".measure.json", ".answers.json", ".bench.json")
_WATCHED = (*_BESIDE, ".gguf", ".safetensors", "config.json", "manifest.json")
_COSTS = re.compile(r"sensitivity\..*\.json")  # what plans keep, which `reporting.discover` looks for


def fingerprint(paths: Iterable[Path]) -> str:
    """The same text as long as nothing that the page shows has changed."""
    text = "".join(sorted(line for path in paths for line in _lines(path, DEPTH)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _lines(path: Path, depth: int) -> Iterator[str]:
    if not path.is_dir():
        for beside in (path, *(path.with_name(path.name + end) for end in _BESIDE)):
            with contextlib.suppress(OSError):
                yield _line(beside.name, os.fspath(beside), beside.stat())
        return
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in islice(entries, MOST_ENTRIES):
            if entry.name.startswith(".") or entry.name.endswith(".part"):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    if depth:
                        yield from _lines(Path(entry.path), depth - 1)
                elif entry.name.endswith(_WATCHED) or _COSTS.fullmatch(entry.name):
                    yield _line(entry.name, entry.path, entry.stat())


def _line(name: str, path: str, stat: os.stat_result) -> str:
    return f"{name}\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"


class Watch:
    """`changed()` is true once for every change that has come to rest."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = [*paths]
        self._known = self._last = fingerprint(self.paths)

    def add(self, path: Path) -> None:
        if path not in self.paths:
            self.paths.append(path)

    def changed(self) -> bool:
        now = fingerprint(self.paths)
        rested, self._last = now == self._last, now
        if news := rested and now != self._known:
            self._known = now
        return news
