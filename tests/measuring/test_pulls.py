"""Weighed Hessians and output Hessians against the formulas written out in float64.

Legend: N tokens, C columns, R rows, E experts, S sequences, T token positions, K diagonal blocks of O rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dither.formats.evidence import GroupStatistics
from dither.measuring import collect
from dither.measuring.live import LiveEvidence, Passage
from dither.models.blocks import open_blocks
from dither.models.blocks.watch import Pull
from dither.models.source import open_model
from dither.types import Evidence

SEQUENCES, CONTEXT, COLUMNS = 8, 12, 6
LENGTHS = [12, 7, 12, 1, 9, 12, 12, 10]
ROWS = {"a": 5, "b": 8}


def made_up(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Inputs (S, T, C) and gradients (S, T, R), float32; pulls differ a lot between tokens."""
    random = np.random.default_rng(seed)
    x_STC = random.standard_normal((SEQUENCES, CONTEXT, COLUMNS)).astype(np.float32)
    pull_ST1 = random.lognormal(0, 1, (SEQUENCES, CONTEXT, 1))
    gradients = {
        name: (pull_ST1 * random.standard_normal((SEQUENCES, CONTEXT, rows))).astype(np.float32)
        for name, rows in ROWS.items()
    }
    return x_STC, gradients


def pull_of(gradients: dict[str, np.ndarray], apart: bool = False) -> Pull:
    found = {name: torch.from_numpy(g_NR) for name, g_NR in gradients.items()}
    return Pull(sum(g_NR.square().sum(dim=1) for g_NR in found.values()), found, apart)


def collected(
    x_STC: np.ndarray, gradients: dict[str, np.ndarray], batches: Sequence[Sequence[int]], apart: bool = False
) -> GroupStatistics:
    collector = collect.Collector({}, sequences=SEQUENCES, context=CONTEXT, hessians=True)
    for index_B in batches:
        index_B = list(index_B)
        collector.batch(index_B, [LENGTHS[s] for s in index_B])
        flat = {name: g_STR[index_B].reshape(-1, g_STR.shape[-1]) for name, g_STR in gradients.items()}
        x_NC = torch.from_numpy(x_STC[index_B].reshape(-1, COLUMNS))
        collector.see(tuple(gradients), x_NC, torch.arange(len(x_NC)), None, pull_of(flat, apart))
    [group], few = collector.finish()
    assert few == {}
    return group


def spans() -> tuple[np.ndarray, np.ndarray]:
    """(S, T): tokens that Hessians are of, and those held back."""
    valid_ST = np.arange(CONTEXT)[None] < np.array(LENGTHS)[:, None]
    held_ST = valid_ST & (np.arange(SEQUENCES)[:, None] == SEQUENCES - 1)
    return valid_ST & ~held_ST, held_ST


BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7]]


def test_hessians_weigh_tokens_by_how_much_their_outputs_matter() -> None:
    x_STC, gradients = made_up()
    group = collected(x_STC, gradients, BATCHES)
    fitted_ST, held_ST = spans()
    x = x_STC.astype(np.float64)
    weight_ST = sum((g_STR.astype(np.float64) ** 2).sum(axis=-1) for g_STR in gradients.values())
    weight_N, x_NC = weight_ST[fitted_ST], x[fitted_ST]
    hessian_CC = (x_NC * weight_N[:, None]).T @ x_NC / weight_N.sum()
    assert group.hessian_ECC is not None and group.held_EHC is not None
    np.testing.assert_allclose(group.hessian_ECC[0], hessian_CC, rtol=1e-5, atol=1e-6)
    everything_NC = x[fitted_ST | held_ST]  # the importance matrix knows no weights and holds nothing back
    np.testing.assert_allclose(group.mean_square_EC[0], (everything_NC**2).mean(axis=0), rtol=1e-6)
    assert group.counts_E.tolist() == [sum(LENGTHS)]

    scaled_HC = x[held_ST] * np.sqrt(weight_ST[held_ST] / weight_N.mean())[:, None]
    assert len(group.held_EHC[0]) == LENGTHS[-1]
    distance_HH = np.abs(group.held_EHC[0][:, None] - scaled_HC[None]).max(axis=-1)
    assert distance_HH.min(axis=1).max() < 1e-5 and sorted(distance_HH.argmin(axis=1)) == list(range(10))


