"""What an exported page takes along of the weights: some tiles and palettes, where a live one reads any.

Of each file two tensors are chosen, the attention's and the feed-forward layers' of the largest error, and
one place in each: its first rows and columns.  A tile with its other types takes about 80 KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dither.errors import DitherError
from dither.formats.ggml import STORED_FLOATS
from dither.models.source import open_model
from dither.reporting.document import Document, PaletteRecord, RunRecord, TensorRow, TileRecord
from dither.types import Model

MOST_RUNS = 12  # of a report whose weights are shown; the others have their numbers alone


def recorded(live: Document, exported: Document) -> Document:
    """`exported` with tiles and palettes of the files that `live` knows the places of."""
    from dither.reporting.picture import picture  # numba: for those alone who export

    found: dict[str, Any] = {"picture": picture().to_json()}
    original = _opened(live.reference.path if live.reference else None)
    if original is not None:
        pairs = zip(exported.runs[:MOST_RUNS], live.runs, strict=False)
        shown = [_with_weights(run, known, original) for run, known in pairs]
        found["runs"] = (*shown, *exported.runs[MOST_RUNS:])
    return exported.model_copy(update=found)


def _with_weights(run: RunRecord, live: RunRecord, original: Model) -> RunRecord:
    quantized = _opened(live.path)
    if quantized is None:
        return run
    from dither.reporting.palette import palette
    from dither.reporting.tiles import tile

    tiles, palettes = {}, {}
    for name in chosen(run.tensors):
        with suppress(DitherError, ValueError):  # of one side only, or not of numbers
            tiles[name] = TileRecord.model_validate(tile(original, quantized, name).to_json())
        with suppress(DitherError, ValueError):
            palettes[name] = PaletteRecord.model_validate(palette(original, quantized, name).to_json())
    return run.model_copy(update={"tiles": tiles, "palettes": palettes})


def chosen(rows: Sequence[TensorRow]) -> list[str]:
    """The tensors to take along: the worst of attention, the worst of the feed-forward layers."""
    matrices = [row for row in rows if len(row.shape) > 1 and row.type not in STORED_FLOATS]
    kinds = ([row for row in matrices if row.kind.startswith(prefix)] for prefix in ("attn", "ffn"))
    found = [max(kind, key=lambda row: row.relative_error or 0.0).name for kind in kinds if kind]
    return found or [row.name for row in matrices[:1]]


def _opened(path: str | None) -> Model | None:
    """None where there is nothing that weights can be read of."""
    with suppress(DitherError):
        return None if path is None else open_model(Path(path))
    return None
