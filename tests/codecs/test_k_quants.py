"""K-quants against ggml's own C encoder and decoder (libgguf) and the gguf package's decoder.

Legend: R rows or super-blocks, C columns, B = 256 weights of a super-block, N bytes.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import libgguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from dither.codecs.base import BlockCodec
from dither.codecs.k_quants import CODECS, AffineGrid, AffineK
from dither.errors import UsageError

every_type = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
WHOLE = slice(0, 256)
BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
COLUMNS = 1024


def weights(kind: str, rows: int = 48) -> np.ndarray:
    random = np.random.default_rng(11)
    shape = (rows, COLUMNS)
    if kind == "gaussian":
        w = random.standard_normal(shape)
    elif kind == "student_t3":
        w = random.standard_t(3, shape)
    else:  # as trained matrices are: low rank plus noise, columns and rows of unequal size, some outliers
        w = random.standard_normal((rows, 6)) @ random.standard_normal((6, COLUMNS)) / 3
        w += random.standard_normal(shape)
        w *= np.exp(0.3 * random.standard_normal(COLUMNS)) * np.exp(0.3 * random.standard_normal((rows, 1)))
        w[random.random(shape) < 1e-3] *= 8
    return (0.02 * w).astype(np.float32)


def importance() -> np.ndarray:
    """Log-normal, as E[x²] of real layers is."""
    return np.exp(np.random.default_rng(12).standard_normal(COLUMNS)).astype(np.float32)


def ggml_encode(codec: BlockCodec, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[codec.name]), w_RC, *w_RC.shape, importance_C)
    return np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)


def ggml_decode(codec: BlockCodec, raw_RN: np.ndarray) -> np.ndarray:
    rows, columns = len(raw_RN), raw_RN.shape[1] // codec.block_bytes * 256
    kind = int(GGMLQuantizationType[codec.name])
    decoded = libgguf.dequantize_rows_raw(kind, raw_RN.tobytes(), rows, columns)
    return np.frombuffer(decoded, np.float32).reshape(rows, columns)


def error(codec: BlockCodec, w_RC: np.ndarray, raw_RN: np.ndarray, importance_C: np.ndarray | None) -> float:
    weight_C = np.ones(w_RC.shape[1]) if importance_C is None else importance_C.astype(np.float64)
    return float((weight_C * (w_RC.astype(np.float64) - ggml_decode(codec, raw_RN)) ** 2).sum())


def searched(codec: BlockCodec, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    """Blocks of least weighted error that the search finds, before they get their length back."""
    w_RB = w_RC.reshape(-1, 256)
    tiled = None if importance_C is None else np.tile(importance_C.reshape(-1, 256), (len(w_RC), 1))
    grid = codec.fit(w_RB, tiled)
    return codec.pack(codec.snap(w_RB, grid, WHOLE), grid).reshape(len(w_RC), -1)


def any_bytes(codec: BlockCodec, blocks: int, seed: int = 5) -> np.ndarray:
    """Random blocks whose float16 scales are finite and of a usual size."""
    random = np.random.default_rng(seed)
    raw_RN = random.integers(0, 256, (blocks, codec.block_bytes), dtype=np.uint8)
    codes_RB, grid = codec.unpack(raw_RN)
    scales = (random.standard_normal((2, blocks)) * 0.01).astype(np.float16)
    parts = grid._replace(d_R=scales[0])
    if isinstance(grid, AffineGrid):
        parts = parts._replace(dmin_R=scales[1])
    return codec.pack(codes_RB, parts)


@every_type
def test_stored_size_is_the_declared_and_ggmls(codec):
    assert GGML_QUANT_SIZES[GGMLQuantizationType[codec.name]] == (codec.block, codec.block_bytes)
    raw_RN = codec.encode(weights("gaussian", 3))
    assert raw_RN.dtype == np.uint8
    assert 8 * raw_RN.size / (3 * COLUMNS) == codec.bits_per_weight == BITS[codec.name]


@every_type
def test_any_bytes_decode_as_both_independent_decoders_say(codec):
    raw_RN = any_bytes(codec, 64).reshape(16, -1)
    ours = codec.decode(raw_RN)
    np.testing.assert_array_equal(ours, ggml_decode(codec, raw_RN))
    np.testing.assert_array_equal(ours, dequantize(raw_RN, GGMLQuantizationType[codec.name]))


@every_type
def test_packing_inverts_unpacking_whatever_the_bytes(codec):
    raw_RN = np.random.default_rng(6).integers(0, 256, (64, codec.block_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(codec.pack(*codec.unpack(raw_RN)), raw_RN)


@every_type
def test_ggmls_own_blocks_survive_unpack_and_pack(codec):
    raw_RN = ggml_encode(codec, weights("gaussian", 4), None).reshape(-1, codec.block_bytes)
    codes_RB, grid = codec.unpack(raw_RN)
    np.testing.assert_array_equal(codec.pack(codes_RB, grid), raw_RN)
    np.testing.assert_array_equal(codec.value(codes_RB, grid, WHOLE), ggml_decode(codec, raw_RN))


@every_type
@pytest.mark.parametrize("kind", ["gaussian", "student_t3", "trained"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_error_is_below_ggmls(codec, kind, weighted):
    w_RC, importance_C = weights(kind), importance() if weighted else None
    ours = error(codec, w_RC, searched(codec, w_RC, importance_C), importance_C)
    assert ours < error(codec, w_RC, ggml_encode(codec, w_RC, importance_C), importance_C)


@every_type
@pytest.mark.parametrize("kind", ["gaussian", "student_t3", "trained"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_blocks_are_as_long_as_their_weights(codec, kind, weighted):
    """What ggml's decoder reads has the weights' length along them, where the search's own answer is short."""
    w_RC, importance_C = weights(kind), importance() if weighted else None
    v_C = np.ones(COLUMNS) if importance_C is None else importance_C.astype(np.float64)

    def kept(raw_RN: np.ndarray) -> np.ndarray:  # of each super-block
        w = w_RC.astype(np.float64)
        parts = [(v_C * w * of).reshape(-1, 256).sum(1) for of in (ggml_decode(codec, raw_RN), w)]
        return parts[0] / parts[1]

    restored = kept(codec.encode(w_RC, importance_C))
    # Half a step of a float16 of some 2⁻¹⁶ is left.
    assert abs(restored - 1).max() < 0.01
    assert abs(restored.mean() - 1) < 1e-3
    if codec.bits_per_weight < 5:
        short = 1 - kept(searched(codec, w_RC, importance_C)).mean()
        assert short > {2: 0.03, 3: 0.01, 4: 0.002}[int(codec.bits_per_weight)]
        assert abs(restored.mean() - 1) < 0.1 * short


