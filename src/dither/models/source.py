"""Opening a model, whatever form it comes in.

    model.gguf                 any part of a split one as well
    folder/                    safetensors and config.json, or exactly one GGUF
    models--org--name/         a repository in the hub's cache: its latest snapshot
    model.safetensors          beside its config.json
    org/name, org/name@rev     a repository of the hub; the only form that may reach the network

What exists locally always wins; a text that looks like a path is never taken for a repository, so that
a slip of the keyboard sends nothing anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dither.errors import SourceError, UsageError
from dither.formats.ggml import string
from dither.formats.gguf import MAGIC
from dither.formats.mapped import MappedFile
from dither.models.checkpoint import ABOUT, INDEX, PICKLES, open_checkpoint, refuse_pickle
from dither.models.gguf_source import PART, is_projector, open_gguf
from dither.system.mistaken import refuse_mistaken, what_it_is
from dither.system.text import shown
from dither.types import Model
from dither.units import counted

if TYPE_CHECKING:
    from dither.models.hub.fetch import HubId

_PRE_KEY = "tokenizer.ggml.pre"
_CACHED = re.compile(r"models--(?:([^/]+?)--)?([^/]+)")  # a repository's folder in the hub's cache
_LISTED = 10


def open_model(source: str | Path, *, pre: str | None = None) -> Model:
    """Opens a model without reading its weights.

    `pre` overrides which pre-tokenizer the model's text is split by (llama.cpp's name for it).
    Raises SourceError or FormatError where it cannot be read, UnsupportedError where nothing here
    knows its architecture or its quantization, UsageError where a choice is left open.
    """
    text, path = _local(source)
    if path is not None:
        return _open_path(path, pre)
    from dither.models.hub import fetch

    path, notes = fetch.fetch(_hub_id(text, isinstance(source, str)))
    model = _open_path(path, pre)
    return replace(model, origin=text, notes=(*notes, *model.notes))


def opened(model: str | Path | Model, pre: str | None = None) -> Model:
    """A model by name, or one that is open already.  Raises as `open_model` does."""
    return model if isinstance(model, Model) else open_model(model, pre=pre)


@contextmanager
def open_headers(source: str | Path) -> Iterator[tuple[Model, int | None, list[str]]]:
    """A model to be judged, not read: as `open_model`, but a repository of the hub gives its headers alone.

    Yields its outline with the bytes that were read from the network (None: nothing was asked of it) and
    notes; after the block a hub's model has no files any more.  Raises as `open_model` does.
    """
    text, path = _local(source)
    if path is not None:
        yield _headers_at(path, text), None, []
        return
    from dither.models.hub import headers

    hub_id = _hub_id(text, isinstance(source, str))
    with headers.twin(hub_id) as (twin, bytes_read, notes):
        yield replace(_headers_at(twin, text), origin=text, name=hub_id.repo.split("/")[1]), bytes_read, notes


def _headers_at(path: Path, origin: str) -> Model:
    from dither.models.outline import outline

    path, _ = _snapshot(path)
    if path.is_dir() and (any(path.glob("*.safetensors")) or (path / INDEX).exists()):
        return outline(path, origin, None)
    if path.is_file() and path.suffix == ".safetensors":
        return outline(path.parent, origin, path)
    return _open_path(path, None)


def _local(source: str | Path) -> tuple[str, Path | None]:
    """What was asked for as a text, and where it lies, None where it is not here."""
    text = os.fspath(source)
    if not text:
        raise UsageError("the model", "has an empty name", "Name a folder, a GGUF or a hub id.")
    path = Path(text).expanduser()
    return text, path if not text.startswith("hf://") and _exists(path) else None


def _exists(path: Path) -> bool:
    """Raises SourceError where a folder on the way may not be searched, so that nobody can tell."""
    try:
        path.stat()
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except (OSError, ValueError):  # too long, a NUL in it, a link to itself
        return False
    return True


def _unreadable(path: Path, error: OSError) -> SourceError:
    reason = f"cannot be read ({error.strerror})"
    return SourceError(shown(str(path)), reason, "Check its permissions and those of the folders above it.")


def _open_path(path: Path, pre: str | None) -> Model:
    path, notes = _snapshot(path)
    if path.is_dir():
        model = _open_folder(path, pre)
        return replace(model, notes=(*notes, *model.notes))
    if path.suffix == ".safetensors":
        return _open_checkpoint(path.parent, pre, path)
    if path.suffix != ".gguf":
        _check_gguf(path)
    model = open_gguf(path)
    if pre is None:
        return model
    from dither.models.arch import families
    from dither.models.tokenizers.pre import checked_name

    pre = checked_name(pre, [chain for family in families() for chain in family.chains])
    note = f"{_PRE_KEY} set to {pre}, as asked"
    return replace(model, metadata={**model.metadata, _PRE_KEY: string(pre)}, notes=(*model.notes, note))


def _check_gguf(path: Path) -> None:
    """Raises SourceError unless a file whose name does not say so is GGUF."""
    start = MappedFile(path).data[:512]
    if start[:4] == MAGIC:
        return
    if path.suffix in PICKLES and what_it_is(start) in (None, what_it_is(b"PK\3\4")):
        raise refuse_pickle(path, [path.name])
    refuse_mistaken(start, str(path))
    reason = "is neither GGUF nor safetensors"
    way_out = "Name a GGUF file, or the folder of a checkpoint."
    if (path.parent / "config.json").exists():
        way_out = f"Name the folder: {path.parent}."
    raise SourceError(str(path), reason, way_out)


def _snapshot(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The snapshot that a repository's folder in the hub's cache stands for, with a note; any other path itself.

    Raises SourceError where none is there, UsageError where it is left open which.
    """
    match = _CACHED.fullmatch(path.resolve().name)
    if match is None or not (path / "snapshots").is_dir():
        return path, ()
    repo, main = "/".join(filter(None, match.groups())), path / "refs" / "main"
    there = {found.name: found for found in sorted((path / "snapshots").iterdir()) if found.is_dir()}
    meant = main.read_text(errors="replace").strip() if main.is_file() else ""
    if meant not in there and len(there) == 1:
        meant = next(iter(there))
    if meant in there:
        return there[meant], (f"the hub's cache of {repo} is read: snapshot {meant[:7]}",)
    if there:
        listed = shown(", ".join(there), 1000)
        raise UsageError(str(path), f"holds {len(there)} snapshots of {repo}", f"Name one of them: snapshots/{listed}.")
    raise SourceError(str(path), f"holds no snapshot of {repo}", f"Fetch it by naming the repository: {repo}.")


