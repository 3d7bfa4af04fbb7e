"""Checkpoint → GGUF → folder, and packed folders → GGUF → folder: the logits are the original's, far out too.

A rotary embedding that is lost on the way shows late: at position 60 nothing is wrong, at position 6,000 everything.
The reference is transformers on the original folder; llama.cpp and the network that measures read the GGUF between.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import byte_level_tokenizer, opened, random_model, save_model, split_chain, write_gguf
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import dither
from dither.errors import DitherError
from dither.formats.ggml import Field, f32, string
from dither.models.arch.conversion import constant
from dither.models.arch.written import written
from dither.models.blocks import open_blocks
from dither.models.blocks.rotary import BY_LENGTH
from dither.models.source import open_model
from dither.models.tokenizers import pre
from dither.types import Floats

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # loads models with transformers
transformers.logging.set_verbosity_error()

LENGTH = 6000
ENDS = (64, 512, 2048, LENGTH)  # positions up to these are compared, sixteen at each
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "head_dim": 32,
}  # fmt: skip
TWO = SMALL | {"num_hidden_layers": 2}
ONE_HEAD = {"num_attention_heads": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {
    "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [1.0 + i for i in range(16)],
    "original_max_position_embeddings": 1024,
}
HALF = {name: value[:8] if isinstance(value, list) else value for name, value in LONGROPE.items()}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
WINDOW = {"sliding_window": 128, "query_pre_attn_scalar": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases, tied": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama linear": LlamaConfig(**SMALL, **rope("linear", factor=4.0)),
    "llama 3.2": LlamaConfig(
        **SMALL | {"max_position_embeddings": 131072}, **rope("llama3", **LLAMA3 | {"rope_theta": 500000.0})
    ),
    "llama yarn": LlamaConfig(**SMALL, **rope("yarn", **YARN)),
    "llama longrope": LlamaConfig(**SMALL, **rope("longrope", **LONGROPE)),
    "mistral yarn": MistralConfig(**SMALL, sliding_window=None, **rope("yarn", **YARN)),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, **rope("linear", factor=2.0)),
    "qwen2 yarn with attention factor": Qwen2Config(
        **{key: value for key, value in SMALL.items() if key != "head_dim"},
        **rope("yarn", **YARN, attention_factor=1.2),
    ),
    "qwen3 linear": Qwen3Config(**SMALL, tie_word_embeddings=True, **rope("linear", factor=4.0)),
    "qwen3 moe yarn": Qwen3MoeConfig(**SMALL, num_experts=4, **EXPERTS, **rope("yarn", **YARN)),
    "gemma 2": Gemma2Config(**TWO | ONE_HEAD, **WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=7.0),
    "gemma 3": Gemma3TextConfig(
        **SMALL | ONE_HEAD | {"num_hidden_layers": 6}, **WINDOW, rope_parameters=LOCAL_AND_GLOBAL
    ),
    "phi-3": Phi3Config(**SMALL),
    "phi-3 longrope": Phi3Config(**SMALL, original_max_position_embeddings=1024, **rope("longrope", **LONGROPE)),
    "phi-4-mini": Phi3Config(
        **SMALL,
        original_max_position_embeddings=1024,
        tie_word_embeddings=True,
        **rope("longrope", **HALF, partial_rotary_factor=0.5),
    ),
    "smollm3 yarn": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}, **rope("yarn", **YARN)),
}
TOKENIZER = byte_level_tokenizer(split_chain(pre.QWEN2), size=300)  # which transformers' Qwen2 has whatever is said
Made = tuple[Path, Path, dict[int, torch.Tensor]]


def lengths(name: str) -> tuple[int, ...]:
    """LongRoPE's factors depend on how long a text is; a softcap needs scores T × T, which 6,000² makes slow."""
    kinds = str(CONFIGS[name].rope_parameters)
    return (512, LENGTH) if "longrope" in kinds else (2048 if name == "gemma 2" else LENGTH,)


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(7))


def at_ends(length: int) -> torch.Tensor:
    return torch.cat([torch.arange(end - 16, end) for end in ENDS if end <= length])


