"""Which types of a model run on this machine, how fast, at what loss, and which one to take.

Read from headers alone: a hub id is judged through range requests, a checkpoint or a GGUF through its
header, and no weight is read.  Weights are counted as `dither quantize` would really write them,
fallbacks included; the rest is the arithmetic of `fitting/memory.py`.

Every figure says where it is from: *measured* (counted in a header, timed here, or a measurement of this
model), *estimated* (by a formula that was checked against the real thing, see docs/fit.md), *literature*
(published by others) or *told* (by the person).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dither.containers.presets import ALIASES, BARE, describe, file_type, preset_names
from dither.containers.recipe import Options, Plan, make_plan
from dither.errors import DitherError, UsageError
from dither.fitting.advice import FITS, NO, Choice, Engine, Load, Verdict, choose, engines, judge
from dither.fitting.machine import ESTIMATED, MEASURED, Machine, detect
from dither.fitting.memory import KV_TYPES, Memory, Shape, margin, needed
from dither.fitting.quality import Quality, literature, measured
from dither.fitting.shape import shape_of
from dither.fitting.speed import active_bytes
from dither.models.arch import families
from dither.models.outline import is_ours, outline
from dither.models.source import open_headers
from dither.types import Model
from dither.units import format_bytes, parse_bytes

CONTEXT = 8192  # tokens per slot; a model trained on fewer gets its own number
MOST_CONTEXT, MOST_SLOTS = 2**28, 2**16
_FLOATS = ("F32", "F16", "BF16", "F64")
# What a recommendation chooses among, the least loss first: above Q8_0 there is nothing to gain.
LADDER = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "IQ4_XS", "Q4_K_S", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_XXS",
    "Q3_K_S", "IQ2_M", "Q2_K", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
_PLAIN_BITS = 15  # bits per weight; a file of so many is not quantized yet
_GOOD_BITS = 4.25  # bits per weight; where no loss is known, that many are taken for good
_USUAL = 0.05  # a file's bytes differ by less from what its type usually comes to
_MOST_NEIGHBORS = 64  # files beside the model that are looked at for measurements


@dataclass(frozen=True)
class Candidate:
    """One type of the model, or the file as it is; bytes, tokens per second, KL in nats per token."""

    type: str
    file: str | None  # where it lies already
    bits_per_weight: float
    memory: Memory
    verdict: Verdict
    quality: Quality | None
    needs_importance: bool
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.verdict.word in FITS

    def to_json(self) -> dict[str, Any]:
        speed, quality, memory = self.verdict.speed, self.quality, self.memory
        return {
            "type": self.type,
            "file": self.file,
            "bits_per_weight": self.bits_per_weight,
            "weights_bytes": memory.weights,
            "cache_bytes": memory.cache,
            "compute_bytes": memory.compute,
            "overhead_bytes": memory.overhead,
            "total_bytes": memory.total,
            "verdict": self.verdict.word,
            "gpu_layers": self.verdict.gpu_layers,
            "tokens_per_second": speed.likely if speed else None,
            "tokens_per_second_low": speed.low if speed else None,
            "tokens_per_second_high": speed.high if speed else None,
            "no_speed_because": self.verdict.why_no_speed,
            "kl": quality.kl if quality else None,
            "kl_source": quality.source if quality else None,
            "needs_importance": self.needs_importance,
            "notes": list(self.notes),
            "tags": {
                "bits_per_weight": MEASURED,
                "weights_bytes": MEASURED,
                "cache_bytes": ESTIMATED,
                "compute_bytes": ESTIMATED,
                "overhead_bytes": ESTIMATED,
                "total_bytes": ESTIMATED,
                "tokens_per_second": ESTIMATED,
                "kl": quality.tag if quality else None,
            },
        }


@dataclass(frozen=True)
class Fit:
    """What `dither fit` found."""

    model: str
    arch: str
    parameters: int
    context: int  # tokens per slot
    kv: str
    slots: int
    machine: Machine
    shape: Shape
    candidates: tuple[Candidate, ...]  # the largest first
    chosen: str | None  # a candidate's type, None where nothing fits
    recommendation: str
    commands: tuple[str, ...]
    ruled_out: tuple[tuple[str, str], ...]  # which, why
    engines: tuple[Engine, ...]
    bytes_read: int | None  # from the network, None where nothing was asked of it
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether anything does, wholly in memory."""
        return any(candidate.fits for candidate in self.candidates)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "architecture": self.arch,
            "parameters": self.parameters,
            "context": self.context,
            "kv": self.kv,
            "slots": self.slots,
            "machine": _machine_json(self.machine),
            "fits": self.fits,
            "chosen": self.chosen,
            "recommendation": self.recommendation,
            "commands": list(self.commands),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "ruled_out": [{"what": what, "why": why} for what, why in self.ruled_out],
            "engines": [asdict(engine) for engine in self.engines],
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
        }


