"""Export of a file to Ollama, to LM Studio or to the Hugging Face hub.

    open the file → what the other program needs to know → its folder, its Modelfile, its repository

Weights are never encoded again: files are linked, or copied, or split into parts between two tensors.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dither.errors import UnsupportedError, UsageError
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.running import hub_upload
from dither.running.link_or_copy import link_or_copy, one_name, write_text
from dither.running.ollama import Ollama, describe
from dither.types import Model
from dither.units import parse_bytes


@dataclass(frozen=True)
class Exported:
    """What was exported: `files` name → bytes, `sent` whether it is on the hub, `next` what to do then."""

    to: str  # "ollama", "lmstudio" or "hf"
    place: str
    files: Mapping[str, int]
    how: str = ""  # "linked", "copied" or "kept"
    sent: bool = False
    next: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"files": dict(self.files), "notes": list(self.notes)}


def export(
    file: str | Path,
    to: str,
    place: str | Path,
    *,
    publisher: str = "dither",
    context: int | None = None,
    upload: bool = False,
    private: bool = False,
    shard: int | str = hub_upload.SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Exports a GGUF: `to` is "ollama" or "lmstudio" and `place` their folder, or "hf" and a repository.

    For Ollama, `context` is its num_ctx (default: what the model was trained on, up to 8192).  For LM Studio, the
    folder is `place/publisher/name/`.  To the hub nothing is sent unless `upload`; files above `shard` bytes are
    split into parts.

    Raises UsageError if the request makes no sense, SourceError if the file cannot be read or the hub refuses it,
    UnsupportedError for a model that is not a GGUF, OutputError if a file is in the way.
    """
    if to not in ("ollama", "lmstudio", "hf"):
        raise UsageError(f"export to {to!r}", "is not known", "Choose ollama, lmstudio or hf.")
    model, report = open_model(file), progress or Silent()
    if model.kind != "gguf":
        way_out = "Make a GGUF of it with `dither quantize` or `dither convert`."
        raise UnsupportedError(str(file), "is a folder, which these programs do not read", way_out)
    for note in model.notes:
        report.note(note)
    if to == "ollama":
        return _ollama(model, Path(place), context)
    if to == "lmstudio":
        return _lmstudio(model, Path(place), publisher)
    limit = parse_bytes(shard, "--shard", least=2**20)
    if not upload:
        planned = hub_upload.preview(model, str(place), limit)
        return Exported("hf", str(place), planned.files, next="Add --yes to send this.")
    sent = hub_upload.upload(model, str(place), report, private=private, limit=limit)
    kept = f"{sent.folder} was sent; delete it when you need not resume the upload."
    return Exported("hf", str(place), sent.files, sent=True, next=sent.url, notes=(kept,))


def _ollama(model: Model, folder: Path, context: int | None) -> Exported:
    if len(model.files) > 1:
        way_out = "Make one file of them: `dither convert FIRST-PART whole.gguf`."
        raise UnsupportedError(model.origin, "has several parts, and Ollama reads one file only", way_out)
    path = Path(model.files[0])
    if not path.name.isprintable():
        raise UsageError(repr(path.name), "is a name that a Modelfile cannot hold", "Rename the file.")
    told = modelfile(model, context)
    how = link_or_copy(path, folder / path.name)
    write_text(told.modelfile(), folder / "Modelfile")
    files = {name: (folder / name).stat().st_size for name in (path.name, "Modelfile")}
    name = one_name(path.stem, "the name").lower()
    typed = f"ollama create {name} -f {shlex.quote(str(folder / 'Modelfile'))} && ollama run {name}"
    return Exported("ollama", str(folder), files, how, next=typed, notes=told.notes)


def modelfile(model: Model, context: int | None = None) -> Ollama:
    """What Ollama is told about a model; the model's chat template is rendered by llama.cpp."""
    name = Path(model.files[0]).name
    if "tokenizer.chat_template" not in model.metadata:
        return describe(name, model.arch, model.metadata, None, context)
    from dither.engines.vocabulary import Vocabulary

    with Vocabulary(model) as vocabulary:
        return describe(name, model.arch, model.metadata, vocabulary.apply_template, context)


def _lmstudio(model: Model, folder: Path, publisher: str) -> Exported:
    name = one_name(str(model.value("general.name", model.name)), "the model's name")
    home = folder / one_name(publisher, "--publisher") / f"{name}-GGUF"
    files, how = {}, ""
    for part in map(Path, model.files):
        how = link_or_copy(part, home / part.name)
        files[part.name] = part.stat().st_size
    typed = f"Choose {name} in LM Studio, whose models folder must be {folder}."
    return Exported("lmstudio", str(home), files, how, next=typed)
