"""The files as models: what each is called, who runs it, what it will need in memory.

A model is called by its file's stem (of a split file, without the part's number) or its folder's name; the
name in its metadata works too where no other has it, and capitals do not matter.  Two files of one name
get their folders' names in front.

The memory is `capacity/memory.py`'s: weights as stored, the cache of every slot, buffers, overhead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dither.capacity.memory import BATCH, Memory, needed
from dither.capacity.shape import shape_of
from dither.engines.processes import LlamaProcess
from dither.engines.protocol import Engine
from dither.engines.settings import Settings, Wishes
from dither.engines.transformers import TransformersEngine
from dither.errors import DitherError, UsageError
from dither.models.source import open_headers
from dither.serving.errors import NOT_FOUND, ApiError, invalid
from dither.types import Model

CONTEXT = 8192  # tokens per slot; a model trained on fewer gets its own number
EMBEDDED = 2048  # tokens of a text to embed: they are computed in one batch, whose buffers grow with it
SLOTS = (4, 2, 1)  # the most of these that fits
GGUF, FOLDER = "llamacpp", "transformers"
ENGINES: dict[str, type[Engine]] = {GGUF: LlamaProcess, FOLDER: TransformersEngine}
_PART = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class ServedModel:
    """One model.  `memory` is predicted, in bytes; None where its headers leave something open."""

    name: str
    path: Path
    engine: str  # one of ENGINES
    created: int
    title: str  # its metadata's name; "" where there is none, or another model has it
    context: int
    slots: int
    memory: Memory | None
    need: int  # bytes, whatever is known
    wishes: Wishes
    notes: tuple[str, ...] = ()

    def settings(self, embeddings: bool) -> Settings:
        asked = vars(self.wishes) | {"context": self.context, "slots": self.slots}
        if embeddings:
            asked |= {"context": min(self.context, EMBEDDED), "kv": "f16", "loras": (), "embeddings": True}
        return Settings(**asked, metrics=True, alias=self.name)

    @property
    def takes_embeddings(self) -> bool:
        return ENGINES[self.engine].takes_embeddings

    def needs(self, embeddings: bool) -> int:
        """An embedding engine computes a whole text at once: its buffers are that much larger."""
        if not embeddings or self.memory is None:
            return self.need
        context = min(self.context, EMBEDDED)
        return self.need + self.memory.compute * max(0, -(-context // BATCH) - 1)


def serve_files(files: Sequence[str | Path], wishes: Wishes, budget: int, engine: str) -> list[ServedModel]:
    """The models of these files.

    Raises UsageError where two have one name, SourceError and its kin where a file cannot be read."""
    if not files:
        raise UsageError("dither serve", "has no file to serve", "Name one or more.")
    paths = [Path(file).expanduser() for file in files]
    names = _names(paths)
    served = [_served(path, name, wishes, budget, engine) for path, name in zip(paths, names, strict=True)]
    often = Counter(name.lower() for model in served for name in (model.title, model.name))
    return [model if often[model.title.lower()] == 1 else replace(model, title="") for model in served]


def _names(paths: Sequence[Path]) -> list[str]:
    short = [_stem(path) for path in paths]
    often = Counter(name.lower() for name in short)
    names = [
        name if often[name.lower()] == 1 else f"{path.resolve().parent.name}/{name}"
        for path, name in zip(paths, short, strict=True)
    ]
    name, count = Counter(name.lower() for name in names).most_common(1)[0]
    if count > 1:
        raise UsageError(name, "is the name of two of the files: a request could not tell them apart", "Rename one.")
    return names


def _stem(path: Path) -> str:
    plain = path.resolve()
    name = plain.stem if plain.suffix in (".gguf", ".safetensors") else plain.name
    return _PART.sub("", name) or name


def _served(path: Path, name: str, wishes: Wishes, budget: int, engine: str) -> ServedModel:
    with open_headers(path) as (model, _, _):
        kind = _engine_of(model, path, engine)
        field = model.metadata.get(f"{model.arch}.context_length")
        trained = field.value if field and isinstance(field.value, int) and field.value > 0 else None
        context = wishes.context or min(CONTEXT, trained or CONTEXT)
        notes = []
        if trained and context > trained:
            notes.append(f"{model.name} was trained on contexts of {trained} tokens: text beyond that gets worse")
        if kind == GGUF and "tokenizer.chat_template" not in model.metadata:
            notes.append(f"{model.name} has no chat template: chats are written in ChatML, which it may not know")
        title = model.metadata.get("general.name")
        weights = sum(tensor.stored_bytes for tensor in model.tensors)
        weights += sum(Path(lora).stat().st_size for lora in wishes.loras if Path(lora).is_file())
        slots, memory = _slots_that_fit(model, weights, context, wishes, budget, kind)
        if wishes.slots is None and slots < SLOTS[0] and kind == GGUF:
            notes.append(f"{name}: {slots} at once, as more do not fit into memory; --slots insists")
        return ServedModel(
            name=name,
            path=_weights_of(model, path),
            engine=kind,
            created=int(path.stat().st_mtime),
            title=str(title.value) if title and title.value else "",
            context=context,
            slots=slots,
            memory=memory,
            need=memory.total if memory else int(1.2 * weights),
            wishes=wishes,
            notes=tuple(notes),
        )


def _weights_of(model: Model, path: Path) -> Path:
    """What the engine opens: a folder may have held one GGUF, a file may be one shard of a folder."""
    if model.kind == "gguf":
        return path if path.is_file() else Path(model.files[0])
    return path if path.is_dir() else path.parent


def _engine_of(model: Model, path: Path, asked: str) -> str:
    found = GGUF if model.kind == "gguf" else FOLDER
    if asked not in ("auto", found):
        raise UsageError(
            str(path),
            f"is not a file for {asked}: it is {'a GGUF' if found == GGUF else 'a checkpoint'}",
            f"Leave --engine out, or say --engine {found}.",
        )
    return found


def _slots_that_fit(
    model: Model, weights: int, context: int, wishes: Wishes, budget: int, kind: str
) -> tuple[int, Memory | None]:
    """How many slots, and the memory that takes.  transformers answers one request at a time."""
    choices = (1,) if kind == FOLDER else (wishes.slots,) if wishes.slots else SLOTS
    try:
        shape, _ = shape_of(model)
        found = [(slots, needed(shape, weights, context, wishes.kv, slots)) for slots in choices]
    except (DitherError, ZeroDivisionError):
        return choices[-1], None
    return next(((slots, memory) for slots, memory in found if memory.total <= budget), found[-1])


class Catalog:
    """The models by name."""

    def __init__(self, served: Sequence[ServedModel]) -> None:
        self.served = tuple(served)
        self._by_name = {name.lower(): model for model in served for name in (model.title, model.name)}

    def find(self, asked: object) -> ServedModel:
        """The model a request names; where it names none, the only one.  Raises ApiError."""
        listed = ", ".join(model.name for model in self.served)
        if asked is None and len(self.served) == 1:
            return self.served[0]
        if not isinstance(asked, str) or not asked:
            raise invalid("model", f"model must name one of: {listed}")
        if (found := self._by_name.get(asked.lower())) is None:
            message = f"The model {asked[:200]!r} does not exist here. There is: {listed}"
            raise ApiError(404, message, NOT_FOUND, "model_not_found", "model")
        return found
