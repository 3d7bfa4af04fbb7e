"""`quantize` with evidence: solvers, statistics, transforms, and the measurement a file is born with.

The bundled model calibrated on its own text; what a file lost is computed here from transformers' logits
of the decoded file, not by the code under test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families_util import TEXT, byte_level_tokenizer, random_model, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import dither
from dither.formats.evidence import EvidenceStore
from dither.measuring.calibrate import calibrate
from dither.solvers.learned import Learned
from killed import killed
from test_calibrate import SMALL, Listener

pytestmark = pytest.mark.slow
BUNDLED = Path(str(files("dither") / "demo_model"))
TOKENS = 8192


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence") / "demo"
    calibrate(BUNDLED, "self", tokens=TOKENS, context=256, out=folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    """Held-out tokens (S, T): what the model itself writes, sampled by transformers."""
    model = reference()
    torch.manual_seed(7)
    openings = torch.randint(300, 4000, (12, 4))
    return model.generate(openings, do_sample=True, max_new_tokens=124, min_new_tokens=124, pad_token_id=0)


def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


def divergence(path: str | Path, text: torch.Tensor) -> float:
    """Mean KL divergence of a GGUF of the bundled model, by transformers and the gguf package's decoders."""
    original, model = reference(), reference()
    state = model.state_dict()
    for tensor in gguf.GGUFReader(path).tensors:
        w = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        name = hugging_face_name(tensor.name)
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp's order of rows back to transformers'
            heads = len(w) // 64
            w = w.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(w.shape)
        state[name].copy_(torch.from_numpy(np.array(w, np.float32)))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(text).logits.double(), dim=-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def hugging_face_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, block, kind, _ = name.split(".")
    part = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }[kind]
    return f"model.layers.{block}.{part}.weight"


@pytest.fixture(scope="session")
def made(evidence: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dither.Result]:
    folder = tmp_path_factory.mktemp("made")
    return {
        solver: dither.quantize(BUNDLED, "Q3_K_M", folder / f"{solver}.gguf", evidence=evidence, solver=solver)
        for solver in ("nearest", "gptq")
    }


def test_error_feedback_loses_less_than_half_of_what_nearest_loses(
    made: dict[str, dither.Result], text: torch.Tensor
) -> None:
    nearest, gptq = (divergence(made[solver].path, text) for solver in ("nearest", "gptq"))
    assert 0 < gptq < 0.6 * nearest
    assert made["nearest"].bytes == made["gptq"].bytes - _recipe_difference(made)


def _recipe_difference(made: dict[str, dither.Result]) -> int:
    """The headers name their solver; tensors are equal byte for byte in size."""
    sizes = {name: Path(result.path).stat().st_size for name, result in made.items()}
    assert made["nearest"].plan == made["gptq"].plan
    return sizes["gptq"] - sizes["nearest"]


def test_gptq_is_the_default_where_there_are_hessians(evidence: Path, tmp_path: Path) -> None:
    result = dither.quantize(BUNDLED, "Q3_K_M", tmp_path / "m.gguf", evidence=evidence)
    assert result.solver == "gptq"
    assert result.solvers == {"gptq": 29}
    matrix = dither.quantize(BUNDLED, "Q3_K_M", tmp_path / "n.gguf", evidence=evidence / "imatrix.gguf")
    assert matrix.solver == "nearest"


def test_the_records_hold_both_objectives(made: dict[str, dither.Result]) -> None:
    for name, record in made["gptq"].tensors.items():
        if "objective" in record:
            assert record["objective"] < record["nearest_objective"], name
            assert min(record["held"], record["nearest_held"]) > 0, name
    assert sum("objective" in record for record in made["gptq"].tensors.values()) == 29


