"""A folder that is written in pieces and never seen half done: `journal.PartFile` for several files.

Beside the target `model-awq/` stand `model-awq.part/`, with every shard at its full size, and the journal.
When all is written the folder takes its name; one that stood there is moved aside first and removed last, so
that at no moment neither is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dither.containers.journal import CONTINUES, PartFile
from dither.errors import OutputError
from dither.system.files import writing

# What a model's folder holds: a folder with anything else in it is not replaced, whatever the flags.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".measure.json", ".gitattributes")


class PartFolder(PartFile):
    """The files of one output folder.  `pieces` are those with bytes to place: name → size.

    Raises OutputError where the target is no folder, or holds what no model's folder does.
    """

    kind = "folder"

    def __init__(self, target: Path, pieces: Mapping[str, int], identity: str) -> None:
        self._pieces = dict(pieces)
        self._files: dict[str, int] = {}
        super().__init__(target, sum(pieces.values()), identity)

    def write_text(self, name: str, text: str) -> None:
        """A small file, whole.  Raises OutputError."""
        path = self.part / name
        with writing(path, CONTINUES):
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def copy(self, source: Path, name: str) -> None:
        """A small file of the model's.  Raises OutputError."""
        path = self.part / name
        with writing(path, CONTINUES):
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, path)

    def _is_ours(self, path: Path) -> bool:
        if path == self.journal:
            return path.is_file()
        return path.is_dir()

    def _held(self) -> int:
        paths = (self.part / name for name in self._pieces)
        return sum(path.stat().st_blocks * 512 for path in paths if path.exists())

    def _is_whole(self, size: int) -> bool:
        paths = {self.part / name: expected for name, expected in self._pieces.items()}
        return all(path.is_file() and path.stat().st_size == expected for path, expected in paths.items())

    def _open_part(self, size: int) -> None:
        refuse_others(self.target)
        if not self.finished:
            self._remove_part()
        self.part.mkdir(exist_ok=True)
        try:
            for name, expected in self._pieces.items():
                self._files[name] = os.open(self.part / name, os.O_RDWR | os.O_CREAT, 0o666)
                os.truncate(self._files[name], expected)
        except OSError:
            for file in self._files.values():
                os.close(file)
            if not self.finished:
                self._remove_part()
            raise

    def _remove_part(self) -> None:
        if self.part.is_dir():
            shutil.rmtree(self.part)

    def _publish(self) -> None:
        if not self.target.exists():
            self.part.rename(self.target)
            return
        refuse_others(self.target)  # it may have changed since
        aside = self.target.with_name(self.target.name + ".replaced")
        if aside.exists():  # of a run that was killed here
            refuse_others(aside)
            shutil.rmtree(aside)
        self.target.rename(aside)
        self.part.rename(self.target)
        shutil.rmtree(aside)


def refuse_others(target: Path) -> None:
    """Raises OutputError where a folder to be replaced holds what no model's folder does."""
    if not target.is_dir():
        return
    for path in sorted(target.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.name.endswith(_MODEL_FILES)):
            raise OutputError(
                str(target),
                f"holds {path.relative_to(target)}, which is no part of a model: not replaced",
                "Choose another name with -o, or move that away.",
            )
