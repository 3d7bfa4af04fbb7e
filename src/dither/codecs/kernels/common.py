"""Half precision and rounding, for use inside numba kernels.

Every block format stores its scales as IEEE 754 binary16, which numba does not know on the CPU, so both
directions are spelled out here on the bit patterns.  They agree with numpy's float16 on every bit of every
finite number (tests/codecs/test_kernel_basics.py walks all of them) and need no hardware support.

Nothing here is compiled with fast-math: rounding must not be optimized away, and what a kernel stores has
to be what a decoder reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

F16_MAX = np.float32(65504.0)
F16_TINY = np.float32(2.0**-24)  # the smallest positive float16

# Adding 1.5·2²³ to a float32 leaves no room for a fraction: hardware rounds to nearest, ties to even.
ROUND_MAGIC = np.float32(12582912.0)


# For functions that only kernels call: no way in from Python or C, which would be compiled for each.
_INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(**_INNER)
# For those whose very sense is how sums round: they do not take over the fast-math of whoever calls them
# first, which numba would otherwise compile into them for all.
exact = njit(fastmath=False, **_INNER)


def _bitcast(source, target):
    """An intrinsic that reads the same 32 bits as another type."""

    @intrinsic
    def cast(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


float_bits = _bitcast(types.float32, types.uint32)  # float32 → uint32
bits_float = _bitcast(types.uint32, types.float32)  # uint32 → float32


@inner
def f32_to_f16(x):
    """The uint16 pattern of the float16 nearest to float32 `x`, ties to even; 65520 and more is infinity."""
    bits = float_bits(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(0x47800000):  # 65536 and above, infinity, NaN
        nan = size > np.uint32(0x7F800000)
        return np.uint16(sign | (np.uint32(0x7E00) if nan else np.uint32(0x7C00)))
    if size < np.uint32(0x38800000):  # below 2⁻¹⁴: 0.5 has a last place of 2⁻²⁴, float16's own there
        rounded = float_bits(bits_float(size) + np.float32(0.5))
        return np.uint16(sign | (rounded - np.uint32(0x3F000000)))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    rounded = size + np.uint32(0xFFF) + odd - np.uint32(112 << 23)  # 127 − 15 exponents apart
    return np.uint16(sign | (rounded >> np.uint32(13)))


@inner
def f32_to_f16_finite(x):
    """As `f32_to_f16`, but what does not fit becomes ±65504: a stored scale must never be infinite."""
    if x > F16_MAX:
        return np.uint16(0x7BFF)
    if x < -F16_MAX:
        return np.uint16(0xFBFF)
    return f32_to_f16(x)


@inner
def f16_to_f32(pattern):
    """The float32 with the value of a float16 given as its uint16 pattern; exact."""
    half = np.uint32(pattern)
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    size = half & np.uint32(0x7FFF)
    if size >= np.uint32(0x7C00):  # infinity, NaN
        magnitude = np.uint32(0x7F800000) | ((size & np.uint32(0x3FF)) << np.uint32(13))
    elif size < np.uint32(0x400):  # subnormal: a whole number of 2⁻²⁴
        magnitude = float_bits(np.float32(size) * F16_TINY)
    else:
        magnitude = (size << np.uint32(13)) + np.uint32(112 << 23)
    return bits_float(sign | magnitude)


@inner
def load_f16(raw, at):
    """The float32 value of the little-endian float16 in bytes `at` and `at + 1`."""
    return f16_to_f32(np.uint16(raw[at]) | (np.uint16(raw[at + 1]) << np.uint16(8)))


@inner
def store_f16(raw, at, pattern):
    """Write a float16 pattern as two little-endian bytes."""
    raw[at] = np.uint8(pattern & np.uint16(0xFF))
    raw[at + 1] = np.uint8(pattern >> np.uint16(8))


@exact
def round_even(x):
    """Nearest integer as float32, ties to even; exact for |x| < 2²², which callers ensure by clamping."""
    return (x + ROUND_MAGIC) - ROUND_MAGIC
