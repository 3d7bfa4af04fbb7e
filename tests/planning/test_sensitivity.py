"""One tensor's divergence against the whole model in transformers, float64, with that one tensor replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families_util import random_model, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import dither
from conftest import BUNDLED
from dither.measuring.sensitivity import FORWARD_TOKENS, affordable, by_block, divergences
from dither.measuring.text import Sequences, pack
from dither.models.blocks import open_blocks
from dither.progress import Silent

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_down_exps": "mlp.experts.down_proj",
}  # fmt: skip


def text_of(vocabulary: int, lengths: tuple[int, ...] = (40, 33, 17)) -> Sequences:
    rng = np.random.default_rng(3)
    return pack([rng.integers(2, vocabulary, length).tolist() for length in lengths], "random", 0)


def parameter(name: str) -> str:
    """Transformers' name of a GGUF's tensor, in a Llama or a Mixtral."""
    if name.startswith("blk."):
        _, block, kind, _ = name.split(".")
        suffix = "" if kind.endswith("_exps") else ".weight"
        return f"model.layers.{block}.{LAYER[kind]}{suffix}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}[name]


def rows_of_transformers(name: str, w: np.ndarray, heads: Mapping[str, int]) -> np.ndarray:
    """llama.cpp keeps the halves of each rotary pair side by side, transformers one after the other."""
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    if kind in heads:
        half = len(w) // heads[kind] // 2
        w = w.reshape(heads[kind], half, 2, -1).swapaxes(1, 2).reshape(w.shape)
    return w


def expected(folder: Path, probe: dither.types.Model, names: list[str], text: Sequences) -> dict[str, float]:
    """Mean KL divergence over the second half of every sequence, each sequence on its own."""
    tensors = {tensor.name: tensor for tensor in probe.tensors}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    config, state = model.config, model.state_dict()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def log_probabilities() -> torch.Tensor:
        parts = []
        for row, length in zip(text.tokens_ST, text.lengths_S, strict=True):
            logits_TV = model(torch.from_numpy(row[:length].astype(np.int64))[None]).logits[0]
            parts.append(torch.log_softmax(logits_TV.double(), -1)[length // 2 : length - 1])
        return torch.cat(parts)

    found = {}
    with torch.no_grad():
        p = log_probabilities()
        for name in names:
            tensor, weight = tensors[name], state[parameter(name)]
            kept = weight.clone()
            w = rows_of_transformers(name, tensor.read(0, tensor.rows).reshape(tensor.shape), heads)
            weight.copy_(torch.from_numpy(np.array(w, np.float64)))
            q = log_probabilities()
            weight.copy_(kept)
            found[name] = float((p.exp() * (p - q)).sum(-1).mean())
    return found


def measured(folder: Path, probe: Path, names: list[str], text: Sequences) -> list[dict[str, float]]:
    heard: list[dict[str, float]] = []
    network = open_blocks(dither.open_model(folder))
    opened = dither.open_model(probe)
    divergences(network, opened, names, text, lambda found: heard.append(dict(found)), Silent())
    return heard


NAMES = {
    "tied": ["token_embd.weight", "blk.0.attn_q.weight", "blk.3.attn_k.weight", "blk.3.ffn_down.weight"],
    "untied": ["token_embd.weight", "output.weight", "blk.0.ffn_gate.weight", "blk.1.attn_output.weight"],
    "experts": ["output.weight", "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight", "blk.1.ffn_down_exps.weight"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_detour_costs_what_replacing_one_tensor_costs(kind: str, tmp_path: Path) -> None:
    if kind == "tied":
        folder, to = BUNDLED, "Q3_K_S"
    else:
        config = LlamaConfig(**SIZES) if kind == "untied" else MixtralConfig(**SIZES, num_local_experts=4)
        folder, to = save_model(random_model(config), tmp_path / "model"), "Q4_0"
    dither.quantize(folder, to, tmp_path / "probe.gguf", pure=kind != "tied")
    text = text_of(4000 if kind == "tied" else 300)
    heard = measured(folder, tmp_path / "probe.gguf", NAMES[kind], text)
    found = {name: value for group in heard for name, value in group.items()}
    right = expected(folder, dither.open_model(tmp_path / "probe.gguf"), NAMES[kind], text)
    assert min(right.values()) > 1e-5, "nothing that a tensor left out would not show as well"
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in right.items()}
    # Heard of as soon as they are final: those outside blocks, then block by block.
    assert [set(group) for group in heard] == [set(group) for group in by_block(NAMES[kind]).values()]


def test_a_tensor_that_is_the_same_costs_nothing(tmp_path: Path) -> None:
    dither.quantize(BUNDLED, "BF16", tmp_path / "same.gguf")  # what the model is stored in
    heard = measured(BUNDLED, tmp_path / "same.gguf", ["blk.1.ffn_up.weight"], text_of(4000))
    assert heard == [{"blk.1.ffn_up.weight": pytest.approx(0, abs=1e-12)}]


def test_groups_are_those_outside_blocks_then_blocks_by_number() -> None:
    names = ["blk.10.a", "token_embd.weight", "blk.2.b", "output.weight", "blk.2.a"]
    assert list(by_block(names).items()) == [
        (None, ("token_embd.weight", "output.weight")),
        (2, ("blk.2.b", "blk.2.a")),
        (10, ("blk.10.a",)),
    ]


@pytest.mark.parametrize(("tensors", "kept"), [(1, 5), (100, 5), (3277, 1), (10**6, 1), (1100, 2)])
def test_many_tensors_are_measured_on_less_text(tensors: int, kept: int) -> None:
    text = text_of(300, (100, 150, 80, 60, 40))
    less = affordable(text, tensors)
    assert less.lengths_S.tolist() == [100, 150, 80, 60, 40][:kept]
    assert np.array_equal(less.tokens_ST, text.tokens_ST[:kept])
    assert less.tokens * tensors <= FORWARD_TOKENS or kept == 1
