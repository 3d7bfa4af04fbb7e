"""16-bit floats to float32, on vector lanes.

numpy converts float16 one number at a time, which would take a visible share of quantizing a half-precision
checkpoint.  bfloat16 is a float32's upper half.  A float16's exponent and mantissa, moved to where float32
has them, are the right number but for the exponent's bias, 112 apart: a product with 2¹¹² mends that, exactly
and for subnormal numbers as well; infinity and NaN get their exponent back by hand.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dither.codecs.kernels.common import bits_float, float_bits

_BIAS = np.float32(2.0**112)


@njit(cache=True, nogil=True)
def widen_bf16(raw, out):
    """uint16 patterns of bfloat16 to uint32 patterns of float32."""
    for i in range(raw.size):
        out[i] = np.uint32(raw[i]) << np.uint32(16)


@njit(cache=True, nogil=True)
def widen_f16(raw, out):
    """uint16 patterns of float16 to uint32 patterns of float32."""
    for i in range(raw.size):
        half = np.uint32(raw[i])
        size = float_bits(bits_float((half & np.uint32(0x7FFF)) << np.uint32(13)) * _BIAS)
        endless = np.uint32(0x7F800000) if half & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
        out[i] = size | endless | (half & np.uint32(0x8000)) << np.uint32(16)
