"""Llama 3.1's scaling found again in its factors, and any other factors said one by one.

The factors are transformers' own: the frequencies of a plain rotary embedding over those of its scaled one.
Legend: P rotated pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dither.models.blocks.llama3 import llama3_parameters
from dither.types import Floats


def frequencies(head_dim: int, base: float, **scaling: Any) -> Floats:
    given = {"rope_type": "default", "rope_theta": base, **scaling}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=2**20, rope_parameters=given)
    if given["rope_type"] == "default":
        return (1.0 / base ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu")[0].numpy()


def factors(head_dim: int, base: float, *numbers: float) -> Floats:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaled_P = frequencies(head_dim, base, rope_type="llama3", **dict(zip(names, numbers, strict=True)))
    return frequencies(head_dim, base) / scaled_P


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("numbers", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 4096)])
def test_llamas_own_numbers_come_back_exactly(head_dim: int, numbers: tuple[float, ...]) -> None:
    found = llama3_parameters(factors(head_dim, 500000.0, *numbers), 500000.0)
    assert found is not None and found.pop("rope_type") == "llama3"
    assert tuple(found.values()) == numbers


@pytest.mark.parametrize("numbers", [(6.5, 1.5, 7.0, 3000), (40.0, 0.5, 32.0, 4096), (4.0, 2.0, 3.0, 1000)])
def test_other_numbers_come_back_as_their_equals(numbers: tuple[float, ...]) -> None:
    """original, low and high may all be multiplied by one number: what counts are the frequencies."""
    found = llama3_parameters(factors(128, 10000.0, *numbers), 10000.0)
    assert found is not None
    original, expected = (
        factors(128, 10000.0, *answer) for answer in (numbers, [v for v in found.values() if v != "llama3"])
    )
    np.testing.assert_allclose(original, expected, rtol=2e-6)


@pytest.mark.parametrize("other", ["random", "linear", "ones", "one off"])
def test_factors_of_another_origin_are_not_taken_for_llama_3(other: str) -> None:
    made = {
        "random": np.random.default_rng(0).uniform(1, 8, 32),
        "linear": np.full(32, 4.0),
        "ones": np.ones(32),
        "one off": factors(64, 500000.0, 8.0, 1.0, 4.0, 8192) * np.where(np.arange(32) == 17, 1.001, 1),
    }
    assert llama3_parameters(made[other].astype(np.float32), 500000.0) is None
