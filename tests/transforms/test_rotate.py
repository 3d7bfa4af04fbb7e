"""Rotation against the model it must not change, and evidence against rotated activations.

Legend: R rows, C columns, D the residual stream's width, T tokens.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from llama_util import TinyLlama
from transforms_util import TOKENS, evidence_of, made_up_evidence, outlier_inputs, reference, tiny_model

import dither
from dither.errors import DitherError, SourceError, UnsupportedError
from dither.formats.ggml import f32
from dither.models.arch import feeds
from dither.models.gguf_source import open_gguf
from dither.transforms.orthogonal import Orthogonal
from dither.transforms.rotate import Rotate, check
from dither.types import Model, Tensor, Transformed

FEEDS = feeds("llama")


@pytest.fixture(scope="module")
def llama() -> TinyLlama:
    return TinyLlama()


@pytest.fixture(scope="module")
def model(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("rotate"), llama)


def tensors(model: Model) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


def rotated(model: Model, **options: int) -> Transformed:
    return Rotate(FEEDS, **options)(model, lambda name, expert=0: None, lambda name: None)


def with_tensor(model: Model, name: str, values: np.ndarray) -> Model:
    """The model with one more tensor, or another in its place."""
    tensor = Tensor(name, values.shape, "F32", values.nbytes, lambda start, stop: values.reshape(1, -1))
    return dataclasses.replace(model, tensors=(*(t for t in model.tensors if t.name != name), tensor))


@pytest.mark.parametrize("hadamard", [True, False])
def test_the_rewritten_model_computes_the_same(llama: TinyLlama, model: Model, hadamard: bool) -> None:
    done = rotated(model, hadamard=hadamard)
    np.testing.assert_allclose(reference(llama, done.model), llama.probabilities(TOKENS), rtol=5e-5)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"):
        before, after = tensors(model)[name].read(0, 64), tensors(done.model)[name].read(0, 64)
        assert np.abs(before - after).max() > 0.5 * np.abs(before).max(), f"{name} was not turned"
    assert done.record["kind"] == ("hadamard" if hadamard else "random")


def test_gains_become_one_and_outliers_go(model: Model) -> None:
    loud = model
    embedding = tensors(model)["token_embd.weight"].read(0, 266).copy()
    embedding[:, 3] *= 50
    values = tensors(model)["token_embd.weight"]
    loud = dataclasses.replace(
        model,
        tensors=tuple(
            dataclasses.replace(t, read=lambda start, stop: embedding[start:stop]) if t is values else t
            for t in model.tensors
        ),
    )
    done = tensors(rotated(loud).model)
    for name in ("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight", "output_norm.weight"):
        np.testing.assert_array_equal(done[name].read(0, 1), np.ones((1, 64)))
    turned = done["token_embd.weight"].read(0, 266)
    peak = np.abs(turned).max(axis=1) / np.sqrt((turned**2).mean(axis=1))
    assert np.median(np.abs(embedding).max(axis=1) / np.sqrt((embedding**2).mean(axis=1))) > 7
    assert np.median(peak) < 3


def test_tied_embeddings_part_and_the_bytes_are_told(llama: TinyLlama, model: Model) -> None:
    tied = dataclasses.replace(model, tensors=tuple(t for t in model.tensors if t.name != "output.weight"))
    done = rotated(tied)
    assert done.record["untied"]
    size = tensors(model)["token_embd.weight"].size
    assert any(f"{size:,} weights" in note for note in done.notes)
    assert done.model.parameters == tied.parameters + size
    twin = TinyLlama()
    twin.weights = {**llama.weights, "output.weight": llama.weights["token_embd.weight"]}
    np.testing.assert_allclose(reference(twin, done.model), twin.probabilities(TOKENS), rtol=5e-5)


def test_hessians_are_those_of_the_turned_inputs(model: Model) -> None:
    """x = g ⊙ n is what calibration saw; n Q is what the rewritten layer gets."""
    x_TD = outlier_inputs(64, seed=1)
    seen = evidence_of(x_TD, held=30)
    done = Rotate(FEEDS, seed=9)(model, lambda name, expert=0: seen, lambda name: None)
    gain_D = tensors(model)["blk.1.ffn_norm.weight"].read(0, 1)[0].astype(np.float64)
    expected = evidence_of((x_TD / gain_D) @ Orthogonal(64, 9).matrix(), held=30)
    found = done.evidence("blk.1.ffn_up.weight")
    assert found is not None and found.hessian_CC is not None and found.held_HC is not None
    assert expected.hessian_CC is not None
    scale = float(np.diag(expected.hessian_CC).mean())
    np.testing.assert_allclose(found.hessian_CC, expected.hessian_CC, atol=1e-5 * scale)
    np.testing.assert_allclose(found.mean_square_C, np.diag(expected.hessian_CC), rtol=1e-4)
    np.testing.assert_allclose(found.held_HC, expected.held_HC, atol=1e-4)
    assert np.array_equal(found.hessian_CC, found.hessian_CC.T)
    assert done.evidence("blk.1.ffn_gate.weight") is found
    assert done.evidence("blk.1.ffn_down.weight") is seen
    assert not any("without evidence" in note for note in done.notes)


def test_the_turned_layer_answers_its_turned_inputs_as_before(model: Model) -> None:
    """Evidence and weights fit together: tr(W H Wᵀ) is the mean squared output, and must not move."""
    x_TD = outlier_inputs(64, seed=2)
    seen = evidence_of(x_TD)
    done = Rotate(FEEDS)(model, lambda name, expert=0: seen, lambda name: None)
    found = done.evidence("blk.0.attn_q.weight")
    assert found is not None and found.hessian_CC is not None
    w_RD = tensors(done.model)["blk.0.attn_q.weight"].read(0, 64).astype(np.float64)
    original = tensors(model)["blk.0.attn_q.weight"].read(0, 64).astype(np.float64)
    expected_R = ((original @ x_TD.T) ** 2).mean(axis=1)
    np.testing.assert_allclose(np.einsum("rc,cd,rd->r", w_RD, found.hessian_CC, w_RD), expected_R, rtol=1e-3)


def test_mean_squares_alone_are_dropped_and_that_is_said(model: Model) -> None:
    done = Rotate(FEEDS)(model, made_up_evidence(model, hessian=False), lambda name: None)
    assert done.evidence("blk.0.attn_q.weight") is None
    assert done.evidence("blk.0.ffn_down.weight") is not None
    assert any("without evidence" in note and "Hessian" in note for note in done.notes)


def test_rows_read_by_threads_in_pieces_are_the_same_rows(model: Model) -> None:
    done = rotated(model).model
    chunks = [(t, start, min(start + 5, t.rows)) for t in done.tensors for start in range(0, t.rows, 5)]
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda chunk: chunk[0].read(chunk[1], chunk[2]), chunks))
    again = tensors(rotated(model).model)
    for (tensor, start, stop), piece in zip(chunks, pieces, strict=True):
        expected = again[tensor.name].read(0, tensor.rows)[start:stop]
        np.testing.assert_allclose(piece, expected, rtol=1e-5, atol=1e-6)


def test_a_stack_of_experts_is_turned_expert_by_expert(model: Model) -> None:
    first, *_ = (t for t in model.tensors if t.name == "blk.0.ffn_down.weight")
    w_DC = first.read(0, 64)
    stack = np.concatenate([w_DC, 2 * w_DC, -w_DC])
    experts = dataclasses.replace(
        first, name="blk.0.ffn_down_exps.weight", shape=(3, *first.shape), read=lambda a, b: stack[a:b]
    )
    up = dataclasses.replace(first, name="blk.0.ffn_up_exps.weight", shape=(3, 128, 64))
    done = tensors(rotated(dataclasses.replace(model, tensors=(*model.tensors, experts, up))).model)
    q_DD = Orthogonal(64, 0).matrix()
    expected = np.concatenate([q_DD.T @ w_DC, 2 * q_DD.T @ w_DC, -q_DD.T @ w_DC])
    np.testing.assert_allclose(done["blk.0.ffn_down_exps.weight"].read(0, 192), expected, atol=1e-5)
    np.testing.assert_allclose(done["blk.0.ffn_down_exps.weight"].read(60, 70), expected[60:70], atol=1e-5)


def test_quantizing_writes_the_turned_weights(model: Model, tmp_path: Path) -> None:
    """Not the source's own bytes, which have the same type."""
    done = rotated(model)
    written = open_gguf(Path(dither.quantize(done.model, "F32", tmp_path / "turned.gguf").path))
    for tensor in written.tensors:
        expected = tensors(done.model)[tensor.name].read(0, tensor.rows)
        np.testing.assert_array_equal(tensor.read(0, tensor.rows), expected)


