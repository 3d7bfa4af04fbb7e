"""From one file, or one measurement, to a run of the results document.

Headers alone are read, so that a file of 70 billion weights opens as fast as a small one; what they tell is
kept in memory for as long as the file's size and time stay the same.  Whether a measurement still belongs to
its file is judged by what costs nothing: the bytes of the tensors, the times of both.  Only where the times
are in doubt and the file is small is it hashed; a large one gets a note instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dither.containers.mix import count_by_type
from dither.containers.provenance import MEASUREMENT
from dither.errors import DitherError
from dither.formats.ggml import STORED_FLOATS, string
from dither.measuring import proof, schema
from dither.measuring.build import content_sha256, type_name
from dither.measuring.schema import Measurement
from dither.models.checkpoint import ABOUT
from dither.models.source import open_headers
from dither.reporting import answer_records, recipes, speeds
from dither.reporting.document import MeasuredOn, RunRecord, TaggedValue, TensorRow
from dither.reporting.tensors import rows_of
from dither.system.files import bytes_of
from dither.system.json_text import read_object
from dither.system.text import shown
from dither.types import Model

HASHED = 64 * 2**20  # bytes; files up to this size are hashed where their measurement's age is in doubt
KEPT_BYTES = 128 * 2**20  # of what headers tell that is remembered; a model of 300 tensors takes about 0.6 MiB
_SIDE = 2**20  # bytes of config.json and dither.json that are read
_INTERVALS = ("kl_mean", "kl_median", "kl_p99", "kl_max", "same_top", "ppl", "ppl_ratio")


@dataclass(frozen=True)
class Facts:
    """What a model's headers tell."""

    path: Path
    name: str
    arch: str
    container: str  # "gguf", "gptq", "safetensors", …
    parameters: int
    tensor_bytes: int
    type: str
    quantized: bool
    recipe: dict[str, Any]
    embedded: str  # the measurement's JSON that the file carries
    mixed: tuple[tuple[str, int, int], ...]
    tensors: tuple[TensorRow, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]
    license: str

    @property
    def bytes(self) -> int:
        """Of the file, or of a folder's weights, configuration and tokenizer together."""
        return bytes_of(self.files)


_kept: dict[tuple[object, ...], tuple[Facts, int]] = {}  # and about how many bytes; the last used stands last


def facts_of(path: Path) -> Facts:
    """Raises DitherError where the headers cannot be read, or mean nothing here."""
    status = path.stat()
    texts = [path / name for name in ("config.json", ABOUT)] if path.is_dir() else []
    beside = (text.stat().st_mtime_ns if text.exists() else 0 for text in texts)
    state = (str(path), status.st_size, status.st_mtime_ns, status.st_ino, *beside)
    entry = _kept.pop(state, None)
    if entry is None:
        with open_headers(path) as (model, _, _notes):
            facts = facts_of_model(_with_about(model, path), path)
        entry = facts, 2048 * len(facts.tensors) + 4 * (len(facts.embedded) + len(str(facts.recipe)))
    _kept[state] = entry
    while sum(size for _, size in _kept.values()) > KEPT_BYTES and len(_kept) > 1:
        del _kept[next(iter(_kept))]
    return entry[0]


def facts_of_model(model: Model, path: Path) -> Facts:
    recipe = recipes.read_recipe(_value(model, "dither.recipe"))
    groups = count_by_type((shown(t.stored), t.size, t.stored_bytes) for t in model.tensors)
    return Facts(
        path=path,
        name=shown(model.name),
        arch=shown(model.arch),
        container=_container(model, path, recipe),
        parameters=model.parameters,
        tensor_bytes=sum(tensor.stored_bytes for tensor in model.tensors),
        type=shown(type_name(model)),
        quantized=any(len(t.shape) > 1 and t.stored not in STORED_FLOATS for t in model.tensors),
        recipe=recipe,
        embedded=str(_value(model, MEASUREMENT)),
        mixed=tuple((kind, group["tensors"], group["bytes"]) for kind, group in groups.items()),
        tensors=rows_of(model),
        notes=tuple(shown(note, 1000) for note in model.notes),
        files=model.files,
        license=_license(model, path),
    )


