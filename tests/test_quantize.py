"""The main job from checkpoint to file, held against independent readers and ggml's own encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dither
from conftest import BUNDLED, write_checkpoint
from dither.errors import OutputError, SourceError, UsageError
from dither.solvers.nearest import Nearest
from dither.types import Codec, Evidence, Solved


def read_back(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values of every tensor, through the `gguf` package's reader and decoders."""
    reader = gguf.GGUFReader(path)
    found = {}
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        found[tensor.name] = (kind.name, gguf.quants.dequantize(tensor.data, kind))
    return found


@pytest.mark.parametrize("to", ["F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"])
def test_an_independent_reader_finds_the_planned_types_and_the_reported_error(
    checkpoint: Path, tmp_path: Path, to: str
) -> None:
    result = dither.quantize(checkpoint, to, tmp_path / "model.gguf", threads=2)
    original = read_back(Path(dither.quantize(checkpoint, "F32", tmp_path / "f32.gguf").path))
    written = read_back(Path(result.path))
    assert {name: kind for name, (kind, _) in written.items()} == {
        tensor.name: tensor.type for tensor in result.plan.tensors
    }
    squared = norm = 0.0
    for name, (_, values) in written.items():
        reference = original[name][1].astype(np.float64)
        if reference.ndim > 1:
            squared += float(((values - reference) ** 2).sum())
            norm += float((reference**2).sum())
    assert result.relative_error == pytest.approx((squared / norm) ** 0.5, rel=1e-5, abs=1e-12)
    assert result.bytes == Path(result.path).stat().st_size


def test_f32_keeps_every_weight(checkpoint: Path, tmp_path: Path) -> None:
    written = read_back(Path(dither.quantize(checkpoint, "F32", tmp_path / "f32.gguf").path))
    source = load_file(checkpoint / "model.safetensors")
    assert np.array_equal(written["blk.1.ffn_down.weight"][1], source["model.layers.1.mlp.down_proj.weight"])
    assert np.array_equal(written["token_embd.weight"][1], source["model.embed_tokens.weight"])


def test_rounding_loses_no_more_than_ggml(checkpoint: Path, tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf")
    written = read_back(Path(dither.quantize(checkpoint, "Q4_K_M", tmp_path / "q4.gguf").path))
    name, source_name = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(checkpoint / "model.safetensors")[source_name]
    kind, values = written[name]
    raw = libgguf.quantize_rows_raw(gguf.GGMLQuantizationType[kind], weights, *weights.shape)
    ggml = np.frombuffer(
        libgguf.dequantize_rows_raw(gguf.GGMLQuantizationType[kind], raw, *weights.shape), np.float32
    ).reshape(weights.shape)
    assert ((values - weights) ** 2).sum() <= ((ggml - weights) ** 2).sum()


def test_bytes_do_not_depend_on_threads(checkpoint: Path, tmp_path: Path) -> None:
    one = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "one.gguf", threads=1)
    three = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "three.gguf", threads=3)
    assert Path(one.path).read_bytes() == Path(three.path).read_bytes()


def test_a_gguf_goes_in_and_its_metadata_is_carried_over(checkpoint: Path, tmp_path: Path) -> None:
    first = dither.quantize(checkpoint, "Q8_0", tmp_path / "q8.gguf")
    second = dither.quantize(first.path, "Q4_K_M", tmp_path / "q4.gguf")
    before, after = gguf.GGUFReader(first.path).fields, gguf.GGUFReader(second.path).fields
    changing = {"general.file_type", "dither.recipe", "dither.relative_errors"}
    for key in before.keys() - changing:
        if not key.startswith("GGUF."):
            assert after[key].contents() == before[key].contents(), key
    assert after["general.file_type"].contents() == 15  # llama.cpp's number for Q4_K_M
    errors = [second.tensors[tensor.name]["relative_error"] for tensor in second.plan.tensors]
    assert after["dither.relative_errors"].contents() == np.float32(errors).tolist()
    assert any("quantized already (Q8_0)" in note for note in second.notes)


