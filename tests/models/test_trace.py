"""Gradients traced back through blocks and head, against transformers' autograd and finite differences.

Legend: S sequences, T tokens, H hidden width, V vocabulary, N tokens of all sequences, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_blocks import CONFIGS, FUSED, MODULES, Save, assert_close, hidden_after, saved, some_tokens, stored, watched
from transformers import PreTrainedModel

from dither.measuring.backward import first_of_turn, kept_per_token
from dither.models.blocks import Block, Blocks, block as block_module, open_blocks
from dither.models.source import open_model

__all__ = ["saved"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")

PERMUTED = {"llama", "mistral", "mixtral", "smollm3"}  # rotated pairs side by side in GGUF
EXPERTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}


def probe(hidden_STH: torch.Tensor) -> torch.Tensor:
    return torch.randn(hidden_STH.shape, generator=torch.Generator().manual_seed(11))


def traced(block: Block, hidden_STH: torch.Tensor, back_STH: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    calls: list[Any] = []
    return block.trace(hidden_STH, back_STH, lambda *call: calls.append(call)), calls


def through_transformers(
    model: PreTrainedModel, tokens_ST: torch.Tensor, back_STH: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of <back, layer 1's output> by its input and by each of its parameters."""
    layer = model.get_submodule("model.layers.1")
    kept: dict[str, torch.Tensor] = {}

    def enter(_module: Any, args: Any, kwargs: Any) -> None:
        kept["input"] = args[0] if args else kwargs["hidden_states"]

    def leave(_module: Any, _args: Any, output: Any) -> None:
        kept["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
    model(tokens_ST)
    for hook in hooks:
        hook.remove()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found, *gradients = torch.autograd.grad(kept["output"], [kept["input"], *parameters], back_STH)
    return found, dict(zip(names, gradients, strict=True))


def expected_gradient(model: PreTrainedModel, gradients: Mapping[str, torch.Tensor], leaf: str) -> torch.Tensor:
    """A matrix's gradient, looked up among transformers' own and brought into GGUF's order of rows."""
    kind = model.config.model_type
    if leaf in EXPERTS:
        if leaf == "ffn_down_exps":
            return gradients["mlp.experts.down_proj"]
        gate_ERC, up_ERC = gradients["mlp.experts.gate_up_proj"].chunk(2, dim=1)
        return gate_ERC if leaf == "ffn_gate_exps" else up_ERC
    modules = FUSED if kind == "phi3" else MODULES
    gradient = gradients[f"{modules[leaf]}.weight"]
    return stored(gradient, leaf) if kind in PERMUTED else gradient


def products(block: Block, calls: list[Any]) -> dict[str, torch.Tensor]:
    """Σ_n g_n x_nᵀ of every matrix, from what was reported."""
    found = {name: torch.zeros_like(block.weight(name)) for name in block.names}
    for names, x_NC, _, expert, pull in calls:
        assert list(pull.gradients) == list(names)
        for name, g_NR in pull.gradients.items():
            target_RC = found[name] if expert is None else found[name][expert]
            target_RC += g_NR.T @ x_NC
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_transformers(name: str, saved: Save) -> None:
    """That of the input, and Σ g xᵀ of every matrix, which is its gradient: rows in the right order."""
    folder, model = saved(name)
    blocks = open_blocks(open_model(folder))
    hidden_STH = hidden_after(blocks, some_tokens(), 1)
    back_STH = probe(hidden_STH)
    block = blocks.load(1)
    found_STH, calls = traced(block, hidden_STH, back_STH)
    expected_STH, gradients = through_transformers(model, some_tokens(), back_STH)
    assert_close(found_STH, expected_STH, 1e-4)
    for matrix, product in products(block, calls).items():
        assert_close(product, expected_gradient(model, gradients, matrix.split(".")[2]), 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_weights_moves_the_loss_by_what_was_reported(name: str, saved: Save) -> None:
    """Central differences of <back, output>, each matrix moved in GGUF's order of rows by `set_weight`."""
    blocks = open_blocks(open_model(saved(name)[0]))
    hidden_STH = hidden_after(blocks, some_tokens(2, 40), 1)
    back_STH = probe(hidden_STH)
    block = blocks.load(1)
    _, calls = traced(block, hidden_STH, back_STH)
    reported = products(block, calls)
    generator = torch.Generator().manual_seed(5)
    for matrix in block.names:
        if matrix.endswith("ffn_gate_inp.weight"):
            continue  # a token that goes to another expert is a jump
        w = block.weight(matrix)
        # A direction that the loss feels: the gradient itself, with half as much noise.
        noise = torch.randn(w.shape, generator=generator)
        direction = reported[matrix] / reported[matrix].norm() + 0.5 * noise / noise.norm()
        step = 1e-3 * float(w.norm())
        losses = []
        for sign in (1, -1):
            block.set_weight(matrix, w + sign * step * direction)
            losses.append(float((back_STH.double() * block(hidden_STH).double()).sum()))
        block.set_weight(matrix, w)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((reported[matrix] * direction).sum()), rel=0.02), matrix


@pytest.mark.parametrize("name", ["llama", "phi-3", "qwen3 moe", "gemma 2"])
def test_tracing_sees_the_inputs_that_watching_sees(name: str, saved: Save) -> None:
    blocks = open_blocks(open_model(saved(name)[0]))
    hidden_STH = hidden_after(blocks, some_tokens(), 1)
    block = blocks.load(1)
    _, calls = traced(block, hidden_STH, probe(hidden_STH))
    _, seen = watched(block, hidden_STH)
    assert len(calls) == len(seen)
    for (names, x_NC, position_N, expert, pull), expected in zip(calls, seen, strict=True):
        assert (names, expert) == (expected[0], expected[3])
        assert torch.equal(x_NC, expected[1]) and torch.equal(position_N, expected[2])
        squares = [g_NR.double().square().sum(dim=1) for g_NR in pull.gradients.values()]
        assert_close(pull.weight_N.double(), torch.stack(squares).sum(dim=0))
        assert not pull.apart
    assert not any(x.requires_grad for call in calls for x in (call[1], *call[4].gradients.values()))


def test_no_gradient_comes_from_what_follows_or_from_other_sequences(saved: Save) -> None:
    """A loss at position 30 of one sequence pulls at nothing behind it, and at nothing of the other."""
    blocks = open_blocks(open_model(saved("llama")[0]))
    hidden_STH = hidden_after(blocks, some_tokens(), 1)
    back_STH = torch.zeros_like(hidden_STH)
    back_STH[0, 30] = 1
    found_STH, calls = traced(blocks.load(1), hidden_STH, back_STH)
    assert not found_STH[0, 31:].any() and not found_STH[1].any()
    assert found_STH[0, :31].abs().amax(dim=1).min() > 0
    for names, _, _, _, pull in calls:
        pulled_ST = pull.weight_N.reshape(hidden_STH.shape[:2]) > 0
        first = 0 if "blk.1.attn_k.weight" in names else 30
        assert pulled_ST[0, first:31].all() and int(pulled_ST.sum()) == 31 - first


def head_of(saved: Save, name: str) -> tuple[Blocks, PreTrainedModel, torch.Tensor]:
    folder, model = saved(name)
    blocks = open_blocks(open_model(folder))
    return blocks, model, hidden_after(blocks, some_tokens(2, 24), blocks.count)


def drawn(
    blocks: Blocks, hidden_STH: torch.Tensor, valid_ST: torch.Tensor, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]:
    """The gradient by the hidden states, g_NV, the drawn tokens as g tells them, and the calls."""
    calls: list[Any] = []
    draw = torch.Generator().manual_seed(seed)
    back_STH = blocks.head().trace(hidden_STH, valid_ST, draw, lambda *call: calls.append(call))
    [name] = blocks.head().names
    g_NV = torch.cat([call[4].gradients[name] for call in calls])
    return back_STH, g_NV, g_NV.argmax(dim=1), calls  # one-hot(y) − p is positive at y alone


def log_likelihood(model: PreTrainedModel, hidden_STH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own norm, output matrix and softcap in float64: (z before the softcap, log p)."""
    z_STV = model.lm_head.double()(model.model.norm.double()(hidden_STH))
    model.float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    capped_STV = z_STV if cap is None else cap * torch.tanh(z_STV / cap)
    return z_STV, torch.log_softmax(capped_STV, dim=-1)


@pytest.mark.parametrize("name", ["llama", "gemma 2", "qwen3"])
@pytest.mark.parametrize("logits", [2**24, 300 * 5])
def test_the_heads_gradient_is_that_of_the_drawn_tokens(
    name: str, logits: int, saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of positions goes through at once; Gemma 2 has a softcap."""
    monkeypatch.setattr(block_module, "_LOGITS", logits)
    monkeypatch.setattr(block_module, "_FEWEST", 1)
    blocks, model, hidden_STH = head_of(saved, name)
    valid_ST = torch.ones(hidden_STH.shape[:2], dtype=torch.bool)
    valid_ST[1, 15:] = False
    back_STH, g_NV, y_N, calls = drawn(blocks, hidden_STH, valid_ST)
    assert len(calls) == (1 if logits > 300 * 48 else 10)
    assert [int(p) for call in calls for p in call[2]] == list(range(48))
    valid_N = valid_ST.flatten()

    given_STH = hidden_STH.double().requires_grad_()
    z_STV, log_p_STV = log_likelihood(model, given_STH)
    chosen_N = log_p_STV.flatten(0, 1).gather(1, y_N[:, None])[:, 0]
    expected_STH, expected_STV = torch.autograd.grad(chosen_N[valid_N].sum(), [given_STH, z_STV])
    assert_close(back_STH.double(), expected_STH, 1e-4)
    assert_close(g_NV.double(), expected_STV.flatten(0, 1), 1e-4)
    assert not back_STH[1, 15:].any() and not g_NV[~valid_N].any()
    x_NC = torch.cat([call[1] for call in calls]).double()
    assert_close(x_NC, model.model.norm(hidden_STH).detach().flatten(0, 1).double(), 1e-4)
    weight_N = torch.cat([call[4].weight_N for call in calls]).double()
    assert_close(weight_N, expected_STV.flatten(0, 1).square().sum(dim=1), 1e-4)
    assert all(call[4].apart and call[3] is None for call in calls)


def test_the_same_seed_draws_the_same(saved: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU even in other portions: a position's numbers are taken from the generator in order."""
    blocks, _, hidden_STH = head_of(saved, "llama")
    valid_ST = torch.ones(hidden_STH.shape[:2], dtype=torch.bool)
    back_STH, _, y_N, _ = drawn(blocks, hidden_STH, valid_ST)
    again_STH, _, _, _ = drawn(blocks, hidden_STH, valid_ST)
    assert torch.equal(back_STH, again_STH)
    _, _, other_N, _ = drawn(blocks, hidden_STH, valid_ST, seed=2)
    assert (y_N != other_N).any()
    monkeypatch.setattr(block_module, "_LOGITS", 300 * 7)
    portions_STH, _, portions_N, _ = drawn(blocks, hidden_STH, valid_ST)
    assert torch.equal(portions_N, y_N)
    assert_close(portions_STH, back_STH, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma 2"])
def test_tokens_are_drawn_as_often_as_the_model_predicts_them(name: str, saved: Save) -> None:
    blocks, model, hidden_STH = head_of(saved, name)
    one_STH = hidden_STH[:1, 9:10].expand(1, 6000, -1)
    _, _, y_N, _ = drawn(blocks, one_STH, torch.ones(1, 6000, dtype=torch.bool))
    p_V = log_likelihood(model, hidden_STH[:1, 9:10].double())[1].detach().exp()[0, 0]
    count_V = torch.bincount(y_N, minlength=len(p_V)).double()
    spread_V = (6000 * p_V * (1 - p_V)).sqrt()
    assert float(((count_V - 6000 * p_V).abs() / (spread_V + 1)).max()) < 5
    assert float(p_V.max()) < 0.9 and int((count_V > 0).sum()) > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_way_back_needs_is_no_more_than_was_thought(name: str, saved: Save) -> None:
    """Counted where autograd keeps it: of a block, every array that is no weight."""
    blocks = open_blocks(open_model(saved(name)[0]))
    hidden_STH = hidden_after(blocks, some_tokens(), 1)
    block, kept = blocks.load(1), {}
    weights = {parameter.data_ptr() for parameter in block._layer.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        there = block.there(hidden_STH)
    for y in there.tracing.outputs:
        keep(y)
    tensors = [t for t in blocks.model.tensors if t.name.startswith("blk.1.") and len(t.shape) > 1]
    thought = 4 * hidden_STH[..., 0].numel() * sum(map(kept_per_token, tensors))
    assert sum(kept.values()) > 0
    if blocks.skeleton.config._attn_implementation == "sdpa":
        assert sum(kept.values()) < thought
    else:
        assert first_of_turn(blocks, hidden_STH[..., 0].numel()) == blocks.count
