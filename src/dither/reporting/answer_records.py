"""Answers of a file and of its original, recorded beside the file as `<file>.answers.json`.

Two records, because "does it answer differently?" is two questions:

    answers    both models continue the same prompt, always with the likeliest token.  From the first
               different token on they read different texts, so that what follows shows the taste of a
               difference, not its size
    forced     both models read the same text and predict each next token.  Nothing drifts apart, and the
               KL divergence of every position says where the file would have hesitated or chosen otherwise

The file is a stranger's like any other: it is bounded in every direction, and text is text.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dither.formats.sidecars import Sidecar

SCHEMA_VERSION = 1
SUFFIX = ".answers.json"
TOP = 5  # of the likeliest tokens that are kept of each model
MOST_TOKENS = 4096  # of an answer, and of a text
LONGEST_TEXT = 65_536  # characters of a prompt or a text
_LARGEST_FILE = 64 * 2**20  # bytes; a text of 4096 tokens with ten candidates each is under 2 MiB
_MOST = 256  # answers, and texts, of one file
_AGAIN = "Record them again with `dither answers`."

Piece = Annotated[str, Field(max_length=1024)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Side(_Record):
    """What one model wrote, piece by piece as its tokens came."""

    tokens: tuple[Piece, ...] = Field(max_length=MOST_TOKENS)
    seconds: float = Field(ge=0)


class Answer(_Record):
    """Both continuations of a prompt, and the first piece that differs: None where none does."""

    prompt: str = Field(max_length=LONGEST_TEXT)
    original: Side
    quantized: Side
    first_divergence: int | None = Field(default=None, ge=0)


class ForcedToken(_Record):
    """One token of a text, and what both models expected in its place.

    `kl` in nats; None of the first token, which nothing precedes.  The lists are (token, probability).
    """

    text: Piece
    kl: float | None = Field(default=None, ge=0)
    top_original: tuple[tuple[Piece, Share], ...] = Field(default=(), max_length=2 * TOP)
    top_quantized: tuple[tuple[Piece, Share], ...] = Field(default=(), max_length=2 * TOP)
    same_top: bool = True


class Forced(_Record):
    """A text read by both models."""

    text: str = Field(max_length=LONGEST_TEXT)
    tokens: tuple[ForcedToken, ...] = Field(max_length=MOST_TOKENS)


class Recorded(_Record):
    """All that was recorded of one file."""

    schema_version: int = SCHEMA_VERSION
    tool: str = Field(default="", max_length=256)
    file: str = Field(max_length=4096)  # name without its folder
    file_sha256: str = Field(default="", max_length=64)
    reference: str = Field(max_length=4096)
    answers: tuple[Answer, ...] = Field(default=(), max_length=_MOST)
    forced: tuple[Forced, ...] = Field(default=(), max_length=_MOST)
    notes: tuple[Annotated[str, Field(max_length=4096)], ...] = Field(default=(), max_length=_MOST)


_KEPT = Sidecar(Recorded, SUFFIX, SCHEMA_VERSION, "holds no recorded answers", _LARGEST_FILE, _AGAIN)
path_for, load, parse = _KEPT.path_for, _KEPT.load, _KEPT.parse
save, check_writable = _KEPT.save, _KEPT.check_writable
