"""Integer codes against the formulas they replace, exhaustive search in float64, and bytes written out.

Legend: R rows, C columns, N blocks, B weights of a block.
"""

from __future__ import annotations

import numpy as np
import pytest
from split_util import joined

from dither.codecs import codec
from dither.codecs.base import as_stored
from dither.codecs.integers import Integers
from dither.errors import UsageError

ROWS, COLUMNS = 16, 1024
TYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
SYMMETRIC = ["int2-g64", "int3-g128", "int4-g32", "int4-g128", "int4-channel-bf16", "int8-channel-f32", "int8-g128"]
AFFINE = ["uint2-g64", "uint3-g32", "uint4-g128", "uint4-channel", "uint8-g64-bf16", "uint8-channel"]


def weights(kind: str, rows: int = ROWS) -> np.ndarray:
    random = np.random.default_rng(3)
    shape = (rows, COLUMNS)
    w_RC = random.standard_normal(shape) if kind == "gauss" else random.standard_t(3, shape)
    return (0.02 * (w_RC + (1.5 if kind == "shifted" else 0))).astype(np.float32)


def importance(spread: float) -> np.ndarray | None:
    return np.random.default_rng(4).lognormal(0, spread, COLUMNS).astype(np.float32) if spread else None


def parts(name: str) -> tuple[Integers, int, bool, str]:
    kind, _, *more = name.split("-")
    c = codec(name, COLUMNS)
    assert isinstance(c, Integers)
    return c, int(kind[-1]), kind[0] == "u", TYPES[more[0] if more else "f16"]


def stored(scale: np.ndarray, kind: str) -> np.ndarray:
    nearest = as_stored(scale.astype(np.float32), kind).astype(np.float64)
    return np.where(nearest == 0, 2.0**-24, nearest)  # float16's smallest


