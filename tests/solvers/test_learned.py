"""Learned rounding: gradients against finite differences, bytes against decoders, blocks against
transformers.

Legend: R rows, C columns, E experts, N bytes of a packed row, S sequences, T tokens, H hidden width, B
blocks of all rows, I weights of a sub-block, K entries of a table.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import AutoModelForCausalLM

import dither
from dither import open_model
from dither.codecs import codec
from dither.codecs.base import as_stored
from dither.errors import UsageError
from dither.models.blocks import open_blocks
from dither.solvers.gptq import Gptq
from dither.solvers.learned import Learned
from dither.solvers.learning.grids import AnyMatrix, LevelMatrix, placed
from dither.solvers.learning.task import BlockTask
from dither.solvers.nearest import Nearest
from dither.types import Evidence, Solved

BUNDLED = Path(dither.__file__).parent / "demo_model"
CPU = torch.device("cpu")
LEVELS = [
    "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4", "TQ2_0",
    "int4-g128", "int2-g64-bf16", "uint4-g128", "uint3-g64-f32", "nf4-g64", "fp4-g64", "fp8-e8", "nvfp4-e8",
]  # fmt: skip


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_t(5, shape)).astype(np.float32)


def level_matrix(name: str, seed: int = 0) -> LevelMatrix:
    w_RC = weights(4, 512, seed=seed)
    return LevelMatrix(codec(name), w_RC, codec(name).encode(w_RC, np.ones(512, np.float32)), CPU)


def stir(matrix: LevelMatrix, seed: int = 1) -> None:
    """Moves every number that is trained, off the corners of its polygon."""
    random = torch.Generator().manual_seed(seed)
    for knob in matrix.knobs:
        with torch.no_grad():
            reach = min(1.7, knob.high - knob.low)
            shift = (torch.rand(knob.tensor.shape, generator=random) - 0.5) * 2 * reach
            knob.tensor.add_(shift).clamp_(knob.low, knob.high)


class TestGrids:
    @pytest.mark.parametrize("name", LEVELS)
    def test_begins_with_the_bytes_it_is_given(self, name: str) -> None:
        c, w_RC = codec(name), weights(4, 512)
        start_RN = c.encode(w_RC, np.ones(512, np.float32))
        matrix = LevelMatrix(c, w_RC, start_RN, CPU)
        assert np.array_equal(c.decode(matrix.pack()), c.decode(start_RN))
        assert np.array_equal(matrix.value().detach().numpy(), c.decode(start_RN))

    @pytest.mark.parametrize("name", LEVELS)
    def test_bytes_decode_to_what_is_evaluated(self, name: str) -> None:
        matrix = level_matrix(name)
        before = matrix.pack()
        stir(matrix)
        raw_RN = matrix.pack()
        assert not np.array_equal(raw_RN, before)
        assert np.array_equal(codec(name).decode(raw_RN), matrix.value().detach().numpy())

    def test_bytes_of_a_lattice_decode_to_what_is_evaluated(self) -> None:
        c, w_RC = codec("IQ3_S"), weights(4, 512)
        start_RN = c.encode(w_RC)
        matrix = AnyMatrix(c, w_RC, start_RN, None, CPU)
        assert np.array_equal(matrix.pack(), start_RN)
        with torch.no_grad():
            matrix.shift_RC.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        assert np.array_equal(c.decode(matrix.pack()), matrix.value().detach().numpy())
        assert not np.array_equal(matrix.pack(), start_RN)

    @pytest.mark.parametrize("name", LEVELS)
    def test_gradients_are_those_of_the_polygon(self, name: str) -> None:
        """Of Σ c·ŵ with one kind of number free along polygons in float64, all others as stored."""
        matrix = level_matrix(name)
        stir(matrix)
        c_RC = weights(4, 512, seed=2).astype(np.float64)
        loss = (matrix.value() * torch.from_numpy(c_RC)).sum()
        gradients = torch.autograd.grad(loss, [knob.tensor for knob in matrix.knobs])
        random = np.random.default_rng(3)
        for knob, gradient in zip(matrix.knobs, gradients, strict=True):
            at = knob.tensor.detach().numpy().astype(np.float64)
            inner = (at > knob.low + 0.01) & (at < knob.high - 0.01) & (np.abs(at - at.round()) > 0.01)
            move = random.standard_normal(at.shape) * inner
            up, down = (surrogate(matrix, knob.tensor, at + sign * 1e-4 * move, c_RC) for sign in (1, -1))
            slope = (up - down) / 2e-4
            assert inner.any()
            size = np.abs(gradient.numpy() * move).sum()
            assert float((gradient.numpy() * move).sum()) == pytest.approx(slope, abs=1e-3 * size)

    @given(st.integers(0, 255), st.floats(-1000, 1000, width=32))
    def test_positions_begin_in_the_cell_of_their_code(self, index: int, wanted: float) -> None:
        found = placed(np.array([index]), np.array([wanted], np.float32))[0]
        assert np.round(found) == index
        if abs(wanted - index) < 0.49:
            assert found == pytest.approx(wanted, abs=1e-3)


def surrogate(matrix: LevelMatrix, free: torch.Tensor, at: np.ndarray, c_RC: np.ndarray) -> float:
    """Σ c·ŵ where the numbers of `free` are `at`, along polygons, and all others are rounded."""

    def number(tensor: torch.Tensor, table_K: np.ndarray) -> np.ndarray:
        position = at if tensor is free else tensor.detach().numpy().round()
        return np.interp(position, np.arange(len(table_K)), table_K.astype(np.float64))

    def factor(tensor: torch.Tensor, base_B11: torch.Tensor) -> np.ndarray:
        if tensor is free:
            return base_B11.numpy().astype(np.float64) * at
        return as_stored((base_B11 * tensor).detach().numpy(), matrix.levels.unit_type).astype(np.float64)

    levels = matrix.levels
    unit_B11 = factor(matrix.unit_factor_B11, matrix.unit_B11) if levels.free_unit else 1.0
    scale_BS1 = unit_B11 * number(matrix.multiple_BS1, levels.multiples_M)
    below_B11 = unit_B11 if levels.tied else factor(matrix.below_factor_B11, matrix.below_B11)
    lower_BS1 = below_B11 * number(matrix.lower_BS1, levels.lowers_M)
    value_BSI = scale_BS1 * number(matrix.code_BSI, levels.numbers_K) - lower_BS1
    return float((value_BSI.reshape(c_RC.shape) * c_RC).sum())


def mixture(hidden_STH: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """A toy block: two matrices behind one another, the first a stack of two whose outputs add up."""
    inner_STC = torch.tanh(torch.einsum("sth,erh->str", hidden_STH, given["stack"]))
    return hidden_STH + inner_STC @ given["down"].T


def toy(name: str = "Q3_K", types: dict[str, str] | None = None, seed: int = 0) -> BlockTask:
    random = np.random.default_rng(seed)
    mix_HH = random.standard_normal((256, 256)) / 16
    hidden_STH = torch.from_numpy((random.standard_normal((24, 16, 256)) @ mix_HH).astype(np.float32))
    originals = {"stack": weights(2, 256, 256), "down": weights(256, 256, seed=1)}
    tensors = {key: torch.from_numpy(w) for key, w in originals.items()}
    targets_STH = mixture(hidden_STH, tensors)
    codecs = {key: codec((types or {}).get(key, name)) for key in originals}
    start = {key: Nearest()(w.reshape(-1, 256), codecs[key], None) for key, w in originals.items()}
    train, held = slice(0, 16), slice(16, 24)
    return BlockTask(
        mixture,
        hidden_STH[train].split(8),
        targets_STH[train].split(8),
        (hidden_STH[held].split(8), targets_STH[held].split(8)),
        originals,
        codecs,
        start,
    )


def toy_loss(task: BlockTask, solved: dict[str, Solved]) -> float:
    """The held-back loss in float64, numpy alone."""
    x = torch.cat(list(task.held[0])).numpy().astype(np.float64)
    y = torch.cat(list(task.held[1])).numpy().astype(np.float64)
    stack, down = (
        task.codecs[key].decode(solved[key].raw_RN).astype(np.float64).reshape(task.weights[key].shape)
        for key in ("stack", "down")
    )
    found = x + np.tanh(x @ stack[0].T + x @ stack[1].T) @ down.T
    return float(np.square(found - y).mean())


class TestRefine:
    @pytest.mark.parametrize("types", [{}, {"stack": "Q2_K", "down": "IQ4_XS"}, {"down": "Q4_1"}])
    def test_lowers_the_loss_of_sequences_held_back(self, types: dict[str, str]) -> None:
        task = toy(types=types)
        solved = Learned(steps=30, batch=8, threads=1).refine(task)
        record = solved["down"].record
        assert all(answer.solver == "learned" and answer.record == record for answer in solved.values())
        assert record["steps"] == 30
        assert record["start_block_loss"] == pytest.approx(toy_loss(task, task.start), rel=1e-4)
        assert record["block_loss"] == pytest.approx(toy_loss(task, solved), rel=1e-4)
        assert toy_loss(task, solved) < 0.97 * toy_loss(task, task.start)

    @pytest.mark.parametrize("name", ["int3-g64", "uint2-g32", "nf4-g128"])
    def test_lowers_the_loss_of_gpu_formats(self, name: str) -> None:
        task = toy(name)
        solved = Learned(steps=30, batch=8, threads=1).refine(task)
        assert toy_loss(task, solved) < 0.97 * toy_loss(task, task.start)

    def test_tiles_of_scales_stay_as_they_are(self) -> None:
        note = "scales are shared between rows: rounded to nearest"
        task = toy(types={"stack": "fp8-128x128"})
        solved = Learned(steps=10, batch=8, threads=1).refine(task)
        assert np.array_equal(solved["stack"].raw_RN, task.start["stack"].raw_RN)
        assert solved["stack"].solver == "nearest" and solved["stack"].notes == (note,)
        assert solved["down"].solver == "learned" and solved["down"].notes == ()
        assert toy_loss(task, solved) < toy_loss(task, task.start)
        both = Learned(steps=10, batch=8, threads=1).refine(toy("fp8-128x128"))
        assert all(answer.notes == (note,) and answer.solver == "nearest" for answer in both.values())

    def test_lattice_is_never_worse(self) -> None:
        task = toy(types={"down": "IQ3_S"})
        solved = Learned(steps=4, batch=8, threads=1).refine(task)
        assert toy_loss(task, solved) < toy_loss(task, task.start)

    def test_what_lies_on_the_grid_stays(self) -> None:
        task = toy("Q4_K")
        exact = {
            key: task.codecs[key].decode(solved.raw_RN).reshape(task.weights[key].shape)
            for key, solved in task.start.items()
        }
        tensors = {key: torch.from_numpy(w) for key, w in exact.items()}
        held = (task.held[0], [mixture(x, tensors) for x in task.held[0]])
        targets = [mixture(x, tensors) for x in task.inputs]
        start = {key: Solved(s.raw_RN, "gptq", {"damping": 0.1}, ("a note",)) for key, s in task.start.items()}
        exact_task = replace(task, weights=exact, targets=targets, held=held, start=start)
        solved = Learned(steps=5, threads=1).refine(exact_task)
        for key, answer in solved.items():
            assert np.array_equal(answer.raw_RN, start[key].raw_RN)
            assert answer.solver == "gptq"
            assert answer.record == {"damping": 0.1, "block_loss": 0, "start_block_loss": 0, "steps": 5}
            assert answer.notes[0] == "a note"
            assert "gptq kept" in answer.notes[1]

    def test_bytes_depend_on_the_seed_alone(self) -> None:
        task, heard = toy(), []
        before = torch.get_num_threads()
        first, same, other = (
            Learned(steps=5, batch=4, threads=1, seed=seed).refine(task, lambda *step: heard.append(step))
            for seed in (0, 0, 1)
        )
        assert all(np.array_equal(first[key].raw_RN, same[key].raw_RN) for key in first)
        assert any(not np.array_equal(first[key].raw_RN, other[key].raw_RN) for key in first)
        assert heard[:5] == heard[5:10] and [step for step, _ in heard] == [1, 2, 3, 4, 5] * 3
        assert torch.get_num_threads() == before

    def test_nothing_held_back(self) -> None:
        with pytest.raises(UsageError, match="held back"):
            Learned(threads=1).refine(replace(toy(), held=([], [])))

    def test_outside_a_block_it_is_gptq(self) -> None:
        w_RC, x_TC = weights(16, 256), weights(512, 256, seed=4)
        known = Evidence(512, np.square(x_TC).mean(axis=0), x_TC.T @ x_TC / 512)
        solved = Learned(threads=1)(w_RC, codec("Q3_K"), known)
        assert solved.solver == "gptq"
        assert np.array_equal(solved.raw_RN, Gptq(threads=1)(w_RC, codec("Q3_K"), known).raw_RN)


RENAMED = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEADS = {"attn_q": 8, "attn_k": 4}


class Bundled:
    """Block 0 of the bundled model in transformers, on text that the model writes itself."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
        torch.manual_seed(0)
        self.tokens_ST = torch.randint(4096, (36, 1))
        memory = None
        with torch.no_grad():
            for _ in range(63):
                found = self.model(self.tokens_ST[:, -1:], past_key_values=memory, use_cache=True)
                memory, following_SV = found.past_key_values, found.logits[:, -1].softmax(dim=-1)
                self.tokens_ST = torch.cat([self.tokens_ST, torch.multinomial(following_SV, 1)], dim=1)
        self.block = open_blocks(open_model(BUNDLED)).load(0)

    def linear(self, name: str) -> torch.nn.Linear:
        return self.model.model.layers[0].get_submodule(RENAMED[name.split(".")[2]])

    @torch.no_grad()
    def around(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the block, and what leaves it."""
        states = self.model.model(self.tokens_ST, output_hidden_states=True).hidden_states
        return states[0], states[1]

    def evidence(self, name: str, train: slice) -> Evidence:
        seen: list[torch.Tensor] = []
        hook = self.linear(name).register_forward_hook(lambda module, x, y: seen.append(x[0][train]))
        self.around()
        hook.remove()
        x_TC = seen[0].reshape(-1, seen[0].shape[-1]).numpy()
        return Evidence(len(x_TC), np.square(x_TC).mean(axis=0), x_TC.T @ x_TC / len(x_TC))

    def loss(self, task: BlockTask, solved: dict[str, Solved], held: slice) -> float:
        """The mean squared error of the block's output, with these bytes in transformers' layer."""
        wanted = self.around()[1][held]
        kept = {name: self.linear(name).weight.data for name in solved}
        for name, answer in solved.items():
            w_RC = task.codecs[name].decode(answer.raw_RN)
            if heads := HEADS.get(name.split(".")[2]):  # rotated pairs are neighbors in GGUF, not here
                w_RC = w_RC.reshape(heads, -1, 2, w_RC.shape[1]).swapaxes(1, 2).reshape(w_RC.shape)
            self.linear(name).weight.data = torch.from_numpy(np.ascontiguousarray(w_RC))
        found = self.around()[1][held]
        for name, w in kept.items():
            self.linear(name).weight.data = w
        return float((found.double() - wanted.double()).square().mean())


@pytest.fixture(scope="module")
def bundled() -> Bundled:
    return Bundled()


@pytest.mark.slow
class TestBundledModel:
    @pytest.mark.parametrize(
        ("name", "steps", "matrices", "most"),
        [("Q2_K", 20, 7, 0.95), ("Q3_K", 20, 7, 0.98), ("IQ4_XS", 30, 7, 0.995), ("IQ3_S", 5, 1, 0.995)],
    )
    def test_block_on_held_text(self, bundled: Bundled, name: str, steps: int, matrices: int, most: float) -> None:
        train, held = slice(0, 24), slice(24, 36)
        names = bundled.block.names[:matrices]
        inputs, targets = bundled.around()
        weights = {key: bundled.block.weight(key).numpy() for key in names}
        known = {key: bundled.evidence(key, train) for key in names}
        quick = Gptq(fits=1, scale_rounds=0, refit_rounds=1, threads=1)
        start = {key: quick(weights[key], codec(name), known[key]) for key in names}
        task = BlockTask(
            bundled.block,
            inputs[train].split(8),
            targets[train].split(8),
            (inputs[held].split(8), targets[held].split(8)),
            weights,
            dict.fromkeys(names, codec(name)),
            start,
            {key: evidence.mean_square_C for key, evidence in known.items()},
        )
        solved = Learned(steps=steps, batch=4, threads=1).refine(task)
        losses = [bundled.loss(task, answer, held) for answer in (start, solved)]
        record = solved[names[0]].record
        assert [record["start_block_loss"], record["block_loss"]] == pytest.approx(losses, rel=1e-3)
        assert losses[1] < most * losses[0]


class TestTorch:
    def test_is_not_needed_to_look_at_solvers(self) -> None:
        code = "import sys, dither.solvers.learned, dither.solvers.learning; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_missing_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in [name for name in sys.modules if name.startswith("dither.solvers.learning.")]:
            monkeypatch.delitem(sys.modules, module)
        task = toy()
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(UsageError, match=r"pip install 'dither\[calibrate\]'"):
            Learned(threads=1).refine(task)
