"""F32, F16 and BF16 against numpy's and ggml's conversions, bit for bit."""

from __future__ import annotations

import libgguf
import numpy as np
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from dither.codecs import codec

F16, BF16, F32 = codec("F16"), codec("BF16"), codec("F32")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
WHOLE = slice(0, 1)


def ggml_bytes(kind: int, w_RC: np.ndarray) -> np.ndarray:
    raw = libgguf.quantize_rows_raw(kind, np.ascontiguousarray(w_RC), *w_RC.shape)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


def awkward_floats() -> np.ndarray:
    """Random exponents over the whole range, exact ties between neighbors of each format, both signs."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 0x7F800000, 40_000, dtype=np.uint32)
    ties = np.concatenate([bits[:2000] & 0xFFFF0000 | 0x8000, bits[2000:4000] & 0xFFFFE000 | 0x1000])
    w = np.concatenate([bits, ties]).view(np.float32)
    return np.concatenate([w, -w]).reshape(-1, 400)


def test_f16_is_numpys_float16_up_to_its_end() -> None:
    w_RC = awkward_floats()
    inside = abs(w_RC) < 65504
    expected = np.where(inside, w_RC, 0).astype(np.float16)
    got = F16.encode(w_RC).view(np.float16)
    np.testing.assert_array_equal(got.view(np.uint16)[inside], expected.view(np.uint16)[inside])
    np.testing.assert_array_equal(got[~inside], np.copysign(np.float16(65504), w_RC[~inside]))


def test_every_half_survives() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    patterns = patterns[(patterns & 0x7C00) != 0x7C00].reshape(2, -1)
    decoded = F16.decode(patterns.view(np.uint8))
    np.testing.assert_array_equal(decoded, patterns.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(F16.encode(decoded), patterns.view(np.uint8))


def test_bf16_is_ggmls() -> None:
    w_RC = awkward_floats()
    np.testing.assert_array_equal(BF16.encode(w_RC), ggml_bytes(30, w_RC))


@given(arrays(np.float32, (2, 16), elements=finite))
def test_bf16_is_ggmls_on_anything_finite(w_RC: np.ndarray) -> None:
    np.testing.assert_array_equal(BF16.encode(w_RC), ggml_bytes(30, w_RC))


@given(arrays(np.float32, (3, 5), elements=finite))
def test_nearest_and_lossless(w_RC: np.ndarray) -> None:
    np.testing.assert_array_equal(F32.encode(w_RC), w_RC.view(np.uint8))
    np.testing.assert_array_equal(F32.decode(F32.encode(w_RC)), w_RC)
    inside_RC = np.clip(w_RC, -1e38, 1e38)
    decoded_RC = BF16.decode(BF16.encode(inside_RC)).astype(np.float64)
    step_RC = np.exp2(np.floor(np.log2(np.maximum(abs(inside_RC.astype(np.float64)), 2.0**-126))) - 7)
    assert (abs(decoded_RC - inside_RC) <= step_RC / 2).all()


def test_a_column_at_a_time() -> None:
    w_RC = awkward_floats()[:3]
    for c in (F16, BF16, F32):
        grid = c.fit(w_RC[:, :1], None)
        codes = c.snap(w_RC[:, :1], grid, WHOLE)
        np.testing.assert_array_equal(c.value(codes, grid, WHOLE), c.decode(c.encode(w_RC))[:, :1])
