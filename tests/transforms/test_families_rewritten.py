"""Every family, rewritten: llama.cpp still computes what transformers computed of the original.

Legend: V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import expected_probabilities, opened, random_model, save_model, write_gguf
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transforms_util import everything_as, made_up_evidence

from dither.errors import UnsupportedError
from dither.models.arch import convert, feeds
from dither.models.checkpoint import open_checkpoint
from dither.transforms.awq import Awq
from dither.transforms.rotate import Rotate
from dither.types import Model

pytestmark = pytest.mark.slow  # llama.cpp

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with head_dim, biases, tied": LlamaConfig(
        **SMALL, head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "phi-3": Phi3Config(**SMALL),
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}),
    "gemma 3": Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 6},
        head_dim=32,
        sliding_window=16,
        query_pre_attn_scalar=32,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}
PROMPT = [(37 * i) % 300 for i in range(60)]
# llama.cpp keeps keys and values as float16: the unchanged models come within 3e-5 of transformers.
DIVERGENCE = 2e-4


def scaled(model: Model) -> Model:
    done = Awq(feeds(model.arch))(model, made_up_evidence(model), everything_as("Q4_0"))
    kinds = {name.split(".")[-2].removesuffix("_exps") for name, g in done.record["groups"].items() if g["alpha"]}
    value = "attn_qkv" if model.arch == "phi3" else "attn_v"
    assert {"attn_norm", "ffn_norm", value, "ffn_up"} <= kinds, "what is not scaled is not tested"
    assert not any("left as it was" in note for note in done.notes)
    return done.model


def turned(model: Model) -> Model:
    return Rotate(feeds(model.arch), seed=3)(model, lambda name, expert=0: None, lambda name: None).model


def divergence(model: Model, original: transformers.PreTrainedModel, path: Path) -> float:
    expected_V = expected_probabilities(original, PROMPT)
    assert expected_V.max() < 0.99
    with opened(write_gguf(model, path)) as llama:
        actual_V = llama.next_token_probabilities(PROMPT).astype(np.float64)
    return float(np.sum(expected_V * np.log(expected_V / np.maximum(actual_V, 1e-30))))


@pytest.mark.parametrize("name", CONFIGS)
def test_rewritten_models_compute_what_the_original_does(name: str, tmp_path: Path) -> None:
    original = random_model(CONFIGS[name])
    model = convert(open_checkpoint(save_model(original, tmp_path / "checkpoint")))
    assert divergence(scaled(model), original, tmp_path / "awq.gguf") < DIVERGENCE
    if name == "gemma 3":
        with pytest.raises(UnsupportedError, match="residual sum"):
            turned(model)
        return
    # both at once: the scales of a model that was turned first
    assert divergence(turned(model), original, tmp_path / "turned.gguf") < DIVERGENCE
    assert divergence(scaled(turned(model)), original, tmp_path / "both.gguf") < DIVERGENCE