def test_output_hessians_are_kronecker_factors_of_the_whole() -> None:
    """G ∝ Σ |x|² g gᵀ, and tr G · tr H is the mean of |g|² |x|², with nothing of padding or held back."""
    x_STC, gradients = made_up(seed=1)
    group = collected(x_STC, gradients, BATCHES)
    fitted_ST, _ = spans()
    size_N = (x_STC[fitted_ST].astype(np.float64) ** 2).sum(axis=1)
    assert group.outputs is not None and set(group.outputs) == {"a", "b"} and group.hessian_ECC is not None
    trace = float(np.trace(group.hessian_ECC[0].astype(np.float64)))
    for name, found_EKOO in group.outputs.items():
        g_NR = gradients[name][fitted_ST].astype(np.float64)
        expected_RR = (g_NR * size_N[:, None]).T @ g_NR / len(g_NR) / trace
        assert found_EKOO.shape == (1, 1, ROWS[name], ROWS[name]) and found_EKOO.dtype == np.float32
        np.testing.assert_allclose(found_EKOO[0, 0], expected_RR, rtol=1e-5, atol=1e-6 * expected_RR.max())
        assert np.array_equal(found_EKOO[0, 0], found_EKOO[0, 0].T)
        mean = float(((g_NR**2).sum(axis=1) * size_N).mean())
        assert np.trace(found_EKOO[0, 0]) * trace == pytest.approx(mean, rel=1e-5)


def test_what_is_padding_or_held_back_changes_nothing() -> None:
    x_STC, gradients = made_up()
    before = collected(x_STC, gradients, BATCHES)
    fitted_ST, _ = spans()
    x_STC[~fitted_ST] *= -3
    for g_STR in gradients.values():
        g_STR[~fitted_ST] *= 100
    after = collected(x_STC, gradients, BATCHES)
    assert np.array_equal(before.hessian_ECC, after.hessian_ECC)
    assert before.outputs is not None and after.outputs is not None
    for name in ROWS:
        assert np.array_equal(before.outputs[name], after.outputs[name])


def test_other_batches_give_the_same_sums() -> None:
    x_STC, gradients = made_up(seed=3)
    one, other = (collected(x_STC, gradients, b) for b in (BATCHES, [[7, 3], [6, 0, 5, 1], [2], [4]]))
    np.testing.assert_allclose(one.hessian_ECC, other.hessian_ECC, rtol=1e-5, atol=1e-6)
    assert one.outputs is not None and other.outputs is not None
    for name in ROWS:
        np.testing.assert_allclose(one.outputs[name], other.outputs[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.held_EHC, other.held_EHC, rtol=1e-5)  # in the same order, too


def test_outputs_told_apart_keep_the_diagonal_alone() -> None:
    x_STC, gradients = made_up(seed=4)
    whole, apart = (collected(x_STC, gradients, BATCHES, apart) for apart in (False, True))
    assert whole.outputs is not None and apart.outputs is not None
    for name, rows in ROWS.items():
        assert apart.outputs[name].shape == (1, rows, 1, 1)
        np.testing.assert_allclose(apart.outputs[name][0, :, 0, 0], np.diagonal(whole.outputs[name][0, 0]), rtol=1e-5)


def test_wide_matrices_keep_diagonal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x_STC, gradients = made_up(seed=5)
    whole = collected(x_STC, gradients, BATCHES)
    monkeypatch.setattr(collect, "WIDEST", 4)
    cut = collected(x_STC, gradients, BATCHES)
    assert whole.outputs is not None and cut.outputs is not None
    assert cut.outputs["a"].shape == (1, 5, 1, 1)  # no number but one divides 5
    assert cut.outputs["b"].shape == (1, 2, 4, 4)
    for name, found_EKOO in cut.outputs.items():
        size = found_EKOO.shape[-1]
        for k, found_OO in enumerate(found_EKOO[0]):
            at = slice(k * size, (k + 1) * size)
            np.testing.assert_allclose(found_OO, whole.outputs[name][0, 0, at, at], rtol=1e-5, atol=1e-6)


def test_blocks_are_equal_narrow_enough_and_as_few_as_can_be() -> None:
    for rows in [*range(1, 300), 4096, 4097, 6144, 8192, 9728, 11008, 14336, 28672]:
        parts = collect.diagonal_blocks(rows)
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= collect.WIDEST]
        assert parts == fitting[0]


