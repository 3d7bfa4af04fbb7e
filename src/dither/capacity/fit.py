"""Which types of a model run on this machine, how fast, at what loss, and which one to take.

Read from headers alone: a hub id is judged through range requests, a checkpoint or a GGUF through its
header, and no weight is read.  Weights are counted as `dither quantize` would really write them,
fallbacks included; the rest is the arithmetic of `memory.py`.  Every figure says where it is from (`result.py`).
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from dither.capacity.advice import Load, engine_advice, judge
from dither.capacity.machine import Machine, detect
from dither.capacity.memory import KV_TYPES, Shape, needed
from dither.capacity.quality import Quality, literature
from dither.capacity.recommendation import commands, memory_notes, recommended, ruled_out, sentence
from dither.capacity.result import Candidate, Fit
from dither.capacity.shape import shape_of
from dither.capacity.speed import active_bytes
from dither.containers.mix import Mix, Options, make_mix
from dither.containers.preset_tables import ALIASES
from dither.containers.presets import describe, preset_names, preset_of
from dither.errors import UsageError
from dither.formats.ggml import STORED_FLOATS
from dither.formats.tensor_names import EMBEDDING, OUTPUT
from dither.measuring import sidecar
from dither.measuring.schema import Measurement
from dither.models.outline import is_ours
from dither.models.source import open_headers
from dither.types import Model
from dither.units import parse_bytes

CONTEXT = 8192  # tokens per slot; a model trained on fewer gets its own number
MOST_CONTEXT, MOST_SLOTS = 2**28, 2**16
_USUAL = 0.05  # a file's bytes differ by less from what its type usually comes to


def fit(
    model: str | Path | Model,
    *,
    memory: int | str | None = None,
    vram: int | str | None = None,
    context: int | None = None,
    kv: str = "f16",
    slots: int = 1,
    machine: Machine | None = None,
) -> Fit:
    """Judges every type of a model, or a GGUF as it is, against a machine's memory.

    `memory` and `vram` are bytes or texts such as "16GiB" and stand for what would be detected (vram 0:
    no GPU); `context` is in tokens per slot (8192, or what the model was trained on if that is less);
    `kv` is the cache's type, `slots` the conversations at once.  `machine` replaces detection altogether.
    No weight is read; a hub id costs its headers.

    Raises UsageError for a size, context or type that makes no sense, SourceError where the model's
    headers cannot be read or leave out what the arithmetic needs.
    """
    kv = kv.lower()
    _check(context, kv, slots)
    told_memory = None if memory is None else parse_bytes(memory, "--memory", 1)
    told_vram = None if vram is None else parse_bytes(vram, "--vram", 0)
    headers: AbstractContextManager[tuple[Model, int | None, list[str]]]
    headers = nullcontext((model, None, [])) if isinstance(model, Model) else open_headers(model)
    with headers as (opened, bytes_read, notes):
        shape, doubts = shape_of(opened)
        length, context_notes = _context(context, opened)
        if shape.head % KV_TYPES[kv][0]:
            reason = f"does not fit heads of {shape.head} numbers: llama.cpp refuses it"
            raise UsageError(f"--kv {kv}", reason, "Use --kv f16.")
        here = machine or detect(told_memory, told_vram)
        candidates = _Judge(opened, shape, here, length, kv, slots).candidates()
        best = recommended(candidates)
        said = (*notes, *opened.notes, *doubts, *context_notes, *memory_notes(here))
        return Fit(
            model=opened.origin,
            arch=opened.arch,
            parameters=opened.parameters,
            context=length,
            kv=kv,
            slots=slots,
            machine=here,
            shape=shape,
            candidates=tuple(candidates),
            chosen=best.type if best else None,
            recommendation=sentence(best, candidates, here, len(shape.layers), length),
            commands=tuple(commands(best, opened, length)),
            ruled_out=tuple(ruled_out(best, candidates, here)),
            engines=tuple(engine_advice(here)),
            bytes_read=bytes_read,
            notes=tuple(dict.fromkeys(said)),
        )


def _check(context: int | None, kv: str, slots: int) -> None:
    if kv not in KV_TYPES:
        raise UsageError(f"--kv {kv}", "is no type of the cache", f"Choose one of {', '.join(KV_TYPES)}.")
    if context is not None and not 1 <= context <= MOST_CONTEXT:
        raise UsageError(f"--context {context}", "is no number of tokens", "Give 1 or more: 8192, say.")
    if not 1 <= slots <= MOST_SLOTS:
        raise UsageError(f"--slots {slots}", "is no number of conversations", "Give 1 or more.")


def _context(asked: int | None, model: Model) -> tuple[int, list[str]]:
    trained = model.metadata.get(f"{model.arch}.context_length")
    limit = int(trained.value) if trained and isinstance(trained.value, int) and trained.value > 0 else None
    if asked is None:
        return min(CONTEXT, limit or CONTEXT), []
    if limit and asked > limit:
        return asked, [f"it was trained on contexts of {limit} tokens: text beyond that gets worse"]
    return asked, []


class _Judge:
    """Judges the types of one model on one machine, for one context length, cache type and number of slots."""

    def __init__(self, model: Model, shape: Shape, machine: Machine, context: int, kv: str, slots: int) -> None:
        self.model, self.shape, self.machine = model, shape, machine
        self.context, self.kv, self.slots = context, kv, slots
        self.known = tuple(tensor for tensor in model.tensors if is_ours(tensor.name))
        self.strange = sum(tensor.stored_bytes for tensor in model.tensors if not is_ours(tensor.name))
        matrices = {tensor.stored for tensor in model.tensors if len(tensor.shape) > 1}
        self.quantized = any(kind not in STORED_FLOATS and not kind.startswith("F8") for kind in matrices)

    def candidates(self) -> list[Candidate]:
        """The file itself where it is one that llama.cpp runs, and what can be made of the model."""
        made = [self.made(name) for name in preset_names() if name not in ALIASES]
        if self.model.kind == "gguf":
            own = self.as_it_is()
            smaller = (c for c in made if not self.quantized or c.memory.weights < own.memory.weights)
            made = [own, *(candidate for candidate in smaller if candidate.type != own.type)]
        return sorted(made, key=lambda candidate: -candidate.memory.weights)

    def as_it_is(self) -> Candidate:
        tensors = [(tensor.name, tensor.stored_bytes) for tensor in self.known]
        name = _type_of(self.model)
        found = sidecar.of_file(self.model)
        quality = _measured(*found) if found else self.published(name, sum(size for _, size in tensors) + self.strange)
        return self.judged(name, tensors, quality, file=self.model.origin)

    @cached_property
    def measured(self) -> dict[str, tuple[Measurement, str]]:
        return sidecar.by_type(self.model)

    def published(self, name: str, weights: int) -> Quality | None:
        """The literature's loss for the file, where its tensors are those that its type's name promises."""
        if name not in preset_names():
            return None
        plan = self.plan(name, importance=False)
        usual = abs(plan.tensor_bytes + self.strange - weights) <= _USUAL * weights
        return literature(name, _fallback_share(plan)) if usual else None

    def made(self, name: str) -> Candidate:
        importance = "needs an importance matrix" in describe(name)
        plan = self.plan(name, importance)
        found = self.measured.get(name)
        quality = _measured(*found) if found else literature(name, _fallback_share(plan))
        notes = plan.notes()
        if self.quantized:
            quality = None
            notes.append("would be quantized a second time: better from the original")
        tensors = [(tensor.name, tensor.bytes) for tensor in plan.tensors]
        return self.judged(name, tensors, quality, importance, tuple(notes))

    def plan(self, name: str, importance: bool) -> Mix:
        names = [tensor.name for tensor in self.known] if importance else []
        return make_mix(replace(self.model, tensors=self.known), Options(to=name), names)

    def judged(
        self,
        name: str,
        tensors: list[tuple[str, int]],
        quality: Quality | None,
        importance: bool = False,
        notes: tuple[str, ...] = (),
        file: str | None = None,
    ) -> Candidate:
        weights = sum(size for _, size in tensors) + self.strange
        memory = needed(self.shape, weights, self.context, self.kv, self.slots)
        experts = self.model.metadata.get(f"{self.model.arch}.expert_count")
        active = active_bytes(tensors, int(experts.value) if experts else 0, self.shape.experts_used) + self.strange
        sizes = dict(tensors)
        embedding = sizes.get(EMBEDDING, 0) if OUTPUT in sizes else 0
        layers = max(1, len(self.shape.layers))
        verdict = judge(Load(memory, layers, active, self.shape.vocabulary, embedding), self.machine)
        bits = 8 * weights / max(1, self.model.parameters)
        return Candidate(name, file, bits, memory, verdict, quality, importance, notes, active, embedding)


def _measured(found: Measurement, where: str) -> Quality:
    return Quality(found.kl_mean, "measured", f"{where}, on {found.data}")


def _fallback_share(plan: Mix) -> float:
    return sum(tensor.size for tensor in plan.tensors if tensor.is_fallback) / max(1, plan.parameters)


def _type_of(model: Model) -> str:
    field = model.metadata.get("general.file_type")
    preset = None if field is None else preset_of(field.value)
    weights: Counter[str] = Counter()
    for tensor in model.tensors:
        weights[tensor.stored] += tensor.size
    return preset or max(weights, key=weights.__getitem__, default="unknown")
