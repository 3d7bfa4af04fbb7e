"""The measurement embedded in a file: made before the file gets its name, kept in the file's metadata.

Legend: S sequences, T tokens of each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dither.formats.evidence import EvidenceStore
from dither.measuring import schema
from dither.measuring.build import SEED, About, check_text, content_sha256
from dither.measuring.collect import held_back
from dither.measuring.proof import embedded_text
from dither.measuring.schema import Measurement
from dither.measuring.stream import measure_stream
from dither.measuring.text import Sequences, pack, sequences
from dither.models.blocks import open_blocks
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.types import Model

TOKENS = 16384


@dataclass(frozen=True)
class EmbeddedMeasurement:
    measurement: Measurement
    part: Path
    path: Path  # the name the file will get

    @property
    def embedded(self) -> str:
        """The document that goes into the file."""
        return embedded_text(self.measurement)

    def save(self) -> None:
        """Writes `<file>.measure.json`; to be called when the file's bytes are final."""
        sha256 = content_sha256(open_model(self.part))
        schema.save(self.measurement.model_copy(update={"file_sha256": sha256}), schema.path_for(self.path))


def measure_written(
    reference: Model,
    written: Model,
    path: Path,
    store: EvidenceStore | None,
    data: str | None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> EmbeddedMeasurement:
    """Measures `written`, a file that will be named `path`, against `reference`.

    The text is `data` ("self", a file), or if that is None the sequences that calibration held back: they are not
    in the Hessians, though they are in the mean squares.
    """
    started, report = time.monotonic(), progress or Silent()
    blocks = open_blocks(reference, device=device)
    if data is None and store is not None:
        text = held_back_text(store)
    else:
        text = sequences(reference, data or "self", tokens=TOKENS, context=None, seed=SEED, progress=progress)
    notes = check_text(text, None)
    found = measure_stream(blocks, {"": written}, text.tokens_ST, text.lengths_S, progress=report)[""]
    about = About(reference, content_sha256(reference), text, None, time.monotonic() - started)
    measurement = about.measurement(written, path.name, "", found, notes)
    return EmbeddedMeasurement(measurement, Path(written.origin), path)


def held_back_text(store: EvidenceStore) -> Sequences:
    """The sequences of a calibration that are not in its Hessians: those it held back, then those it did not run."""
    tokens_ST, lengths_S = store.tokens()
    held_S = np.asarray(held_back(len(lengths_S)))
    if not held_S.any():
        held_S[-1] = True
    about = store.manifest["data"]
    kept = [tokens_ST[s, : lengths_S[s]].tolist() for s in np.flatnonzero(held_S)]
    if (spare := store.spare_tokens()) is not None:
        kept += [row_T[:length].tolist() for row_T, length in zip(*spare, strict=True) if length > 1]
    return pack(kept, f"held back from {about['name']}", int(about.get("seed", 0)))
