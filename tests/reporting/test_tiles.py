"""A window holds the file's own weights, costs its own rows alone, and says where columns stand out."""

from __future__ import annotations

import base64
from pathlib import Path

import gguf
import numpy as np
import pytest
from showing_util import NAME, Counted, model, stored_as

import dither
from conftest import BUNDLED
from dither.errors import SourceError, UsageError
from dither.models.source import open_model
from dither.reporting.tiles import tile
from dither.types import Model

DOWN = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def original() -> Model:
    return open_model(BUNDLED)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "four.gguf"
    dither.quantize(BUNDLED, "Q4_K_M", path)
    return path


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "folder"
    dither.quantize(BUNDLED, "gptq", path, solver="nearest")
    return path


def halves(text: str, rows: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32).reshape(rows, -1)


def bfloats(checkpoint: Path, name: str) -> np.ndarray:
    """A BF16 tensor through the safetensors library, which numpy users get as raw bytes or ml_dtypes."""
    import torch
    from safetensors.torch import load_file as load_torch

    found: np.ndarray = load_torch(checkpoint / "model.safetensors")[name].to(torch.float32).numpy()
    return found


def test_the_window_is_what_independent_readers_see(original: Model, four_bits: Path) -> None:
    found = tile(original, open_model(four_bits), DOWN, 100, 300)
    document = found.to_json()
    assert (document["row"], document["column"]) == (100, 288)  # where a block begins
    at = (slice(100, 164), slice(288, 352))
    expected = bfloats(BUNDLED, "model.layers.1.mlp.down_proj.weight")[at]
    np.testing.assert_array_equal(halves(document["original"], 64), expected.astype(np.float16))
    (stored,) = [t for t in gguf.GGUFReader(four_bits).tensors if t.name == DOWN]
    decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)[at]
    assert document["type"] == stored.tensor_type.name
    np.testing.assert_allclose(halves(document["quantized"][document["type"]], 64), decoded, rtol=1e-3, atol=1e-6)
    assert document["clip"] == pytest.approx(np.percentile(np.abs(expected), 99.5))


def test_fewer_bits_lose_more(original: Model, four_bits: Path) -> None:
    found = tile(original, open_model(four_bits), DOWN)
    errors = {kind: float(np.square(w - found.original_RW).mean()) for kind, w in found.quantized.items()}
    rising = [errors[kind] for kind in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")]
    assert rising == sorted(rising) and 4 * rising[0] < rising[1]


def test_a_packed_folder_opens_too(original: Model, gptq_folder: Path) -> None:
    found = tile(original, open_model(gptq_folder), DOWN, 7, 0, 32)
    assert (found.type, found.block) == ("int4-g128", 128)
    levels = [len(np.unique(row)) for row in found.quantized["int4-g128"]]
    assert max(levels) <= 16
    error = np.abs(found.quantized["int4-g128"] - found.original_RW).mean()
    assert 0 < error < 0.1 * np.abs(found.original_RW).mean() + 0.05


def test_only_the_rows_of_the_window_are_read() -> None:
    before, after = Counted(2**20, 8192), Counted(2**20, 8192, seed=1)  # 8.6 billion weights
    found = tile(model(before.tensor()), model(after.tensor()), NAME, 2**19, 4096, 16)
    assert (before.asked, after.asked) == (16, 16)
    assert found.original_RW.shape == (16, 16)


def test_windows_stay_inside() -> None:
    source = Counted(40, 288)
    found = tile(model(source.tensor()), model(source.tensor()), NAME, 10**9, 10**9)
    assert (found.row, found.column, found.original_RW.shape) == (0, 224, (40, 64))
    assert list(found.quantized) == ["F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    narrow = Counted(4, 30)
    assert list(tile(model(narrow.tensor()), model(narrow.tensor()), NAME).quantized) == ["F32"]


def test_outlier_columns_are_found_and_smear_their_blocks() -> None:
    scale_C = np.ones(256, np.float32)
    scale_C[[40, 200]] = 12
    source = Counted(64, 256, scale_C=scale_C)
    four = stored_as("Q4_0", source)
    found = tile(model(source.tensor()), model(four), NAME)
    assert found.outlier_columns == (40,)  # 200 lies outside the window
    error_C = np.abs(found.quantized["Q4_0"] - found.original_RW).mean(axis=0)
    assert error_C[[32, 36, 60]].mean() > 3 * error_C[:32].mean()
    assert tile(model(source.tensor()), model(four), NAME, 0, 192).outlier_columns == (200,)
    plain = Counted(64, 256)
    assert tile(model(plain.tensor()), model(plain.tensor()), NAME).outlier_columns == ()


def test_what_cannot_be_shown_is_said(original: Model, four_bits: Path) -> None:
    quantized = open_model(four_bits)
    with pytest.raises(UsageError, match="It has blk"):
        tile(original, quantized, "blk.1.ffn_dwn.weight")
    with pytest.raises(UsageError, match="is a vector"):
        tile(original, quantized, "output_norm.weight")
    with pytest.raises(UsageError, match="window of 257"):
        tile(original, quantized, DOWN, size=257)
    with pytest.raises(UsageError, match="not known"):
        tile(original, quantized, DOWN, types=["Q9_K"])
    with pytest.raises(UsageError, match="4 × 64 in made, and 4 × 32 in made"):
        tile(model(Counted(4, 32).tensor()), model(Counted(4, 64).tensor()), NAME)
    with pytest.raises(UsageError, match=r"a\\x1b"):
        tile(original, quantized, "a\x1b[2J")


def test_a_weight_that_is_no_number_is_refused() -> None:
    broken = Counted(4, 32, scale_C=np.full(32, np.nan, np.float32))
    with pytest.raises(SourceError, match="NaN"):
        tile(model(Counted(4, 32).tensor()), model(broken.tensor()), NAME)


def test_float16_keeps_to_its_range() -> None:
    large = Counted(4, 32, scale_C=np.full(32, 1e9, np.float32))
    document = tile(model(large.tensor()), model(large.tensor()), NAME, types=()).to_json()
    assert np.isfinite(halves(document["original"], 4)).all()