def _license(model: Model, path: Path) -> str:
    """What the metadata or the front matter of the folder's card names."""
    named = shown(str(_value(model, "general.license")), 80)
    card = path / "README.md"
    if named or not card.is_file():
        return named
    with suppress(OSError), card.open(encoding="utf-8", errors="replace") as file:
        front = file.read(4096).split("\n---", 1)[0]
        found = re.search(r"^license: *[\"']?([\w.+-]{1,80})[\"']? *$", front, re.MULTILINE)
        return found[1] if front.startswith("---") and found else ""
    return ""


def _value(model: Model, key: str) -> object:
    field = model.metadata.get(key)
    return "" if field is None else field.value


def _with_about(model: Model, path: Path) -> Model:
    """A folder outlined without its tokenizer still says how it was made."""
    if not (path / ABOUT).is_file() or "dither.recipe" in model.metadata:
        return model
    found = read_object(path / ABOUT, _SIDE)
    about = {f"dither.{key}": string(json.dumps(value)) for key, value in found.items()}
    return replace(model, metadata={**model.metadata, **about})


def _container(model: Model, path: Path, recipe: Mapping[str, Any]) -> str:
    if model.kind == "gguf":
        return "gguf"
    if isinstance(recipe.get("to"), str):
        return shown(recipe["to"], 40).lower()
    with suppress(DitherError):
        found = read_object(path / "config.json", _SIDE).get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else None
        return shown(method, 40) if isinstance(method, str) and method else model.kind
    return model.kind


def measurement_of(facts: Facts) -> tuple[Measurement | None, list[str], bool]:
    """A file's measurement, beside it or inside, notes on it, and whether it is of an earlier file.  Raises DitherError
    where what lies beside the file is no measurement."""
    beside = schema.path_for(facts.path)
    if beside.is_file():
        found = schema.load(beside)
        return found, *_doubts(found, facts, beside)
    if facts.embedded.strip() in ("", "{}"):
        return None, [], False
    return proof.read(facts.embedded, f"{facts.path}: {MEASUREMENT}"), [], False


def _doubts(found: Measurement, facts: Facts, beside: Path) -> tuple[list[str], bool]:
    stale = f"Stale: {beside.name} is of an earlier {facts.path.name}. Measure it again."
    other = f"{beside.name} was computed by another definition: compare it only with measurements of the same one."
    notes = [other] if found.metric_version != schema.METRIC_VERSION else []
    if found.tensor_bytes != facts.tensor_bytes:
        return [*notes, stale], True
    weights = [Path(file) for file in facts.files if file.endswith((".gguf", ".safetensors"))]
    newest_ns = max((path.stat().st_mtime_ns for path in weights), default=0)
    if not found.file_sha256 or newest_ns <= beside.stat().st_mtime_ns:
        return notes, False
    if facts.bytes > HASHED:
        newer = f"{facts.path.name} is newer than its measurement, which may be of an earlier one."
        return [*notes, newer], False
    sha256 = content_sha256(Model("", "", {}, (), str(facts.path), "gguf", facts.files, ""))
    return ([*notes, stale], True) if sha256 != found.file_sha256 else (notes, False)


