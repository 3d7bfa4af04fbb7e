"""How a model is run: one record for the server, for the process it starts and for llama.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


@dataclass(frozen=True)
class Settings:
    """`context` is in tokens (0: up to 4096, or what the model was trained on), `threads` defaults to the
    physical cores at hand, `gpu_layers` counts layers on an accelerator (−1: as many as fit, where the wheel
    knows one), `seed` is the default for sampling.  `slots` requests run at a time, each with `context` tokens
    of its own; others wait.  `kv` is the cache's type (f16, q8_0, q4_0), `loras` are adapters as GGUF files, laid
    over the weights.  `embeddings` makes it an engine for `/v1/embeddings` alone, `metrics` counts for
    Prometheus, `alias` is the model's name in answers."""

    context: int = 0
    threads: int | None = None
    seed: int = 0
    gpu_layers: int = 0
    slots: int = 1
    kv: str = "f16"
    loras: Sequence[str | Path] = ()
    embeddings: bool = False
    metrics: bool = False
    alias: str = ""


class Keywords(TypedDict, total=False):
    """The same as keywords of a call (PEP 692)."""

    context: int
    threads: int | None
    seed: int
    gpu_layers: int
    slots: int
    kv: str
    loras: Sequence[str | Path]
    embeddings: bool
    metrics: bool
    alias: str