def test_experts_with_few_tokens_are_filled_up_from_the_pool() -> None:
    """600 tokens of its own, 100, and none; Hessians and output Hessians alike."""
    random = np.random.default_rng(6)
    x_NC = random.standard_normal((700, COLUMNS)).astype(np.float32)
    g_NR = (random.lognormal(0, 1, (700, 1)) * random.standard_normal((700, 5))).astype(np.float32)
    spans = [slice(0, 600), slice(600, 700), slice(0, 0)]
    collector = collect.Collector({"e": 3}, sequences=1, context=700, hessians=True)
    collector.batch([0], [700])
    for expert, span in enumerate(spans[:2]):
        at = torch.arange(700)[span]
        collector.see(("e",), torch.from_numpy(x_NC[span]), at, expert, pull_of({"e": g_NR[span]}))
    [group], few = collector.finish()
    assert few == {"e": [1, 2]}

    x, g = x_NC.astype(np.float64), g_NR.astype(np.float64)
    hessians, outputs, counts = [], [], [600, 100, 0]
    for span in spans:
        weight_N = (g[span] ** 2).sum(axis=1)
        weight_N = weight_N / (weight_N.mean() if len(weight_N) else 1)
        hessians.append((x[span] * weight_N[:, None]).T @ x[span])
        outputs.append((g[span] * (x[span] ** 2).sum(axis=1)[:, None]).T @ g[span])
    for expert, count in enumerate(counts):
        lacking = max(0, 256 - count)
        filled_CC, filled_RR = (
            (sums[expert] + lacking * sum(sums) / 700) / (count + lacking) for sums in (hessians, outputs)
        )
        assert group.hessian_ECC is not None and group.outputs is not None
        np.testing.assert_allclose(group.hessian_ECC[expert], filled_CC, rtol=1e-4, atol=1e-5)
        expected_RR = filled_RR / np.trace(filled_CC)
        np.testing.assert_allclose(group.outputs["e"][expert, 0], expected_RR, rtol=1e-4, atol=1e-5 * expected_RR.max())


def test_outputs_at_which_nothing_pulls() -> None:
    """A head that the loss never asks: zeros, no division by zero."""
    x_STC, gradients = made_up(seed=7)
    silent = {name: np.zeros_like(g_STR) for name, g_STR in gradients.items()}
    group = collected(x_STC, silent, BATCHES)
    assert group.outputs is not None and group.hessian_ECC is not None and group.held_EHC is not None
    arrays = [group.hessian_ECC, *group.outputs.values(), *group.held_EHC]
    assert not any(array.any() for array in arrays)  # NaN would count as true
    assert group.mean_square_EC.all()


def test_without_pulls_nothing_is_weighed() -> None:
    x_STC, _ = made_up()
    collector = collect.Collector({}, sequences=SEQUENCES, context=CONTEXT, hessians=True)
    collector.batch(range(SEQUENCES), LENGTHS)
    x_NC = torch.from_numpy(x_STC.reshape(-1, COLUMNS))
    collector.see(("a",), x_NC, torch.arange(len(x_NC)), None)
    [group], _ = collector.finish()
    fitted_NC = x_STC[spans()[0]].astype(np.float64)
    assert group.outputs is None and group.hessian_ECC is not None
    np.testing.assert_allclose(group.hessian_ECC[0], fitted_NC.T @ fitted_NC / len(fitted_NC), rtol=1e-5, atol=1e-6)


def test_behind_quantized_layers_outputs_are_still_the_originals(checkpoint: Path) -> None:
    """Inputs are the file's that is being written, unweighed; output Hessians come from the evidence."""
    model = open_model(checkpoint)
    rows = {tensor.name: tensor.rows for tensor in model.tensors}

    def base(tensor: str, expert: int = 0) -> Evidence | None:
        output_KOO = np.full((1, rows[tensor], rows[tensor]), len(tensor), np.float32)
        return Evidence(1, np.ones(256, np.float32), output_KOO=None if "attn_v" in tensor else output_KOO)

    tokens_ST = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)
    blocks = open_blocks(model)
    passage = Passage(blocks, tokens_ST, np.full(3, 20, np.int32), lambda: model)
    live = LiveEvidence(passage, base, set(rows), set(), "")
    seen: list[torch.Tensor] = []
    blocks.load(0).watch(blocks.embed(torch.from_numpy(tokens_ST).long()), lambda *call: seen.append(call[1]))
    x_NC = seen[0].numpy().astype(np.float64)
    for leaf in ("attn_q", "attn_k", "attn_v"):
        name = f"blk.0.{leaf}.weight"
        found, given = live(name), base(name)
        assert found is not None and given is not None and found.hessian_CC is not None
        np.testing.assert_allclose(found.hessian_CC, x_NC.T @ x_NC / len(x_NC), rtol=1e-4, atol=1e-5)
        if given.output_KOO is None:
            assert found.output_KOO is None
        else:
            assert np.array_equal(found.output_KOO, given.output_KOO)
