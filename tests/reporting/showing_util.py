"""Models of one tensor each, made in memory, that count what is read of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dither.codecs import codec
from dither.types import Bytes, Floats, Model, Tensor

NAME = "blk.0.ffn_down.weight"


@dataclass
class Counted:
    """Rows that are made up as they are asked for: `asked` is how many were."""

    rows: int
    columns: int
    seed: int = 0
    scale_C: Floats | None = None
    asked: int = field(default=0)

    def read(self, start: int, stop: int) -> Floats:
        self.asked += stop - start
        made = [np.random.default_rng([self.seed, row]) for row in range(start, stop)]
        w_RC = np.stack([rng.standard_normal(self.columns) for rng in made]).astype(np.float32) * 0.02
        return w_RC if self.scale_C is None else (w_RC * self.scale_C).astype(np.float32)

    def tensor(self, name: str = NAME, stored: str = "F32") -> Tensor:
        shape = (self.rows, self.columns)
        return Tensor(name, shape, stored, 4 * self.rows * self.columns, self.read)


def model(*tensors: Tensor, name: str = "made") -> Model:
    return Model(name, "llama", {}, tensors, "made", "gguf", (), "")


def stored_as(kind: str, source: Counted, raw: bool = True, importance: bool = False) -> Tensor:
    """The source's rows in `kind`: as a GGUF gives them, or with `raw` false as a packed matrix does."""
    found = codec(kind, source.columns)
    weight_C = np.ones(source.columns, np.float32) if importance else None

    def read_raw(start: int, stop: int) -> Bytes:
        return found.encode(source.read(start, stop), weight_C)

    def read(start: int, stop: int) -> Floats:
        return found.decode(read_raw(start, stop))

    shape = (source.rows, source.columns)
    return Tensor(NAME, shape, kind, 0, read, read_raw if raw else None)
