"""Every 16-bit pattern, against numpy and against the definition of bfloat16."""

from __future__ import annotations

import numpy as np

from dither.codecs.kernels.widen import widen_bf16, widen_f16

PATTERNS = np.arange(2**16, dtype=np.uint16)


def test_float16_as_numpy_has_it() -> None:
    out = np.empty(2**16, np.uint32)
    widen_f16(PATTERNS, out)
    with np.errstate(invalid="ignore"):
        expected = PATTERNS.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(out[number], expected.view(np.uint32)[number])
    assert np.isnan(out.view(np.float32)[~number]).all()


def test_bfloat16_is_the_upper_half() -> None:
    out = np.empty(2**16, np.uint32)
    widen_bf16(PATTERNS, out)
    assert np.array_equal(out.view(np.uint16).reshape(-1, 2)[:, 1], PATTERNS)
    assert not out.view(np.uint16).reshape(-1, 2)[:, 0].any()


def test_rows_of_a_map_need_not_be_aligned_or_writable() -> None:
    raw = np.frombuffer(b"\0" + PATTERNS.tobytes(), np.uint8)[1:].view("<u2")
    assert not raw.flags.writeable
    out, again = np.empty(2**16, np.uint32), np.empty(2**16, np.uint32)
    widen_f16(raw, out)
    widen_f16(PATTERNS, again)
    assert np.array_equal(out, again)