@every_type
def test_restoring_length_changes_nothing_but_the_super_blocks_scales(codec):
    w_RC = weights("student_t3", 8)
    before_RB, grid = codec.unpack(searched(codec, w_RC, None).reshape(-1, codec.block_bytes))
    after_RB, longer = codec.unpack(codec.encode(w_RC).reshape(-1, codec.block_bytes))
    np.testing.assert_array_equal(after_RB, before_RB)
    for name, before, after in zip(grid._fields, grid, longer, strict=True):
        if name not in ("d_R", "dmin_R"):
            np.testing.assert_array_equal(after, before)


def nearest_rounding(codec: BlockCodec, w_RB: np.ndarray) -> np.ndarray:
    """Plain rounding in float64: scales from each sub-block's extremes, super-scales from the largest."""
    affine = isinstance(codec, AffineK)
    w = w_RB.astype(np.float64).reshape(len(w_RB), -1, codec.size if affine else 16)

    def stored(scale, most):  # what float16 and whole numbers make of a scale per sub-block
        d = (np.abs(scale).max(1, keepdims=True) / most).astype(np.float16).astype(np.float64)
        return d * np.rint(scale / d)

    if affine:
        low = np.minimum(w.min(2), 0)
        scale = stored((w.max(2) - low) / codec.top, codec.most)
        minimum = stored(-low, codec.most)
        codes = np.clip(np.rint((w + minimum[..., None]) / scale[..., None]), 0, codec.top)
        return (scale[..., None] * codes - minimum[..., None]).reshape(w_RB.shape)
    scale = stored(np.abs(w).max(2) / codec.top, codec.reach - 1)[..., None]
    return (scale * np.clip(np.rint(w / scale), codec.low, codec.top)).reshape(w_RB.shape)