def _machine_json(machine: Machine) -> dict[str, Any]:
    def device(found: Any) -> dict[str, Any]:
        return {
            "name": found.name, "bytes": found.bytes, "bandwidth": found.bandwidth,
            "tags": {"bytes": found.how_bytes, "bandwidth": found.how_bandwidth or None},
        }  # fmt: skip

    return {
        "cpu": machine.cpu, "cores": machine.cores, "memory": device(machine.memory),
        "free_bytes": machine.free, "margin_bytes": margin(machine.memory.bytes),
        "gpus": [device(gpu) for gpu in machine.gpus], "unified": machine.unified,
        "tags": {"free_bytes": MEASURED, "margin_bytes": ESTIMATED, "cores": MEASURED},
    }  # fmt: skip


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
    told_memory, told_vram = _size(memory, "--memory", 1), _size(vram, "--vram", 0)
    with _opened(model) as (opened, bytes_read, notes):
        shape, doubts = shape_of(opened)
        length, context_notes = _context(context, opened)
        _check_heads(shape, kv)
        here = machine or detect(told_memory, told_vram)
        judged = _Judge(opened, shape, here, length, kv, slots)
        candidates = judged.candidates()
        best = _recommended(candidates)
        return Fit(
            model=_name(opened), arch=opened.arch, parameters=opened.parameters, context=length, kv=kv,
            slots=slots, machine=here, shape=shape, candidates=tuple(candidates),
            chosen=best.type if best else None,
            recommendation=_sentence(best, candidates, judged),
            commands=tuple(_commands(best, opened, length)),
            ruled_out=tuple(_ruled_out(best, candidates, here)), engines=tuple(engines(here)),
            bytes_read=bytes_read,
            notes=tuple(dict.fromkeys((*notes, *opened.notes, *doubts, *context_notes, *_memory_notes(best, here)))),
        )  # fmt: skip


def _check(context: int | None, kv: str, slots: int) -> None:
    if kv not in KV_TYPES:
        raise UsageError(f"--kv {kv}", "is no type of the cache", f"Choose one of {', '.join(KV_TYPES)}.")
    if context is not None and not 1 <= context <= MOST_CONTEXT:
        raise UsageError(f"--context {context}", "is no number of tokens", "Give 1 or more: 8192, say.")
    if not 1 <= slots <= MOST_SLOTS:
        raise UsageError(f"--slots {slots}", "is no number of conversations", "Give 1 or more.")


def _size(value: int | str | None, option: str, least: int) -> int | None:
    return None if value is None else parse_bytes(value, option, least)


def _check_heads(shape: Shape, kv: str) -> None:
    block = KV_TYPES[kv][0]
    if shape.head % block:
        raise UsageError(
            f"--kv {kv}", f"does not fit heads of {shape.head} numbers: llama.cpp refuses it",
            "Use --kv f16.",
        )  # fmt: skip


def _context(asked: int | None, model: Model) -> tuple[int, list[str]]:
    trained = model.metadata.get(f"{model.arch}.context_length")
    limit = int(trained.value) if trained and isinstance(trained.value, int) and trained.value > 0 else None
    if asked is None:
        return min(CONTEXT, limit or CONTEXT), []
    if limit and asked > limit:
        return asked, [f"it was trained on contexts of {limit} tokens: text beyond that gets worse"]
    return asked, []


