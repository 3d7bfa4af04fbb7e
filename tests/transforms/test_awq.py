"""AWQ against a plain float64 objective, and against the model it must not change.

Legend: R rows, C columns, T tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
from llama_util import TinyLlama
from transforms_util import TOKENS, everything_as, evidence_of, made_up_evidence, outlier_inputs, reference, tiny_model

from dither.codecs import codec
from dither.errors import UsageError
from dither.models.arch import feeds
from dither.transforms.awq import ALPHAS, Awq, Sample
from dither.transforms.rewrite import ScaledEvidence
from dither.types import Codec, Evidence, Model, Tensor

FEEDS = feeds("llama")


@pytest.fixture(scope="module")
def llama() -> TinyLlama:
    return TinyLlama()


@pytest.fixture(scope="module")
def model(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("awq"), llama)


def tensors(model: Model) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


def objective(
    w_RC: npt.NDArray[np.float64], s_C: npt.NDArray[np.float64], x_TC: npt.NDArray[np.float64], name: str
) -> float:
    """The mean over tokens of |W x − Ŵ x|², where Ŵ is what W·s became, over s."""
    scaled = np.ascontiguousarray(w_RC * s_C, dtype=np.float32)
    importance = ((x_TC**2).mean(axis=0) / s_C**2).astype(np.float32)
    rounded = codec(name).decode(codec(name).encode(scaled, importance)).astype(np.float64) / s_C
    return float(np.square((rounded - w_RC) @ x_TC.T).sum() / len(x_TC))


def test_the_objective_is_the_mean_squared_output_error() -> None:
    x_TC = outlier_inputs(64, seed=1)
    x_TC += 40 * x_TC[:, :1]  # so that the diagonal is far from the whole
    w_RC = np.random.default_rng(2).standard_normal((24, 64))
    s_C = np.exp(np.random.default_rng(3).standard_normal(64) / 2)
    expected = objective(w_RC, s_C, x_TC, "Q4_0")

    def found(seen: Evidence, held: bool = False) -> float:
        sample = Sample(w_RC.astype(np.float32), codec("Q4_0"), seen, 1.0)
        return sample.error(s_C.astype(np.float32), held)

    assert found(evidence_of(x_TC)) == pytest.approx(expected, rel=1e-3)
    everything_held = dataclasses.replace(evidence_of(x_TC), held_HC=x_TC.astype(np.float32))
    assert found(everything_held, held=True) == pytest.approx(expected, rel=1e-3)
    independent = np.diag((x_TC**2).mean(axis=0))
    diagonal = found(evidence_of(x_TC, hessian=False))
    wide = dataclasses.replace(evidence_of(x_TC), hessian_CC=independent.astype(np.float32))
    assert diagonal == pytest.approx(found(wide), rel=1e-4)
    assert diagonal != pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("hessian", [True, False])
def test_outliers_are_scaled_and_the_error_falls_by_a_lot(model: Model, hessian: bool) -> None:
    """Rebuilt without the code under test: weights read from the rewritten model, scales from their ratio."""
    source = made_up_evidence(model, hessian)
    done = Awq(FEEDS)(model, source, everything_as("Q4_0"))
    name = "blk.0.ffn_down.weight"
    before, after = tensors(model)[name], tensors(done.model)[name]
    w_RC = before.read(0, before.rows).astype(np.float64)
    s_C = np.median(after.read(0, after.rows) / w_RC, axis=0)
    x_TC = outlier_inputs_of(source(name))
    ratio = objective(w_RC, s_C, x_TC, "Q4_0") / objective(w_RC, np.ones_like(s_C), x_TC, "Q4_0")
    assert ratio < 0.6
    # equal in the Hessian's metric, near in the diagonal's
    assert done.record["groups"]["blk.0.ffn_up.weight"]["objective_ratio"] == pytest.approx(
        ratio, rel=0.01 if hessian else 0.2
    )


def outlier_inputs_of(seen: Evidence | None) -> npt.NDArray[np.float64]:
    """Inputs with exactly the second moments of this evidence."""
    assert seen is not None
    moments = seen.hessian_CC if seen.hessian_CC is not None else np.diag(seen.mean_square_C)
    root = np.linalg.cholesky(moments.astype(np.float64) + 1e-9 * np.eye(len(moments)))
    return np.asarray(root.T * np.sqrt(len(root)))


def test_scales_follow_the_inputs_with_the_best_power_on_the_grid(model: Model) -> None:
    done = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0"))
    name = "blk.1.ffn_down.weight"
    before, after = tensors(model)[name], tensors(done.model)[name]
    w_RC = before.read(0, before.rows).astype(np.float64)
    root_C = np.median(after.read(0, after.rows) / w_RC, axis=0)
    seen = made_up_evidence(model)(name)
    assert seen is not None
    size_C = np.sqrt(seen.mean_square_C.astype(np.float64))
    tried = [size_C**alpha / np.exp(alpha * np.log(size_C).mean()) for alpha in ALPHAS]
    errors = [objective(w_RC, s_C, outlier_inputs_of(seen), "Q4_0") for s_C in tried]
    best = int(np.argmin(errors))
    assert done.record["groups"]["blk.1.ffn_up.weight"]["alpha"] == ALPHAS[best] > 0
    np.testing.assert_allclose(root_C, tried[best], rtol=1e-4)


def test_alike_inputs_stay_alike(model: Model) -> None:
    """With white inputs s is the same for every α but for noise, and none is no worse."""
    white = {
        64: Evidence(1000, np.ones(64, np.float32), np.eye(64, dtype=np.float32)),
        128: Evidence(1000, np.ones(128, np.float32), np.eye(128, dtype=np.float32)),
    }
    source = {tensor.name: white.get(tensor.columns) for tensor in model.tensors if len(tensor.shape) > 1}
    done = Awq(FEEDS)(model, lambda name, expert=0: source.get(name), everything_as("Q4_0"))
    assert {group["alpha"] for group in done.record["groups"].values()} == {0.0}
    for tensor in model.tensors:
        np.testing.assert_array_equal(tensors(done.model)[tensor.name].read(0, 1), tensor.read(0, 1))
    assert "0 of 9 groups" in done.notes[0]


def test_the_rewritten_model_computes_the_same(llama: TinyLlama, model: Model) -> None:
    done = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0"))
    scaled = {name: group["alpha"] for name, group in done.record["groups"].items()}
    assert set(scaled) == {
        "output_norm.weight",
        *(f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_norm", "attn_v", "ffn_norm", "ffn_up")),
    }
    assert min(scaled.values()) > 0, "a group that was not scaled proves nothing"
    np.testing.assert_allclose(reference(llama, done.model), llama.probabilities(TOKENS), rtol=2e-5)


def test_values_are_scaled_alike_for_all_heads_that_share_them(llama: TinyLlama, model: Model) -> None:
    done = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0"))
    name = "blk.0.attn_output.weight"
    before, after = tensors(model)[name], tensors(done.model)[name]
    s_C = np.median(after.read(0, after.rows) / before.read(0, before.rows), axis=0)
    s_GNK = s_C.reshape(llama.G, llama.H // llama.G, llama.D // llama.H)
    np.testing.assert_allclose(s_GNK[:, 0], s_GNK[:, 1], rtol=1e-5)
    assert s_C.max() / s_C.min() > 1.2


def test_rows_read_in_pieces_are_the_same_rows(model: Model) -> None:
    done = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0"))
    for tensor in done.model.tensors:
        pieces = [tensor.read(start, min(start + 7, tensor.rows)) for start in range(0, tensor.rows, 7)]
        np.testing.assert_array_equal(np.concatenate(pieces), tensor.read(0, tensor.rows))


def test_threads_change_nothing_and_work_is_told_apart(model: Model) -> None:
    alone = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0"))
    together = Awq(FEEDS, threads=3)(model, made_up_evidence(model), everything_as("Q4_0"))
    assert alone.record == together.record
    assert alone.model.fingerprint == together.model.fingerprint != model.fingerprint
    coarser = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_1"))
    assert coarser.model.fingerprint != alone.model.fingerprint
    changed = tensors(alone.model)["blk.0.attn_q.weight"]
    assert changed.read_raw is None and changed.stored == "F32"


def test_evidence_is_that_of_the_divided_inputs() -> None:
    x_TC = outlier_inputs(64, seed=4)
    s_C = np.exp(np.random.default_rng(5).standard_normal(64)).astype(np.float32)
    seen = evidence_of(x_TC, held=20)
    scales = s_C[None]
    scaled = ScaledEvidence(lambda name, expert=0: seen, {"a": scales, "b": scales})
    expected = evidence_of(x_TC / s_C, held=20)
    found = scaled("a")
    assert found is not None and found.hessian_CC is not None and found.held_HC is not None
    np.testing.assert_allclose(found.mean_square_C, expected.mean_square_C, rtol=1e-5)
    np.testing.assert_allclose(found.hessian_CC, expected.hessian_CC, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.held_HC, expected.held_HC, rtol=1e-5)
    assert scaled("b") is found, "layers that share an input share its evidence"
    assert scaled("c") is seen


def test_a_layer_with_a_tensor_nobody_knows_is_left_alone_and_named(model: Model) -> None:
    """An expert shared by all tokens reads ffn_norm too: scaling the gain would change what it gets."""
    first = tensors(model)["blk.0.ffn_gate.weight"]
    stranger = dataclasses.replace(first, name="blk.0.ffn_gate_shexp.weight")
    odd = dataclasses.replace(model, tensors=(*model.tensors, stranger))
    done = Awq(FEEDS)(odd, made_up_evidence(odd), everything_as("Q4_0"))
    assert not any(name.startswith("blk.0.") for name in done.record["groups"])
    assert any(name.startswith("blk.1.") for name in done.record["groups"])
    assert any("ffn_gate_shexp" in note for note in done.notes)
    np.testing.assert_array_equal(
        tensors(done.model)["blk.0.ffn_norm.weight"].read(0, 1), tensors(model)["blk.0.ffn_norm.weight"].read(0, 1)
    )


def test_an_ungated_feed_forward_is_not_folded_through_its_activation(model: Model) -> None:
    ungated = dataclasses.replace(model, tensors=tuple(t for t in model.tensors if "ffn_gate" not in t.name))
    done = Awq(FEEDS)(ungated, made_up_evidence(ungated), everything_as("Q4_0"))
    assert "blk.0.ffn_up.weight" not in done.record["groups"]
    assert any("no gate" in note for note in done.notes)


def test_float_readers_need_no_scales_and_no_evidence_is_an_error(model: Model) -> None:
    kept = Awq(FEEDS)(model, made_up_evidence(model), everything_as("Q4_0", floats=("output.weight",)))
    assert "output_norm.weight" not in kept.record["groups"]
    assert any("none of its readers is quantized" in note for note in kept.notes)
    with pytest.raises(UsageError, match=r"no evidence.*dither calibrate"):
        Awq(FEEDS)(model, lambda name, expert=0: None, everything_as("Q4_0"))


def test_what_loses_on_held_back_inputs_is_not_kept(model: Model) -> None:
    """The Hessian swears that some channels are large; the held-back inputs know better."""
    honest = made_up_evidence(model)

    def misled(tensor: str, expert: int = 0) -> Evidence | None:
        seen = honest(tensor, expert)
        if seen is None:
            return None
        held = np.random.default_rng(0).standard_normal((400, len(seen.mean_square_C)))
        quiet = held / np.sqrt(seen.mean_square_C)
        return dataclasses.replace(seen, held_HC=quiet.astype(np.float32))

    done = Awq(FEEDS)(model, misled, everything_as("Q4_0"))
    assert {group["alpha"] for group in done.record["groups"].values()} == {0.0}
    assert len(ALPHAS) == 21 and ALPHAS[0] == 0


@pytest.mark.parametrize("kept", ["BF16", "F16"])
def test_a_norm_kept_in_a_short_float_is_divided_without_rounding(model: Model, kept: str) -> None:
    """What is stored of norm / s, times what the readers were given, is the norm: nothing is lost between."""
    short = everything_as("Q4_0")

    def codec_of(name: str) -> Codec | None:
        return codec(kept) if name.endswith("norm.weight") else short(name)

    done = Awq(FEEDS)(model, made_up_evidence(model), codec_of)
    before, after = tensors(model), tensors(done.model)
    changed = 0
    for layer in range(2):
        norm, reader = f"blk.{layer}.attn_norm.weight", f"blk.{layer}.attn_q.weight"
        old_1C, new_1C = before[norm].read(0, 1), after[norm].read(0, 1)
        stored_1C = codec(kept).decode(codec(kept).encode(new_1C))
        assert np.allclose(stored_1C, new_1C, rtol=3e-7), "the division is rounded"
        changed += not np.array_equal(old_1C, new_1C)
        product = stored_1C.astype(np.float64) * after[reader].read(0, 4)
        assert np.allclose(product, old_1C.astype(np.float64) * before[reader].read(0, 4), rtol=1e-6)
    assert changed
