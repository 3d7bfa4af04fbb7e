"""Handing a file over: to Ollama, to LM Studio, to the Hugging Face hub.

    open the file → what the other side wants to know → its folder, its Modelfile, its repository

Weights are never encoded anew: files are linked, or copied, or cut into parts between two tensors.
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
from dither.running.link_or_copy import one_name, place, write_text
from dither.running.ollama import Ollama, describe
from dither.types import Model
from dither.units import parse_bytes

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Exported:
    """What was handed over: `files` name → bytes, `sent` whether it is on the hub, `next` what to type."""

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
    """Hands a GGUF over: `to` is "ollama" or "lmstudio", `place` their folder, or "hf" and a repository.

    For Ollama, `context` is its num_ctx (default: what the model was trained on, up to 8192).  For LM
    Studio, the folder is `place/publisher/name/`.  For the hub, nothing is sent unless `upload`; files
    above `shard` bytes are cut into parts.

    Raises UsageError where the request makes no sense, SourceError where the file cannot be read or the
    hub refuses, UnsupportedError for what is no GGUF, OutputError where something is in the way.
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
    return _hub(model, str(place), limit, upload, private, report)


def _ollama(model: Model, folder: Path, context: int | None) -> Exported:
    if len(model.files) > 1:
        way_out = "Make one file of them: `dither convert FIRST-PART whole.gguf`."
        raise UnsupportedError(model.origin, "is in several parts, which Ollama does not read", way_out)
    path = Path(model.files[0])
    if not path.name.isprintable():
        raise UsageError(repr(path.name), "is a name no Modelfile can hold", "Rename the file.")
    told = modelfile(model, context)
    how = place(path, folder / path.name)
    write_text(told.modelfile(), folder / "Modelfile")
    files = {name: (folder / name).stat().st_size for name in (path.name, "Modelfile")}
    name = one_name(path.stem, "the name").lower()
    typed = f"ollama create {name} -f {shlex.quote(str(folder / 'Modelfile'))} && ollama run {name}"
    return Exported("ollama", str(folder), files, how, next=typed, notes=told.notes)


def modelfile(model: Model, context: int | None = None) -> Ollama:
    """What to tell Ollama about a model; its own chat template is asked through llama.cpp."""
    name = Path(model.files[0]).name
    if _TEMPLATE not in model.metadata:
        return describe(name, model.arch, model.metadata, None, context)
    from dither.engines.vocabulary import Vocabulary

    with Vocabulary(model) as vocabulary:
        return describe(name, model.arch, model.metadata, vocabulary.apply_template, context)


def _lmstudio(model: Model, folder: Path, publisher: str) -> Exported:
    named = model.metadata.get("general.name")
    name = one_name(str(named.value) if named else model.name, "the model's name")
    home = folder / one_name(publisher, "--publisher") / f"{name}-GGUF"
    files, how = {}, ""
    for part in map(Path, model.files):
        how = place(part, home / part.name)
        files[part.name] = part.stat().st_size
    typed = f"Choose {name} in LM Studio, whose models folder must be {folder}."
    return Exported("lmstudio", str(home), files, how, next=typed)


def _hub(model: Model, repo: str, limit: int, upload: bool, private: bool, report: Progress) -> Exported:
    if not upload:
        planned = hub_upload.preview(model, repo, limit)
        return Exported("hf", repo, planned.files, next="Add --yes to send this.")
    sent = hub_upload.upload(model, repo, report, private=private, limit=limit)
    kept = f"{sent.folder} was sent; delete it once you need to resume nothing."
    return Exported("hf", repo, sent.files, sent=True, next=sent.url, notes=(kept,))
