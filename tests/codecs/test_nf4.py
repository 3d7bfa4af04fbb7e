"""NF4 and FP4 against bitsandbytes, where it is installed, and against its rule written out in float64.

Legend: R rows, C columns, N blocks, K borders or numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_reference import FP4_SIZES, NF4
from split_util import joined

from dither.codecs import codec
from dither.codecs.nf4 import Numbers

COLUMNS = 512
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.float32([*FP4_SIZES, *(-x for x in FP4_SIZES)])}
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def of(name: str) -> Numbers:
    found = codec(name)
    assert isinstance(found, Numbers)
    return found


def weights(kind: str, rows: int = 48) -> np.ndarray:
    """Weights, some as float16, with borders between numbers, zeros, and the ends of float32 among them."""
    random = np.random.default_rng(0)
    w_RC = (0.02 * random.standard_t(4, (rows, COLUMNS))).astype(np.float32)
    w_RC[:8] = w_RC[:8].astype(np.float16)
    table_K = np.unique(TABLES[kind])
    borders_K = (table_K[:-1] + table_K[1:]) / np.float32(2)
    for row, size in enumerate((1.0, 0.5, 0.7, 3e-3)):
        w_RC[8 + row] = np.resize(np.concatenate([borders_K, [1.0], table_K]), COLUMNS) * np.float32(size)
    w_RC[12], w_RC[13] = 0, -0.0
    w_RC[14] *= np.float32(1e-37)
    w_RC[15] *= np.float32(1e30)
    w_RC[16, ::2] *= np.float32(1e-39)
    w_RC[17] = np.float32(1e-45)
    return w_RC


@kinds
@pytest.mark.parametrize("group", [64, 128, 512])
def test_codes_and_scales_are_bitsandbytes(kind: str, group: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch = pytest.importorskip("torch")
    w_RC, c = weights(kind), of(f"{kind}-g{group}")
    packed, state = functional.quantize_4bit(torch.from_numpy(w_RC), blocksize=group, quant_type=kind)
    packed_N = packed.numpy().reshape(-1)
    raw_RN = c.encode(w_RC)
    codes_RC, absmax_RG = c.split(raw_RN)
    np.testing.assert_array_equal(codes_RC.reshape(-1), np.stack([packed_N >> 4, packed_N & 15], 1).reshape(-1))
    np.testing.assert_array_equal(absmax_RG.reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(c.table, state.code.numpy())
    decoded = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(c.decode(raw_RN), decoded)


@kinds
def test_codes_are_the_nearest_numbers_and_the_lower_on_a_border(kind: str) -> None:
    """bitsandbytes' rule: w · (1 / largest), and as many numbers as have their border below that."""
    w_RC, c = weights(kind), of(f"{kind}-g64")
    codes_RC, absmax_RG = c.split(c.encode(w_RC))
    w_NB = w_RC.reshape(-1, 64)
    absmax_N = np.abs(w_NB).max(axis=1)
    np.testing.assert_array_equal(absmax_RG.reshape(-1), absmax_N)
    position_NB = w_NB * (np.float32(1) / np.maximum(absmax_N, np.float32(1e-38)))[:, None]
    order_K = np.argsort(TABLES[kind], kind="stable")
    rising_K = TABLES[kind][order_K]
    border_K = (rising_K[1:] + rising_K[:-1]) / np.float32(2)
    expected = order_K[(position_NB[:, :, None] > border_K).sum(axis=2)]
    np.testing.assert_array_equal(codes_RC.reshape(-1, 64), expected)


@kinds
def test_zero_is_zero(kind: str) -> None:
    w_RC = np.zeros((2, COLUMNS), np.float32)
    codes_RC, absmax_RG = of(f"{kind}-g64").split(of(f"{kind}-g64").encode(w_RC))
    assert not absmax_RG.any()
    assert (codes_RC == (7 if kind == "nf4" else 0)).all()


@kinds
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_searched_scale_is_never_worse(kind: str, spread: float) -> None:
    c, w_RC = of(f"{kind}-g64"), weights(kind)
    w_RC[15] *= np.float32(1e-25)
    importance_C = np.random.default_rng(1).lognormal(0, spread, COLUMNS).astype(np.float32)

    def errors(raw_RN: np.ndarray) -> np.ndarray:
        weighed = importance_C * (w_RC.astype(np.float64) - c.decode(raw_RN)) ** 2
        return weighed.reshape(-1, 64).sum(axis=1)

    searched_N, plain_N = errors(c.encode(w_RC, importance_C)), errors(c.encode(w_RC))
    assert (searched_N <= plain_N * (1 + 1e-5)).all()
    usual = slice(18 * COLUMNS // 64, None)
    assert searched_N[usual].sum() < 0.95 * plain_N[usual].sum()
    assert (c.split(c.encode(w_RC, importance_C))[1] >= 0).all()


@kinds
def test_hardly_any_scale_would_have_been_better(kind: str) -> None:
    c, w_RC = of(f"{kind}-g64"), weights(kind)[20:24]
    w_NB = w_RC.astype(np.float64).reshape(-1, 64)
    least_N = np.full(len(w_NB), np.inf)
    for factor in np.linspace(0.4, 1.3, 400):
        scale_N1 = factor * np.abs(w_NB).max(axis=1, keepdims=True)
        rest = np.abs(w_NB[:, :, None] - scale_N1[:, :, None] * TABLES[kind]).min(axis=2)
        least_N = np.minimum(least_N, np.square(rest).sum(axis=1))
    found_RC = c.decode(c.encode(w_RC, np.ones(COLUMNS, np.float32)))
    assert np.square(w_RC - found_RC).sum() <= 1.01 * least_N.sum()


@kinds
def test_nesting_is_counted_and_left_to_the_container(kind: str) -> None:
    w_RC, plain, nested = weights(kind), of(f"{kind}-g64"), of(f"{kind}-g64-dq")
    assert plain.bits_per_weight == 4.5
    assert nested.bits_per_weight == 4 + 8 / 64 + 32 / 256 / 64
    np.testing.assert_array_equal(nested.encode(w_RC), plain.encode(w_RC))


@kinds
def test_joined_inverts_split(kind: str) -> None:
    c = of(f"{kind}-g128")
    raw_RN = np.random.default_rng(2).integers(0, 256, (9, COLUMNS // 128 * c.block_bytes), dtype=np.uint8)
    codes_RC, absmax_RG = c.split(raw_RN)
    assert codes_RC.shape == (9, COLUMNS) and absmax_RG.shape == (9, COLUMNS // 128)
    np.testing.assert_array_equal(joined(c, codes_RC, absmax_RG), raw_RN)