def logits(folder: Path, length: int = LENGTH) -> torch.Tensor:
    """(positions, V) by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(tokens(length), logits_to_keep=at_ends(length)).logits[0]
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor, close: float = 2e-3) -> None:
    """The largest difference, of the logits' own spread.  One part in a hundred thousand of an angle of 6,000 radians
    shows as much; a scheme that is lost shows a thousand times as much."""
    assert float((found - expected).abs().max()) < close * float(expected.std())


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A family's checkpoint, the GGUF made of it, and transformers' logits by length."""
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / "model"
            save_model(random_model(CONFIGS[name]), folder, TOKENIZER)
            dither.quantize(folder, "F32", folder.parent / "model.gguf")
            expected = {length: logits(folder, length) for length in lengths(name)}
            made[name] = folder, folder.parent / "model.gguf", expected
        return made[name]

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_a_gguf_computes_what_the_original_does(
    name: str, trip: Callable[[str], Made], tmp_path: Path
) -> None:
    _, gguf, expected = trip(name)
    result = dither.convert(gguf, tmp_path / "back", dtype="f32").result
    assert not result.notes, result.notes
    for length in lengths(name):
        assert_same(logits(tmp_path / "back", length), expected[length])


@pytest.mark.parametrize("name", ["llama 3.2", "llama yarn", "llama linear", "phi-4-mini"])
def test_the_network_that_measures_a_gguf_computes_so_too(name: str, trip: Callable[[str], Made]) -> None:
    _, gguf, expected = trip(name)
    blocks = open_blocks(open_model(gguf))
    with torch.no_grad():
        hidden = blocks.embed(tokens())
        for index in range(blocks.count):
            hidden = blocks.load(index)(hidden)
        found = blocks.head()(hidden[:, at_ends(LENGTH)])[0]
    assert_same(found, expected[LENGTH])


@pytest.mark.parametrize("name", ["llama 3.2", "llama yarn", "llama longrope", "phi-4-mini"])
def test_llama_cpp_computes_so_too(name: str, trip: Callable[[str], Made]) -> None:
    _, gguf, expected = trip(name)
    expected_V = torch.softmax(expected[LENGTH][-1].double(), -1).numpy()
    with opened(gguf, context=LENGTH + 16) as llama:
        actual_V = llama.next_token_probabilities(tokens()[0].tolist()).astype(np.float64)
    assert expected_V.max() < 0.99
    assert float(np.sum(expected_V * np.log(expected_V / np.maximum(actual_V, 1e-30)))) < 1e-3


PACKED = {"gptq": 32, "awq": 32, "w4a16": 32, "w8a8": None, "fp8": None, "fp8-block": None, "mxfp4": None, "nf4": None}


@pytest.mark.parametrize("to", PACKED)
def test_packed_weights_become_a_gguf_and_a_folder_again(to: str, trip: Callable[[str], Made], tmp_path: Path) -> None:
    """The reference is the packed folder's numbers under the original's own config.json and tokenizer."""
    original, _, plain = trip("llama 3.2")
    dither.quantize(original, to, tmp_path / "packed", group=PACKED[to])
    packed = dither.open_model(tmp_path / "packed")
    dither.convert(tmp_path / "packed", tmp_path / "model.gguf", dtype="f32")
    dither.convert(tmp_path / "model.gguf", tmp_path / "back", dtype="f32")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    _, entries = written(packed)
    tensors = {tensor.name: tensor for tensor in packed.tensors}
    with torch.no_grad():
        for entry in entries:
            w_RC = tensors[entry.tensor].read(0, entry.rows)
            order = entry.order()
            w_RC = w_RC if order is None else w_RC[order]
            model.get_parameter(entry.name).copy_(torch.from_numpy(w_RC.copy()).reshape(entry.shape))
        expected = model(tokens(), logits_to_keep=at_ends(LENGTH)).logits[0]
    assert_same(logits(tmp_path / "back"), expected)
    assert float((expected - plain[LENGTH]).abs().mean()) > 1e-3 * float(expected.std()), "nothing was rounded"


def test_llama_3s_scaling_stands_in_the_folders_config(trip: Callable[[str], Made], tmp_path: Path) -> None:
    _, gguf, _ = trip("llama 3.2")
    dither.convert(gguf, tmp_path / "back")
    stored = json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"]
    assert stored == {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}


