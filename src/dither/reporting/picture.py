"""A picture through the very quantizer that rounds weights: banding and smearing that anyone can see.

Eyes are not made for matrices.  They see at once, though, what few levels do to a sky, and what one glaring
column does to everything beside it.  So a landscape is drawn here, by arithmetic, 128 rows of 256 numbers
from −1 to 1 like a matrix of weights, and goes row by row through the codecs of the weights: blocks of 32
or 256 neighbors under one scale.  One column, a beam, is eight times as bright as white.  On the screen
it is white like any other; in its blocks the scale must reach that far, and little is left for the rest.

Weights are no pixels: neighbors among them have nothing to do with each other, there is no sky to band, and
a network forgives errors that an eye does not.  Only the way a block is rounded carries over.

Legend: R rows, C columns of the picture.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.codecs import codec as find_codec
from dither.errors import UsageError
from dither.reporting.tiles import SLIDER, round_trip
from dither.types import Bytes, Floats

ROWS, COLUMNS = 128, 256
BEAM = 176  # the column that outshines all others
BRIGHTNESS = 8.0
MOST_TYPES = 12


@dataclass(frozen=True)
class Picture:
    """8-bit gray (R, C), and the same after a round trip through each type."""

    original_RC: Bytes
    quantized: Mapping[str, Bytes]

    def to_json(self) -> dict[str, Any]:
        def text(gray_RC: Bytes) -> str:
            return base64.b64encode(gray_RC.tobytes()).decode("ascii")

        rows, columns = self.original_RC.shape
        quantized = {kind: text(gray_RC) for kind, gray_RC in self.quantized.items()}
        original = text(self.original_RC)
        return {"rows": rows, "columns": columns, "original": original, "quantized": quantized, "beam": BEAM}


def picture(types: Sequence[str] = SLIDER) -> Picture:
    """The landscape through each of `types`.

    Raises UsageError for a type that is not known or does not divide 256 columns, and for too many.
    """
    if len(types) > MOST_TYPES:
        raise UsageError(f"{len(types)} types", "are too many pictures", f"Ask for {MOST_TYPES} at most.")
    found = {kind: _through(kind) for kind in dict.fromkeys(types)}
    return Picture(gray(landscape()), found)


@lru_cache(maxsize=64)
def _through(kind: str) -> Bytes:
    found = find_codec(kind, COLUMNS)
    if COLUMNS % found.block:
        reason = f"shares a scale among {found.block} weights, more than a row of {COLUMNS} has"
        raise UsageError(found.name, reason, "Choose a type with smaller blocks.")
    return gray(round_trip(found, landscape()))


def landscape() -> Floats:
    """The picture as numbers, black −1 and white 1, the beam beyond: float32 (128, 256)."""
    y_R1, x_1C = np.mgrid[0:ROWS, 0:COLUMNS].astype(np.float64) / COLUMNS
    shore = 0.30  # heights and widths are in units of the picture's width
    picture_RC = 0.75 - 1.5 * y_R1 + 0.15 * x_1C  # the sky: a smooth gradient
    away_RC = np.hypot(x_1C - 0.24, y_R1 - 0.11)
    picture_RC += 0.5 * np.exp(-((away_RC / 0.12) ** 2))  # haze around the sun
    picture_RC = np.where(away_RC < 0.05, 0.95, picture_RC)
    for height, wave, phase, shade in ((0.075, 9.0, 0.3, 0.02), (0.045, 15.0, 2.1, -0.35)):
        ridge = shore - height * (1.2 + np.sin(wave * x_1C + phase) + 0.3 * np.sin(3.7 * wave * x_1C))
        slope_RC = shade + 0.5 * (y_R1 - ridge)
        picture_RC = np.where(y_R1 > ridge, slope_RC, picture_RC)
    ripples_RC = 0.06 * np.sin(260 * (y_R1 - shore) / (0.35 + y_R1)) * np.cos(21 * x_1C + 40 * y_R1)
    water_RC = -0.55 + 2.2 * (y_R1 - shore) + ripples_RC
    glitter_RC = 0.5 * np.exp(-(((x_1C - 0.24) / (0.02 + 0.4 * np.abs(y_R1 - shore))) ** 2))
    picture_RC = np.where(y_R1 > shore, water_RC + glitter_RC * (y_R1 > shore), picture_RC)
    tower = (np.abs(x_1C - BEAM / COLUMNS) < 0.018 - 0.02 * (y_R1 - shore)) & (y_R1 > 0.13) & (y_R1 < 0.33)
    stripes_RC = np.where((y_R1 * COLUMNS).astype(int) // 8 % 2 == 0, 0.85, -0.8)
    picture_RC = np.where(tower, stripes_RC, picture_RC)
    picture_RC = np.clip(picture_RC, -1, 1)
    picture_RC[: int(0.13 * COLUMNS), BEAM] = BRIGHTNESS
    weights_RC: Floats = picture_RC.astype(np.float32)
    return weights_RC


def gray(weights_RC: npt.ArrayLike) -> Bytes:
    """Numbers from −1 to 1 as 0 to 255, what is beyond them cut off."""
    pixels_RC: Bytes = np.clip(np.rint((np.asarray(weights_RC) + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels_RC