@every_type
@pytest.mark.parametrize("kind", ["gaussian", "student_t3"])
def test_search_beats_nearest_rounding_in_every_row(codec, kind):
    w_RC = weights(kind)
    w_RB = w_RC.reshape(-1, 256)
    plain_R = ((w_RB.astype(np.float64) - nearest_rounding(codec, w_RB)) ** 2).reshape(len(w_RC), -1).sum(1)
    ours_R = ((w_RC.astype(np.float64) - ggml_decode(codec, codec.encode(w_RC))) ** 2).sum(1)
    assert (ours_R < plain_R).all()


@every_type
def test_importance_lowers_the_error_that_it_weighs(codec):
    w_RC, importance_C = weights("gaussian"), importance()
    with_it = error(codec, w_RC, codec.encode(w_RC, importance_C), importance_C)
    assert with_it < 0.97 * error(codec, w_RC, codec.encode(w_RC), importance_C)


@every_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_encode_is_fit_snap_pack_and_length_whatever_the_batch(codec, weighted):
    w_RC, importance_C = weights("student_t3", 9), importance() if weighted else None
    raw_RN = codec.encode(w_RC, importance_C)
    for chosen in (slice(0, 9), slice(3, 4)):  # full batches, and a lone row
        part = w_RC[chosen]
        tiled = None if importance_C is None else np.tile(importance_C.reshape(-1, 256), (len(part), 1))
        grid = codec.fit(part.reshape(-1, 256), tiled)
        packed = codec.pack(codec.snap(part.reshape(-1, 256), grid, WHOLE), grid)
        codec.restore_length(part.reshape(-1, 256), tiled, packed)
        np.testing.assert_array_equal(packed.reshape(len(part), -1), raw_RN[chosen])


@every_type
def test_one_importance_for_all_rows_is_that_importance_in_each(codec):
    w_RB, importance_B = weights("gaussian", 5).reshape(-1, 256), importance()[:256]
    for one, each in zip(codec.fit(w_RB, importance_B), codec.fit(w_RB, np.tile(importance_B, (20, 1))), strict=True):
        np.testing.assert_array_equal(one, each)


@every_type
def test_threads_and_repetition_change_nothing(codec):
    w_RC, importance_C = weights("gaussian", 40), importance()
    once = codec.encode(w_RC, importance_C)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda start: codec.encode(w_RC[start : start + 7], importance_C), range(0, 40, 7))
        np.testing.assert_array_equal(np.concatenate(list(parts)), once)


