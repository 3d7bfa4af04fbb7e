"""How a model is run: one record for the server, for the process it starts and for llama.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


@dataclass(frozen=True)
class Wishes:
    """What a person may ask for.

    `context` is in tokens (none: up to 4096, or what the model was trained on).  `slots` requests run at a time, each
    with `context` tokens of its own; others wait.  `kv` is the cache's type (f16, q8_0, q4_0), `threads` defaults to
    the physical cores at hand, `gpu_layers` counts layers on an accelerator (−1: as many as fit, where the wheel
    knows one), `loras` are adapters as GGUF files, laid over the weights.
    """

    context: int | None = None
    slots: int | None = None
    kv: str = "f16"
    threads: int | None = None
    gpu_layers: int = 0
    loras: Sequence[str | Path] = ()


@dataclass(frozen=True)
class Settings(Wishes):
    """And what a program asks for.

    `seed` is the default for sampling, `embeddings` makes it an engine for `/v1/embeddings` alone, `metrics` counts for
    Prometheus, `alias` is the model's name in answers.
    """

    seed: int = 0
    embeddings: bool = False
    metrics: bool = False
    alias: str = ""


class WishKeywords(TypedDict, total=False):
    """`Wishes` as keywords of a call (PEP 692)."""

    context: int | None
    slots: int | None
    kv: str
    threads: int | None
    gpu_layers: int
    loras: Sequence[str | Path]


class SettingsKeywords(WishKeywords, total=False):
    seed: int
    embeddings: bool
    metrics: bool
    alias: str
