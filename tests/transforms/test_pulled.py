"""Output Hessians through rewriting: those of the rewritten model, whose blocks are traced here.

Token weights are what one pleases, so the sums compared are Σ c g gᵀ with the same c before and after.

Legend: R rows, C columns, N tokens, E experts, K diagonal blocks of O rows, S sequences, T tokens, H width.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from families_util import random_model, save_model
from transformers import LlamaConfig, MixtralConfig, Phi3Config, PreTrainedConfig, Qwen3MoeConfig
from transforms_util import everything_as, made_up_evidence

from dither.models.arch import feeds
from dither.models.blocks import open_blocks
from dither.models.source import open_model
from dither.transforms.awq import Awq
from dither.transforms.orthogonal import Orthogonal
from dither.transforms.rewrite import put_out
from dither.transforms.rotate import Rotate, turned_output
from dither.types import Evidence, EvidenceSource, Model

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama with head_dim, biases": LlamaConfig(**SMALL, head_dim=32, attention_bias=True, mlp_bias=True),
    "phi-3": Phi3Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
}
pytestmark = pytest.mark.usefixtures("one_thread")
Outputs = dict[tuple[str, int], np.ndarray]  # (matrix, expert) → Σ c g gᵀ (R, R), float64
Open = Callable[[str], Model]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    made: dict[str, Model] = {}

    def find(name: str) -> Model:
        if name not in made:
            made[name] = open_model(save_model(random_model(CONFIGS[name]), tmp_path_factory.mktemp("model")))
        return made[name]

    return find


def outputs_of(model: Model, turn: np.ndarray | None = None) -> Outputs:
    """What a random pull at the last block's output does at every matrix of all blocks.

    `turn` is the rotation of the model's residual stream, in which the pull must be told.
    """
    blocks = open_blocks(model)
    tokens_ST = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    states = [blocks.embed(tokens_ST)]
    for index in range(blocks.count):
        states.append(blocks.load(index)(states[-1]))
    back_STH = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(3))
    if turn is not None:
        back_STH = (back_STH.double() @ torch.from_numpy(turn)).float()
    weight_N = torch.rand(tokens_ST.numel(), generator=torch.Generator().manual_seed(4))
    found: dict[tuple[str, int], torch.Tensor] = defaultdict(lambda: torch.zeros(()))

    def see(names: object, x_NC: object, position_N: torch.Tensor, expert: int | None, pull: object) -> None:
        for name, g_NR in pull.gradients.items():  # type: ignore[attr-defined]
            g_NR = g_NR.double()
            product_RR = (g_NR * weight_N[position_N, None]).T @ g_NR
            found[name, expert or 0] = found[name, expert or 0] + product_RR

    for index in reversed(range(blocks.count)):
        back_STH = blocks.load(index).trace(states[index], back_STH, see)
    return {key: sums_RR.numpy() for key, sums_RR in found.items()}


def with_outputs(base: EvidenceSource, outputs: Outputs, parts: int = 1) -> EvidenceSource:
    def find(tensor: str, expert: int = 0) -> Evidence | None:
        seen = base(tensor, expert)
        if seen is None or (tensor, expert) not in outputs:
            return seen
        return dataclasses.replace(seen, output_KOO=blocks_of(outputs[tensor, expert], parts))

    return find


def blocks_of(sums_RR: np.ndarray, parts: int) -> np.ndarray:
    size = len(sums_RR) // parts
    cut = [sums_RR[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(parts)]
    return np.stack(cut).astype(np.float32)


def assert_same(found: np.ndarray | None, expected: np.ndarray, name: object) -> None:
    assert found is not None and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(np.abs(expected).max()), err_msg=str(name))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_outputs_are_pulled_at_as_in_the_scaled_model(name: str, parts: int, opened: Open) -> None:
    model = opened(name)
    before = outputs_of(model)
    source = with_outputs(made_up_evidence(model), before, parts)
    done = Awq(feeds(model.arch))(model, source, everything_as("Q4_0"))
    after = outputs_of(done.model)
    changed = set()
    for (tensor, expert), sums_RR in after.items():
        seen = done.evidence(tensor, expert)
        assert seen is not None
        assert_same(seen.output_KOO, blocks_of(sums_RR, parts), (tensor, expert))
        if np.abs(sums_RR / np.abs(sums_RR).max() - (b := before[tensor, expert]) / np.abs(b).max()).max() > 0.01:
            changed.add(tensor.split(".")[2])
    values = {"attn_qkv"} if name == "phi-3" else {"attn_v"}
    assert changed == values | {"ffn_up_exps" if "ffn_up_exps" in {t.split(".")[2] for t, _ in after} else "ffn_up"}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_turned_outputs_are_pulled_at_as_in_the_turned_model(name: str, parts: int, opened: Open) -> None:
    """Of diagonal blocks the turned ones are made as if there was nothing beside them."""
    model = opened(name)
    before = outputs_of(model)
    done = Rotate(feeds(model.arch), seed=9)(
        model, with_outputs(made_up_evidence(model), before, parts), everything_as("Q4_0")
    )
    q_HH = Orthogonal(64, 9).matrix()
    after = outputs_of(done.model, q_HH)
    writers = 0
    for (tensor, expert), sums_RR in after.items():
        seen = done.evidence(tensor, expert)
        assert seen is not None
        expected_KOO = blocks_of(sums_RR, parts)
        if "attn_output" in tensor or "ffn_down" in tensor:
            writers += 1
            assert np.abs(expected_KOO - blocks_of(before[tensor, expert], parts)).max() > 0.05 * expected_KOO.max()
            if parts > 1:
                known_RR = np.zeros_like(sums_RR)
                for k in range(parts):
                    at = slice(k * 64 // parts, (k + 1) * 64 // parts)
                    known_RR[at, at] = before[tensor, expert][at, at]
                expected_KOO = blocks_of(q_HH.T @ known_RR @ q_HH, parts)
            assert np.array_equal(seen.output_KOO, np.swapaxes(seen.output_KOO, 1, 2))
        assert_same(seen.output_KOO, expected_KOO, (tensor, expert))
    assert writers == (10 if "moe" in name or name == "mixtral" else 4)


def test_layers_that_share_an_input_keep_outputs_of_their_own(opened: Open) -> None:
    model = opened("llama with head_dim, biases")
    outputs = outputs_of(model)
    for transform in (Awq(feeds("llama")), Rotate(feeds("llama"))):
        done = transform(model, with_outputs(made_up_evidence(model), outputs), everything_as("Q4_0"))
        gate, up = (done.evidence(f"blk.0.ffn_{part}.weight") for part in ("gate", "up"))
        assert gate is not None and up is not None
        assert gate.hessian_CC is not None and gate.output_KOO is not None and up.output_KOO is not None
        assert np.abs(gate.output_KOO - up.output_KOO).max() > 0.1 * gate.output_KOO.max()


def test_rows_multiplied_are_pulled_at_by_the_inverse() -> None:
    """Of one expert among three, in two diagonal blocks."""
    random = np.random.default_rng(0)
    g_TR, s_R = random.standard_normal((50, 8)), random.lognormal(0, 1, 24)
    seen = Evidence(1, np.ones(4, np.float32), output_KOO=blocks_of(g_TR.T @ g_TR, 2))
    pulled_TR = g_TR / s_R[8:16]
    found = put_out(seen, s_R.astype(np.float32), 1)
    assert found.output_KOO is not None and found.mean_square_C is seen.mean_square_C
    np.testing.assert_allclose(found.output_KOO, blocks_of(pulled_TR.T @ pulled_TR, 2), rtol=1e-5)


def test_turned_outputs_are_those_of_turned_gradients() -> None:
    g_TR = np.random.default_rng(1).standard_normal((50, 96))
    rotation = Orthogonal(96, 5)
    turned_TR = g_TR @ rotation.matrix()
    found_KOO = turned_output((g_TR.T @ g_TR).astype(np.float32)[None], rotation)
    np.testing.assert_allclose(found_KOO[0], turned_TR.T @ turned_TR, atol=1e-3)
