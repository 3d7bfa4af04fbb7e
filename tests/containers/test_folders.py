"""Folders for GPU engines: what we write, the real loaders compute with.

The independent reference is transformers with the real backend of each format (compressed-tensors,
bitsandbytes, gptqmodel): its logits are held against those of a dense model of the weights that we decode.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import NASTY, byte_level_tokenizer, random_model, save_model, split_chain
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import dither
from dither.errors import OutputError, UsageError
from dither.models.arch.written import written
from dither.models.tokenizers import pre

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
pytestmark = [
    pytest.mark.slow,  # loads models with transformers
    pytest.mark.filterwarnings("ignore"),  # the backends' own
]
transformers.logging.set_verbosity_error()

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases, tied": LlamaConfig(
        **SMALL, head_dim=64, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=64, tie_word_embeddings=True),
    "phi-3": Phi3Config(**SMALL),
    "gemma 3": Gemma3TextConfig(**SMALL, head_dim=64, sliding_window=16, query_pre_attn_scalar=64),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True
    ),
}
TOKENIZER = byte_level_tokenizer(split_chain(pre.QWEN2), size=300)  # which transformers' Qwen2 has whatever is said
DENSE = [name for name in CONFIGS if name not in ("mixtral", "qwen3 moe")]
BACKENDS = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "w4a16": "compressed_tensors", "w8a16": "compressed_tensors",
    "w8a8": "compressed_tensors", "fp8": "compressed_tensors", "mxfp4": "compressed_tensors",
    "nvfp4": "compressed_tensors", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes",
    "fp8-block": "torch", "safetensors": "torch",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"gptq": {"group": 32}, "awq": {"group": 32}, "w4a16": {"group": 32}}
# Of the logits' own spread: what float16 scales under float32 sums, and rounded activations, may do.
CLOSE = {
    "w8a8": 0.06,
    "fp8": 0.12,
    "int8": 0.06,
    **dict.fromkeys(("gptq", "awq", "fp8-block", "mxfp4", "nvfp4"), 0.02),  # bfloat16 kernels
}
BRAIN = {"fp8-block", "mxfp4", "nvfp4"}  # de-quantized to bfloat16 by their loaders, whatever is asked for
TOKENS = torch.tensor([[(37 * i) % 290 + 2 for i in range(48)]])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: save_model(random_model(config), folder / name.replace(" ", "-").replace(",", ""), TOKENIZER)
        for name, config in CONFIGS.items()
    }


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits[0].float()
    return found


def stored(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_come_back_as_they_were(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    dither.convert(checkpoints[name], tmp_path / "out")
    original, copy = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoints[name], tmp_path / "out"))
    ours = dict(copy.named_parameters())
    for parameter, values in original.named_parameters():
        assert torch.equal(ours[parameter].float(), values.bfloat16().float()), parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_becomes_a_checkpoint(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    dither.quantize(checkpoints[name], "F32", tmp_path / "model.gguf")
    dither.convert(tmp_path / "model.gguf", tmp_path / "back", dtype="f32")
    original, back = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoints[name], tmp_path / "back"))
    with torch.no_grad():
        expected, found = original(TOKENS).logits, back(TOKENS).logits
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.std()))
    ours = AutoTokenizer.from_pretrained(tmp_path / "back")
    theirs = Tokenizer.from_file(str(checkpoints[name] / "tokenizer.json"))  # transformers' class may have its own idea
    for text in ("The harbour woke: 12 crates, it's naïve.", *NASTY):
        assert ours(text)["input_ids"] == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("name", "to"),
    [(DENSE[0], to) for to in BACKENDS]
    + [(name, to) for name in DENSE[1:] for to in ("gptq", "w4a16", "nf4", "fp8-block")],
)
def test_the_real_loader_computes_what_we_decode(
    name: str, to: str, checkpoints: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip(BACKENDS[to])
    if BACKENDS[to] == "bitsandbytes":
        request.getfixturevalue("wide_bitsandbytes")
    stored = "BF16" if to in BRAIN else "F32"
    result = dither.quantize(checkpoints[name], to, tmp_path / to, dtype=stored, **OPTIONS.get(to, {}))
    dither.convert(tmp_path / to, tmp_path / "dense", dtype="f32")
    dtype = torch.bfloat16 if to in BRAIN else torch.float32
    expected, found = logits(tmp_path / "dense", dtype), logits(tmp_path / to, dtype)
    spread = float(expected.std())
    assert float((found - expected).abs().mean()) < CLOSE.get(to, 0.004) * spread
    if to != "safetensors":
        assert float((expected - logits(checkpoints[name])).abs().mean()) > 1e-3 * spread, "nothing was rounded"
        assert result.bits_per_weight < 24


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
@pytest.mark.parametrize("to", ["w4a16", "gptq", "awq"])
def test_experts_are_written_one_by_one(name: str, to: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Each under its own module, as vLLM reads them; routers stay numbers."""
    dither.quantize(checkpoints[name], to, tmp_path / "q", group=32)
    packed = "weight_packed" if to == "w4a16" else "qweight"
    names = stored(tmp_path / "q")
    experts = [n for n in names if ".experts." in n and n.endswith(packed)]
    assert len(experts) == 2 * 4 * 3
    assert not any(("mlp.gate." in n or "block_sparse_moe.gate." in n) and n.endswith(packed) for n in names)
    dither.convert(tmp_path / "q", tmp_path / "dense", dtype="f32")
    opened, dense = dither.open_model(tmp_path / "q"), dither.open_model(tmp_path / "dense")
    for one, other in zip(opened.tensors, dense.tensors, strict=True):
        assert np.array_equal(one.read(0, one.rows), other.read(0, other.rows)), one.name


