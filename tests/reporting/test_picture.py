"""The picture goes through the quantizer of the weights, and the beam spoils what shares a block with it."""

from __future__ import annotations

import base64

import gguf
import numpy as np
import pytest

from dither.errors import UsageError
from dither.reporting.picture import BEAM, BRIGHTNESS, gray, landscape, picture


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_it_is_what_llama_cpp_would_make_of_it(kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(landscape(), type_), type_)
    np.testing.assert_array_equal(picture([kind]).quantized[kind], gray(expected))


def test_fewer_bits_look_worse_and_the_beam_smears() -> None:
    found = picture()
    original = found.original_RC.astype(int)
    errors = [float(np.square(each - original).mean()) for each in map(np.int64, found.quantized.values())]
    assert errors == sorted(errors)
    block = slice(BEAM // 32 * 32, BEAM // 32 * 32 + 32)
    away = np.abs(picture(["Q4_0"]).quantized["Q4_0"].astype(int) - original)[:30]
    assert np.delete(away[:, block], BEAM % 32, axis=1).mean() > 5 * away[:, :128].mean()
    assert landscape().max() == BRIGHTNESS and np.abs(np.delete(landscape(), BEAM, axis=1)).max() <= 1


def test_it_travels_as_bytes() -> None:
    document = picture(["Q2_K"]).to_json()
    pixels = np.frombuffer(base64.b64decode(document["quantized"]["Q2_K"]), np.uint8)
    assert pixels.reshape(document["rows"], document["columns"]).shape == (128, 256)


def test_what_has_no_picture_is_said() -> None:
    with pytest.raises(UsageError, match="not known"):
        picture(["JPEG"])
    with pytest.raises(UsageError, match="512 weights"):
        picture(["int4-g512"])
    with pytest.raises(UsageError, match="13 types"):
        picture([f"Q{n}" for n in range(13)])