def rounded(w_NB: np.ndarray, scale: np.ndarray, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
    """The nearest of the numbers scale · (low … high)."""
    return np.clip(np.rint(w_NB / scale), low, high) * scale


def plain(w_NB: np.ndarray, bits: int, affine: bool, kind: str) -> list[np.ndarray]:
    """What peers' formulas make of the blocks, under scales of the stored type."""
    half, most = 2 ** (bits - 1), 2**bits - 1
    if affine:  # from the least weight to the greatest, widened to hold zero
        low = np.minimum(w_NB.min(axis=1, keepdims=True), 0)
        high = np.maximum(w_NB.max(axis=1, keepdims=True), 0)
        scale = stored((high - low) / most, kind)
        zero = np.clip(np.rint(-low / scale), 0, most)
        return [rounded(w_NB, scale, -zero, most - zero)]
    peak = np.take_along_axis(w_NB, np.abs(w_NB).argmax(axis=1)[:, None], axis=1)
    if bits == 8:
        return [rounded(w_NB, stored(abs(peak) / 127, kind), -127, 127)]
    scales = abs(peak) / (half - 1), abs(peak) / half, -peak / half
    return [rounded(w_NB, stored(scale, kind), -half, half - 1) for scale in scales]


@pytest.mark.parametrize("kind", ["gauss", "student", "shifted"])
@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize("size", [3e-6, 1.0, 1e4])
@pytest.mark.parametrize("name", [*SYMMETRIC, *AFFINE])
def test_no_block_is_worse_than_under_a_plain_formula(name: str, kind: str, spread: float, size: float) -> None:
    c, bits, affine, kind_of_scale = parts(name)
    w_RC = weights(kind) * np.float32(size)
    found_RC = c.decode(c.encode(w_RC, importance(spread)))
    weight_C = np.ones(COLUMNS) if spread == 0 else importance(spread)
    w_NB = w_RC.astype(np.float64).reshape(-1, c.block)
    weight_NB = np.broadcast_to(weight_C, w_RC.shape).reshape(w_NB.shape)
    found_N = (weight_NB * (w_NB - found_RC.reshape(w_NB.shape)) ** 2).sum(axis=1)
    for plain_NB in plain(w_NB, bits, affine, kind_of_scale):
        plain_N = (weight_NB * (w_NB - plain_NB) ** 2).sum(axis=1)
        assert (found_N <= plain_N * (1 + 1e-4)).all()
        if bits < 8 and size == 1 and kind == "student":
            assert found_N.sum() < 0.95 * plain_N.sum()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("name", ["int2-g64", "int3-g64", "int4-g64", "uint2-g64", "uint3-g64", "uint4-g64"])
def test_hardly_any_scale_or_zero_point_would_have_been_better(name: str, spread: float) -> None:
    """Six hundred scales of either sign, and every zero point."""
    c, bits, affine, _ = parts(name)
    w_RC, importance_C = weights("student", 3), importance(spread)
    w_NB = w_RC.astype(np.float64).reshape(-1, c.block)
    weight_C = np.ones(COLUMNS) if importance_C is None else importance_C
    weight_NB = np.broadcast_to(weight_C, w_RC.shape).reshape(w_NB.shape)
    peak_N1 = np.abs(w_NB).max(axis=1, keepdims=True)
    most, least_N = 2**bits - 1, np.full(len(w_NB), np.inf)
    for factor in np.geomspace(0.3, 3, 300):
        for sign in (1,) if affine else (1, -1):
            scale_N1 = stored(sign * factor * peak_N1 / 2 ** (bits - 1), "float16")
            for zero in range(most + 1) if affine else (2 ** (bits - 1),):
                rest_NB = w_NB - rounded(w_NB, scale_N1, -zero, most - zero)
                least_N = np.minimum(least_N, (weight_NB * rest_NB**2).sum(axis=1))
    rest_NB = w_NB - c.decode(c.encode(w_RC, importance_C)).reshape(w_NB.shape)
    assert (weight_NB * rest_NB**2).sum() <= 1.01 * least_N.sum()


def test_bytes_of_a_symmetric_block() -> None:
    """Weights that are whole steps of ½: scale, then nibbles with the even column low."""
    steps = np.tile(np.array([-8, 7, 0, 1, -1, 3, -4, 5]), 4)
    raw_RN = codec("int4-g32").encode((steps * 0.5).astype(np.float32)[None])
    expected = bytes.fromhex("0038") + bytes.fromhex("f0 98 b7 d4".replace(" ", "")) * 4
    assert raw_RN.tobytes() == expected


def test_bytes_of_an_affine_block() -> None:
    """Three bits straddle bytes; −2 … 5 steps of ¼ make 2 the zero point."""
    steps = np.tile(np.arange(-2, 6), 4)
    raw_RN = codec("uint3-g32-f32").encode((steps * 0.25).astype(np.float32)[None])
    stream = sum(code << 3 * j for j, code in enumerate(range(8)))
    assert raw_RN.tobytes() == np.float32(0.25).tobytes() + b"\x02" + stream.to_bytes(3, "little") * 4


@pytest.mark.parametrize("name", [*SYMMETRIC, *AFFINE])
def test_split_gives_what_the_formula_needs(name: str) -> None:
    c, bits, affine, _ = parts(name)
    raw_RN = c.encode(weights("student"), importance(1.0))
    codes_RC, scale_RG, zero_RG = c.split(raw_RN)
    assert (codes_RC.dtype, scale_RG.dtype, zero_RG.dtype) == (np.uint8, np.float32, np.uint8)
    assert codes_RC.shape == (ROWS, COLUMNS)
    assert scale_RG.shape == zero_RG.shape == (ROWS, COLUMNS // c.block)
    assert max(codes_RC.max(), zero_RG.max()) < 2**bits
    if not affine:
        assert (zero_RG == 2 ** (bits - 1)).all()
    scale_RC, zero_RC = (np.repeat(part, c.block, axis=1) for part in (scale_RG, zero_RG))
    value_RC = scale_RC * (codes_RC.astype(np.float32) - zero_RC.astype(np.float32))
    np.testing.assert_array_equal(value_RC, c.decode(raw_RN))
    np.testing.assert_array_equal(joined(c, codes_RC, scale_RG, zero_RG), raw_RN)


@pytest.mark.parametrize("name", ["int8-channel", "int8-g64-bf16"])
def test_eight_bits_around_zero_leave_out_the_lowest_code_and_read_it(name: str) -> None:
    c, *_ = parts(name)
    raw_RN = c.encode(weights("shifted") * np.array([[1], [-1]] * 8, np.float32))
    codes_RC, scale_RG, zero_RG = c.split(raw_RN)
    assert codes_RC.min() >= 1 and codes_RC.max() == 255
    assert (scale_RG > 0).all()
    codes_RC[:] = 0
    value_RC = c.decode(joined(c, codes_RC, scale_RG, zero_RG))
    np.testing.assert_array_equal(value_RC, -128 * np.repeat(scale_RG, c.block, axis=1))


@pytest.mark.parametrize("name", ["int4-g128", "uint4-g128", "int3-g64-bf16", "uint2-channel-f32"])
def test_zero_blocks_are_exact_and_have_a_scale_to_divide_by(name: str) -> None:
    c, *_ = parts(name)
    raw_RN = c.encode(np.array([[0.0], [-0.0]], np.float32).repeat(COLUMNS, axis=1))
    _, scale_RG, _ = c.split(raw_RN)
    assert (scale_RG == 1).all()
    assert not c.decode(raw_RN).any()


@pytest.mark.parametrize("name", ["int4-g128", "uint4-g128", "int2-g64"])
def test_scales_below_the_smallest_normal_float16_keep_what_they_can(name: str) -> None:
    """Weights of 1.2e-7 are two steps of float16's smallest scale: its subnormals hold them."""
    c, *_ = parts(name)
    w_RC = np.full((2, COLUMNS), 2.0**-23, np.float32)
    w_RC[:, ::2] = 0
    _, scale_RG, _ = c.split(c.encode(w_RC))
    assert (scale_RG != 0).all()
    np.testing.assert_array_equal(c.decode(c.encode(w_RC)), w_RC)


def test_groups_that_are_none() -> None:
    for name in ("int4-g48", "uint4-g16", "int4-g8192"):
        with pytest.raises(UsageError, match=r"has groups of \d+.*Choose one of 32"):
            codec(name)
    with pytest.raises(UsageError, match=r"multiple of 128.*such as uint3-g32"):
        codec("uint3-g128").encode(np.zeros((1, 64), np.float32))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_scales_are_rounded_as_torch_rounds(kind: str) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    x = (random.standard_normal(20000) * 10.0 ** random.integers(-44, 38, 20000)).astype(np.float32)
    limit = torch.finfo(getattr(torch, kind)).max
    wanted = torch.from_numpy(x).clamp(-limit, limit).to(getattr(torch, kind)).float().numpy()
    np.testing.assert_array_equal(as_stored(x, kind), wanted)
