"""IQ4_NL and IQ4_XS against ggml's own C encoder and against exhaustive search in float64.

Legend: R rows, C columns, S sub-blocks of 32.
"""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import IQ4_NL, dequantize

from dither.codecs import codec

CODEBOOK = np.array(IQ4_NL.kvalues, np.float64)
COLUMNS = 1024
both = pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])


def weights(kind: str, rows: int = 24) -> np.ndarray:
    random = np.random.default_rng(3)
    w_RC = random.standard_normal((rows, COLUMNS))
    if kind == "student":
        w_RC = random.standard_t(3, w_RC.shape)
    if kind == "trained":  # low rank plus noise, rows and columns of unequal size, a few outliers
        w_RC += random.standard_normal((rows, 5)) @ random.standard_normal((5, COLUMNS))
        w_RC *= np.exp(0.4 * random.standard_normal(COLUMNS)) * np.exp(0.4 * random.standard_normal((rows, 1)))
        w_RC[random.random(w_RC.shape) < 2e-3] *= 6
    return (0.02 * w_RC).astype(np.float32)


def importance(spread: float) -> np.ndarray | None:
    if spread == 0:
        return None
    return np.random.default_rng(4).lognormal(0, spread, COLUMNS).astype(np.float32)


def error(name: str, w_RC: np.ndarray, raw_RN: np.ndarray, importance_C: np.ndarray | None) -> float:
    weight_C = np.ones(COLUMNS) if importance_C is None else importance_C
    decoded = dequantize(raw_RN, GGMLQuantizationType[name])
    return float((weight_C * (w_RC.astype(np.float64) - decoded) ** 2).sum())


def searched(name: str, w_RC: np.ndarray, importance_C: np.ndarray | None) -> np.ndarray:
    """Blocks of least weighted error that the search finds, before they get their length back."""
    c = codec(name)
    w_RB, whole = w_RC.reshape(-1, c.block), slice(0, c.block)
    grid = c.fit(w_RB, None if importance_C is None else np.tile(importance_C.reshape(-1, c.block), (len(w_RC), 1)))
    return c.pack(c.snap(w_RB, grid, whole), grid).reshape(len(w_RC), -1)


def exhaustive(w_S: np.ndarray, v_S: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Least Σ v·(w − s·q)² per sub-block over the given scales (…, K), all codes tried, in float64."""
    least = np.full(w_S.shape[:-1], np.inf)
    for k in range(scales.shape[-1]):
        grid = scales[..., k, None, None] * CODEBOOK
        rest = abs(w_S[..., None] - grid).min(axis=-1)
        least = np.minimum(least, (v_S * rest**2).sum(axis=-1))
    return least


@both
@pytest.mark.parametrize("kind", ["gaussian", "student", "trained"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_error_is_below_ggmls(name: str, kind: str, spread: float) -> None:
    w_RC, importance_C = weights(kind), importance(spread)
    raw = libgguf.quantize_rows_raw(int(GGMLQuantizationType[name]), w_RC, *w_RC.shape, importance_C)
    theirs = error(name, w_RC, np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1), importance_C)
    assert error(name, w_RC, codec(name).encode(w_RC, importance_C), importance_C) <= 0.96 * theirs


@both
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_blocks_are_as_long_as_their_weights(name: str, spread: float) -> None:
    """Along the weights, as the gguf package decodes; the search's own answer is some 0.5 % short."""
    w_RC, importance_C = weights("gaussian"), importance(spread)
    v_C = np.ones(COLUMNS) if importance_C is None else importance_C.astype(np.float64)

    def kept(raw_RN: np.ndarray) -> np.ndarray:
        parts = [(v_C * w_RC * of).reshape(-1, 256).sum(1) for of in (dequantize(raw_RN, kind), w_RC)]
        return parts[0] / parts[1]

    kind = GGMLQuantizationType[name]
    assert kept(searched(name, w_RC, importance_C)).mean() < 0.997
    restored = kept(codec(name).encode(w_RC, importance_C))
    assert abs(restored - 1).max() < 0.01
    assert abs(restored.mean() - 1) < 2e-4


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_nl_is_close_to_the_best_scale_there_is(spread: float) -> None:
    w_RC, importance_C = weights("student", rows=3), importance(spread)
    w_S = w_RC.astype(np.float64).reshape(-1, 32)
    v_S = np.tile(np.ones(COLUMNS) if importance_C is None else importance_C, 3).reshape(-1, 32)
    peak_S = abs(w_S).max(axis=1)
    positions = np.concatenate([np.linspace(70, 220, 600), -np.linspace(70, 220, 600)])
    least = exhaustive(w_S, v_S, peak_S[:, None] / positions).sum()
    assert error("IQ4_NL", w_RC, searched("IQ4_NL", w_RC, importance_C), importance_C) <= 1.015 * least


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_xs_takes_nearly_the_best_multiples_of_its_scale(spread: float) -> None:
    """Given the stored float16 scale, all 64 multiples of every sub-block are tried in float64."""
    w_RC, importance_C = weights("trained", rows=4), importance(spread)
    raw_RN = searched("IQ4_XS", w_RC, importance_C)
    scale_R = np.ascontiguousarray(raw_RN.reshape(-1, 136)[:, :2]).view(np.float16).astype(np.float64)
    w_RS = w_RC.astype(np.float64).reshape(-1, 8, 32)
    v_C = np.ones(COLUMNS) if importance_C is None else importance_C.astype(np.float64)
    v_RS = np.broadcast_to(v_C, w_RC.shape).reshape(w_RS.shape)
    least = exhaustive(w_RS, v_RS, scale_R[:, None] * np.arange(-32, 32)).sum()
    assert error("IQ4_XS", w_RC, raw_RN, importance_C) <= 1.02 * least


@both
def test_codes_are_nearest(name: str) -> None:
    c = codec(name)
    w_RB = weights("student")[:, : c.block]
    grid = c.fit(w_RB, None)
    whole = slice(0, c.block)
    chosen = c.value(c.snap(w_RB, grid, whole), grid, whole)
    scale_R = grid.scale_R[:, None].astype(np.float64)
    scale_RS = scale_R if name == "IQ4_NL" else scale_R * grid.multiple_RS
    scale_RB = np.repeat(scale_RS, 32, axis=1)
    least = abs(w_RB[:, :, None] - scale_RB[:, :, None] * CODEBOOK).min(axis=2)
    assert (abs(w_RB - chosen) <= least + 1e-4 * abs(scale_RB)).all()


@both
def test_decodes_any_stored_block(name: str) -> None:
    c = codec(name)
    raw_RN = np.random.default_rng(5).integers(0, 256, (300, c.block_bytes), dtype=np.uint8)
    raw_RN[:, 1] &= 0xBB  # keeps the float16's exponent below infinity's
    expected = dequantize(raw_RN, GGMLQuantizationType[name])
    np.testing.assert_array_equal(c.decode(raw_RN), expected)
    codes_RB, grid = c.unpack(raw_RN)
    np.testing.assert_array_equal(c.value(codes_RB, grid, slice(0, c.block)), expected)
    np.testing.assert_array_equal(c.pack(codes_RB, grid), raw_RN)


def test_small_weights_are_not_lost_to_a_coarse_float16() -> None:
    """A scale 32 times smaller than IQ4_NL's meets float16's end first; the multiples make up for it."""
    w_RC = weights("gaussian", rows=4) * np.float32(1e-3)
    raw_RN = codec("IQ4_XS").encode(w_RC)
    assert error("IQ4_XS", w_RC, raw_RN, None) <= 0.02 * float((w_RC.astype(np.float64) ** 2).sum())
