"""Biases of zeros beside every matrix, and biases that llama.cpp has no place for.

References: transformers' own network of the folder, and llama.cpp, which must load what is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import expected_probabilities, opened, random_model, save_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import dither
from dither.errors import UnsupportedError
from dither.models.blocks import open_blocks
from dither.models.source import open_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # runs networks
transformers.logging.set_verbosity_error()

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "phi-3": Phi3Config(**SMALL),
    "smollm3": SmolLM3Config(**SMALL, tie_word_embeddings=True),
    "gemma 2": Gemma2Config(**SMALL, head_dim=32, query_pre_attn_scalar=32),
}
PROMPT = [5, 17, 101, 7]


def with_biases(folder: Path, value: float, *ends: str) -> Path:
    """A bias beside every matrix of the blocks whose name ends so, and has none."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(ends) and bias not in tensors:
            tensors[bias] = torch.full((tensors[name].shape[0],), value)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_are_left_out_aloud(name: str, tmp_path: Path) -> None:
    network = random_model(CONFIGS[name])
    folder = with_biases(save_model(network, tmp_path / "model"), 0.0, "_proj.weight")
    result = dither.quantize(folder, "F16", tmp_path / "model.gguf")
    assert any("biases are zero throughout and left out" in note for note in result.notes)
    engine = opened(tmp_path / "model.gguf")
    expected, found = expected_probabilities(network, PROMPT), engine.next_token_probabilities(PROMPT)
    engine.close()
    assert float((expected * (np.log(expected) - np.log(found))).sum()) < 1e-3
    blocks = open_blocks(open_model(folder))  # which measuring and calibrating walk
    hidden = blocks.embed(torch.tensor([PROMPT]))
    for index in range(blocks.count):
        hidden = blocks.load(index)(hidden)
    ours = torch.softmax(blocks.head()(hidden)[0, -1].double(), -1).numpy()
    assert np.allclose(ours, expected, atol=1e-5)


def test_qwen2_keeps_the_biases_it_has(tmp_path: Path) -> None:
    folder = with_biases(save_model(random_model(CONFIGS["qwen2"]), tmp_path / "model"), 0.0, "_proj.weight")
    names = {tensor.name for tensor in open_model(folder).tensors if tensor.name.endswith(".bias")}
    assert names == {f"blk.{block}.attn_{kind}.bias" for block in (0, 1) for kind in "qkv"}


def test_biases_that_llama_cpp_has_no_place_for_are_refused(tmp_path: Path) -> None:
    config = Qwen3Config(**SMALL, head_dim=32, attention_bias=True)
    folder = save_model(random_model(config), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_output\.bias.*wrong number of tensors"):
        dither.quantize(folder, "Q8_0", tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match=r"no place in llama\.cpp's graph of Qwen3"):
        dither.preview(folder, "Q8_0")
    assert not list(tmp_path.glob("model.gguf*"))
    dither.convert(folder, tmp_path / "copy", dtype="f32")  # transformers has a place for them
    original, copy = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, tmp_path / "copy"))
    with torch.no_grad():
        expected, found = (network(torch.tensor([PROMPT])).logits for network in (original, copy))
    assert torch.equal(expected, found)


def test_a_switch_of_zeros_is_switched_off_in_a_folder(tmp_path: Path) -> None:
    """Qwen3's attention_bias: llama.cpp has no place for one of the four, so all go, and config.json says so."""
    network = random_model(Qwen3Config(**SMALL, head_dim=32, attention_bias=True))
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.zero_()
    folder = save_model(network, tmp_path / "model")
    dither.quantize(folder, "F16", tmp_path / "model.gguf", check=True)
    dither.convert(folder, tmp_path / "copy", dtype="f32")
    copy, info = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not copy.config.attention_bias and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(copy(torch.tensor([PROMPT])).logits, network(torch.tensor([PROMPT])).logits)


def test_biases_that_are_not_zero_stay_somebodys(tmp_path: Path) -> None:
    folder = with_biases(save_model(random_model(CONFIGS["qwen2"]), tmp_path / "model"), 0.25, "down_proj.weight")
    with pytest.raises(UnsupportedError, match=r"ffn_down\.bias"):
        dither.quantize(folder, "Q8_0", tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match=r"ffn_down\.bias: has no place in transformers' class"):
        dither.quantize(folder, "fp8", tmp_path / "folder")