def test_an_unknown_architecture_in_a_gguf_still_quantizes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "martian")
    writer.add_string("martian.moon", "Phobos")
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    writer.add_tensor("blk.0.antenna.weight", weights)
    writer.add_tensor("blk.0.antenna.bias", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = dither.quantize(tmp_path / "odd.gguf", "Q6_K", tmp_path / "out.gguf")
    written = read_back(Path(result.path))
    assert written["blk.0.antenna.weight"][0] == "Q6_K"
    assert written["blk.0.antenna.bias"][0] == "F32"
    assert gguf.GGUFReader(result.path).fields["martian.moon"].contents() == "Phobos"


def test_fallbacks_are_said_before_the_work(odd_checkpoint: Path) -> None:
    plan = dither.preview(odd_checkpoint, "Q4_K_M")
    notes = plan.fallback_notes()
    assert any("have 320 columns and cannot be Q4_K: they become Q5_0" in note for note in notes)
    assert notes[-1].startswith("Q4_K_M becomes ")


def test_overrides_reach_the_file(checkpoint: Path, tmp_path: Path) -> None:
    result = dither.quantize(
        checkpoint,
        "Q4_K_M",
        tmp_path / "model.gguf",
        tensors=[(r"blk\.0\.ffn_down", "Q8_0")],
        output_type="Q5_K",
        embedding_type="IQ4_XS",
    )
    kinds = {name: kind for name, (kind, _) in read_back(Path(result.path)).items()}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["output.weight"] == "Q5_K"
    assert kinds["token_embd.weight"] == "IQ4_XS"


def write_imatrix(path: Path, means: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    for name, values in means.items():
        writer.add_tensor(f"{name}.in_sum2", (values * 7).astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_moves_the_error_to_columns_that_matter_less(checkpoint: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    importance = np.random.default_rng(3).lognormal(0, 1.5, 256).astype(np.float32)
    matrix = write_imatrix(tmp_path / "imatrix.gguf", {name: importance})
    plain = read_back(Path(dither.quantize(checkpoint, "Q4_K_S", tmp_path / "plain.gguf").path))
    guided = dither.quantize(checkpoint, "Q4_K_S", tmp_path / "guided.gguf", imatrix=matrix)
    weights = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]

    def weighted_error(values: np.ndarray) -> float:
        return float((importance * (values - weights) ** 2).sum())

    assert weighted_error(read_back(Path(guided.path))[name][1]) < 0.9 * weighted_error(plain[name][1])
    assert any("No importance for" in note for note in guided.notes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: np.where(np.arange(256) == 9, np.nan, v), "NaN"),
        (lambda v: v * 0, "zero throughout"),
        (lambda v: v[:128], "another model"),
    ],
)
def test_a_bad_importance_matrix_is_refused_by_tensor(
    checkpoint: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    values = spoil(np.ones(256, np.float32))  # type: ignore[operator]
    matrix = write_imatrix(tmp_path / "bad.gguf", {"blk.0.ffn_up.weight": values})
    with pytest.raises(dither.DitherError, match=message) as caught:
        dither.quantize(checkpoint, "Q4_K_M", tmp_path / "model.gguf", imatrix=matrix)
    assert "blk.0.ffn_up.weight" in str(caught.value)
    assert not list(tmp_path.glob("model.gguf*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, bad: float) -> None:
    folder = write_checkpoint(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight: holds -?(nan|inf) at row 3, column 5"):
        dither.quantize(folder, "Q4_K_M", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model.gguf*"))


def test_a_weight_beyond_f16_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "big")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match="beyond F16's 65504"):
        dither.quantize(folder, "F16", tmp_path / "model.gguf")


def test_an_input_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    first = dither.quantize(checkpoint, "Q8_0", tmp_path / "model.gguf")
    before = Path(first.path).read_bytes()
    (tmp_path / "link.gguf").symlink_to(first.path)
    for target in (tmp_path / "model.gguf", tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="is the model itself"):
            dither.quantize(first.path, "Q4_K_M", target, force=True)
    with pytest.raises(OutputError, match="exists already"):
        dither.quantize(checkpoint, "Q4_K_M", tmp_path / "model.gguf")
    assert Path(first.path).read_bytes() == before


def test_nothing_that_is_read_is_grown_over(checkpoint: Path, tmp_path: Path) -> None:
    """The file that a result grows in may be the model (browsers call downloads so), the matrix an input."""
    model = tmp_path / "new.gguf.part"
    Path(dither.quantize(checkpoint, "Q8_0", tmp_path / "q8.gguf").path).rename(model)
    matrix = write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.ffn_up.weight": np.ones(256, np.float32)})
    before = model.read_bytes(), matrix.read_bytes()
    with pytest.raises(OutputError, match=r"new\.gguf\.part: is the model itself"):
        dither.quantize(model, "Q4_K_M", tmp_path / "new.gguf", force=True)
    with pytest.raises(OutputError, match="read with it"):
        dither.quantize(checkpoint, "Q4_K_M", matrix, imatrix=matrix, force=True)
    assert (model.read_bytes(), matrix.read_bytes()) == before


@pytest.mark.parametrize(
    ("out", "reason"), [("missing/", "no folder"), ("x" * 255 + ".gguf", "too long"), ("x" * 245 + ".gguf", "too long")]
)
def test_a_name_that_cannot_be_written_is_refused(checkpoint: Path, tmp_path: Path, out: str, reason: str) -> None:
    with pytest.raises(OutputError, match=reason):
        dither.quantize(checkpoint, "Q8_0", f"{tmp_path}/{out}")
    assert not list(tmp_path.iterdir())


def test_no_thread_writes_on_after_an_interruption(checkpoint: Path, tmp_path: Path) -> None:
    import threading

    class Interrupting:
        def note(self, text: str) -> None: ...
        def start(self, total: int, done: int) -> None: ...
        def advance(self, amount: int, what: str) -> None:
            raise KeyboardInterrupt

    before = set(threading.enumerate())  # other tests' servers may be running
    with pytest.raises(KeyboardInterrupt):
        dither.quantize(checkpoint, "Q4_K_M", tmp_path / "m.gguf", threads=4, progress=Interrupting())
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("dither")]


def test_the_default_name_says_model_and_type(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dither.quantize(checkpoint, "Q8_0").path == "tiny-llama-Q8_0.gguf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "Q4_KM"}, "Q4_K_M"),
        ({"to": "Q4_K_M", "tensors": [("ffn_(", "Q8_0")]}, "regular expression"),
        ({"to": "Q4_K_M", "tensors": [("ffn_nothing", "Q8_0")]}, "matches no tensor"),
        ({"to": "IQ2_XXS"}, "importance"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    checkpoint: Path, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dither.quantize(checkpoint, out=tmp_path / "model.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_file_carries_its_recipe(checkpoint: Path, tmp_path: Path) -> None:
    result = dither.quantize(checkpoint, "Q4_K_M", tmp_path / "model.gguf", tensors=[("ffn_down", "Q6_K")])
    recipe = json.loads(gguf.GGUFReader(result.path).fields["dither.recipe"].contents())
    assert recipe["to"] == "Q4_K_M"
    assert recipe["tensors"] == [["ffn_down", "Q6_K"]]
    inspection = dither.inspect(result.path)
    assert inspection.file_type == "Q4_K_M"
    assert inspection.made_by["recipe"] == recipe
    assert inspection.bits_per_weight == pytest.approx(result.bits_per_weight, abs=0)


def test_a_scale_that_is_no_number_is_not_copied_on(checkpoint: Path, tmp_path: Path) -> None:
    first = Path(dither.quantize(checkpoint, "Q8_0", tmp_path / "q8.gguf").path)
    entry = next(t for t in gguf.GGUFReader(first).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(first.read_bytes())
    data[int(entry.data_offset) : int(entry.data_offset) + 2] = np.float16(np.nan).tobytes()
    first.write_bytes(data)
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight: holds nan at row 0, column 0"):
        dither.quantize(first, "Q8_0", tmp_path / "again.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["q8.gguf"]


def test_values_out_of_a_types_reach_are_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "huge")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3e38
    save_file(tensors, folder / "model.safetensors")
    result = dither.quantize(folder, "Q8_0", tmp_path / "model.gguf")
    assert any("blk.0.ffn_up.weight" in note and "beyond what Q8_0 can hold" in note for note in result.notes)


def test_an_infinite_size_in_the_config_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": float("inf")}))
    with pytest.raises(dither.DitherError, match="intermediate_size: is inf, but a whole number"):
        dither.open_model(folder)


class Blockwise:
    """A solver that nobody knows by name or class: only its flags say what it does."""

    name = "blockwise"
    needs = frozenset({"hessian", "block"})
    steps = 3

    def __init__(self) -> None:
        self.refined: list[list[str]] = []

    def __call__(self, w_RC: Any, codec: Codec, evidence: Evidence | None) -> Solved:
        return Nearest()(w_RC, codec, evidence)

    def refine(self, task: Any, report: Any = None) -> dict[str, Solved]:
        report(1, 0.0)
        self.refined.append(sorted(task.start))
        return dict(task.start)


@pytest.mark.slow
def test_a_solver_is_asked_for_its_flags_and_not_for_its_class(learnt: Path, tmp_path: Path) -> None:
    solver = Blockwise()
    result = dither.quantize(BUNDLED, "Q4_0", tmp_path / "m.gguf", evidence=learnt, solver=solver)
    blocks = {name.split(".")[1] for name in result.tensors if name.startswith("blk.")}
    assert len(solver.refined) == len(blocks) and all(len(names) == 7 for names in solver.refined)
    plain = dither.quantize(BUNDLED, "Q4_0", tmp_path / "n.gguf", evidence=learnt, solver="nearest")
    assert {name: r["relative_error"] for name, r in result.tensors.items()} == {
        name: pytest.approx(r["relative_error"], rel=1e-6) for name, r in plain.tensors.items()
    }
    with pytest.raises(UsageError, match="--act-order: needs evidence, and a solver that takes one matrix at a time"):
        dither.quantize(BUNDLED, "gptq", tmp_path / "q", evidence=learnt, solver=Blockwise(), act_order=True)


def test_a_keyword_that_is_not_known_is_a_type_error() -> None:
    """Shared keywords are declared once, and are still all that is taken."""
    for function in (dither.plan, dither.quantize_within, dither.ladder):
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'colour'"):
            function("model", [], colour="blue")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sym'"):
        dither.ladder("model", [], sym=True)
