"""IQ1, IQ2 and IQ3 through ggml's encoders: its bytes, blocks at the weights' length, and the interface kept honest."""

from __future__ import annotations

import subprocess
import sys

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from dither.codecs import codec
from dither.codecs.lattice import CODECS
from dither.errors import UsageError

BUILDS_TABLES = {"IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}  # ggml takes seconds over them, once
every_type = pytest.mark.parametrize(
    "c", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name in BUILDS_TABLES)) for c in CODECS]
)
RESTORED = {"IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS"}  # the others are ggml's bytes throughout
WHOLE = slice(0, 256)


def weights(rows: int = 4) -> np.ndarray:
    return (0.02 * np.random.default_rng(1).standard_t(4, (rows, 512))).astype(np.float32)


def importance() -> np.ndarray:
    return np.random.default_rng(2).lognormal(0, 1, 512).astype(np.float32)


def ggml_encode(name: str, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[name]), w_RC, *w_RC.shape, importance_C)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


def searched(c, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    importance_RB = None if importance_C is None else np.tile(importance_C.reshape(-1, 256), (len(w_RC), 1))
    w_RB = w_RC.reshape(-1, 256)
    return c.snap(w_RB, c.fit(w_RB, importance_RB), WHOLE).reshape(len(w_RC), -1)


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "plain"])
def test_bytes_are_ggmls_but_for_the_blocks_scale(c, weighted: bool) -> None:
    if c.needs_importance and not weighted:
        return
    w_RC, importance_C = weights(), importance() if weighted else None
    expected = ggml_encode(c.name, w_RC, importance_C)
    np.testing.assert_array_equal(searched(c, w_RC, importance_C), expected)
    first = 2 if c.name in RESTORED else 0  # after the float16 scale that makes the block's length
    blocks_NN, expected_NN = (raw.reshape(-1, c.block_bytes) for raw in (c.encode(w_RC, importance_C), expected))
    np.testing.assert_array_equal(blocks_NN[:, first:], expected_NN[:, first:])


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "plain"])
def test_blocks_are_as_long_as_their_weights(c, weighted: bool) -> None:
    """Along the weights, as the gguf package decodes; ggml's own bytes are some per cent short with importance."""
    if c.name not in RESTORED or (c.needs_importance and not weighted):
        return
    w_RC, importance_C = weights(16), importance() if weighted else None
    v_C = np.ones(512) if importance_C is None else importance_C.astype(np.float64)

    def kept(raw_RN: np.ndarray) -> np.ndarray:
        values_RC = dequantize(raw_RN, GGMLQuantizationType[c.name])
        parts = [(v_C * w_RC * of).reshape(-1, 256).sum(1) for of in (values_RC, w_RC)]
        return parts[0] / parts[1]

    theirs = abs(kept(ggml_encode(c.name, w_RC, importance_C)) - 1).mean()
    restored = kept(c.encode(w_RC, importance_C))
    assert theirs > 0.01
    assert abs(restored - 1).max() < 2e-3


@every_type
def test_the_unit_of_importance_does_not_matter(c) -> None:
    w_RC, importance_C = weights(), importance()
    expected = c.encode(w_RC, importance_C)
    for unit in (2.0**-60, 2.0**40):
        np.testing.assert_array_equal(c.encode(w_RC, importance_C * np.float32(unit)), expected)


@every_type
def test_no_importance_at_all_counts_as_equal_importance(c) -> None:
    w_RC = weights()
    zero_C, ones_C = np.zeros(512, np.float32), np.ones(512, np.float32)
    np.testing.assert_array_equal(c.encode(w_RC, zero_C), c.encode(w_RC, ones_C))


@every_type
def test_each_row_may_have_its_own_importance(c) -> None:
    w_RB = weights().reshape(-1, 256)
    importance_RB = np.random.default_rng(3).lognormal(0, 1, w_RB.shape).astype(np.float32)
    codes_RN = c.snap(w_RB, c.fit(w_RB, importance_RB), WHOLE)
    alone = [ggml_encode(c.name, w_RB[r : r + 1], importance_RB[r]) for r in range(len(w_RB))]
    np.testing.assert_array_equal(codes_RN, np.concatenate(alone))


@every_type
def test_a_stored_grid_keeps_its_own_values_and_rounds_others(c) -> None:
    raw_RN = c.encode(weights(), importance()).reshape(-1, c.block_bytes)
    codes_RN, grid = c.unpack(raw_RN)
    values_RB = dequantize(raw_RN, GGMLQuantizationType[c.name])
    np.testing.assert_array_equal(c.snap(values_RB, grid, WHOLE), raw_RN)
    changed_RB = values_RB.copy()
    changed_RB[1] = weights()[3, :256]
    if c.needs_importance:
        with pytest.raises(UsageError, match="--imatrix"):
            c.snap(changed_RB, grid, WHOLE)
    else:
        again_RN = c.snap(changed_RB, grid, WHOLE)
        np.testing.assert_array_equal(np.delete(again_RN, 1, axis=0), np.delete(codes_RN, 1, axis=0))
        np.testing.assert_array_equal(again_RN[1:2], ggml_encode(c.name, changed_RB[1:2], None))


def test_importance_is_demanded_where_ggml_demands_it() -> None:
    for c in CODECS:
        assert c.needs_importance == libgguf.quantize_requires_imatrix(int(GGMLQuantizationType[c.name]))
    for name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):
        with pytest.raises(UsageError, match=f"{name}: needs an importance matrix.*--imatrix"):
            codec(name).fit(weights()[:, :256], None)


def test_first_use_may_be_on_several_threads() -> None:
    """In a fresh process, where ggml's tables are not built yet."""
    script = """
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from dither.codecs import codec
c = codec("IQ3_XXS")
w = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
with ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(lambda r: c.encode(w[r : r + 1]), range(8)))
assert (np.concatenate(rows) == c.encode(w)).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
