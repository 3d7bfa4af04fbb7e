"""The pieces kernels are made of: half precision against numpy's, vector lanes against numpy arrays."""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels import simd
from dither.codecs.kernels.common import f16_to_f32, f32_to_f16, f32_to_f16_finite, round_even
from dither.codecs.kernels.k_stage import nearest_f16, round_between

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


@njit
def _to_f16(x, exact, finite):
    for i in range(x.size):
        exact[i], finite[i] = f32_to_f16(x[i]), f32_to_f16_finite(x[i])


@njit
def _to_f32(patterns, x):
    for i in range(x.size):
        x[i] = f16_to_f32(patterns[i])


def test_every_float16_becomes_its_float32():
    x = np.empty(1 << 16, np.float32)
    _to_f32(PATTERNS, x)
    expected = PATTERNS.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(x.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    np.testing.assert_array_equal(np.isnan(x), ~numbers)


def test_float32_rounds_to_float16_as_numpy_does():
    halves = np.sort(PATTERNS.view(np.float16)[np.isfinite(PATTERNS.view(np.float16))].astype(np.float32))
    ties = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [
            halves,
            ties,
            np.nextafter(ties, np.float32(9e9)),
            np.nextafter(ties, np.float32(-9e9)),
            bits[np.isfinite(bits)],
            np.float32([65504, 65519.996, 65520, 1e30, -1e30, 0.0, -0.0]),
        ]
    )
    exact, finite = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    _to_f16(x, exact, finite)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(exact, expected.view(np.uint16))
    limited = np.clip(x, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(finite, limited.view(np.uint16))


@njit
def _lanes(a, b, out):
    x, y = simd.load(a, 0), simd.load(b, 0)
    simd.store(out, 0, x + y)
    simd.store(out, 16, x - y)
    simd.store(out, 32, x * y)
    simd.store(out, 48, x / y)
    simd.store(out, 64, simd.smaller(x, y))
    simd.store(out, 80, simd.larger(x, y))
    simd.store(out, 96, simd.where(simd.less(x, y), x, simd.splat(7.0)))
    simd.store(out, 112, simd.magnitude(x))
    simd.store(out, 128, simd.fma(x, y, x))
    simd.store(out, 144, nearest_f16(x))
    simd.store(out, 160, round_between(x, simd.splat(-2.0), simd.splat(3.0)))


def test_lanes_compute_as_numpy_does():
    random = np.random.default_rng(1)
    for scale in (1.0, 1e-6, 3e4):
        a, b = (scale * random.standard_normal((2, 16))).astype(np.float32)
        out = np.empty(176, np.float32)
        _lanes(a, b, out)
        exact = [
            a + b,
            a - b,
            a * b,
            a / b,
            np.minimum(a, b),
            np.maximum(a, b),
            np.where(a < b, a, np.float32(7)),
            np.abs(a),
        ]
        np.testing.assert_array_equal(out[:128].reshape(8, 16), exact)
        np.testing.assert_allclose(out[128:144], a * b + a, rtol=1e-5, atol=1e-6 * scale**2)
        half = np.clip(a, -65504, 65504).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(out[144:160], np.where(half == 0, np.copysign(2.0**-24, a), half))
        np.testing.assert_array_equal(out[160:], np.clip(np.rint(a), -2, 3))


@njit
def _move(source, turned, unsigned, signed, back):
    simd.store_transposed(source, 3, 20, turned, 0)
    simd.store_bytes(unsigned, 0, simd.load(source, 0))
    simd.store_bytes(signed, 0, simd.splat(-8.0) - simd.load(source, 0))
    simd.store(back, 0, simd.load_bytes(unsigned, 0))
    simd.store(back, 16, simd.load_bytes(signed, 0))


def test_lanes_are_turned_and_narrowed():
    source = np.arange(400, dtype=np.float32)
    turned, back = np.empty(256, np.float32), np.empty(32, np.float32)
    unsigned, signed = np.empty(16, np.uint8), np.empty(16, np.int8)
    _move(source, turned, unsigned, signed, back)
    runs = np.stack([source[3 + 20 * r : 19 + 20 * r] for r in range(16)])
    np.testing.assert_array_equal(turned.reshape(16, 16), runs.T)
    np.testing.assert_array_equal(unsigned, np.arange(16))
    np.testing.assert_array_equal(signed, -8 - np.arange(16))
    np.testing.assert_array_equal(back, np.concatenate([unsigned, signed]))


@njit
def _round(x, out):
    for i in range(x.size):
        out[i] = round_even(x[i])


def test_ties_go_to_even():
    x = (np.arange(-2001, 2002) / 2).astype(np.float32)
    out = np.empty_like(x)
    _round(x, out)
    np.testing.assert_array_equal(out, np.rint(x))
