"""The evidence folder: numbers come back, another model is refused, hostile bytes cost nothing."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import dither
from dither.errors import DitherError, FormatError, OutputError, SourceError, UsageError
from dither.formats.evidence import (
    EvidenceStore,
    GroupStatistics,
    model_identity,
    weights_sample,
    write_arrays,
    write_groups,
    write_manifest,
)
from dither.formats.imatrix import read_imatrix, write_imatrix
from dither.models.source import open_model

RNG = np.random.default_rng(5)
QKV = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
EXPERTS = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")


def statistics() -> list[GroupStatistics]:
    dense = GroupStatistics(
        QKV,
        RNG.random((1, 8), np.float32),
        np.array([70], np.int64),
        RNG.random((1, 8, 8), np.float32),
        [RNG.standard_normal((5, 8)).astype(np.float32)],
    )
    stacked = GroupStatistics(
        EXPERTS,
        RNG.random((3, 8), np.float32),
        np.array([4, 0, 9], np.int64),
        RNG.random((3, 8, 8), np.float32),
        [RNG.standard_normal((rows, 8)).astype(np.float32) for rows in (2, 0, 1)],
    )
    return [dense, stacked]


def manifest(files: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "model_identity": "x",
        "weights_sample": "y",
        "data": {"sha256": "abc"},
        "hessians": True,
        "files": files,
        "notes": ["a note"],
    }


def folder_of(path: Path, groups: list[GroupStatistics]) -> Path:
    path.mkdir()
    write_manifest(path, manifest({"blk.0.npz": write_groups(path / "blk.0.npz", groups)}))
    tokens_ST = np.array([[3, 4, 5], [6, 0, 0]], np.int32)
    write_arrays(path / "tokens.npz", {"tokens_ST": tokens_ST, "lengths_S": np.array([3, 1], np.int32)})
    return path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    dense, stacked = statistics()
    store = EvidenceStore.open(folder_of(tmp_path / "e", [dense, stacked]))
    assert store.tensors == (*QKV, *EXPERTS)
    assert store.groups == (QKV, EXPERTS)
    assert store.has_hessians
    assert store.notes == ("a note",)
    found = store(QKV[0])
    assert found is not None
    assert found.tokens == 70
    assert found.data_sha256 == "abc"
    assert np.array_equal(found.mean_square_C, dense.mean_square_EC[0])
    assert dense.hessian_ECC is not None and np.array_equal(found.hessian_CC, dense.hessian_ECC[0])
    assert dense.held_EHC is not None and np.array_equal(found.held_HC, dense.held_EHC[0])
    for expert, (count, rows) in enumerate(zip((4, 0, 9), (2, None, 1), strict=True)):
        part = store(EXPERTS[1], expert)
        assert part is not None and stacked.hessian_ECC is not None and stacked.held_EHC is not None
        assert part.tokens == count
        assert np.array_equal(part.mean_square_C, stacked.mean_square_EC[expert])
        assert np.array_equal(part.hessian_CC, stacked.hessian_ECC[expert])
        if rows is None:
            assert part.held_HC is None
        else:
            assert np.array_equal(part.held_HC, stacked.held_EHC[expert])
    assert store("blk.9.attn_q.weight") is None
    tokens_ST, lengths_S = store.tokens()
    assert tokens_ST.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert lengths_S.tolist() == [3, 1]


def pulled(**damage: np.ndarray) -> list[GroupStatistics]:
    """With output Hessians of diagonal blocks; `damage` replaces that of the first or second matrix."""
    dense, stacked = statistics()
    first, second = RNG.random((1, 2, 3, 3), np.float32), RNG.random((1, 1, 5, 5), np.float32)
    outputs = {QKV[0]: damage.get("first", first), QKV[1]: damage.get("second", second)}
    experts = {name: RNG.random((3, 1, 4, 4), np.float32) for name in EXPERTS}
    return [replace(dense, outputs=outputs), replace(stacked, outputs=experts)]


def test_output_hessians_come_back_to_their_own_matrix(tmp_path: Path) -> None:
    written = pulled()
    folder = folder_of(tmp_path / "e", written)
    store = EvidenceStore.open(folder)
    for group in written:
        assert group.outputs is not None
        for tensor, output_EKOO in group.outputs.items():
            for expert, output_KOO in enumerate(output_EKOO):
                found = store(tensor, expert)
                assert found is not None and np.array_equal(found.output_KOO, output_KOO)
    first, second = store(QKV[0]), store(QKV[1])
    assert first is not None and second is not None and first.hessian_CC is second.hessian_CC
    assert "gradients" not in store.manifest  # that is the manifest's to say
    document = json.loads((folder / "evidence.json").read_text())
    (folder / "evidence.json").write_text(json.dumps(document | {"gradients": True}))
    assert EvidenceStore.open(folder).manifest["gradients"] is True
    with np.load(folder / "blk.0.npz", allow_pickle=False) as arrays:
        assert written[0].outputs is not None
        assert np.array_equal(arrays["0.output.1"], written[0].outputs[QKV[1]])


def spoilt(value: float) -> np.ndarray:
    output_EKOO = np.ones((1, 2, 3, 3), np.float32)
    output_EKOO[0, 1, 2, 2] = value
    return output_EKOO


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (spoilt(np.nan), "outputs: holds NaN"),
        (spoilt(np.inf), "outputs: holds NaN or infinity"),
        (spoilt(-1.0), "outputs: has a Hessian with a negative diagonal"),
        (np.ones((1, 2, 3, 4), np.float32), r"has output Hessians of shape \(1, 2, 3, 4\)"),
        (np.ones((2, 2, 3, 3), np.float32), r"has output Hessians of shape \(2, 2, 3, 3\)"),
        (np.ones((1, 3, 3), np.float32), r"has output Hessians of shape \(1, 3, 3\)"),
        (np.ones((1, 2, 3, 3), np.float64), "has output Hessians of shape .*, float64"),
        (np.ones((1, 0, 3, 3), np.float32), "has output Hessians of shape"),
    ],
)
def test_bad_output_hessians_are_refused_by_tensor(tmp_path: Path, damaged: np.ndarray, said: str) -> None:
    store = EvidenceStore.open(folder_of(tmp_path / "e", pulled(first=damaged)))
    assert store(QKV[1]) is not None
    with pytest.raises(FormatError, match=said) as caught:
        store(QKV[0])
    assert QKV[0] in str(caught.value)


def test_layers_of_one_input_share_one_array(tmp_path: Path) -> None:
    store = EvidenceStore.open(folder_of(tmp_path / "e", statistics()))
    first, second = store(QKV[0]), store(QKV[1])
    assert first is not None and second is not None
    assert first.hessian_CC is second.hessian_CC
    gate, up = store(EXPERTS[0], 2), store(EXPERTS[1], 2)
    assert gate is not None and up is not None
    assert gate.hessian_CC is up.hessian_CC


def test_files_can_be_read_by_numpy_alone(tmp_path: Path) -> None:
    dense, _ = statistics()
    folder = folder_of(tmp_path / "e", [dense])
    with np.load(folder / "blk.0.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["0.mean_square"], dense.mean_square_EC)
        assert arrays["0.counts"].tolist() == [70]


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "negative"), (0.0, "zero throughout")]
)
def test_bad_mean_squares_are_refused_by_tensor(tmp_path: Path, value: float, said: str) -> None:
    dense, stacked = statistics()
    if value == 0.0:
        stacked.mean_square_EC[1] = 0
    else:
        stacked.mean_square_EC[1, 3] = value
    store = EvidenceStore.open(folder_of(tmp_path / "e", [dense, stacked]))
    assert store(EXPERTS[0], 0) is not None
    with pytest.raises(FormatError, match=said) as caught:
        store(EXPERTS[0], 1)
    assert EXPERTS[0] in str(caught.value)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (-np.inf, "infinity"), (-2.0, "negative")])
def test_bad_hessians_are_refused_by_tensor(tmp_path: Path, value: float, said: str) -> None:
    dense, stacked = statistics()
    assert dense.hessian_ECC is not None
    dense.hessian_ECC[0, 2, 2] = value
    store = EvidenceStore.open(folder_of(tmp_path / "e", [dense, stacked]))
    with pytest.raises(FormatError, match=said) as caught:
        store(QKV[1])
    assert QKV[1] in str(caught.value)


def test_wrong_sizes_are_refused_by_tensor(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", statistics())
    document = json.loads((folder / "evidence.json").read_text())
    document["files"]["blk.0.npz"][0]["columns"] = 9
    (folder / "evidence.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight: has mean_square of shape"):
        EvidenceStore.open(folder)(QKV[0])


def test_manifest_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", statistics())
    document = json.loads((folder / "evidence.json").read_text())
    document["files"] = {"../e/blk.0.npz": document["files"]["blk.0.npz"]}
    (folder / "evidence.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="damaged"):
        EvidenceStore.open(folder)


def test_compressed_and_pickled_arrays_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", statistics())
    np.savez_compressed(folder / "blk.0.npz", **{"0.mean_square": np.zeros((1, 8), np.float32)})
    with pytest.raises(FormatError, match="compressed"):
        EvidenceStore.open(folder)(QKV[0])
    with zipfile.ZipFile(folder / "blk.0.npz", "w") as archive:
        raw = io.BytesIO()
        np.lib.format.write_array_header_1_0(raw, {"descr": "|O", "fortran_order": False, "shape": (1, 8)})
        archive.writestr("0.mean_square.npy", raw.getvalue() + pickle.dumps([1.0] * 8))
    with pytest.raises(FormatError, match=r"0\.mean_square"):
        EvidenceStore.open(folder)(QKV[0])


def test_header_that_asks_for_more_than_the_file_holds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", statistics())
    raw = io.BytesIO()
    shape = (1, 2**40)
    np.lib.format.write_array_header_1_0(raw, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(folder / "blk.0.npz", "w") as archive:
        archive.writestr("0.mean_square.npy", raw.getvalue())
    with pytest.raises(FormatError, match="bytes that its shape"):
        EvidenceStore.open(folder)(QKV[0])


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_give_an_error_or_sane_numbers(tmp_path: Path, data: st.DataObject) -> None:
    source = tmp_path / "source"
    if not source.exists():
        folder_of(source, statistics())
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / data.draw(st.sampled_from(["evidence.json", "blk.0.npz", "tokens.npz"]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        store = EvidenceStore.open(folder)
        store.tokens()
        found = [store(tensor) for tensor in store.tensors]
    except DitherError:
        return
    for evidence in found:
        assert evidence is not None
        assert np.isfinite(evidence.mean_square_C).all()
        assert (evidence.mean_square_C >= 0).all()


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no evidence\.json"):
        EvidenceStore.open(tmp_path)
    write_groups(tmp_path / "blk.0.npz", statistics())
    with pytest.raises(SourceError, match="unfinished"):
        EvidenceStore.open(tmp_path)


def test_checkpoint_and_its_ggufs_share_an_identity(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_model(checkpoint)
    made = [dither.quantize(checkpoint, to, tmp_path / f"{to}.gguf").path for to in ("F32", "Q8_0", "Q4_K_M")]
    models = [open_model(path) for path in made]
    assert {model_identity(model) for model in models} == {model_identity(opened)}
    samples = [weights_sample(model) for model in models]
    assert samples[0] == weights_sample(opened)
    assert len(set(samples)) == 3


def test_evidence_of_another_model_is_refused(checkpoint: Path, odd_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_model(checkpoint)
    group = GroupStatistics(("blk.0.attn_q.weight",), np.ones((1, 256), np.float32), np.array([9]))
    files = {"blk.0.npz": write_groups(tmp_path / "blk.0.npz", [group])}
    own = {"model_identity": model_identity(opened), "weights_sample": weights_sample(opened)}
    write_manifest(tmp_path, {**manifest(files), **own})
    store = EvidenceStore.open(tmp_path)
    assert store.check(opened) == ()
    quantized = open_model(dither.quantize(checkpoint, "Q8_0", tmp_path / "q.gguf").path)
    assert "weights differ" in store.check(quantized)[0]
    with pytest.raises(UsageError, match="256 inputs, and the model's tensor has 1 × 320"):
        store.check(open_model(odd_checkpoint))
    write_manifest(tmp_path, {**manifest(files), **own, "model_identity": "another", "model": "Other-7B"})
    with pytest.raises(UsageError, match="learnt from Other-7B"):
        EvidenceStore.open(tmp_path).check(opened)


def test_importance_matrix_is_evidence_too(tmp_path: Path) -> None:
    means = {"blk.0.attn_q.weight": np.array([[1.0, 2.0, 4.0]], np.float32)}
    path = tmp_path / "m.gguf"
    counts = {"blk.0.attn_q.weight": np.array([1000])}
    write_imatrix(path, means, counts, datasets=["book.txt"], chunks=2, context=500)
    store = EvidenceStore.open(path)
    found = store("blk.0.attn_q.weight")
    assert found is not None and found.hessian_CC is None
    assert found.tokens == 1000
    assert found.mean_square_C.tolist() == [1, 2, 4]
    assert not store.has_hessians
    with pytest.raises(UsageError, match="holds no text"):
        store.tokens()


def test_written_matrix_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """The `gguf` package for keys and layout, `libgguf`'s loader of importance matrices for the means."""
    means = {
        "blk.0.attn_q.weight": RNG.random((1, 6), np.float32),
        "blk.0.ffn_up_exps.weight": RNG.random((3, 4), np.float32),
    }
    counts = {"blk.0.attn_q.weight": np.array([512]), "blk.0.ffn_up_exps.weight": np.array([7, 1, 300])}
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, means, counts, datasets=["a.txt", "b.txt"], chunks=3, context=512)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt", "b.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # ggml's order: columns first
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == [4, 3]
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == [1, 3]
    loaded = libgguf.load_imatrix(path)
    for name, means_EC in means.items():
        assert np.allclose(loaded[name].reshape(means_EC.shape), means_EC, rtol=1e-6)
    ours = read_imatrix(path)
    for name, means_EC in means.items():
        assert np.allclose(ours.means[name], means_EC, rtol=1e-6)
        assert ours.counts[name].tolist() == counts[name].tolist()


def test_matrix_with_a_wrong_number_of_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.weight"):
        write_imatrix(
            tmp_path / "m.gguf",
            {"a.weight": np.ones((2, 4), np.float32)},
            {"a.weight": np.array([1])},
            datasets=[],
            chunks=1,
            context=1,
        )
    assert list(tmp_path.iterdir()) == []
