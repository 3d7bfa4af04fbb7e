"""llama-quantize's answer as a solver of ours: ggml's own C encoders, in the wheel `libgguf`.

What differs between a file made with it and one of ours is the choice of codes, and nothing else.
"""

from __future__ import annotations

import libgguf
import numpy as np

from dither.formats.ggml import FLOAT_TYPES, GGML_TYPES
from dither.types import Codec, Evidence, Floats, Solved


class Ggml:
    name = "ggml"
    needs: frozenset[str] = frozenset()

    def __call__(self, w_RC: Floats, codec: Codec, evidence: Evidence | None) -> Solved:
        if codec.name in FLOAT_TYPES:
            return Solved(codec.encode(w_RC), self.name)
        importance_C = None if evidence is None else np.ascontiguousarray(evidence.mean_square_C)
        kind = GGML_TYPES[codec.name].id
        raw = libgguf.quantize_rows_raw(kind, np.ascontiguousarray(w_RC), *w_RC.shape, importance_C)
        return Solved(np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1), self.name)
