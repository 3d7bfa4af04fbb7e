"""TQ1_0 and TQ2_0 against ggml's own C encoder and the gguf package's decoder."""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from dither.codecs import codec

both = pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
WHOLE = slice(0, 256)


def ggml_encode(name: str, w_RC: np.ndarray) -> np.ndarray:
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[name]), np.ascontiguousarray(w_RC), *w_RC.shape)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


def rows(kind: str) -> np.ndarray:
    random = np.random.default_rng(7)
    w_RC = random.standard_normal((32, 512))
    if kind == "ternary":
        w_RC = random.integers(-1, 2, w_RC.shape) * 0.0371
    if kind == "halves":
        w_RC = random.integers(-2, 3, w_RC.shape) / 2
    if kind == "denormal":
        w_RC *= 10.0 ** random.uniform(-46, -6, (32, 1))
    if kind == "zero":
        w_RC *= 0
    return w_RC.astype(np.float32)


@both
@pytest.mark.parametrize("kind", ["gaussian", "ternary", "halves", "denormal", "zero"])
def test_bytes_are_ggmls(name: str, kind: str) -> None:
    np.testing.assert_array_equal(codec(name).encode(rows(kind)), ggml_encode(name, rows(kind)))


@both
@settings(max_examples=40, deadline=None)
@given(w_RC=arrays(np.float32, (1, 256), elements=st.floats(-60000, 60000, width=32)))
def test_bytes_are_ggmls_on_anything(name: str, w_RC: np.ndarray) -> None:
    np.testing.assert_array_equal(codec(name).encode(w_RC), ggml_encode(name, w_RC))


@both
def test_a_ternary_model_loses_only_what_float16_takes(name: str) -> None:
    w_RC = rows("ternary")
    decoded_RC = dequantize(codec(name).encode(w_RC), GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded_RC, np.sign(w_RC) * np.float32(np.float16(0.0371)))


@both
def test_importance_finds_a_scale_near_the_best(name: str) -> None:
    """Against a fine sweep of scales in float64."""
    w_RC = rows("gaussian")[:4, :256]
    v_C = np.random.default_rng(8).lognormal(0, 1, 256).astype(np.float32)
    sweep = abs(w_RC).max(axis=1)[:, None] * np.linspace(0.02, 1, 2000)
    q = np.clip(np.round(w_RC[:, None, :] / sweep[:, :, None]), -1, 1)
    least = (v_C * (w_RC[:, None, :] - q * sweep[:, :, None]) ** 2).sum(axis=2).min(axis=1)
    decoded_RC = dequantize(codec(name).encode(w_RC, v_C), GGMLQuantizationType[name])
    error = (v_C * (w_RC.astype(np.float64) - decoded_RC) ** 2).sum(axis=1)
    assert (error <= 1.01 * least).all()


@both
def test_decodes_any_stored_block(name: str) -> None:
    c = codec(name)
    raw_RN = np.random.default_rng(5).integers(0, 256, (300, c.block_bytes), dtype=np.uint8)
    raw_RN[:, -1] &= 0xBB  # keeps the float16's exponent below infinity's
    expected = dequantize(raw_RN, GGMLQuantizationType[name])
    np.testing.assert_array_equal(c.decode(raw_RN), expected)
    codes_RB, grid = c.unpack(raw_RN)
    np.testing.assert_array_equal(c.value(codes_RB, grid, WHOLE), expected)
