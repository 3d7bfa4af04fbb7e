"""Measuring: quantized files against the model they were made of, on the same text.

    open everything → check that it can be compared → the text → one pass, block by block → statistics

All that can be refused is refused before the pass begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dither.errors import UsageError
from dither.measuring import schema
from dither.measuring.build import SEED, About, check_text, content_sha256, file_name
from dither.measuring.comparable import check_comparable
from dither.measuring.comparison import Comparison, contrast
from dither.measuring.per_token import PerToken
from dither.measuring.schema import Measurement
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.types import Model

if TYPE_CHECKING:
    from dither.measuring.text import Sequences
    from dither.models.blocks import Blocks

TOKENS = 8192  # 16 sequences of 512: enough that the intervals mean something


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
    progress: Progress | None = None,
) -> list[Measurement]:
    """What each of `files`, or the one given, costs against the model `against`.

    All of them are GGUFs or checkpoints, of any tool.  `data` is a text file, JSON lines, `hf:DATASET` or
    "self" (the default: the reference writes the text, drawn with `seed`); of it, `tokens` tokens in
    sequences of `context` (512, or the model's) are used, and the first `skip` positions of each sequence
    are not scored (None: the first half, as llama-perplexity).  With `save`, each result is written as
    `<file>.measure.json` beside its file.

    Raises UsageError where the files cannot be compared or the text is too short, SourceError where
    one cannot be read, OutputError where a result cannot be written: all before the pass begins.
    """
    started, report = time.monotonic(), progress or Silent()
    reference = against if isinstance(against, Model) else open_model(against)
    named = _open_files(files)
    notes = {name: [*model.notes, *check_comparable(name, model, reference)] for name, model in named.items()}
    paths = {name: _place_for(model, notes[name]) if save else None for name, model in named.items()}
    blocks, networks = _open_networks(reference, named, device)
    for name, network in networks.items():
        notes[name] = list(dict.fromkeys([*notes[name], *blocks.notes, *network.notes]))
        for line in notes[name]:
            report.note(f"{file_name(named[name])}: {line}")
    text, text_notes = _text(reference, data, tokens, context, skip, seed, report)

    # Hashed before the pass: what changes while it runs must not pass for what was measured.
    sums = {name: content_sha256(model) for name, model in named.items()}
    found = _stream(blocks, networks, text, skip, report)
    about = About(reference, content_sha256(reference), text, skip, time.monotonic() - started)
    results = []
    for name, per_token in found.items():
        result = about.measurement(
            named[name], file_name(named[name]), sums[name], per_token, [*notes[name], *text_notes]
        )
        results.append(result)
        path = paths[name]
        if path is not None:
            schema.save(result, path)
    return results


def _open_networks(reference: Model, named: Mapping[str, Model], device: str) -> tuple[Blocks, dict[str, Blocks]]:
    from dither.models.blocks import open_blocks

    opened = {name: open_blocks(model, device=device) for name, model in named.items()}
    return open_blocks(reference, device=device), opened


def _stream(
    blocks: Blocks, networks: Mapping[str, Blocks], text: Sequences, skip: int | None, report: Progress
) -> dict[str, PerToken]:
    from dither.measuring.stream import measure_stream  # imports torch

    return measure_stream(blocks, networks, text.tokens_ST, text.lengths_S, skip=skip, progress=report)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    against: str | Path | None = None,
    max_kld: float | None = None,
    data: str | Path | None = None,
    tokens: int | None = None,
    context: int | None = None,
    device: str = "cpu",
    save: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """B beside A: two measured files, or a quantized file beside the original it was made of.

    Each is a `.measure.json` or a model.  A measurement kept beside a file is used while the file is
    still the one that was measured; what has none is measured against `against`.  Without `against`,
    an A that has no measurement is the reference, and B is measured against it.  Naming `data`,
    `tokens` or `context` measures anew.

    Raises UsageError where there is neither a measurement nor a reference, or where A could be either
    a reference or a file not measured yet; else as `measure` does.
    """
    if max_kld is not None and not 0 <= max_kld < math.inf:
        raise UsageError(f"a limit of {max_kld}", "is no divergence", "Give a number of nats, such as 0.05.")
    fresh = data is not None or tokens is not None or context is not None
    report = progress or Silent()
    reference = None if against is None else open_model(against)
    sides = {"a": _side(a, fresh, reference, report), "b": _side(b, fresh, reference, report)}
    found = {key: side for key, side in sides.items() if isinstance(side, Measurement)}
    missing = {key: side for key, side in sides.items() if isinstance(side, Model)}
    if reference is None and "a" in missing:
        reference = missing.pop("a")
        if "b" in found and found["b"].reference_sha256 != content_sha256(reference):
            raise UsageError(
                str(a),
                f"has no measurement, and {b} was measured against {found['b'].reference}",
                f"Give --against {found['b'].reference}; or --against {a}, if that is the original.",
            )
    if "b" in missing and reference is None:
        way_out = "Measure it with --against MODEL, or name its original first."
        raise UsageError(str(b), "has no measurement", way_out)
    if missing and reference is not None:
        results = measure(
            list(missing.values()),
            reference,
            data=data,
            tokens=tokens or TOKENS,
            context=context,
            device=device,
            save=save,
            progress=progress,
        )
        found |= dict(zip(missing, results, strict=True))
    return contrast(found.get("a"), found["b"], max_kld=max_kld)


def _side(path: str | Path, fresh: bool, reference: Model | None, report: Progress) -> Measurement | Model:
    """What is known of one side: its measurement, or the model that has none that can be used."""
    if str(path).endswith(".json"):
        if fresh:
            reason = "is a measurement, which no text can be run through"
            raise UsageError(str(path), reason, "Name the file itself, or leave --data, --tokens and -c out.")
        return schema.load(path)
    model, place = open_model(path), schema.path_for(path)
    if fresh or not place.exists():
        return model
    found = schema.load(place)
    if found.file_sha256 and found.file_sha256 != content_sha256(model):
        report.note(f"{place.name} is of an earlier {Path(path).name}: it is not used.")
    elif found.metric_version != schema.METRIC_VERSION:
        report.note(f"{place.name} was computed by another definition: it is not used.")
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
    named: dict[str, Model] = {}
    for model in opened:
        if model.origin in named:
            raise UsageError(model.origin, "is named twice", "Name each file once.")
        named[model.origin] = model
    return named


def _text(
    reference: Model,
    data: str | Path | None,
    tokens: int,
    context: int | None,
    skip: int | None,
    seed: int,
    report: Progress,
) -> tuple[Sequences, list[str]]:
    """The sequences, and notes on them.  Raises UsageError where nothing of them can be scored."""
    from dither.measuring.text import sequences

    text = sequences(reference, data or "self", tokens=tokens, context=context, seed=seed, progress=report)
    notes = check_text(text, skip)
    for line in notes:
        report.note(line)
    return text, notes


def _place_for(model: Model, notes: list[str]) -> Path | None:
    """Where a file's measurement goes, checked; None and a note where there is no file to lie beside."""
    if not Path(model.origin).exists():
        notes.append("It is no local file: the measurement is not saved beside it.")
        return None
    place = schema.path_for(model.origin)
    schema.check_writable(place)
    return place
