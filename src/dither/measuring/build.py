"""Builds a `Measurement` from values per token: which files, which text, what numbers.

Legend: S sequences, N scored positions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dither._version import __version__
from dither.containers.mix import PLANNED, is_planned
from dither.containers.presets import preset_of
from dither.errors import SourceError, UsageError
from dither.measuring.bootstrap import FEW_SEQUENCES, summarize
from dither.measuring.per_token import PerToken, scored_positions
from dither.measuring.schema import THIN_TOKENS, Measurement
from dither.system.files import bytes_of, sha256_of
from dither.types import Model
from dither.units import counted

if TYPE_CHECKING:
    from dither.measuring.text import Sequences

SEED = 1_000_003  # of the text the reference writes for measuring: another one than calibration's


@dataclass(frozen=True)
class About:
    """What all measurements of one pass have in common."""

    reference: Model
    reference_sha256: str
    text: Sequences
    skip: int | None
    seconds: float

    def measurement(self, model: Model, name: str, sha256: str, found: PerToken, notes: Iterable[str]) -> Measurement:
        """The measurement of one file: `name` for people, `sha256` its `content_sha256` or empty."""
        statistics: dict[str, Any] = {**summarize(found)}
        kl_of = [found.kl_N[found.sequence_N == sequence] for sequence in np.unique(found.sequence_N)]
        size = sum(tensor.stored_bytes for tensor in model.tensors)
        return Measurement(
            tool=f"dither {__version__}",
            file=name,
            file_sha256=sha256,
            type=type_name(model),
            bytes=bytes_of(model.files) or size,
            tensor_bytes=size,
            bpw=8 * size / max(1, model.parameters),
            reference=file_name(self.reference),
            reference_sha256=self.reference_sha256,
            data=self.text.name,
            data_sha256=self.text.sha256,
            context=int(self.text.lengths_S.max()),
            seconds=self.seconds,
            notes=tuple(notes),
            sequences=len(kl_of),
            tokens=len(found.kl_N),
            skipped="half" if self.skip is None else self.skip,
            drift=found.drift,
            sequence_kl=tuple(float(kl_N.mean()) for kl_N in kl_of),
            sequence_tokens=tuple(len(kl_N) for kl_N in kl_of),
            **statistics,
        )


def check_text(text: Sequences, skip: int | None) -> list[str]:
    """Notes on the sequences.  Raises UsageError if no position of them can be scored."""
    sequence_N, _ = scored_positions(text.lengths_S, skip)
    scored = len(set(sequence_N.tolist()))
    if not scored:
        reason = f"leaves no position to score after the first {'half' if skip is None else skip}"
        raise UsageError(text.name, reason, "Skip less, or take longer sequences.")
    notes = list(text.notes)
    if scored < FEW_SEQUENCES:
        what = "1 sequence has no interval" if scored == 1 else f"Intervals over {scored} sequences mean little"
        notes.append(f"{what}: give more --tokens, or a shorter context with -c.")
    if len(sequence_N) < THIN_TOKENS:
        only = f"{counted(len(sequence_N), 'token')} scored"
        notes.append(f"A thin proof, {only}: {THIN_TOKENS:,} and more tell what the next text will say.")
    return notes


def content_sha256(model: Model) -> str:
    """sha256 over the bytes of a model's weights: of one file, what `sha256sum` prints.

    Of several, the sha256 over their own hashes in the order of their names.
    """
    weights = [Path(f) for f in model.files if f.endswith((".gguf", ".safetensors"))]
    digests = []
    for path in sorted(weights or map(Path, model.files), key=lambda path: path.name):
        try:
            digests.append(sha256_of(path))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise SourceError(str(path), reason, "Check that it is still there.") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_name(model: Model) -> str:
    """A model's name for people: the name of its file or folder, or its hub id; no path of this machine."""
    path = Path(model.origin)
    return (path.name or path.resolve().name) if path.exists() else model.origin


def type_name(model: Model) -> str:
    """The preset a GGUF names ("plan" if a plan made it), or the type that most of a checkpoint is stored in."""
    if is_planned(model):
        return PLANNED
    number = model.value("general.file_type")
    if model.kind == "gguf" and number is not None:
        return preset_of(number) or f"type {number}"
    weights: Counter[str] = Counter()
    for tensor in model.tensors:
        weights[tensor.stored] += tensor.size
    return max(weights, key=weights.__getitem__, default="")