def test_shards_have_an_index(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.containers.folders.output.SHARD", 200_000)
    dither.convert(checkpoints["llama"], tmp_path / "out", dtype="f32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored(tmp_path / "out").values())
    assert torch.equal(logits(tmp_path / "out"), logits(checkpoints["llama"]))


def test_names_and_shapes_are_those_of_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    for name, folder in checkpoints.items():
        if name in ("mixtral", "qwen3 moe"):
            continue  # transformers saves experts in names of its own
        _, entries = written(dither.open_model(folder))
        found = {entry.name: entry.shape for entry in entries}
        expected = {tensor: array.shape for tensor, array in stored(folder).items()}
        assert found == expected, name


def test_a_group_that_does_not_fit_is_smaller_or_said(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    result = dither.quantize(
        save_model(random_model(LlamaConfig(**SMALL | {"intermediate_size": 192})), tmp_path / "odd"),
        "gptq",
        tmp_path / "q",
        group=128,
    )
    kinds = {tensor.name: tensor.type for tensor in result.plan.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "int4-g64" and kinds["blk.0.ffn_up.weight"] == "int4-g128"
    assert any("192 columns" in note for note in result.notes)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"]["+:^model\\.layers\\.0\\.mlp\\.down_proj$"] == {"bits": 4, "group_size": 64}
    result = dither.quantize(tmp_path / "odd", "gptq", tmp_path / "one")  # nobody asked for 128
    assert {tensor.type for tensor in result.plan.tensors} - {"F32"} == {"int4-g64"}
    assert any("192 columns" in note for note in result.notes)


def test_blocks_that_bitsandbytes_has_not_are_not_written(tmp_path: Path) -> None:
    """160 columns are five blocks of 32, and no whole blocks of 64."""
    odd = save_model(random_model(LlamaConfig(**SMALL | {"intermediate_size": 160})), tmp_path / "odd")
    result = dither.quantize(odd, "nf4", tmp_path / "q", dtype="BF16")
    kinds = {tensor.name: tensor.type for tensor in result.plan.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "nf4-g64-dq" and kinds["blk.0.ffn_down.weight"] == "BF16"
    assert any("160 columns" in note for note in result.notes)


def test_nvfp4_by_name_has_a_scale_of_each_tensor_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    asked = [("ffn_up", "nvfp4")]
    result = dither.quantize(checkpoints["llama"], "w4a16", tmp_path / "q", tensors=asked, dtype="BF16")
    kinds = {tensor.name: tensor.type for tensor in result.plan.tensors}
    assert re.fullmatch(r"nvfp4-e\d+", kinds["blk.0.ffn_up.weight"])
    assert kinds["blk.0.ffn_gate.weight"] == "int4-g128-bf16"
    [said] = [note for note in result.notes if "vLLM" in note]
    assert "blk.0.ffn_gate.weight, blk.0.ffn_up.weight have different types" in said


def test_matrices_that_are_computed_as_one_share_nvfp4s_scale(tmp_path: Path) -> None:
    """A server takes one scale for the stack: each part under its own would be off by a power of two."""
    model = random_model(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= 16
    model = model.to(torch.bfloat16)  # type: ignore[assignment]
    dither.quantize(save_model(model, tmp_path / "m"), "nvfp4", tmp_path / "q")
    stored = {name: value for file in (tmp_path / "q").glob("*.safetensors") for name, value in load_file(file).items()}
    scales = {name: float(value) for name, value in stored.items() if name.endswith("weight_global_scale")}
    for stack in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert len({s for name, s in scales.items() if ".0." in name and any(p in name for p in stack)}) == 1
    assert (
        scales["model.layers.0.self_attn.v_proj.weight_global_scale"]
        < (scales["model.layers.1.self_attn.v_proj.weight_global_scale"])
    )
    written = {t.name: t for t in dither.open_model(tmp_path / "q").tensors}
    for tensor in dither.open_model(tmp_path / "m").tensors:
        if "attn_" in tensor.name and len(tensor.shape) > 1:
            original = tensor.read(0, tensor.rows)
            error = np.abs(written[tensor.name].read(0, tensor.rows) - original)
            assert error.max() < 0.2 * np.abs(original).max(), tensor.name


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("awq", {"bits": 3}, "AWQ is 4 bits"),
        ("gptq", {"bits": 5}, "is not one of 2, 3, 4 and 8"),
        ("fp8", {"bits": 4}, "has one already"),
        ("nf4", {"group": 48}, "is no block of bitsandbytes"),
        ("Q4_K_M", {"group": 64}, "is for the GPU formats"),
        ("gptq", {"tensors": [("attn_q", "Q4_K")]}, "GPTQ holds integers"),
        ("gptq", {"tensors": [("attn_q", "uint4-g128")]}, "cannot stand in one GPTQ file"),
        ("awq", {"output_type": "Q8_0"}, "are for GGUF"),
    ],
)
def test_what_a_container_cannot_hold_is_an_error(
    to: str, options: dict[str, Any], reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        dither.quantize(checkpoints["llama"], to, tmp_path / "q", **options)
    assert not list(tmp_path.iterdir())


def test_folders_are_replaced_with_care(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "q"
    dither.quantize(checkpoints["llama"], "w8a16", out)
    with pytest.raises(OutputError, match="exists already"):
        dither.quantize(checkpoints["llama"], "w4a16", out)
    dither.quantize(checkpoints["llama"], "w4a16", out, group=32, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
    (out / "thesis.doc").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.doc, which is no part of a model"):
        dither.quantize(checkpoints["llama"], "w8a16", out, force=True)
    assert (out / "thesis.doc").read_text() == "years of work"
    with pytest.raises(OutputError):
        dither.quantize(checkpoints["llama"], "w4a16", checkpoints["llama"], force=True)