def test_the_seed_is_part_of_the_fingerprint(model: Model) -> None:
    prints = {rotated(model, seed=seed).model.fingerprint for seed in (0, 1)} | {model.fingerprint}
    assert len(prints) == 3
    assert rotated(model, seed=1).model.fingerprint in prints


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blk.0.post_ffw_norm.weight", "gain before the residual sum"),
        ("blk.1.attn_norm.bias", "subtracts the mean"),
        ("blk.0.ssm_in.weight", "no table says"),
        ("position_embd.weight", "no table says"),
    ],
)
def test_models_that_mixing_would_change_are_refused(model: Model, name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}.*{reason}.*Use awq"):
        rotated(with_tensor(model, name, np.ones(64, np.float32)))


def test_a_layer_norm_without_biases_is_refused_by_its_metadata(model: Model) -> None:
    metadata = {k: v for k, v in model.metadata.items() if not k.endswith("rms_epsilon")}
    metadata["llama.attention.layer_norm_epsilon"] = f32(1e-5)
    with pytest.raises(UnsupportedError, match="RMS"):
        rotated(dataclasses.replace(model, metadata=metadata))


def test_a_gain_of_zero_is_refused(model: Model) -> None:
    gains = np.ones(64, np.float32)
    gains[5] = 0
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_norm.*channel 5"):
        rotated(with_tensor(model, "blk.0.ffn_norm.weight", gains))


def test_a_row_that_was_turned_wrong_never_leaves(model: Model) -> None:
    """The check that guards every read, given a row whose two largest entries were swapped."""
    w_D = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    x_D = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    length = np.array([np.linalg.norm(w_D) * np.linalg.norm(x_D)])
    check("blk.0.attn_q.weight", w_D @ x_D, w_D.astype(np.float64) @ x_D, length)
    swapped = w_D[:, np.r_[1, 0, 2:64]]
    with pytest.raises(DitherError, match=r"blk\.0\.attn_q\.weight"):
        check("blk.0.attn_q.weight", swapped @ x_D, w_D @ x_D, length)