@contextmanager
def _opened(model: str | Path | Model) -> Iterator[tuple[Model, int | None, list[str]]]:
    if isinstance(model, Model):
        yield model, None, []
        return
    with open_headers(model, outline) as found:
        yield found


def _name(model: Model) -> str:
    return model.origin


class _Judge:
    """One model on one machine under one wish."""

    def __init__(
        self, model: Model, shape: Shape, machine: Machine, context: int, kv: str, slots: int
    ) -> None:
        self.model, self.shape, self.machine = model, shape, machine
        self.context, self.kv, self.slots = context, kv, slots
        self.known = tuple(tensor for tensor in model.tensors if is_ours(tensor.name))
        self.strange = sum(tensor.stored_bytes for tensor in model.tensors if not is_ours(tensor.name))
        self.quantized = _is_quantized(model)
        self.measurements = _Measurements(model)

    def candidates(self) -> list[Candidate]:
        """The file itself where it is one that llama.cpp runs, and what can be made of the model."""
        found = [self.as_it_is()] if self.model.kind == "gguf" else []
        whole = self.model.kind == "gguf" and self.quantized
        for name in preset_names():
            if name in ALIASES or name in BARE:
                continue
            made = self.made(name)
            smaller = not whole or made.memory.weights < found[0].memory.weights
            if smaller and not (found and made.type == found[0].type):
                found.append(made)
        return sorted(found, key=lambda candidate: -candidate.memory.weights)

    def as_it_is(self) -> Candidate:
        tensors = [(tensor.name, tensor.stored_bytes) for tensor in self.model.tensors]
        weights = sum(size for _, size in tensors)
        name = _type_of(self.model)
        bits = 8 * weights / max(1, self.model.parameters)
        quality = self.measurements.of_file() or self.published(name, weights)
        return self.judged(name, self.model.origin, tensors, weights, bits, quality, False, ())

    def published(self, name: str, weights: int) -> Quality | None:
        """The literature's loss for the file, where its tensors are those that its type's name promises."""
        if name not in preset_names():
            return None
        plan = self.plan(name, importance=False)
        usual = abs(plan.bytes + self.strange - weights) <= _USUAL * weights
        return literature(name, _fallback_share(plan)) if usual else None

    def made(self, name: str) -> Candidate:
        importance = "needs an importance matrix" in describe(name)
        plan = self.plan(name, importance)
        quality = self.measurements.of_type(name) or literature(name, _fallback_share(plan))
        notes = list(plan.fallback_notes())
        if self.quantized:
            quality = None
            notes.append("would be quantized a second time: better from the original")
        tensors = [(tensor.name, tensor.bytes) for tensor in plan.tensors]
        weights = plan.bytes + self.strange
        bits = 8 * weights / max(1, self.model.parameters)
        return self.judged(name, None, tensors, weights, bits, quality, importance, tuple(notes))

    def plan(self, name: str, importance: bool) -> Plan:
        names = [tensor.name for tensor in self.known] if importance else []
        return make_plan(replace(self.model, tensors=self.known), Options(to=name), names)

    def judged(
        self, name: str, file: str | None, tensors: list[tuple[str, int]], weights: int, bits: float,
        quality: Quality | None, importance: bool, notes: tuple[str, ...],
    ) -> Candidate:  # fmt: skip
        memory = needed(self.shape, weights, self.context, self.kv, self.slots)
        count, used = self.experts()
        active = active_bytes(tensors, count, used) + self.strange
        tied = all(tensor != "output.weight" for tensor, _ in tensors)
        embedding = 0 if tied else sum(size for tensor, size in tensors if tensor == "token_embd.weight")
        layers = max(1, len(self.shape.layers))
        verdict = judge(Load(memory, layers, active, self.shape.vocabulary, embedding), self.machine)
        return Candidate(name, file, bits, memory, verdict, quality, importance, notes)

    def experts(self) -> tuple[int, int]:
        field = self.model.metadata.get(f"{self.model.arch}.expert_count")
        return (int(field.value) if field else 0, self.shape.experts_used)


