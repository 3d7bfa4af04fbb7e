"""What must hold for every codec: those listed, found by iterating the folder, and some of each family.

The independent reference is the `gguf` package's decoder, and for the families `gpu_reference`.
Legend: R rows, C columns, B weights of a block, N bytes of a packed row.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gpu_reference import decoded

from dither.codecs import all_codecs, codec, split_codec
from dither.codecs.base import BlockCodec
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.types import Codec

ROWS, COLUMNS = 6, 512
LISTED = all_codecs()
# Names of families, and the bits per weight of what files store of them.
PARSED = {
    "int2-g64": 2 + 16 / 64,
    "int3-g32": 3 + 16 / 32,
    "int4-g128": 4 + 16 / 128,
    "int4-g32-bf16": 4 + 16 / 32,
    "int4-channel": 4 + 16 / 512,
    "int8-channel-f32": 8 + 32 / 512,
    "int8-g128-bf16": 8 + 16 / 128,
    "uint2-g32": 2 + 18 / 32,
    "uint3-g128-f32": 3 + 35 / 128,
    "uint4-g128": 4 + 20 / 128,
    "uint4-channel-bf16": 4 + 20 / 512,
    "uint8-g64": 8 + 24 / 64,
    "nf4-g64": 4 + 32 / 64,
    "fp4-g128": 4 + 32 / 128,
    "nf4-g64-dq": 4 + 8 / 64 + 32 / 256 / 64,
    "fp4-g32-dq": 4 + 8 / 32 + 32 / 256 / 32,
    "fp8-channel": 8 + 32 / 512,
    "fp8-channel-bf16": 8 + 16 / 512,
    "fp8-e7": 8,
    "fp8-e-3": 8,
    "nvfp4-e8": 4.5,
    "nvfp4-e-2": 4.5,
}
CODECS = {**LISTED, **{name: codec(name, COLUMNS) for name in PARSED}}
BUILDS_TABLES = {"IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}  # ggml takes seconds over them, once
every_codec = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in BUILDS_TABLES else n for n in CODECS]
)
FULL_PRECISION = {"F32", "F16", "BF16"}


def weights(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.02 * random.standard_t(4, (rows, COLUMNS))).astype(np.float32)


def importance(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, COLUMNS).astype(np.float32)


def evidence(c: Codec) -> np.ndarray | None:
    return importance() if c.needs_importance else None


def as_blocks(c: Codec, w_RC: np.ndarray, importance_C: np.ndarray | None):
    per_row = None if importance_C is None else np.tile(importance_C.reshape(-1, c.block), (len(w_RC), 1))
    return w_RC.reshape(-1, c.block), per_row


def whole(c: Codec) -> slice:
    return slice(0, c.block)


def reference(c: Codec, raw_RN: np.ndarray) -> np.ndarray:
    if c.name in PARSED:
        return decoded(c.name, raw_RN, COLUMNS)
    return np.asarray(dequantize(raw_RN, GGMLQuantizationType[c.name]), np.float32)


def stored(c: Codec, importance_C: np.ndarray | None = None):
    """Blocks as stored, with codes and grid read from them."""
    raw_RN = c.encode(weights(), importance_C if importance_C is not None else evidence(c))
    return raw_RN, *c.unpack(raw_RN.reshape(-1, c.block_bytes))


def test_every_type_of_ours_is_found() -> None:
    named = """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ3_S IQ3_XXS
        IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S TQ1_0 TQ2_0 MXFP4 NVFP4"""
    assert set(LISTED) >= set(named.split())
    assert codec("iq4_xs") is CODECS["IQ4_XS"]


def test_a_type_of_gguf_is_one_file_and_one_row(tmp_path: Path) -> None:
    """A codec in a folder elsewhere and its row: `--to`, overrides, fallbacks and descriptions then know it."""
    (tmp_path / "dither" / "codecs").mkdir(parents=True)
    (tmp_path / "dither" / "codecs" / "wide.py").write_text(WIDE)
    done = subprocess.run(
        [sys.executable, "-c", USED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])},
    )
    assert done.stdout.splitlines() == ["8-bit steps, 8.25 bits a weight", "99 Q8_W", "Q8_W Q8_0", "True"]


WIDE = """
import numpy as np

