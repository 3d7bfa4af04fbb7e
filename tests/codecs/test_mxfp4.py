"""MXFP4 and NVFP4 against the gguf package's decoder, ggml's C encoder, and exhaustive search in float64."""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import MXFP4, dequantize
from split_util import joined

from dither.codecs import codec
from dither.errors import UsageError

both = pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
COLUMNS = 512
CODES = np.array(MXFP4.kvalues, np.float64)


def weights(kind: str, size: float = 0.02) -> np.ndarray:
    random = np.random.default_rng(3)
    w_RC = random.standard_normal((32, COLUMNS)) if kind == "gaussian" else random.standard_t(3, (32, COLUMNS))
    return (size * w_RC).astype(np.float32)


def importance(spread: float) -> np.ndarray | None:
    return np.random.default_rng(4).lognormal(0, spread, COLUMNS).astype(np.float32) if spread else None


def decoded(name: str, raw_RN: np.ndarray) -> np.ndarray:
    return dequantize(raw_RN, GGMLQuantizationType[name]).astype(np.float64)


@both
@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize("size", [1e-4, 0.02, 30.0])
def test_error_is_below_ggmls(name: str, kind: str, spread: float, size: float) -> None:
    w_RC, importance_C = weights(kind, size), importance(spread)
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[name]), w_RC, *w_RC.shape, importance_C)
    theirs_RC = decoded(name, np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1))
    ours_RC = decoded(name, codec(name).encode(w_RC, importance_C))
    weight_C = np.ones(COLUMNS) if importance_C is None else importance_C

    def errors(values_RC: np.ndarray) -> np.ndarray:
        group = 32 if name == "MXFP4" else 16
        return (weight_C * (w_RC - values_RC) ** 2).reshape(-1, group).sum(axis=1)

    ours, theirs = errors(ours_RC), errors(theirs_RC)
    assert (ours <= theirs * (1 + 1e-5)).all()
    if size > 1e-3:
        assert ours.sum() <= 0.98 * theirs.sum()


@both
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_hardly_any_scale_would_have_been_better(name: str, spread: float) -> None:
    """All 255 exponents, or all 126 E4M3 scales, and all codes."""
    w_RC, importance_C = weights("student")[:4], importance(spread)
    group = 32 if name == "MXFP4" else 16
    if name == "MXFP4":
        scales = 2.0 ** (np.arange(60, 200) - 128.0)
    else:
        scales = np.array([m * 2.0**-10 for m in range(1, 8)])
        scales = np.append(scales, [(1 + m / 8) * 2.0 ** (e - 8) for e in range(1, 16) for m in range(8)][:-1])
    w_G = w_RC.astype(np.float64).reshape(-1, group)
    weight_RC = np.broadcast_to(np.ones(COLUMNS) if importance_C is None else importance_C, w_RC.shape)
    least = np.full(len(w_G), np.inf)
    for scale in scales:
        rest = abs(w_G[:, :, None] - scale * CODES).min(axis=2)
        least = np.minimum(least, (weight_RC.reshape(-1, group) * rest**2).sum(axis=1))
    error = (weight_RC * (w_RC - decoded(name, codec(name).encode(w_RC, importance_C))) ** 2).sum()
    assert error <= 1.005 * least.sum()


@both
def test_decodes_any_stored_block(name: str) -> None:
    c = codec(name)
    raw_RN = np.random.default_rng(5).integers(0, 256, (600, c.block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        raw_RN[:, 0] = np.arange(600) % 251  # larger exponents leave float32
    else:
        raw_RN[:, :4] &= 0x7F  # unsigned E4M3 has seven bits
        raw_RN[:128, 0] = np.arange(128)
    expected = dequantize(raw_RN, GGMLQuantizationType[name])
    np.testing.assert_array_equal(c.decode(raw_RN), expected)
    codes_RB, grid = c.unpack(raw_RN)
    np.testing.assert_array_equal(c.value(codes_RB, grid, slice(0, c.block)), expected)
    np.testing.assert_array_equal(c.pack(codes_RB, grid), raw_RN)


@both
def test_codes_are_nearest(name: str) -> None:
    c = codec(name)
    w_RB = weights("student")[:, : c.block]
    grid = c.fit(w_RB, None)
    whole = slice(0, c.block)
    chosen = c.value(c.snap(w_RB, grid, whole), grid, whole)
    scale_RB = c.value(np.full(w_RB.shape, 1, np.uint8), grid, whole).astype(np.float64)  # code 1 is 1 × scale
    least = abs(w_RB[:, :, None] - scale_RB[:, :, None] * CODES).min(axis=2)
    assert (abs(w_RB - chosen) <= least + 1e-6 * scale_RB).all()


@both
def test_split_gives_plain_scales_and_magnitudes(name: str) -> None:
    """E8M0 or E4M3 bytes and codes of 0, ½, 1, 1½, 2, 3, 4, 6: what OCP's formats store."""
    c, group = codec(name), 32 if name == "MXFP4" else 16
    raw_RN = c.encode(weights("student", 30.0))
    codes_RC, index_RS = c.split(raw_RN)
    assert codes_RC.shape == (32, COLUMNS) and index_RS.shape == (32, COLUMNS // group)
    byte = index_RS.astype(np.int64)
    normal = (8 + (byte & 7)) / 8 * 2.0 ** ((byte >> 3) - 7.0)
    scale_RS = 2.0 ** (byte - 127.0) if name == "MXFP4" else np.where(byte < 8, byte / 512, normal)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes_RC & 7]
    value_RC = np.where(codes_RC & 8, -sizes, sizes) * np.repeat(scale_RS, group, axis=1)
    np.testing.assert_array_equal(value_RC, decoded(name, raw_RN))
    np.testing.assert_array_equal(joined(c, codes_RC, index_RS), raw_RN)


def test_a_tensor_scale_moves_small_weights_into_e4m3s_range() -> None:
    w_RC = weights("gaussian", 1e-4)
    plain, scaled = codec("NVFP4"), codec("nvfp4-e15")
    np.testing.assert_array_equal(scaled.encode(w_RC), plain.encode(w_RC * np.float32(2.0**15)))
    errors = [np.square(w_RC - c.decode(c.encode(w_RC))).sum() for c in (plain, scaled)]
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(UsageError, match="exponent"):
        codec("nvfp4-e101")


def test_the_largest_floats_stay_finite() -> None:
    """The largest magnitude under the largest scale would leave float32."""
    w_RC = np.full((1, COLUMNS), np.finfo(np.float32).max, np.float32)
    w_RC[0, ::3] *= -0.7
    values_RC = decoded("MXFP4", codec("MXFP4").encode(w_RC))
    assert np.isfinite(values_RC).all()
    np.testing.assert_allclose(values_RC, w_RC, rtol=0.3)
