"""IQ1, IQ2 and IQ3 through ggml's encoders: its very bytes, and the interface kept honest around them."""

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
WHOLE = slice(0, 256)


def weights(rows: int = 4) -> np.ndarray:
    return (0.02 * np.random.default_rng(1).standard_t(4, (rows, 512))).astype(np.float32)


def importance() -> np.ndarray:
    return np.random.default_rng(2).lognormal(0, 1, 512).astype(np.float32)


def ggml_encode(name: str, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[name]), w_RC, *w_RC.shape, importance_C)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


@every_type
def test_bytes_are_ggmls(c) -> None:
    w_RC = weights()
    np.testing.assert_array_equal(c.encode(w_RC, importance()), ggml_encode(c.name, w_RC, importance()))
    if not c.needs_importance:
        np.testing.assert_array_equal(c.encode(w_RC), ggml_encode(c.name, w_RC, None))


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
        np.testing.assert_array_equal(again_RN[1:2], c.encode(changed_RB[1:2]))


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
