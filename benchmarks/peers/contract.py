"""What every peer's script is asked and what it answers.

    python PEER.py MODEL TOKENS.npy OUT --bits 4 --group 128 [--option NAME=VALUE]

TOKENS.npy holds int32 [sequences, positions]: the very ids that Dither calibrates on.  OUT becomes the
quantized folder.  The last line printed is JSON: the seconds of calibrating and solving, without imports,
loading and saving, and the version of what ran.  An option overrides one of the peer's settings.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Request:
    model: str
    tokens_ST: npt.NDArray[np.int32]
    out: str
    bits: int
    group: int
    options: dict[str, Any]


def read_request(description: str | None) -> Request:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    options = dict(_option(text) for text in args.option)
    tokens_ST = np.load(args.tokens, allow_pickle=False)
    return Request(args.model, tokens_ST, args.out, args.bits, args.group, options)


def _option(text: str) -> tuple[str, Any]:
    """Python's literals are taken as such, anything else as a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@dataclass(frozen=True)
class Spent:
    seconds: float  # on the clock
    cpu_seconds: float  # of all this process's threads: what a busy machine changes little


class Clock:
    """Begins when made."""

    def __init__(self) -> None:
        self._began = time.monotonic(), time.process_time()

    def spent(self) -> Spent:
        wall, cpu = self._began
        return Spent(time.monotonic() - wall, time.process_time() - cpu)


def answer(request: Request, spent: Spent, package: str) -> None:
    """The last line.  `OUT` is there."""
    for path in Path(request.out).glob("*.safetensors"):
        _narrow_embeddings(path)
    found = {"peer": package, "version": version(package), "bits": request.bits, "group": request.group}
    print(json.dumps({**found, "options": request.options, **asdict(spent)}), flush=True)


def _narrow_embeddings(path: Path) -> None:
    """Back from float32 to bfloat16 where that is what they were, so that files' sizes compare."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, value in tensors.items():
        narrow = value.bfloat16()
        if name.endswith("embed_tokens.weight") and (narrow.to(value.dtype) == value).all():
            tensors[name] = narrow
    save_file(tensors, path, metadata)
