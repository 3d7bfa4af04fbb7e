"""The tables of what llama.cpp's graphs take, against llama.cpp's own loader.

A tiny GGUF of each family is written with a tensor more or a tensor less; whether llama.cpp loads it must be what the
table says.  The loader counts tensors, so one that it does not create shows as surely as one that is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import xllamacpp
from families_util import opened, random_model, save_model, write_gguf
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from dither.engines import llama_start, llamacpp
from dither.engines.llama_start import EngineError
from dither.engines.settings import Settings
from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import in_every_block
from dither.models.arch import families
from dither.models.arch.conversion import constant
from dither.models.arch.graph import check_graph
from dither.models.source import open_model
from dither.types import Model, Tensor

pytestmark = pytest.mark.slow  # loads some hundred files

transformers.logging.set_verbosity_error()
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama longrope": LlamaConfig(**SMALL, rope_parameters=LONG),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "gemma 2": Gemma2Config(**SMALL, head_dim=32, query_pre_attn_scalar=32),
    "gemma 3": Gemma3TextConfig(**SMALL, head_dim=32, query_pre_attn_scalar=32, layer_types=["sliding_attention"] * 2),
    "phi-3": Phi3Config(**SMALL),
    "smollm3": SmolLM3Config(**SMALL, tie_word_embeddings=True),
}
LIKELY = (
    *(f"blk.*.{kind}.bias" for kind in (
        "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_norm", "ffn_norm", "ffn_gate", "ffn_up",
        "ffn_down", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
    )),
    *(f"blk.*.{kind}.weight" for kind in ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")),
    "blk.*.ffn_down.scale", "blk.*.attn_output.input_scale", "blk.*.ffn_up_exps.scale", "blk.*.attn_norm.scale",
    "output.weight", "output.bias", "output_norm.bias", "cls.output.weight", "rope_freqs.weight",
    "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("graphs")
    return {name: open_model(save_model(random_model(config), folder / name)) for name, config in CONFIGS.items()}


def loads(model: Model, path: Path) -> bool:
    """Whether llama.cpp loads the model, said by llama.cpp."""
    write_gguf(model, path)
    try:
        opened(path, context=16).close()
    except EngineError:
        return False
    return True


@pytest.fixture(autouse=True)
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that fails is otherwise repeated, to catch what llama.cpp says of it."""

    def start(path: Path, asked: Settings, key: str) -> Any:
        try:
            return xllamacpp.Server(llama_start._parameters(path, asked, key))
        except RuntimeError as error:
            raise EngineError(str(path), str(error)) from None

    monkeypatch.setattr(llamacpp, "start", start)


def is_taken(model: Model) -> bool:
    try:
        check_graph(model, families())
    except (SourceError, UnsupportedError):
        return False
    return True


def shape_of(kind: str, model: Model) -> tuple[int, ...]:
    """The shape that llama.cpp gives a tensor wherever it takes it."""
    shapes = {in_every_block(tensor.name): tensor.shape for tensor in model.tensors}
    query, key = shapes.get("blk.*.attn_q.weight", (64,))[0], shapes.get("blk.*.attn_k.weight", (32,))[0]
    stem = kind.rpartition(".")[0]
    if kind.endswith("scale"):
        return (4,) if "_exps" in kind else (1,)
    if stem.endswith("attn_qkv"):
        return (query + 2 * key,)
    if "_norm" in kind and ("attn_q_norm" in kind or "attn_k_norm" in kind):
        return (query // 4,)
    if "rope" in kind:
        return (query // 8,)
    if kind in ("output.weight", "output.bias"):
        return (300, 64)[: 2 if kind.endswith("weight") else 1]
    if kind == "cls.output.weight":
        return (1, 64)
    weight = shapes.get(f"{stem}.weight")
    return (64,) if weight is None else weight[:-1] or weight


def with_one_more(model: Model, kind: str) -> Model:
    shape = shape_of(kind, model)
    names = [kind.replace("*", str(block)) for block in range(2)] if "*" in kind else [kind]
    more = [extra(name, shape) for name in names]
    return replaced(model, (*model.tensors, *more))


def extra(name: str, shape: tuple[int, ...]) -> Tensor:
    flat = constant(name, np.full(int(np.prod(shape)), 0.5, np.float32))
    columns = shape[-1]

    def read(start: int, stop: int) -> Any:
        return flat.read(0, 1).reshape(-1, columns)[start:stop]

    return Tensor(name, shape, "F32", flat.stored_bytes, read)


def replaced(model: Model, tensors: tuple[Tensor, ...]) -> Model:
    return dataclasses.replace(model, tensors=tensors)


def without(model: Model, kinds: Iterable[str]) -> list[str]:
    """Those of some kinds that a model has not."""
    here = {in_every_block(tensor.name) for tensor in model.tensors}
    return [kind for kind in kinds if kind not in here]


def one_less(model: Model) -> Iterator[tuple[str, Model]]:
    for kind in dict.fromkeys(in_every_block(tensor.name) for tensor in model.tensors):
        yield kind, replaced(model, tuple(t for t in model.tensors if in_every_block(t.name) != kind))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loads_with_all_that_the_table_has(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    model = models[name]
    assert is_taken(model)
    for kind in without(model, LIKELY):
        more = with_one_more(model, kind)
        model = more if is_taken(more) else model
    assert len(model.tensors) > len(models[name].tensors)
    assert is_taken(model) and loads(model, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", CONFIGS)
def test_no_file_loads_with_what_it_has_not(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    more = {kind: with_one_more(models[name], kind) for kind in without(models[name], LIKELY)}
    refused = {kind: model for kind, model in more.items() if not is_taken(model)}
    assert refused
    assert [kind for kind, model in refused.items() if loads(model, tmp_path / "model.gguf")] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_no_file_loads_without_what_it_needs(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    needed = {kind: model for kind, model in one_less(models[name]) if not is_taken(model)}
    needed.pop("blk.*.attn_qkv.weight", None)  # which llama.cpp loads, and then ends the process
    assert "blk.*.attn_norm.weight" in needed
    assert [kind for kind, model in needed.items() if loads(model, tmp_path / "model.gguf")] == []
