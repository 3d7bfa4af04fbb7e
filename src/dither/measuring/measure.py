"""Measuring: quantized files against the model they were made of, on the same text.

    open everything → check that it can be compared → the text → one pass, block by block → statistics

Whatever can be refused is refused before the pass begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dither.errors import UsageError
from dither.measuring import schema
from dither.measuring.build import SEED, About, check_text, content_sha256, file_name
from dither.measuring.comparable import check_comparable
from dither.measuring.comparison import Comparison, contrast
from dither.measuring.proof import carries, renew
from dither.measuring.schema import Measurement
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.system.keywords import refuse_unknown
from dither.types import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOKENS = 9216  # 18 sequences of 512, of which more than `schema.THIN_TOKENS` tokens are scored


def measure(
    files: str | Path | Model | Sequence[str | Path | Model],
    against: str | Path | Model,
    *,
    data: str | Path | None = None,
    tokens: int = TOKENS,
    context: int | None = None,
    skip: int | None = None,
    seed: int = SEED,
    device: str = "cpu",
    save: bool = True,
    replace_proof: bool = False,
    progress: Progress | None = None,
) -> list[Measurement]:
    """What quantization cost each of `files` (or the single one) against the model `against`.

    All of them may be GGUFs or checkpoints, made by any tool.  `data` is a text file, JSON lines, `hf:DATASET`
    or "self" (the default: the reference writes the text, sampled with `seed`).  The first `tokens` tokens of it
    are used, in sequences of `context` (512, or the model's); the first `skip` positions of each sequence are
    not scored (None: the first half, as in llama-perplexity).  With `save`, each result is written as
    `<file>.measure.json` beside its file; and a file that carries a measurement is given this one instead where it is
    against the same original and on more tokens, or in any case with `replace_proof`.  `proof` says what was done.

    Raises UsageError if the files cannot be compared or the text is too short, SourceError if one cannot be
    read, OutputError if a result cannot be written: all before the pass begins.
    """
    from dither.measuring.text import sequences
    from dither.models.blocks import open_blocks

    started, report = time.monotonic(), progress or Silent()
    reference = against if isinstance(against, Model) else open_model(against)
    named = _open_files(files)
    notes = {name: [*model.notes, *check_comparable(name, model, reference)] for name, model in named.items()}
    paths = {name: _place_for(model, notes[name]) if save else None for name, model in named.items()}
    networks = {name: open_blocks(model, device=device) for name, model in named.items()}
    blocks = open_blocks(reference, device=device)
    of_reference = [f"the reference, {reference.name}: {line}" for line in reference.notes]
    for line in of_reference:
        report.note(line)
    for name, network in networks.items():
        notes[name] = list(dict.fromkeys([*notes[name], *blocks.notes, *network.notes]))
        for line in notes[name]:
            report.note(f"{file_name(named[name])}: {line}")
    text = sequences(reference, data or "self", tokens=tokens, context=context, seed=seed, progress=report)
    text_notes = check_text(text, skip)
    for line in text_notes:
        report.note(line)
    # Hashed before the pass: a file that changes during the pass must not get the other one's measurement.
    sums = {name: content_sha256(model) for name, model in named.items()}
    from dither.measuring.stream import measure_stream  # imports torch, which open_blocks has asked for

    found = measure_stream(blocks, networks, text.tokens_ST, text.lengths_S, skip=skip, progress=report)
    about = About(reference, content_sha256(reference), text, skip, time.monotonic() - started)
    results = []
    for name, model in named.items():
        said = [*of_reference, *notes[name], *text_notes]
        one = about.measurement(model, file_name(model), sums[name], found[name], said)
        if (path := paths[name]) is not None:
            one = _kept(model, one, path, replace_proof, report)
        results.append(one)
    return results


def _kept(model: Model, found: Measurement, place: Path, replace_proof: bool, report: Progress) -> Measurement:
    """Saves a measurement beside its file, and inside where it is better than the one there."""
    # What changed during the pass is not what was measured.
    unchanged = carries(model) and content_sha256(model) == found.file_sha256
    outcome, note = renew(model, found, replace_proof) if unchanged else ("", "")
    if outcome:
        report.note(note)
        sha256 = content_sha256(model) if outcome == "renewed" else found.file_sha256
        found = found.model_copy(update={"proof": outcome, "file_sha256": sha256, "notes": (*found.notes, note)})
    schema.save(found, place)
    return found


class TextKeywords(TypedDict, total=False):
    """The text that both sides of a comparison are measured on, as `measure` takes it."""

    data: str | Path | None
    tokens: int | None
    context: int | None


def compare(
    a: str | Path,
    b: str | Path,
    *,
    against: str | Path | None = None,
    max_kld: float | None = None,
    device: str = "cpu",
    save: bool = True,
    progress: Progress | None = None,
    **text: Unpack[TextKeywords],
) -> Comparison:
    """Compares B with A: two measured files, or a quantized file with the original it was made of.

    Each is a `.measure.json` or a model.  A measurement beside a file is used as long as the file is still the
    one that was measured; a file without one is measured against `against`.  Without `against`, an A that has
    no measurement is taken as the reference, and B is measured against it.  With `data`, `tokens` or `context`
    both are measured again.

    Raises UsageError if there is neither a measurement nor a reference, or if A may be either a reference or a
    file that was not measured yet; otherwise as `measure` does.
    """
    if max_kld is not None and not 0 <= max_kld < math.inf:
        raise UsageError(f"a limit of {max_kld}", "is not a divergence", "Give a number of nats, such as 0.05.")
    refuse_unknown("compare", text, TextKeywords.__annotations__)
    fresh = any(value is not None for value in text.values())
    report = progress or Silent()
    reference = None if against is None else open_model(against)
    sides = {"a": _side(a, fresh, reference, report), "b": _side(b, fresh, reference, report)}
    found = {key: side for key, side in sides.items() if isinstance(side, Measurement)}
    missing = {key: side for key, side in sides.items() if isinstance(side, Model)}
    if reference is None and "a" in missing:
        reference = missing.pop("a")
        if "b" in found and found["b"].reference_sha256 != content_sha256(reference):
            other = found["b"].reference
            way_out = f"Give --against {other}; or --against {a}, if that is the original."
            raise UsageError(str(a), f"has no measurement, and {b} was measured against {other}", way_out)
    if "b" in missing and reference is None:
        way_out = "Measure it with --against MODEL, or name its original first."
        raise UsageError(str(b), "has no measurement", way_out)
    if missing and reference is not None:
        asked: dict[str, Any] = {**text, "tokens": text.get("tokens") or TOKENS}
        results = measure(list(missing.values()), reference, **asked, device=device, save=save, progress=progress)
        found |= dict(zip(missing, results, strict=True))
    return contrast(found.get("a"), found["b"], max_kld=max_kld)


def _side(path: str | Path, fresh: bool, reference: Model | None, report: Progress) -> Measurement | Model:
    """One side's measurement, or the model if it has none that can be used."""
    if str(path).endswith(".json"):
        if fresh:
            reason = "is a measurement, and no text can be run through it"
            raise UsageError(str(path), reason, "Name the file itself, or leave out --data, --tokens and -c.")
        return schema.load(path)
    model, place = open_model(path), schema.path_for(path)
    if fresh or not place.exists():
        return model
    found = schema.load(place)
    if found.file_sha256 and found.file_sha256 != content_sha256(model):
        report.note(f"{place.name} is of an earlier version of {Path(path).name}: it is not used.")
    elif found.metric_version != schema.METRIC_VERSION:
        report.note(f"{place.name} was computed by an older definition of the numbers: it is not used.")
    elif reference is not None and found.reference_sha256 != content_sha256(reference):
        report.note(f"{place.name} is against another reference: it is not used.")
    else:
        return found
    return model


def _open_files(files: str | Path | Model | Sequence[str | Path | Model]) -> dict[str, Model]:
    if isinstance(files, (str, Path, Model)):
        files = [files]
    if not files:
        raise UsageError("dither measure", "was given no file", "Name at least one quantized file.")
    opened = [file if isinstance(file, Model) else open_model(file) for file in files]
    names = [model.origin for model in opened]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(name, "is named twice", "Name each file once.")
    return dict(zip(names, opened, strict=True))


def _place_for(model: Model, notes: list[str]) -> Path | None:
    """Where a file's measurement will be written, checked; None and a note if the model is not a local file."""
    if not Path(model.origin).exists():
        notes.append("It is not a local file: the measurement is not saved.")
        return None
    place = schema.path_for(model.origin)
    schema.check_writable(place)
    return place
