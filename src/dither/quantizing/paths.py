"""Where a result goes, and what it must never overwrite."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dither.containers.journal import unfinished
from dither.containers.presets import preset_names
from dither.containers.target import Target
from dither.errors import OutputError
from dither.models.gguf_source import HASH
from dither.types import Model

_LONGEST = 100  # characters of a name out of a file


def file_stem(model: Model) -> str:
    """The model's name for a file: that of its folder, file or repository, without an old type.

    Caches call their files and folders by hashes: there the model's own name serves, where it has one.
    """
    last = Path(model.origin).name or Path(model.origin).resolve().name
    last = last if HASH.fullmatch(last) else re.split(r"[@:]", last)[0]
    if HASH.fullmatch(last) and model.name != last:
        last = f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', model.name).strip('-.')[:_LONGEST] or last}.gguf"
    if last.endswith(".gguf"):
        last = re.sub(r"-\d{5}-of-\d{5}$", "", last.removesuffix(".gguf"))
        last = re.sub(rf"[-._](?:{'|'.join(preset_names())})$", "", last, flags=re.IGNORECASE)
    return last or model.name


def output_path(
    model: Model, target: Target, out: str | Path | None, force: bool, inputs: Sequence[Path] = (), label: str = ""
) -> Path:
    """Where the result goes; `label` replaces the target's own in a name that nobody chose.

    Raises OutputError: an input, an existing file, no such folder.
    """
    name = target.name(file_stem(model), label or target.options.label)
    path = Path(out) if out is not None else Path(name)
    try:
        path = target.check_place(path, name, out is not None and os.fspath(out).endswith("/"), force)
        # Neither the result nor what it grows in may be a file that is read.
        for place in filter(Path.exists, (path, *unfinished(path))):
            if any(_is_or_holds(place, file) for file in inputs if file.exists()):
                raise OutputError(str(place), "is the model itself or read with it", "Choose another name with -o.")
        if not path.parent.is_dir():
            raise OutputError(str(path.parent), "is no folder", "Make it first, or choose another with -o.")
    except OSError as error:  # a name too long, a folder that may not be searched
        reason = f"cannot be written ({error.strerror})"
        raise OutputError(str(path), reason, "Choose another name with -o.") from None
    return path


def _is_or_holds(place: Path, file: Path) -> bool:
    return place.samefile(file) or (place.is_dir() and place.samefile(file.parent))