def test_bytes_do_not_depend_on_the_number_of_threads(evidence: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{threads}.gguf" for threads in (1, 2)]
    for threads, path in enumerate(paths, 1):
        dither.quantize(BUNDLED, "Q2_K", path, evidence=evidence, threads=threads)
    assert paths[0].read_bytes() == paths[1].read_bytes()


QUANTIZE = """
import dither
import dither.containers.journal as journal
journal._SYNC_SECONDS = 0  # after every tensor
dither.quantize(
    sys.argv[2], "Q4_0", sys.argv[3], evidence=sys.argv[4], statistics=sys.argv[5], progress=Killer(),
)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two blocks, and evidence of it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(TEXT * 8)
    model = save_model(random_model(LlamaConfig(**SMALL)), folder / "m", byte_level_tokenizer(size=300))
    calibrate(model, folder / "text.txt", tokens=480, context=48, out=folder / "e")
    return model, folder / "e"


@pytest.mark.parametrize("statistics", ["parallel", "sequential"])
@pytest.mark.parametrize("moment", [4, 11])  # in the first block, in the second
def test_a_killed_run_resumes_with_identical_bytes(
    small: tuple[Path, Path], tmp_path: Path, statistics: Any, moment: int
) -> None:
    (model, evidence), target = small, tmp_path / "killed.gguf"
    whole = dither.quantize(model, "Q4_0", tmp_path / "whole.gguf", evidence=evidence, statistics=statistics)
    assert whole.solvers["gptq"] > 10
    killed(QUANTIZE, moment, model, target, evidence, statistics)
    journal = target.with_name("killed.gguf.part.journal").read_text()
    assert journal.count("\n") == moment  # what it is of, and the tensors before the one it died at
    assert not target.exists()
    listener = Listener()
    dither.quantize(model, "Q4_0", target, evidence=evidence, statistics=statistics, progress=listener)
    assert listener.done > 0
    assert target.read_bytes() == Path(whole.path).read_bytes()


def test_statistics_behind_quantized_layers_give_another_file_of_like_quality(
    evidence: Path, made: dict[str, dither.Result], text: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "sequential.gguf"
    result = dither.quantize(BUNDLED, "Q3_K_M", path, evidence=evidence, statistics="sequential")
    recipe = json.loads(gguf.GGUFReader(path).fields["dither.recipe"].contents())
    assert recipe["statistics"] == "sequential"
    assert path.read_bytes() != Path(made["gptq"].path).read_bytes()
    assert divergence(result.path, text) < 1.2 * divergence(made["gptq"].path, text)


def test_learned_rounding_loses_less_than_error_feedback(
    evidence: Path, made: dict[str, dither.Result], text: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "learned.gguf"
    result = dither.quantize(BUNDLED, "Q3_K_M", path, evidence=evidence, solver=Learned(steps=12))
    assert result.solvers["learned"] >= 7
    assert divergence(path, text) < divergence(made["gptq"].path, text)


@pytest.mark.parametrize("transform", ["awq", "rotate"])
def test_a_transformed_file_loses_little(
    evidence: Path, made: dict[str, dither.Result], text: torch.Tensor, tmp_path: Path, transform: str
) -> None:
    """Measured by our own stream: a rotated model has an output matrix, which transformers' would not."""
    path = tmp_path / "m.gguf"
    result = dither.quantize(
        BUNDLED, "Q3_K_M", path, evidence=evidence, solver="gptq", transforms=[transform], measure=True
    )
    assert result.measurement is not None
    assert result.measurement.kl_mean < 2 * divergence(made["gptq"].path, text)
    assert transform in json.loads(gguf.GGUFReader(path).fields["dither.recipe"].contents())["transforms"]
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) == (transform == "rotate")


@pytest.fixture(scope="session")
def measured(evidence: Path, tmp_path_factory: pytest.TempPathFactory) -> dither.Result:
    path = tmp_path_factory.mktemp("measured") / "m.gguf"
    return dither.quantize(BUNDLED, "Q4_K_M", path, evidence=evidence, measure=True)


class TestMeasured:
    def test_the_figures_are_those_of_the_held_back_text(self, measured: dither.Result, evidence: Path) -> None:
        tokens_ST, lengths_S = EvidenceStore.open(evidence).tokens()
        spare_ST, spare_S = EvidenceStore.open(evidence).spare_tokens() or (tokens_ST[:0], lengths_S[:0])
        held_ST = torch.from_numpy(np.concatenate([tokens_ST[7::8], spare_ST]).astype(np.int64))
        assert len(spare_ST) and (np.concatenate([lengths_S, spare_S]) == held_ST.shape[1]).all()
        half = held_ST.shape[1] // 2
        assert measured.measurement.tokens == len(held_ST) * (held_ST.shape[1] - 1 - half)
        expected = scored_divergence(measured.path, held_ST, half)
        assert measured.measurement.kl_mean == pytest.approx(expected, rel=1e-3)

    def test_file_and_side_file_agree(self, measured: dither.Result) -> None:
        kept = json.loads(Path(measured.path + ".measure.json").read_text())
        inside = json.loads(gguf.GGUFReader(measured.path).fields["dither.measure"].contents())
        assert inside["kl_mean"] == kept["kl_mean"] == measured.measurement.kl_mean
        assert inside["tensor_bytes"] == kept["tensor_bytes"] == measured.plan.tensor_bytes
        assert inside["bytes"] == kept["bytes"] == measured.bytes == Path(measured.path).stat().st_size
        sha256 = subprocess.run(["sha256sum", measured.path], capture_output=True, text=True, check=True).stdout
        assert kept["file_sha256"] == sha256.split()[0]

    def test_inspect_shows_recipe_and_measurement(self, measured: dither.Result) -> None:
        found = dither.inspect(measured.path)
        assert found.measurement["kl_mean"] == measured.measurement.kl_mean
        assert found.made_by["recipe"]["solver"] == "gptq"
        assert found.made_by["recipe"]["evidence"]["data"]["tokens"] >= TOKENS * 0.9

    def test_a_file_made_of_it_carries_no_old_measurement(self, measured: dither.Result, tmp_path: Path) -> None:
        again = dither.quantize(measured.path, "Q8_0", tmp_path / "again.gguf")
        assert dither.inspect(again.path).measurement is None


