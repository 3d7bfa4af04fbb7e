"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 against ggml's own C encoder: equal bytes, or with importance less error."""

from __future__ import annotations

from itertools import permutations

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from numba import njit

from dither.codecs.kernels.uniform import load_block
from dither.codecs.legacy import CODECS

every_type = pytest.mark.parametrize("c", CODECS, ids=lambda c: c.name)
COLUMNS = 512


def ggml_encode(name: str, w_RC: np.ndarray, importance_C: np.ndarray | None = None) -> np.ndarray:
    kind = int(GGMLQuantizationType[name])
    raw = libgguf.quantize_rows_raw(kind, np.ascontiguousarray(w_RC), *w_RC.shape, importance_C)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


def rows(kind: str) -> np.ndarray:
    random = np.random.default_rng(7)
    w_RC = random.standard_normal((64, COLUMNS))
    if kind == "student":
        w_RC = random.standard_t(3, w_RC.shape)
    if kind == "zero":
        w_RC = np.copysign(0.0, w_RC)
    if kind == "constant":
        w_RC = np.repeat(w_RC[:, :1], COLUMNS, axis=1)
    if kind == "outlier":
        w_RC[:, ::97] *= 1e4
    if kind == "positive":
        w_RC = abs(w_RC) + 1
    if kind == "ties":  # the largest magnitude twice, with either sign first
        w_RC = np.round(w_RC * 2)
    if kind == "denormal":
        w_RC *= 10.0 ** random.uniform(-46, -37, (64, 1))
    if kind == "float16 denormal":
        w_RC *= 10.0 ** random.uniform(-8, -3, (64, 1))
    if kind == "half steps":  # every quotient ends in ½
        w_RC = (random.integers(-127, 127, w_RC.shape) + 0.5) * 2.0**-6
        w_RC[:, ::32] = 127 * 2.0**-6
    return w_RC.astype(np.float32)


KINDS = """gaussian student zero constant outlier positive ties denormal|float16 denormal|half steps"""
KINDS = [kind for part in KINDS.split("|") for kind in (part.split() if "gaussian" in part else [part])]


@every_type
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_ggmls(c, kind: str) -> None:
    w_RC = rows(kind)
    np.testing.assert_array_equal(c.encode(w_RC), ggml_encode(c.name, w_RC))


@every_type
@settings(max_examples=60, deadline=None)
@given(w_RC=arrays(np.float32, (1, 32), elements=st.floats(-60000, 60000, width=32)))
@example(w_RC=np.full((1, 32), -0.0, np.float32))
@example(w_RC=np.array([[3.0, -3.0] * 16], np.float32))
@example(w_RC=np.array([[-3.0, 3.0] * 16], np.float32))
def test_bytes_are_ggmls_on_anything(c, w_RC: np.ndarray) -> None:
    np.testing.assert_array_equal(c.encode(w_RC), ggml_encode(c.name, w_RC))


@every_type
@pytest.mark.parametrize("kind", ["gaussian", "student", "outlier"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_importance_is_used_at_least_as_well_as_by_ggml(c, kind: str, spread: float) -> None:
    w_RC = rows(kind)
    importance_C = np.random.default_rng(8).lognormal(0, spread, COLUMNS).astype(np.float32)

    def error(raw_RN: np.ndarray) -> float:
        decoded = dequantize(raw_RN, GGMLQuantizationType[c.name])
        return float((importance_C * (w_RC.astype(np.float64) - decoded) ** 2).sum())

    ours, theirs = error(c.encode(w_RC, importance_C)), error(ggml_encode(c.name, w_RC, importance_C))
    if c.name == "Q8_0":
        assert ours == theirs
    else:
        assert ours <= 0.995 * theirs


@every_type
def test_decodes_any_stored_block(c) -> None:
    random = np.random.default_rng(9)
    raw_RN = random.integers(0, 256, (400, c.block_bytes), dtype=np.uint8)
    for at in (1, 3)[: 1 + c.name.endswith("1")]:
        raw_RN[:, at] &= 0xBB  # keeps the float16's exponent below infinity's
    expected = dequantize(raw_RN, GGMLQuantizationType[c.name])
    np.testing.assert_array_equal(c.decode(raw_RN), expected)
    codes_RB, grid = c.unpack(raw_RN)
    np.testing.assert_array_equal(c.value(codes_RB, grid, slice(0, 32)), expected)
    np.testing.assert_array_equal(c.pack(codes_RB, grid), raw_RN)


@every_type
def test_a_searched_grid_rounds_to_nearest(c) -> None:
    """Under stored scales, no other code lies closer: float64, all codes."""
    w_RB = rows("student")[:, :32]
    grid = c.fit(w_RB, np.linspace(0.1, 3, 32, dtype=np.float32))
    if c.name == "Q8_0":
        grid = c.unpack(c.pack(c.snap(w_RB, grid, slice(0, 32)), grid))[1]
    chosen = c.value(c.snap(w_RB, grid, slice(0, 32)), grid, slice(0, 32))
    levels = np.arange(-127, 128) if c.name == "Q8_0" else np.arange(c.most + 1) - c.middle
    scale = grid.scale_R[:, None, None].astype(np.float64)
    every = levels * scale + grid.minimum_R[:, None, None]
    least = abs(w_RB[:, :, None] - every).min(axis=2)
    improved = grid.inverse_R == np.float32(1) / grid.scale_R  # the plain formula's rounding is ggml's
    assert improved.mean() > 0.5
    assert (abs(w_RB - chosen) <= least * (1 + 1e-5) + 1e-6 * abs(grid.scale_R[:, None]))[improved].all()


@njit
def loaded(w_NB, importance_PB, x, v):
    found = np.empty_like(w_NB)
    for n in range(len(w_NB)):
        load_block(w_NB, importance_PB, n, np.float32(1), x, v)
        found[n] = v
    return found


def test_importance_does_not_hang_on_where_arrays_lie() -> None:
    """Side by side or far apart: LLVM may choose at run time how a loop that writes and sums is vectorized."""
    random = np.random.default_rng(0)
    w_NB = random.standard_normal((64, 32)).astype(np.float32)
    importance_B = random.lognormal(0, 1, 32).astype(np.float32)
    seen = set()
    for order in permutations(range(3)):
        for apart in (32, 36, 48, 64, 96, 128, 1024):  # floats from the beginning of one array to the next one's
            room = np.empty(3 * apart, np.float32)
            x, v, importance = (room[apart * at :][:32] for at in order)
            importance[:] = importance_B
            seen.add(loaded(w_NB, importance[None], x, v).tobytes())
    assert len(seen) == 1
