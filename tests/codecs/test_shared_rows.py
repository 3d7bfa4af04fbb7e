"""Rows that share scales stay together where a tensor is cut into chunks, and no chunk crosses an expert.

Legend: R rows, C columns, E experts, N bytes of a packed row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dither.codecs import codec
from dither.containers.mix import Mix, MixTensor
from dither.quantizing.request import Running
from dither.quantizing.tensor_pass import TensorPass, no_evidence
from dither.solvers.nearest import Nearest
from dither.types import Model, Tensor


class Kept:
    """An output that keeps what it is given."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.raw_RN, self.finished, self.starts = np.zeros((rows, row_bytes), np.uint8), {}, []

    def write_rows(self, tensor: str, start: int, raw_RN: np.ndarray) -> None:
        self.raw_RN[start : start + len(raw_RN)] = raw_RN
        self.starts.append(start)

    def finish(self, tensor: str, record: dict[str, Any]) -> None:
        self.finished[tensor] = record


@pytest.mark.parametrize("columns", [1536, 1500])
def test_chunks_are_whole_tiles(columns: int) -> None:
    w_ERC = (0.02 * np.random.default_rng(0).standard_t(5, (2, 300, columns))).astype(np.float32)
    w_RC = w_ERC.reshape(600, columns)
    tensor = Tensor("blk.0.w", w_ERC.shape, "F32", w_RC.nbytes, lambda start, stop: w_RC[start:stop])
    planned = MixTensor("blk.0.w", w_ERC.shape, "F32", w_RC.nbytes, "fp8-128x128", 0, "fp8-128x128", "")
    model = Model("m", "llama", {}, (tensor,), "", "safetensors", (), "")
    c = codec("fp8-128x128", columns)
    output = Kept(600, columns // c.block * c.block_bytes)
    mix = Mix("fp8-128x128", 0, (planned,))
    TensorPass(model, mix, no_evidence, output, Nearest(), Running(threads=1)).all()  # type: ignore[arg-type]
    assert output.starts == [0, 128, 256, 300, 428, 556]
    np.testing.assert_array_equal(output.raw_RN, np.concatenate([c.encode(w_RC) for w_RC in w_ERC]))
    relative = np.linalg.norm(c.decode(output.raw_RN) - w_RC) / np.linalg.norm(w_RC)
    assert output.finished["blk.0.w"]["relative_error"] == pytest.approx(relative, rel=1e-4)
