"""The levels of a block are all numbers it may take: by its bytes, its codec, or from numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
from showing_util import NAME, Counted, model, stored_as

from dither.codecs import codec
from dither.errors import UsageError
from dither.reporting.palette import iq4_nl, nearest, nf4, palette, uniform
from dither.types import Tensor

SOURCE = Counted(8, 512)
# Of the lattices one: the tables of the others take ggml ten seconds.
GROUPED = [
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
    "Q3_K", "Q2_K", "TQ2_0", "TQ1_0", "IQ3_XXS",
]  # fmt: skip


def opened(tensor: Tensor, row: int = 3, block: int = 1, source: Counted = SOURCE):  # type: ignore[no-untyped-def]
    return palette(model(source.tensor()), model(tensor), NAME, row, block)


def test_the_levels_of_q4_0_are_read_off_its_bytes() -> None:
    tensor = stored_as("Q4_0", SOURCE)
    assert tensor.read_raw is not None
    raw = tensor.read_raw(3, 4)[0, 18:36]  # the second block: float16 d, then nibbles
    scale = float(raw[:2].view("<f2")[0])
    codes = np.concatenate([raw[2:] & 15, raw[2:] >> 4])
    found = opened(tensor)
    np.testing.assert_allclose(sorted(scale * (np.arange(16) - 8)), found.levels, rtol=1e-6)
    counts = np.bincount(codes, minlength=16)
    assert list(found.used) == (counts if scale > 0 else counts[::-1]).tolist()
    np.testing.assert_array_equal(found.values, SOURCE.read(3, 4)[0, 32:64])
    assert (found.block, found.blocks, found.rows, found.how) == (32, 16, 8, "stored")


@pytest.mark.parametrize("kind", GROUPED)
def test_every_stored_number_is_a_level(kind: str) -> None:
    tensor = stored_as(kind, SOURCE, importance=codec(kind).needs_importance)
    found = opened(tensor, block=2)
    levels = np.array(found.levels)
    stored = tensor.read(3, 4)[0, 2 * found.block : 3 * found.block]
    assert np.isin(stored, levels.astype(np.float32)).all()
    assert sum(found.used) == found.block and (np.diff(levels) > 0).all()
    bits = int("".join(c for c in kind if c.isdigit())[:1])
    if found.how == "stored" and kind not in ("NVFP4", "MXFP4", "TQ2_0", "TQ1_0"):
        assert len(levels) in (2**bits, 2**bits - 1)


@pytest.mark.parametrize("kind", ["int4-g128", "int8-g128", "nf4-g64", "fp4-g64", "fp8-channel", "MXFP4"])
def test_scales_are_found_again_from_numbers_alone(kind: str) -> None:
    packed, stored = (opened(stored_as(kind, SOURCE, raw=raw), block=0) for raw in (False, True))
    assert (packed.how, stored.how) == ("deduced", "stored")
    np.testing.assert_allclose(packed.levels, stored.levels, rtol=2e-3)
    assert packed.used == stored.used


def test_zero_points_leave_a_window_of_sixteen() -> None:
    found = opened(stored_as("uint4-g128", SOURCE, raw=False), block=0)
    steps = np.diff(found.levels)
    assert (len(found.levels), found.how) == (16, "deduced")
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    assert found.levels[0] <= 0 <= found.levels[-1]


def test_numbers_that_no_scale_explains_are_shown_as_they_occur() -> None:
    noise = SOURCE.tensor(stored="int4-g128")
    found = opened(noise, block=0)
    assert found.how == "occurring"
    assert set(np.float32(found.values)) <= set(np.float32(found.levels))


def test_the_grids_beside_it_are_those_of_the_codecs() -> None:
    values = SOURCE.read(0, 1)[0, :64]
    np.testing.assert_allclose(uniform(values), np.min(values) + np.arange(16) * np.ptp(values) / 15, atol=1e-7)
    by_codec = codec("nf4-g64").decode(codec("nf4-g64").encode(values[None]))[0]
    np.testing.assert_allclose(nf4(values)[nearest(values, nf4(values))], by_codec, rtol=1e-5)
    part = values[:32]
    own = part - iq4_nl(part)[nearest(part, iq4_nl(part))]
    theirs = part - codec("IQ4_NL").decode(codec("IQ4_NL").encode(part[None]))[0]
    assert np.square(own).sum() <= 1.02 * np.square(theirs).sum()


def test_a_block_of_zeros_has_one_level() -> None:
    zeros = Counted(2, 64, scale_C=np.zeros(64, np.float32))
    for raw in (True, False):
        found = opened(stored_as("Q4_0", zeros, raw=raw), 0, 0, zeros)
        assert (found.levels, found.used) == ([0.0], [32])


def test_blocks_stay_inside_and_long_ones_are_cut() -> None:
    wide = Counted(2, 4096)
    found = opened(stored_as("int8-channel", wide), 10**9, 10**9, wide)
    assert (found.row, found.index, found.blocks, found.block) == (1, 0, 1, 1024)
    assert len(found.to_json()["values"]) == 1024


def test_floats_have_no_palette() -> None:
    with pytest.raises(UsageError, match="no palette"):
        opened(SOURCE.tensor(stored="BF16"))