@every_type
def test_snap_takes_the_nearest_of_all_values_in_any_columns(codec):
    raw_RN = any_bytes(codec, 24)
    codes_RB, grid = codec.unpack(raw_RN)
    w_RB = (np.random.default_rng(8).standard_normal(codes_RB.shape) * 3).astype(np.float32)
    low, high = codes_RB.min(), codes_RB.max()
    options = np.stack(
        [codec.value(np.full_like(codes_RB, code), grid, WHOLE) for code in range(low, high + 1)]
    ).astype(np.float64)
    least_RB = np.abs(options - w_RB).min(0)
    for at in (WHOLE, slice(0, 1), slice(37, 38), slice(5, 99), slice(64, 128), slice(250, 256)):
        codes_RK = codec.snap(w_RB[:, at], grid, at)
        away = np.abs(codec.value(codes_RK, grid, at).astype(np.float64) - w_RB[:, at])
        np.testing.assert_allclose(away, least_RB[:, at], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(codes_RK, codec.snap(w_RB, grid, WHOLE)[:, at])


@every_type
def test_values_snap_to_themselves(codec):
    for raw_RN in (any_bytes(codec, 64), codec.encode(weights("student_t3", 8)).reshape(-1, codec.block_bytes)):
        codes_RB, grid = codec.unpack(raw_RN)
        value_RB = codec.value(codes_RB, grid, WHOLE)
        again = codec.value(codec.snap(value_RB, grid, WHOLE), grid, WHOLE)
        np.testing.assert_array_equal(again, value_RB)


ODD_ROWS = {
    "zero": np.zeros(256),
    "negative zero": -np.zeros(256),
    "constant": np.full(256, 0.37),
    "negative constant": np.full(256, -0.37),
    "one outlier": np.where(np.arange(256) == 100, 50.0, 0.01 * np.sin(np.arange(256))),
    "denormal": 1e-40 * np.cos(np.arange(256)),
    "tiny": 1e-7 * np.cos(np.arange(256)),
    "small": 1e-5 * np.cos(np.arange(256)),
    "huge": 1e30 * np.cos(np.arange(256)),
    "largest": 3.4e38 * np.sign(np.cos(np.arange(256))),
    "large": 1e5 * np.cos(np.arange(256)),
    "far from zero": -5 + 1e-3 * np.cos(np.arange(256)),
    "half zero": np.where(np.arange(256) < 128, 0.0, np.cos(np.arange(256))),
}


@every_type
@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_are_finite_and_never_worse_than_zeros(codec, name):
    w_RC = ODD_ROWS[name].astype(np.float32)[None]
    for importance_C in (None, importance()[:256], np.zeros(256, np.float32)):
        decoded = ggml_decode(codec, codec.encode(w_RC, importance_C)).astype(np.float64)
        assert np.isfinite(decoded).all()
        weight_C = np.ones(256) if importance_C is None or not importance_C.any() else importance_C
        exact = w_RC.astype(np.float64)
        remaining = (weight_C * (exact - decoded) ** 2).sum() / max(1e-300, (weight_C * exact**2).sum())
        assert remaining <= 1
        if name in {"constant", "negative constant", "far from zero"}:
            assert remaining < 1e-4
        if name in {"large", "small", "half zero"}:
            assert remaining < {2: 0.08, 3: 0.03}.get(int(codec.bits_per_weight), 0.01)
        if "zero" in name and name != "half zero" and name != "far from zero":
            assert not decoded.any()


@every_type
@settings(max_examples=60, deadline=None)
@given(
    w_RC=arrays(np.float32, (2, 256), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    importance_C=arrays(np.float32, 256, elements=st.floats(0, width=32, allow_infinity=False)),
)
def test_any_finite_input_gives_finite_output(codec, w_RC, importance_C):
    for given_importance in (None, importance_C):
        raw_RN = codec.encode(w_RC, given_importance)
        decoded = ggml_decode(codec, raw_RN)
        assert np.isfinite(decoded).all()
        np.testing.assert_array_equal(codec.decode(raw_RN), decoded)


@every_type
def test_importance_counts_only_in_proportion(codec):
    w_RC, importance_C = weights("gaussian", 6), importance()
    expected = codec.encode(w_RC, importance_C)
    for factor in (2.0**-60, 2.0**60):
        np.testing.assert_array_equal(codec.encode(w_RC, importance_C * np.float32(factor)), expected)
    np.testing.assert_array_equal(codec.encode(w_RC, np.zeros(COLUMNS, np.float32)), codec.encode(w_RC))


@every_type
def test_importance_out_of_range_does_no_harm(codec):
    w_RC, odd = weights("gaussian", 4), importance()
    odd[::7], odd[1::7], odd[2::7] = np.nan, np.inf, -1
    decoded = ggml_decode(codec, codec.encode(w_RC, odd))
    assert np.isfinite(decoded).all()
    assert ((w_RC - decoded) ** 2).sum() < 0.5 * (w_RC**2).sum()


@every_type
def test_columns_without_importance_do_not_disturb_the_others(codec):
    w_RC, importance_C = weights("gaussian", 16), importance()
    importance_C[::2] = 0
    ours = error(codec, w_RC, codec.encode(w_RC, importance_C), importance_C)
    assert ours < error(codec, w_RC, ggml_encode(codec, w_RC, importance_C), importance_C)


@every_type
def test_no_rows_no_bytes(codec):
    raw_RN = codec.encode(np.empty((0, 512), np.float32))
    assert raw_RN.shape == (0, 2 * codec.block_bytes)
    assert codec.decode(raw_RN).shape == (0, 512)


@every_type
def test_what_does_not_fit_is_refused(codec):
    with pytest.raises(UsageError, match=f"576 columns: {codec.name} needs a multiple of 256"):
        codec.encode(np.zeros((1, 576), np.float32))
    with pytest.raises(UsageError, match="importance of 256 columns"):
        codec.encode(np.zeros((1, 512), np.float32), np.ones(256, np.float32))
    grid = codec.fit(np.ones((1, 256), np.float32), None)
    with pytest.raises(UsageError, match="importance of 3 blocks"):
        codec.fit(np.ones((1, 256), np.float32), np.ones((3, 256), np.float32))
    with pytest.raises(UsageError, match="columns 0:4"):
        codec.snap(np.ones((1, 8), np.float32), grid, slice(0, 4))


def test_importing_the_codecs_does_not_load_numba():
    code = "import sys, dither.codecs.k_quants; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