def _open_folder(folder: Path, pre: str | None) -> Model:
    try:
        for path in folder.iterdir():
            path.lstat()  # a folder may be listed and yet not be entered
            break
    except OSError as error:
        raise _unreadable(folder, error) from None
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return _open_checkpoint(folder, pre)
    ggufs = sorted(path for path in folder.glob("*.gguf") if _is_first_part(path))
    beside = [path for path in ggufs if is_projector(path.name)]
    models = [path for path in ggufs if path not in beside] or ggufs
    if len(models) == 1:
        model = _open_path(models[0], pre)
        notes = (f"{beside[0].name} is beside the model: it stays as it is",) if len(ggufs) > 1 else ()
        return replace(model, notes=(*notes, *model.notes))
    if models:
        listed = shown(", ".join(path.name for path in models), 1000)
        raise UsageError(str(folder), f"holds {len(models)} GGUF models", f"Name one of {listed}.")
    _look_below(folder)
    return _open_checkpoint(folder, pre)


def _look_below(folder: Path) -> None:
    """Raises SourceError where a folder is none of a model, but folders in it are."""
    if (folder / "config.json").exists() or any(path.suffix in PICKLES for path in folder.iterdir()):
        return
    below = sorted(path for path in folder.iterdir() if path.is_dir() and _is_models(path))
    if below:
        names = [
            "/".join(filter(None, match.groups())) if (match := _CACHED.fullmatch(path.name)) else path.name
            for path in below
        ]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = shown(", ".join(names[:_LISTED]), 1000)
        reason = f"is no model itself, but {counted(len(names), 'folder')} in it may be"
        raise SourceError(str(folder), reason, f"Name one of them: {listed}{more}.")


def _is_models(folder: Path) -> bool:
    """Whether a folder looks like a model's; one that may not be read does not."""
    try:
        cached = _CACHED.fullmatch(folder.name) and (folder / "snapshots").is_dir()
        return bool(cached) or (folder / "config.json").exists() or any(folder.glob("*.gguf"))
    except OSError:
        return False


def _is_first_part(path: Path) -> bool:
    match = PART.fullmatch(path.name)
    return not match or int(match[2]) == 1 or not path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf").exists()


def _open_checkpoint(folder: Path, pre: str | None, weights: Path | None = None) -> Model:
    from dither.models.arch import convert

    checkpoint = open_checkpoint(folder, weights)
    model = convert(checkpoint, pre=pre)
    # How Dither made a folder and what that cost, as a GGUF says it in its metadata.
    about = {
        f"dither.{key}": string(value if isinstance(value, str) else json.dumps(value))
        for key, value in checkpoint.document(ABOUT).items()
        if key in ("version", "recipe", "measure", "relative_errors")
    }
    notes = tuple(dict.fromkeys((*checkpoint.notes, *model.notes)))
    return replace(model, metadata={**model.metadata, **about}, notes=notes)


def _hub_id(text: str, may_be_hub: bool) -> HubId:
    """The repository that is meant.  Raises SourceError where the text was more likely a path."""
    from dither.models.hub import fetch

    hub_id = fetch.parse_id(text) if may_be_hub else None
    is_file_name = ":" not in text and text.endswith((".gguf", ".safetensors", *PICKLES))
    looks_local = not text.startswith("hf://") and (is_file_name or _exists(Path(text.partition("/")[0])))
    if hub_id is None or looks_local:
        hint = "" if hub_id is None else f" If you mean the hub's repository, write hf://{text}."
        raise SourceError(shown(text), "no such file or folder", f"Check the path.{hint}")
    return hub_id