def _fallback_share(plan: Plan) -> float:
    return sum(tensor.size for tensor in plan.tensors if tensor.is_fallback) / max(1, plan.parameters)


def _is_quantized(model: Model) -> bool:
    matrices = {tensor.stored for tensor in model.tensors if len(tensor.shape) > 1}
    return any(kind not in _FLOATS and not kind.startswith("F8") for kind in matrices)


def _type_of(model: Model) -> str:
    field = model.metadata.get("general.file_type")
    names = [name for name in preset_names() if field is not None and file_type(name) == field.value]
    if names:
        return names[0]
    weights: dict[str, int] = {}
    for tensor in model.tensors:
        weights[tensor.stored] = weights.get(tensor.stored, 0) + tensor.size
    return max(weights, key=weights.__getitem__, default="unknown")


class _Measurements:
    """What is known of this very model: kept beside it, or in files that were made of it.

    Whose they are is judged by the reference's name and the number of weights, since comparing contents
    would mean to read them.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.path = Path(model.origin)
        self.name = self.path.name or self.path.resolve().name
        self._by_type: dict[str, Quality] | None = None

    def of_file(self) -> Quality | None:
        """Of the file itself."""
        from dither.containers.provenance import MEASUREMENT

        field = self.model.metadata.get(MEASUREMENT)
        beside = self.path.with_name(self.path.name + ".measure.json")
        if beside.is_file():
            found = _load(beside)
            if found and found["file"] == self.path.name and self._same_size(found):
                return measured(found, beside.name)
        found = _parse(str(field.value)) if field else None
        return measured(found, self.path.name) if found else None

    def of_type(self, name: str) -> Quality | None:
        if self._by_type is None:
            self._by_type = dict(self._neighbors())
        return self._by_type.get(name)

    def _neighbors(self) -> Iterator[tuple[str, Quality]]:
        if not self.path.exists():
            return
        path = self.path.resolve()
        folders = [path, path.parent] if path.is_dir() else [path.parent]
        for folder in folders:
            files = sorted(p for p in folder.iterdir() if p.name.endswith((".measure.json", ".gguf")))
            for file in files[:_MOST_NEIGHBORS]:
                found = _load(file) if file.suffix == ".json" else _embedded(file)
                if found and found["type"] and found["reference"] == self.name and self._same_size(found):
                    yield found["type"], measured(found, file.name)

    def _same_size(self, found: Mapping[str, Any]) -> bool:
        parameters = 8 * found["bytes"] / found["bpw"] if found["bpw"] else 0
        return abs(parameters - self.model.parameters) <= 0.01 * self.model.parameters


def _load(path: Path) -> dict[str, Any] | None:
    """A measurement's file; None where it is none: it was not asked for, and may be anybody's."""
    from dither.measuring.schema import load

    try:
        return load(path).model_dump()
    except DitherError:
        return None


def _parse(text: str) -> dict[str, Any] | None:
    from dither.measuring.schema import parse

    if text.strip() in ("", "{}"):
        return None
    try:
        return parse(text, "metadata").model_dump()
    except DitherError:
        return None


def _embedded(path: Path) -> dict[str, Any] | None:
    from dither.containers.provenance import MEASUREMENT
    from dither.formats.gguf import read_header

    try:
        field = read_header(path).metadata.get(MEASUREMENT)
    except DitherError:
        return None
    return _parse(str(field.value)) if field else None


def _recommended(candidates: list[Candidate]) -> Candidate | None:
    """The candidate to take.  A quantized file that fits is taken as it is: making another would lose more."""
    own = next((candidate for candidate in candidates if candidate.file), None)
    if own and own.fits and own.bits_per_weight < _PLAIN_BITS:
        return own
    choices = [
        Choice(
            candidate.type, candidate.verdict, candidate.memory.weights, LADDER.index(candidate.type),
            _is_good(candidate), candidate.needs_importance,
        )
        for candidate in candidates
        if candidate.type in LADDER
    ]  # fmt: skip
    best = choose(choices)
    if best is None:
        return next((candidate for candidate in candidates if candidate.fits), None)
    return next(candidate for candidate in candidates if candidate.type == best.name)


def _is_good(candidate: Candidate) -> bool:
    """No more loss than 4 bits usually cost, as far as anything is known."""
    if candidate.quality is None:
        return candidate.bits_per_weight >= _GOOD_BITS
    return LADDER.index(candidate.type) <= LADDER.index("Q4_K_S")


def _sentence(best: Candidate | None, candidates: list[Candidate], judged: _Judge) -> str:
    if best is None:
        least = min(candidates, key=lambda candidate: candidate.memory.total)
        room = format_bytes(judged.machine.memory.bytes)
        disk = " It would run from disk, slowly." if least.verdict.word != NO else ""
        return (
            f"Nothing fits: even {least.type} needs {format_bytes(least.memory.total)} and there is {room}.{disk} "
            f"Try a shorter context than {judged.context}, --kv q8_0, or a smaller model."
        )
    places = {
        "GPU": "entirely on the GPU",
        "RAM": "in RAM",
        "part in RAM": f"with {best.verdict.gpu_layers} of {len(judged.shape.layers)} layers on the GPU",
    }
    speed = best.verdict.speed
    how_fast = f", about {_rounded(speed.likely)} tokens/s" if speed else ""
    what = "it as it is" if best.file else best.type
    return (
        f"Take {what}: {format_bytes(best.memory.total)} with {judged.context} tokens of context, "
        f"{places[best.verdict.word]}{how_fast}."
    )


def _rounded(value: float) -> str:
    """Two digits that count: no estimate here has more.

    >>> _rounded(2374.1), _rounded(79.2), _rounded(4.04)
    ('2400', '79', '4.0')
    """
    if value >= 10:
        digits = len(f"{value:.0f}") - 2
        return str(round(value / 10**digits) * 10**digits)
    return f"{value:.1f}"


def _commands(best: Candidate | None, model: Model, context: int) -> Iterator[str]:
    import shlex

    if best is None:
        return
    name = shlex.quote(model.origin if not model.origin.startswith("-") else f"./{model.origin}")
    if best.file:
        yield f"dither chat {name} -c {context}"
        return
    if not _convertible(model):
        yield "# convert it to a GGUF with llama.cpp's convert_hf_to_gguf.py first, then:"
        yield f"dither quantize model.gguf --to {best.type}"
        return
    if best.needs_importance:
        yield f"dither calibrate {name} -o evidence"
        yield f"dither quantize {name} --to {best.type} --evidence evidence"
    else:
        yield f"dither quantize {name} --to {best.type}"


def _convertible(model: Model) -> bool:
    return model.kind == "gguf" or any(family.arch == model.arch for family in families())


def _ruled_out(
    best: Candidate | None, candidates: list[Candidate], machine: Machine
) -> Iterator[tuple[str, str]]:
    """Types by the reason that speaks against them, in the order of the table."""
    reasons: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate is not best:
            reasons.setdefault(_reason(candidate, best), []).append(candidate.type)
    for reason, names in reasons.items():
        shown = names if len(names) <= 8 else [*names[:7], f"{len(names) - 7} more"]
        yield ", ".join(shown), reason


def _reason(candidate: Candidate, best: Candidate | None) -> str:
    word = candidate.verdict.word
    if not candidate.fits:
        return "would run from disk" if word != NO else "does not fit"
    if best is None:
        return ""
    if candidate.memory.weights > best.memory.weights:
        if FITS.index(word) > FITS.index(best.verdict.word):
            return f"does not fit the {best.verdict.word}" if best.verdict.word == "GPU" else "slower place"
        if candidate.type not in LADDER or LADDER.index(candidate.type) < LADDER.index(best.type):
            slow = candidate.verdict.speed and candidate.verdict.speed.likely < 10
            return "slower than people read" if slow else "larger, and nothing to gain"
        return "larger, and loses as much or more"
    return "loses more"


def _memory_notes(best: Candidate | None, machine: Machine) -> Iterator[str]:
    free, total = machine.free, machine.memory.bytes
    if free is not None and free < 0.8 * total:
        yield f"{format_bytes(free)} of {format_bytes(total)} are free right now: that is what was judged by"