from dither.codecs.base import BlockCodec


class Wide(BlockCodec):
    name, block, block_bytes = "Q8_W", 64, 66

    def fit(self, w_RB, importance_B):
        return np.maximum(abs(w_RB).max(axis=1) / 127, 1e-4).astype("<f2")

    def snap(self, w_RK, grid, at):
        return np.rint(w_RK / grid[:, None].astype(np.float32)).astype(np.int8)

    def value(self, codes_RK, grid, at):
        return codes_RK * grid[:, None].astype(np.float32)

    def pack(self, codes_RB, grid):
        return np.concatenate([grid[:, None].view(np.uint8), codes_RB.view(np.uint8)], axis=1)

    def unpack(self, raw_RN):
        return raw_RN[:, 2:].view(np.int8), np.ascontiguousarray(raw_RN[:, :2]).view("<f2")[:, 0]


CODECS = (Wide(),)
"""
USED = """
import numpy as np

from dither.codecs import codec
from dither.containers.presets import Wanted, assign, describe, file_type
from dither.formats.ggml import GGML_TYPES, read_type

GGML_TYPES["Q8_W"] = read_type("Q8_W 90 64 66 Q8_0 99 8-bit steps")
print(describe("q8_w").removeprefix("Q8_W for every matrix: ").removesuffix("."))
print(file_type("q8_w"), codec("q8_w").name)
tensors = [("blk.0.ffn_up.weight", (2, 128)), ("blk.0.ffn_down.weight", (2, 96))]
print(*(found.type for found in assign(tensors, Wanted("q8_w"), arch="llama", metadata={}, has_imatrix=False)))
w_RC = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
print(bool(abs(codec("q8_w").decode(codec("q8_w").encode(w_RC)) - w_RC).max() < 0.005))
"""


@pytest.mark.parametrize("name", PARSED)
def test_names_of_families_are_canonical(name: str) -> None:
    assert codec(name.upper(), COLUMNS).name == name
    assert codec(name, COLUMNS) is CODECS[name]
    assert CODECS[name].bits_per_weight == pytest.approx(PARSED[name], rel=1e-12)
    assert CODECS[name].rows_together == 1
    if "channel" in name:
        with pytest.raises(UsageError, match="one scale per row"):
            codec(name)


@pytest.mark.parametrize("name", ["int5-g128", "int4", "int4-g128-f16", "int4-g0128", "int4-g128 ", "fp8", "fp8-e", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"is not known.*Q4_K.*int4-g128"):
        codec(name, COLUMNS)


@pytest.mark.parametrize("name", LISTED)
def test_declared_bits_are_stored_bits(name: str) -> None:
    c, kind = CODECS[name], GGML_TYPES[name]
    assert (c.name, c.block, c.block_bytes) == (name, kind.block, kind.block_bytes)
    raw_RN = c.encode(weights(), evidence(c))
    assert raw_RN.dtype == np.uint8
    assert raw_RN.shape == (ROWS, kind.row_bytes(COLUMNS))
    assert c.bits_per_weight == 8 * raw_RN.size / (ROWS * COLUMNS)


@every_codec
def test_decodes_as_the_independent_decoder(name: str) -> None:
    c = CODECS[name]
    for importance_C in (evidence(c), importance()):
        raw_RN = c.encode(weights(), importance_C)
        np.testing.assert_array_equal(c.decode(raw_RN), reference(c, raw_RN))


@every_codec
def test_unpack_inverts_pack(name: str) -> None:
    c = CODECS[name]
    raw_RN, codes_RB, grid = stored(c)
    np.testing.assert_array_equal(c.pack(codes_RB, grid), raw_RN.reshape(-1, c.block_bytes))
    w_RB, importance_RB = as_blocks(c, weights(3), importance())
    fitted = c.fit(w_RB, importance_RB)
    chosen_RB = c.snap(w_RB, fitted, whole(c))
    read_RB, _ = c.unpack(c.pack(chosen_RB, fitted))
    np.testing.assert_array_equal(read_RB, chosen_RB)


@every_codec
def test_values_are_what_a_decoder_reads(name: str) -> None:
    c = CODECS[name]
    raw_RN, codes_RB, grid = stored(c)
    values_RB = c.value(codes_RB, grid, whole(c))
    assert values_RB.dtype == np.float32
    np.testing.assert_array_equal(values_RB.reshape(ROWS, COLUMNS), reference(c, raw_RN))


@every_codec
def test_stored_values_snap_to_themselves(name: str) -> None:
    c = CODECS[name]
    _, codes_RB, grid = stored(c)
    values_RB = c.value(codes_RB, grid, whole(c))
    again_RB = c.value(c.snap(values_RB, grid, whole(c)), grid, whole(c))
    np.testing.assert_array_equal(again_RB, values_RB)


@every_codec
def test_encode_is_fit_snap_pack_and_length(name: str) -> None:
    c = CODECS[name]
    w_RC = np.concatenate([weights(), special_rows()])
    for importance_C in (evidence(c), importance()):
        w_RB, importance_RB = as_blocks(c, w_RC, importance_C)
        grid = c.fit(w_RB, importance_RB)
        raw_RN = c.pack(c.snap(w_RB, grid, whole(c)), grid)
        if isinstance(c, BlockCodec):
            c.restore_length(w_RB, importance_RB, raw_RN)
        np.testing.assert_array_equal(c.encode(w_RC, importance_C).reshape(-1, c.block_bytes), raw_RN)


@every_codec
def test_columns_can_be_taken_one_by_one(name: str) -> None:
    """`value` of any columns is those columns of the whole, and so is `snap` where weights stand alone."""
    c = CODECS[name]
    w_RB, importance_RB = as_blocks(c, weights(4), importance())
    grid = c.fit(w_RB, importance_RB)
    codes_RB = c.snap(w_RB, grid, whole(c))
    values_RB = c.value(codes_RB, grid, whole(c))
    slices = [slice(k, min(k + 7, c.block)) for k in range(0, c.block, 37)]
    slices += [whole(c), slice(c.block - 1, c.block), slice(c.block // 2, c.block)]
    for at in slices:
        if c.snap_columns == 1:
            np.testing.assert_array_equal(c.snap(w_RB[:, at], grid, at), codes_RB[:, at])
            np.testing.assert_array_equal(c.value(codes_RB[:, at], grid, at), values_RB[:, at])
        else:
            np.testing.assert_array_equal(c.value(codes_RB, grid, at), values_RB[:, at])
            if at != whole(c):
                with pytest.raises(UsageError, match="together"):
                    c.snap(w_RB[:, at], grid, at)


def special_rows() -> np.ndarray:
    """Zero, one sign of zero, constants, one outlier, denormals, tiny, huge, and alternating extremes."""
    w_RC = np.zeros((10, COLUMNS), np.float32)
    w_RC[1] = -0.0
    w_RC[2] = 0.5
    w_RC[3] = -3e-5
    w_RC[4] = weights(5)[0]
    w_RC[4, 77] = 300.0
    w_RC[5] = weights(6)[0] * np.float32(1e-39)
    w_RC[6] = weights(7)[0] * np.float32(1e-7)
    w_RC[7] = weights(8)[0] * np.float32(1e30)
    w_RC[8, ::2], w_RC[8, 1::2] = 1e30, -1e30
    w_RC[9, 300] = 1e-45
    return w_RC


@every_codec
@pytest.mark.parametrize("kind", ["none", "lognormal", "zero", "half zero", "tiny", "huge"])
def test_special_rows_stay_finite(name: str, kind: str) -> None:
    c = CODECS[name]
    importance_C = None if kind == "none" else importance()
    if kind == "zero":
        importance_C = np.zeros(COLUMNS, np.float32)
    if kind == "half zero":
        importance_C[: COLUMNS // 2] = 0
        importance_C[COLUMNS // 2 :: 3] = 0
    if kind in ("tiny", "huge"):
        importance_C *= np.float32(1e-18 if kind == "tiny" else 1e12)
    if kind == "none" and c.needs_importance:
        with pytest.raises(UsageError, match="--imatrix"):
            c.encode(special_rows())
        return
    w_RC = special_rows()
    decoded_RC = reference(c, c.encode(w_RC, importance_C))
    assert np.isfinite(decoded_RC).all()
    assert not decoded_RC[:2].any()
    if c.snap_columns == 1:
        assert abs(decoded_RC[2] - 0.5).max() <= 0.05
    largest = abs(w_RC).max(axis=1, keepdims=True)
    assert (abs(decoded_RC) <= 2 * np.maximum(largest, 1e-7)).all()


@every_codec
def test_evidence_lowers_the_error_it_weighs(name: str) -> None:
    """Σ importance · (w − ŵ)² with the importance known is at most what it is without."""
    c = CODECS[name]
    w_RC, importance_C = weights(9), importance(10)
    blind = np.ones(COLUMNS, np.float32) if c.needs_importance else None

    def error(raw_RN: np.ndarray) -> float:
        return float((importance_C * (w_RC.astype(np.float64) - reference(c, raw_RN)) ** 2).sum())

    assert error(c.encode(w_RC, importance_C)) <= error(c.encode(w_RC, blind))


@every_codec
def test_error_falls_with_bits(name: str) -> None:
    """Above what any code of this many bits must lose on a Gaussian source, 2^(−2·bits), not far above."""
    c = CODECS[name]
    w_RC = np.random.default_rng(11).standard_normal((8, COLUMNS)).astype(np.float32)
    decoded_RC = reference(c, c.encode(w_RC, np.ones(COLUMNS, np.float32)))
    relative = float(((w_RC - decoded_RC) ** 2).sum() / (w_RC**2).sum())
    least = 2.0 ** (-2 * c.bits_per_weight)
    assert relative >= least or name == "F32"
    if name not in FULL_PRECISION and c.bits_per_weight < 8 and not name.startswith("fp4"):
        assert relative <= 5.5 * least


@every_codec
def test_rows_are_independent_and_threads_change_nothing(name: str) -> None:
    c = CODECS[name]
    w_RC, importance_C = np.concatenate([weights(12), special_rows()]), importance()
    at_once_RN = c.encode(w_RC, importance_C)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda row: c.encode(w_RC[row : row + 1], importance_C), range(len(w_RC))))
        decoded = list(pool.map(c.decode, rows))
    np.testing.assert_array_equal(np.concatenate(rows), at_once_RN)
    np.testing.assert_array_equal(np.concatenate(decoded), c.decode(at_once_RN))


@every_codec
def test_memory_layout_and_emptiness_do_not_matter(name: str) -> None:
    c = CODECS[name]
    w_RC = weights(13)
    raw_RN = c.encode(w_RC, evidence(c))
    np.testing.assert_array_equal(c.encode(np.asfortranarray(w_RC), evidence(c)), raw_RN)
    np.testing.assert_array_equal(c.decode(np.asfortranarray(raw_RN)), c.decode(raw_RN))
    frozen_RC, frozen_RN = w_RC.copy(), raw_RN.copy()
    frozen_RC.flags.writeable = frozen_RN.flags.writeable = False
    np.testing.assert_array_equal(c.encode(frozen_RC, evidence(c)), raw_RN)
    np.testing.assert_array_equal(c.decode(frozen_RN), c.decode(raw_RN))
    shifted_RC = np.frombuffer(b"-" + w_RC.tobytes(), np.float32, offset=1).reshape(w_RC.shape)
    np.testing.assert_array_equal(c.encode(shifted_RC, evidence(c)), raw_RN)
    assert c.encode(w_RC[:0], evidence(c)).shape == (0, raw_RN.shape[1])
    assert c.decode(raw_RN[:0]).shape == (0, COLUMNS)


@every_codec
def test_refuses_importance_of_another_width(name: str) -> None:
    """Half as wide, it could pass for a shorter row's and be repeated along this one."""
    if name not in FULL_PRECISION:
        with pytest.raises(UsageError, match=f"importance of {COLUMNS // 2} columns"):
            CODECS[name].encode(weights(), importance()[: COLUMNS // 2])


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "BF16"])
def test_types_that_store_scales_among_codes_do_not_come_apart(name: str) -> None:
    with pytest.raises(UsageError, match="stores codes and scales together"):
        split_codec(name, COLUMNS)


@every_codec
def test_refuses_rows_that_are_no_whole_blocks(name: str) -> None:
    c = CODECS[name]
    if c.block > 1:
        with pytest.raises(UsageError, match=f"multiple of {c.block}"):
            c.encode(np.zeros((2, c.block + 8), np.float32), np.ones(c.block + 8, np.float32))
