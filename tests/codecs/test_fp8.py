"""E4M3 against torch's cast, bit for bit, and tiles of scales against the formula that reads them.

Legend: R rows, C columns, G scales of a row, N bytes of a packed row.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_reference import e4m3
from split_util import joined

from dither.codecs import codec
from dither.codecs.fp8 import NUMBERS, FloatRows, FloatTensor, FloatTiles, to_e4m3
from dither.errors import UsageError

torch = pytest.importorskip("torch")


def weights(rows: int = 24, columns: int = 256, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.uniform(-4, 1, (rows, 1))
    return (sizes * random.standard_t(4, (rows, columns))).astype(np.float32)


def cast(x: np.ndarray) -> np.ndarray:
    """torch's patterns, saturated first."""
    limited = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448, 448)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_every_float16_rounds_as_torch_casts() -> None:
    x = np.arange(65536).astype(np.uint16).view(np.float16).astype(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(to_e4m3(x), cast(x))


def test_float32s_and_ties_round_as_torch_casts() -> None:
    random = np.random.default_rng(0)
    numbers = np.sort(e4m3()[:127])
    ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    any_size = random.standard_normal(200_000) * 10.0 ** random.uniform(-12, 38, 200_000)
    with np.errstate(over="ignore"):
        x = np.concatenate([near, -near, any_size.astype(np.float32), [np.float32(1e-45), np.float32(-0.0)]])
    np.testing.assert_array_equal(to_e4m3(x.astype(np.float32)), cast(x.astype(np.float32)))


def test_patterns_stand_for_torchs_numbers() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(NUMBERS, theirs)
    np.testing.assert_array_equal(e4m3().astype(np.float32), theirs)


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-channel-bf16"])
def test_rows_are_no_worse_than_with_the_largest_weight_at_448(name: str) -> None:
    c, w_RC = codec(name, 256), weights()
    assert isinstance(c, FloatRows)
    raw_RN = c.encode(w_RC)
    patterns_RC, scale_RG = c.split(raw_RN)
    assert patterns_RC.shape == w_RC.shape and scale_RG.shape == (len(w_RC), 1)
    np.testing.assert_array_equal(patterns_RC, cast(w_RC / scale_RG))
    np.testing.assert_array_equal(c.decode(raw_RN), NUMBERS[patterns_RC] * scale_RG)
    np.testing.assert_array_equal(joined(c, patterns_RC, scale_RG), raw_RN)
    plain = torch.from_numpy(np.abs(w_RC).max(axis=1, keepdims=True) / np.float32(448))
    if "bf16" in name:
        plain = plain.bfloat16().float()
        np.testing.assert_array_equal(torch.from_numpy(scale_RG).bfloat16().float().numpy(), scale_RG)
    plain_RC = NUMBERS[cast(w_RC / plain.numpy())] * plain.numpy()
    found_R, plain_R = (np.square(w_RC.astype(np.float64) - v).sum(axis=1) for v in (c.decode(raw_RN), plain_RC))
    assert (found_R <= plain_R * (1 + 1e-5)).all()
    assert found_R.sum() < 0.99 * plain_R.sum()


@pytest.mark.parametrize("exponent", [-117, -3, 0, 8, 117])
@pytest.mark.parametrize("columns", [0, 256])
def test_a_tensors_scale_is_in_its_name(exponent: int, columns: int) -> None:
    c, w_RC = codec(f"fp8-e{exponent}", columns), np.ldexp(weights(), -exponent)
    assert isinstance(c, FloatTensor)
    raw_RN = c.encode(w_RC)
    np.testing.assert_array_equal(raw_RN, cast(weights()))
    np.testing.assert_array_equal(c.decode(raw_RN), np.ldexp(NUMBERS[raw_RN], -exponent))
    assert np.isfinite(c.decode(to_e4m3(np.full((1, 256), 448, np.float32)))).all()
    patterns_RC, scale_RG = c.split(raw_RN)
    np.testing.assert_array_equal(NUMBERS[patterns_RC] * scale_RG, c.decode(raw_RN))
    np.testing.assert_array_equal(patterns_RC, raw_RN)
    assert c.bits_per_weight == 8


@pytest.mark.parametrize("name", ["fp8-e118", "fp8-e-118", "fp8-e-0"])
def test_exponents_beyond_float32_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="exponent"):
        codec(name)


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (300, 384), (128, 200), (130, 72), (1, 1)])
@pytest.mark.parametrize("weighed", [False, True])
def test_tiles_share_one_scale(rows: int, columns: int, weighed: bool) -> None:
    """Read back as DeepSeek's `weight_dequant` does: each number times the scale of its tile."""
    c, w_RC = codec("fp8-128x128", columns), weights(rows, columns)
    assert isinstance(c, FloatTiles) and c.rows_together == 128
    importance_C = np.random.default_rng(1).lognormal(0, 1, columns).astype(np.float32) if weighed else None
    raw_RN = c.encode(w_RC, importance_C)
    assert raw_RN.shape == (rows, columns // c.block * c.block_bytes)
    patterns_RC, scale_RG = c.split(raw_RN)
    tall, wide = -(-rows // 128), -(-columns // 128)
    assert scale_RG.shape == (rows, wide)
    scale_TT = scale_RG[::128]
    np.testing.assert_array_equal(scale_RG, np.repeat(scale_TT, 128, axis=0)[:rows])
    spread_RC = np.kron(scale_TT, np.ones((128, 128), np.float32))[:rows, :columns]
    np.testing.assert_array_equal(c.decode(raw_RN), NUMBERS[patterns_RC] * spread_RC)
    np.testing.assert_array_equal(patterns_RC, cast(w_RC / spread_RC))
    assert c.decode(raw_RN[:0]).shape == (0, columns)
    np.testing.assert_array_equal(joined(c, patterns_RC, scale_RG), raw_RN)
    for i in range(tall):
        for j in range(wide):
            largest = np.abs(w_RC[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]).max()
            assert largest / 448 * 0.9999 <= scale_TT[i, j] <= largest / 240 * 1.0001


def test_tiles_in_chunks_of_whole_tiles_are_those_of_all_rows() -> None:
    c, w_RC = codec("fp8-128x128"), weights(400, 256)
    parts = [c.encode(w_RC[start : start + 128]) for start in range(0, 400, 128)]
    np.testing.assert_array_equal(np.concatenate(parts), c.encode(w_RC))
    assert c.bits_per_weight == 8 + 32 / 128**2
    assert codec("fp8-128x128", 384) is not None and codec("fp8-128x128", 384).block == 128
    assert not c.decode(c.encode(np.zeros((130, 128), np.float32))).any()