def test_a_window_that_llama_cpp_leaves_out_is_kept_and_told(tmp_path: Path) -> None:
    config = Phi3Config(**SMALL, sliding_window=256, rms_norm_eps=1e-5)
    folder = save_model(random_model(config), tmp_path / "model", TOKENIZER)
    said = dither.quantize(folder, "F32", tmp_path / "model.gguf").notes
    assert any("no sliding window for Phi-3: exact up to 256 tokens" in note for note in said)
    [note] = dither.convert(tmp_path / "model.gguf", tmp_path / "back", dtype="f32").result.notes
    assert note == "config.json keeps the sliding window of 256 tokens that llama.cpp leaves out: they differ beyond"
    assert_same(logits(tmp_path / "back", 2048), logits(folder, 2048))
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (stored["sliding_window"], stored["rms_norm_eps"]) == (256, 1e-5)


FACTORS = np.random.default_rng(3).uniform(1, 6, 16).astype(np.float32)
STRANGE: dict[str, tuple[dict[str, Field], dict[str, Floats]]] = {
    "factors": ({}, {"rope_freqs.weight": FACTORS}),
    "factors and linear": (
        {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(3.0)},
        {"rope_freqs.weight": FACTORS},
    ),
    "factors alike": ({}, {"rope_freqs.weight": np.full(16, 2.5, np.float32)}),
    "scores scaled": ({"rope.scaling.attn_factor": f32(1.3)}, {}),
    "scores scaled and linear": (
        {"rope.scaling.attn_factor": f32(1.3), "rope.scaling.type": string("linear"), "rope.scaling.factor": f32(3.0)},
        {},
    ),
    "linear by its old key": ({"rope.scale_linear": f32(4.0)}, {}),
    "a factor without a type": ({"rope.scaling.factor": f32(4.0)}, {}),
    "a factor of type none": ({"rope.scaling.type": string("none"), "rope.scaling.factor": f32(4.0)}, {}),
}


@pytest.mark.parametrize("name", STRANGE)
def test_scaling_that_no_checkpoint_of_ours_writes_is_read_as_llama_cpp_reads_it(name: str, tmp_path: Path) -> None:
    fields, tables = STRANGE[name]
    model = open_model(save_model(random_model(CONFIGS["llama"]), tmp_path / "model", TOKENIZER))
    metadata = {**model.metadata, **{f"llama.{key}": field for key, field in fields.items()}}
    first, *others = model.tensors
    tensors = (first, *(constant(name, factor_P) for name, factor_P in tables.items()), *others)
    gguf = write_gguf(replace(model, metadata=metadata, tensors=tensors), tmp_path / "model.gguf")
    said = dither.convert(gguf, tmp_path / "back", dtype="f32").result.notes
    assert ("rope_freqs.weight is of no scheme" in " ".join(said)) == (
        "rope_freqs.weight" in tables and "alike" not in name
    )
    expected_V = torch.softmax(logits(tmp_path / "back", 512)[-1].double(), -1).numpy()
    with opened(gguf, context=600) as llama:
        actual_V = llama.next_token_probabilities(tokens(512)[0].tolist()).astype(np.float64)
    assert float(np.sum(expected_V * np.log(expected_V / np.maximum(actual_V, 1e-30)))) < 2e-4


@pytest.mark.parametrize(
    ("fields", "tables", "message"),
    [
        (
            {"rope.scaling.type": string("yarn"), "rope.scaling.factor": f32(4.0)},
            ["rope_freqs.weight"],
            "is yarn beside",
        ),
        ({}, [BY_LENGTH[1]], r"rope_factors_short\.weight: is missing, and its twin"),
        ({"rope.scaling.type": string("ntk"), "rope.scaling.factor": f32(4.0)}, [], "scaling.type: is ntk"),
    ],
)
def test_scaling_that_no_folder_can_say_is_refused_before_work(
    fields: dict[str, Field], tables: list[str], message: str, tmp_path: Path
) -> None:
    model = open_model(save_model(random_model(CONFIGS["llama"]), tmp_path / "model", TOKENIZER))
    metadata = {**model.metadata, **{f"llama.{key}": field for key, field in fields.items()}}
    tensors = (*model.tensors, *(constant(name, FACTORS) for name in tables))
    gguf = write_gguf(replace(model, metadata=metadata, tensors=tensors), tmp_path / "model.gguf")
    with pytest.raises(DitherError, match=message):
        dither.convert(gguf, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob("*.part*"))
