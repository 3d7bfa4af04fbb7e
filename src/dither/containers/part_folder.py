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
        super().__init__(target, sum(pieces.values()), identity, pieces)

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
        return path.is_file() if path == self.journal else path.is_dir()

    def _open_pieces(self) -> None:
        refuse_others(self.target)
        super()._open_pieces()

    def _remove_part(self) -> None:
        if self.part.is_dir():
            shutil.rmtree(self.part)

    def _publish(self) -> None:
        aside = self.target.with_name(self.target.name + ".replaced")
        if self.target.exists():
            refuse_others(self.target)  # it may have changed since
            _remove_replaced(aside)
            self.target.rename(aside)
        self.part.rename(self.target)
        _remove_replaced(aside)  # now, or left by a run that was killed in between


def _remove_replaced(aside: Path) -> None:
    if aside.is_dir() and not aside.is_symlink():
        refuse_others(aside)
        shutil.rmtree(aside)


def refuse_others(target: Path) -> None:
    """Raises OutputError where a folder to be replaced holds what no model's folder does."""
    if not target.is_dir():
        return
    for path in sorted(target.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.name.endswith(_MODEL_FILES)):
            reason = f"holds {path.relative_to(target)}, which is no part of a model: not replaced"
            raise OutputError(str(target), reason, "Choose another name with -o, or move that away.")
