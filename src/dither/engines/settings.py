"""How a model is run: one record for the server, for the process it starts and for llama.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


@dataclass(frozen=True)
class Settings:
    """`context` is in tokens (none: up to 4096, or what the model was trained on), `threads` defaults to the
    physical cores at hand, `gpu_layers` counts layers on an accelerator (−1: as many as fit, where the wheel
    knows one), `seed` is the default for sampling.  `slots` requests run at a time, each with `context` tokens
    of its own; others wait.  `kv` is the cache's type (f16, q8_0, q4_0), `loras` are adapters as GGUF files, laid
    over the weights.  `embeddings` makes it an engine for `/v1/embeddings` alone, `metrics` counts for
    Prometheus, `alias` is the model's name in answers."""

    context: int | None = None
    slots: int | None = None
    kv: str = "f16"
    threads: int | None = None
    gpu_layers: int = 0
    loras: Sequence[str | Path] = ()
    seed: int = 0
    embeddings: bool = False
    metrics: bool = False
    alias: str = ""


class RunKeywords(TypedDict, total=False):
    """Those that a person chooses, as keywords of a call (PEP 692)."""

    context: int | None
    slots: int | None
    kv: str
    threads: int | None
    gpu_layers: int
    loras: Sequence[str | Path]


class Keywords(RunKeywords, total=False):
    """All of them."""

    seed: int
    embeddings: bool
    metrics: bool
    alias: str
