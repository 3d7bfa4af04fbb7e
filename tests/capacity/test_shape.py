"""What metadata says of the cache, against the golden shapes and llama.cpp's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fitting_util import llama_31_8b, outlined

from dither.capacity.memory import Layer, Shape
from dither.capacity.shape import shape_of
from dither.errors import SourceError

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]

# config.json of each model, in GGUF's keys
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-70B": (
        "llama",
        {
            "block_count": 80,
            "embedding_length": 8192,
            "feed_forward_length": 28672,
            "attention__head_count": 64,
            "attention__head_count_kv": 8,
            "vocab_size": 128256,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3moe",
        {
            "block_count": 48,
            "embedding_length": 2048,
            "feed_forward_length": 6144,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 768,
            "attention__head_count": 32,
            "attention__head_count_kv": 4,
            "attention__key_length": 128,
            "attention__value_length": 128,
            "vocab_size": 151936,
        },
    ),
    "Gemma-3-27B": (
        "gemma3",
        {
            "block_count": 62,
            "embedding_length": 5376,
            "feed_forward_length": 21504,
            "attention__head_count": 32,
            "attention__head_count_kv": 16,
            "attention__key_length": 128,
            "attention__value_length": 128,
            "attention__sliding_window": 1024,
            "vocab_size": 262144,
        },
    ),
    "DeepSeek-V3": (
        "deepseek2",
        {
            "block_count": 62,
            "nextn_predict_layers": 1,
            "embedding_length": 7168,
            "feed_forward_length": 18432,
            "leading_dense_block_count": 3,
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_feed_forward_length": 2048,
            "attention__head_count": 128,
            "attention__head_count_kv": 1,
            "attention__key_length": 576,
            "attention__value_length": 512,
            "attention__key_length_mla": 192,
            "attention__value_length_mla": 128,
            "vocab_size": 129280,
        },
    ),
    "Mamba-2.8B": (
        "mamba",
        {
            "block_count": 64,
            "embedding_length": 2560,
            "feed_forward_length": 0,
            "attention__head_count": 0,
            "ssm__conv_kernel": 4,
            "ssm__inner_size": 5120,
            "ssm__state_size": 16,
            "vocab_size": 50280,
        },
    ),
    "Gemma-3n-E2B": (
        "gemma3n",
        {
            "block_count": 30,
            "embedding_length": 2048,
            "feed_forward_length": [8192] * 30,
            "attention__head_count": 8,
            "attention__head_count_kv": 2,
            "attention__key_length": 256,
            "attention__value_length": 256,
            "attention__sliding_window": 512,
            "attention__shared_kv_layers": 10,
            "vocab_size": 262144,
        },
    ),
}


def golden(model: str) -> Shape:
    stored = next(case["shape"] for case in CASES if case["name"].startswith(model + ","))
    layers = [Layer(**kind["layer"]) for kind in stored["layers"] for _ in range(kind["count"])]
    return Shape(layers=tuple(layers), **{key: value for key, value in stored.items() if key != "layers"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_golden_shapes(name: str) -> None:
    arch, keys = PUBLISHED[name]
    model = outlined(arch, {}, **keys)
    if name.startswith("Gemma"):
        model.metadata["tokenizer.ggml.model"] = type(model.metadata[f"{arch}.block_count"])(8, "llama")  # type: ignore[index]
    shape, notes = shape_of(model)
    assert shape == golden(name)
    assert notes == []


def test_llama_from_its_tensors() -> None:
    assert shape_of(llama_31_8b())[0] == golden("Llama-3.1-8B")


def base(**more: Any) -> dict[str, Any]:
    return {
        "block_count": 4,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention__head_count": 4,
        "attention__head_count_kv": 2,
        **more,
    }


def layers(arch: str, **more: Any) -> tuple[Layer, ...]:
    return shape_of(outlined(arch, {}, **base(**more)))[0].layers


def test_heads_may_differ_per_layer() -> None:
    assert layers("llama", attention__head_count_kv=[2, 1, 0, 2])[1] == Layer(16, 16)


def test_the_window_pattern_is_a_period_or_a_list() -> None:
    windows = [layer.window for layer in layers("x", attention__sliding_window=32, attention__sliding_window_pattern=2)]
    assert windows == [32, 0, 32, 0]
    listed = layers("x", attention__sliding_window=32, attention__sliding_window_pattern=[0, 0, 1, 1])
    assert [layer.window for layer in listed] == [0, 0, 32, 32]
    assert all(layer.window == 0 for layer in layers("llama", attention__sliding_window=32))  # not in its graph


def test_a_window_in_unknown_layers_is_counted_in_full_and_said() -> None:
    shape, notes = shape_of(outlined("newarch", {}, **base(attention__sliding_window=32)))
    assert all(layer.window == 0 for layer in shape.layers)
    assert len(notes) == 1 and "32 tokens" in notes[0] and "newarch" in notes[0]


def test_hybrids_keep_a_state_where_there_are_no_heads() -> None:
    found = layers(
        "jamba",
        attention__head_count_kv=[0, 0, 2, 0],
        ssm__conv_kernel=4,
        ssm__inner_size=128,
        ssm__state_size=16,
        ssm__group_count=1,
    )
    state = 3 * (128 + 2 * 16) + 16 * 128
    assert found == (Layer(state=state), Layer(state=state), Layer(32, 32), Layer(state=state))


def test_a_state_that_is_not_known_is_said() -> None:
    _, notes = shape_of(outlined("novel", {}, **base(attention__head_count_kv=[0, 2, 2, 2])))
    assert "layer 0 of novel" in notes[0]


@pytest.mark.parametrize(
    ("key", "value"), [("block_count", None), ("block_count", 0), ("block_count", 2**31), ("embedding_length", None)]
)
def test_what_is_missing_or_absurd_is_named(key: str, value: int | None) -> None:
    keys = base()
    del keys[key]
    if value is not None:
        keys[key] = value
    with pytest.raises(SourceError, match=key):
        shape_of(outlined("llama", {}, **keys))