def run_of(facts: Facts) -> tuple[RunRecord, list[DitherError]]:
    """The run of a file, and what beside it could not be read.  Raises DitherError where nothing could."""
    problems: list[DitherError] = []
    found, recorded, benchmark, stale = None, None, None, False
    doubts: list[str] = []
    timing: list[str] = []
    try:
        found, doubts, stale = measurement_of(facts)
    except DitherError as error:
        problems.append(error)
    try:
        place = answer_records.path_for(facts.path)
        recorded = answer_records.load(place) if place.is_file() else None
    except DitherError as error:
        problems.append(error)
    try:
        benchmark, timing = speeds.benchmark_of(facts.path, facts.bytes)
    except DitherError as error:
        problems.append(error)
    measured = _measured(found)
    if benchmark is not None:
        measured["metrics"] = measured.get("metrics", {}) | speeds.metrics_of(benchmark)
    run = RunRecord(
        id=run_id(facts.path),
        file=shown(facts.path.name, 400),
        path=_path(facts.path),
        type=facts.type,
        container=facts.container,
        recipe=recipes.in_words(facts.recipe),
        command=recipes.command(facts.recipe, facts.path.name, found.reference if found else ""),
        bytes=facts.bytes,
        tensor_bytes=facts.tensor_bytes,
        parameters=facts.parameters,
        bpw=8 * facts.tensor_bytes / max(1, facts.parameters),
        mixed=facts.mixed,
        tensors=facts.tensors,
        **measured,
        answers=recorded.answers if recorded else (),
        forced=recorded.forced if recorded else (),
        notes=(*facts.notes, *doubts, *_said(found), *timing),
        stale=stale,
        timed=None if benchmark is None else speeds.speed_of(run_id(facts.path), benchmark),
    )
    return run, problems


def run_of_measurement(found: Measurement, place: Path) -> RunRecord:
    """A run of which nothing but the measurement is here."""
    missing = f"{shown(found.file, 200)} itself is not here: only its measurement is."
    return RunRecord(
        id=run_id(place),
        file=shown(found.file, 400),
        type=shown(found.type) or "unknown",
        container="gguf" if found.file.endswith(".gguf") else "unknown",
        bytes=found.bytes,
        tensor_bytes=found.tensor_bytes,
        parameters=round(8 * found.tensor_bytes / found.bpw) if found.bpw > 0 else 0,
        bpw=max(0.0, found.bpw),
        **_measured(found),
        notes=(missing, *_said(found)),
    )


def _measured(found: Measurement | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "metrics": metrics_of(found),
        "measured_on": MeasuredOn(
            data=shown(found.data, 400), tokens=found.tokens, context=found.context, sha256=shown(found.data_sha256, 80)
        ),
        "reference": shown(found.reference, 400),
        "measure_command": recipes.measure_command(found),
        "drift": found.drift[:8192],
    }


def _said(found: Measurement | None) -> list[str]:
    return [] if found is None else [shown(note, 1000) for note in found.notes[:64]]


def metrics_of(found: Measurement) -> dict[str, TaggedValue]:
    """The document's metrics.  ΔPPL is the ratio's distance from 1 in the reference's perplexity, which the
    same tokens gave and which is taken as it is."""
    known: dict[str, dict[str, float | None]] = {key: getattr(found, key).ends for key in _INTERVALS}
    # A logarithm of less than this means nothing, and a ratio to it overflows.
    known = {key: {end: 0.0 if x and abs(x) < 1e-30 else x for end, x in ends.items()} for key, ends in known.items()}
    ratio = found.ppl_ratio.ends
    known["delta_ppl"] = {end: None if x is None else found.ppl_reference * (x - 1) for end, x in ratio.items()}
    return {key: TaggedValue.model_validate(ends) for key, ends in known.items()}


def run_id(path: Path) -> str:
    """Stable while the file stays where it is, and safe in an address.

    >>> run_id(Path("/models/My file.gguf"))
    'My-file-dd35f3bb'
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", path.name.removesuffix(schema.SUFFIX).removesuffix(".gguf"))
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    return f"{slug.strip('-')[:64] or 'run'}-{digest[:8]}"


def _path(path: Path) -> str | None:
    """A path that JSON can hold; a name of other bytes than UTF-8 has none."""
    text = str(path.absolute())
    with suppress(UnicodeEncodeError):
        text.encode("utf-8")
        return text if len(text) <= 4096 else None
    return None