def scored_divergence(path: str | Path, text_ST: torch.Tensor, skip: int) -> float:
    original, model = reference(), reference()
    state = model.state_dict()
    for tensor in dither.open_model(path).tensors:
        w = tensor.read(0, tensor.rows).reshape(tensor.shape)
        name = hugging_face_name(tensor.name)
        if ".q_proj" in name or ".k_proj" in name:
            w = w.reshape(len(w) // 64, 32, 2, -1).swapaxes(1, 2).reshape(w.shape)
        state[name].copy_(torch.from_numpy(np.array(w, np.float32)))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(text_ST).logits.double(), dim=-1)[:, skip:-1] for m in (original, model))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


class TestRefused:
    def test_evidence_of_another_model(self, evidence: Path, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(dither.DitherError, match="evidence"):
            dither.quantize(checkpoint, "Q4_K_M", tmp_path / "m.gguf", evidence=evidence)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"solver": "gptq"}, "needs Hessians"),
            ({"solver": "best"}, "is not one of"),
            ({"measure": True}, "no held-back text"),
            ({"transforms": ["awq"]}, "needs evidence"),
            ({"transforms": ["shake"]}, "is not one of"),
            ({"statistics": "sequential"}, "solvers that use Hessians"),
            ({"statistics": "both"}, "is not one of"),
        ],
    )
    def test_what_cannot_be_done_is_said_before_anything_is_written(
        self, checkpoint: Path, tmp_path: Path, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(dither.DitherError, match=message):
            dither.quantize(checkpoint, "Q4_K_M", tmp_path / "m.gguf", **arguments)
        assert not list(tmp_path.iterdir())

    def test_a_matrix_cannot_drive_error_feedback(self, evidence: Path, tmp_path: Path) -> None:
        with pytest.raises(dither.DitherError, match="needs Hessians"):
            dither.quantize(BUNDLED, "Q4_K_M", tmp_path / "m.gguf", imatrix=evidence / "imatrix.gguf", solver="gptq")

    @pytest.mark.parametrize("arguments", ["measure=True", "solver='learned'", "statistics='sequential'"])
    def test_what_needs_torch_says_so_before_any_work(self, evidence: Path, tmp_path: Path, arguments: str) -> None:
        code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
import dither
try:
    out, evidence = {str(tmp_path / "m.gguf")!r}, {str(evidence)!r}
    dither.quantize({str(BUNDLED)!r}, "Q4_K_M", out, evidence=evidence, {arguments})
except dither.DitherError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "pip install 'dither[calibrate]'" in done.stdout
        assert not list(tmp_path.iterdir())


def test_every_expert_is_solved_on_its_own(tmp_path: Path) -> None:
    """A stack's rows belong to experts that see other tokens: each has its own Hessian, its own answer."""
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    folder = save_model(random_model(config), tmp_path / "moe")
    words = np.random.default_rng(0).integers(0, 1000, 6000)
    (tmp_path / "text.txt").write_text(" ".join(f"word{word}" for word in words))
    evidence = tmp_path / "evidence"
    calibrate(folder, tmp_path / "text.txt", tokens=2048, context=64, out=evidence)
    result = dither.quantize(folder, "Q4_0", tmp_path / "m.gguf", evidence=evidence, pure=True)
    written = {tensor.name: tensor for tensor in dither.open_model(result.path).tensors}
    original = {tensor.name: tensor for tensor in dither.open_model(folder).tensors}
    store = EvidenceStore.open(evidence)
    name = "blk.1.ffn_down_exps.weight"
    record, rows = result.tensors[name], original[name].rows // 4
    assert sum(record["solvers"].values()) == 4
    total = 0.0
    for expert in range(4):
        span = slice(expert * rows, (expert + 1) * rows)
        seen = store(name, expert)
        assert seen is not None and seen.hessian_CC is not None
        w_RC, found_RC = (tensors[name].read(span.start, span.stop) for tensors in (original, written))
        error_RC = w_RC.astype(float) - found_RC
        total += float(np.trace(error_RC @ seen.hessian_CC @ error_RC.T))
    assert record["solvers"] == {"gptq": 4}
    assert total == pytest.approx(record["objective"], rel=1e-4)
    assert total < record["nearest_objective"]
