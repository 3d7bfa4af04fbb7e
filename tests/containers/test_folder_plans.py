"""Plans and budgets for folders, resuming, conversion: sizes from the disk, numbers from the `gguf` package.

Legend: R rows, C columns.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from safetensors import safe_open

import dither
from conftest import BUNDLED
from dither.containers.plan_file import read_plan
from dither.errors import OutputError, UsageError

pytestmark = pytest.mark.slow  # models run


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def everything(folder: Path) -> int:
    """Bytes of all the files, the tokenizer and the card included."""
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(("to", "size"), [("gptq", 3_700_000), ("w4a16", 4_000_000), ("w4a16", 6_790_000)])
def test_a_planned_folder_is_no_larger_than_promised(to: str, size: int, learnt: Path, tmp_path: Path) -> None:
    planned = dither.plan(BUNDLED, size=size, to=to, evidence=learnt, solver="nearest", out=tmp_path / "p.toml")
    dither.quantize(BUNDLED, plan=tmp_path / "p.toml", evidence=learnt, out=tmp_path / "q")
    assert 0.995 * size <= planned.file_bytes <= size
    assert 0.985 * size <= everything(tmp_path / "q") <= planned.file_bytes
    written = {t.name: t.stored for t in dither.open_model(tmp_path / "q").tensors}
    for name, tensor in read_plan(tmp_path / "p.toml").tensors.items():
        assert written[name] == tensor.type.removesuffix("-bf16"), name
    kinds = {name: t.type for name, t in planned.plan.tensors.items()}
    assert len(set(kinds.values())) > 1
    for block in range(4):
        for stack in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):  # servers compute these as one
            assert len({kinds[f"blk.{block}.{part}.weight"] for part in stack}) == 1
    assert json.loads((tmp_path / "q" / "dither.json").read_text())["recipe"]["to"] == to


def test_servers_find_the_rules_of_the_modules_that_they_fuse(learnt: Path, tmp_path: Path) -> None:
    """vLLM and SGLang match a GPTQ file's rules against qkv_proj and gate_up_proj, the first match counts."""
    planned = dither.plan(BUNDLED, size=3_700_000, to="gptq", evidence=learnt, solver="nearest")
    dither.quantize(BUNDLED, plan=planned.plan, evidence=learnt, out=tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]

    def bits(module: str) -> int:
        for rule, values in config["dynamic"].items():
            if re.match(rule[2:], module):
                return 16 if rule.startswith("-:") else values["bits"]
        return config["bits"]

    found = []
    for block in range(4):
        for fused, part in (("self_attn.qkv_proj", "attn_v"), ("mlp.gate_up_proj", "ffn_up")):
            kind = planned.plan.tensors[f"blk.{block}.{part}.weight"].type
            found.append(bits(f"model.layers.{block}.{fused}"))
            assert found[-1] == (16 if kind == "BF16" else int(kind[3]))
            own = "self_attn.v_proj" if part == "attn_v" else "mlp.up_proj"
            assert bits(f"model.layers.{block}.{own}") == found[-1]
    assert len(set(found)) > 1


def test_nvfp4_and_numbers_are_mixed_to_a_size(learnt: Path, tmp_path: Path) -> None:
    """Its codec hangs on a tensor's largest weight: errors are those of the file's own scales."""
    planned = dither.plan(BUNDLED, size=5_200_000, to="nvfp4", evidence=learnt, solver="nearest")
    assert {t.type for t in planned.plan.tensors.values()} == {"NVFP4", "BF16"}
    result = dither.quantize(BUNDLED, plan=planned.plan, evidence=learnt, out=tmp_path / "q", measure=True)
    assert 0.97 * 5_200_000 < everything(tmp_path / "q") <= 5_200_000
    assert result.measurement is not None and planned.plan.kl is not None
    assert result.measurement.kl_mean == pytest.approx(planned.plan.kl, rel=0.3)


def test_a_plan_beats_one_type_and_says_so(learnt: Path, tmp_path: Path) -> None:
    found = dither.quantize_within(
        BUNDLED,
        dither.budget(bpw=6.2, parameters=dither.open_model(BUNDLED).parameters),
        tmp_path / "q",
        to="gptq",
        evidence=learnt,
        solver="nearest",
    )
    names = [rival.name for rival in found.rivals]
    assert names == ["plan", "int3-g128 throughout", "random allocation"]
    assert found.winner == min(found.rivals, key=lambda rival: rival.kl).name == "plan"
    assert found.result.bits_per_weight <= 6.2
    assert dither.inspect(tmp_path / "q").measurement is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.measure.json", "q.toml"]


def test_a_budget_wants_a_format_that_mixes(learnt: Path) -> None:
    with pytest.raises(UsageError, match="names one type, and a budget chooses among them"):
        dither.plan(BUNDLED, size=3_000_000, to="Q4_K_M", evidence=learnt)


def test_a_killed_folder_continues_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL while tensors are written, as often as it takes to catch one half done."""
    script = (
        "import sys, time, dither\n"
        "from dither.containers.folders.output import FolderOutput\n"
        "finish = FolderOutput.finish\n"
        "def slow(self, tensor, record):\n"
        "    finish(self, tensor, record); self._file.sync(); print(tensor, flush=True); time.sleep(0.05)\n"
        "FolderOutput.finish = slow\n"
        f"dither.quantize({str(BUNDLED)!r}, 'w4a16', sys.argv[1])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "q")], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for _ in range(9):
        run.stdout.readline()
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not (tmp_path / "q").exists() and (tmp_path / "q.part").is_dir()
    result = dither.quantize(BUNDLED, "w4a16", tmp_path / "q")
    assert result.resumed >= 8
    dither.quantize(BUNDLED, "w4a16", tmp_path / "whole")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("q", "whole"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


@pytest.mark.parametrize(
    ("to", "options", "kind"),
    [
        ("gptq", {"group": 32}, "Q4_0"),
        ("gptq", {"group": 128}, "Q4_0"),
        ("w4a16", {"group": 64}, "Q4_0"),
        ("mxfp4", {}, "MXFP4"),
    ],
)
def test_what_coincides_with_a_type_of_gguf_is_carried_over(
    to: str, options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    dither.quantize(BUNDLED, to, tmp_path / "q", **options)
    found = dither.convert(tmp_path / "q", tmp_path / "model.gguf")
    assert (found.exact, found.rounded) == (29, 0)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    originals = {tensor.name: tensor for tensor in dither.open_model(tmp_path / "q").tensors}
    matrices = [tensor for tensor in reader.tensors if tensor.name.startswith("blk") and len(tensor.shape) > 1]
    assert len(matrices) == 28
    for tensor in matrices:
        assert tensor.tensor_type.name == kind
        expected_RC = originals[tensor.name].read(0, originals[tensor.name].rows)
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), expected_RC), tensor.name


def test_what_does_not_coincide_is_counted(tmp_path: Path) -> None:
    dither.quantize(BUNDLED, "nf4", tmp_path / "q")
    rounded = dither.convert(tmp_path / "q", tmp_path / "model.gguf")
    assert (rounded.exact, rounded.rounded) == (1, 28) and 0 < rounded.result.relative_error < 0.003
    exact = dither.convert(tmp_path / "q", tmp_path / "exact.gguf", dtype="f32")
    assert (exact.exact, exact.rounded) == (29, 0)
    forced = dither.convert(tmp_path / "q", tmp_path / "forced.gguf", "Q8_0")
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "forced.gguf").tensors} == {"Q8_0", "BF16", "F32"}
    assert forced.rounded == 28


def test_ends_that_do_not_meet_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a type of GGUF, and the output is a folder"):
        dither.convert(BUNDLED, tmp_path / "out", "Q4_0")
    with pytest.raises(UsageError, match=r"is a folder, and the output is a GGUF"):
        dither.convert(BUNDLED, tmp_path / "out.gguf", "awq")
    with pytest.raises(UsageError, match="is not one of bf16, f16, f32"):
        dither.convert(BUNDLED, tmp_path / "out", dtype="int4")
    with pytest.raises(OutputError, match="is no folder"):
        dither.convert(BUNDLED, tmp_path / "nowhere" / "out")


def test_a_measured_folder_says_what_it_lost(learnt: Path, tmp_path: Path) -> None:
    result = dither.quantize(BUNDLED, "w8a16", tmp_path / "q", evidence=learnt, measure=True)
    assert result.measurement is not None and 0 < result.measurement.kl_mean < 1e-3
    inside = dither.inspect(tmp_path / "q")
    assert inside.measurement is not None
    assert inside.measurement["kl_mean"] == pytest.approx(result.measurement.kl_mean)
    assert f"{result.measurement.kl_mean:.4f}" in (tmp_path / "q" / "README.md").read_text()
    again = dither.measure([tmp_path / "q"], BUNDLED, data="self", tokens=512, save=False)[0]
    assert again.kl_mean < 2e-3


@pytest.mark.parametrize("sym", [True, False])
def test_groups_by_what_columns_matter(sym: bool, learnt: Path, tmp_path: Path) -> None:
    """As AutoGPTQ's desc_act: g_idx says the groups, and what is read back is what was solved for."""
    made: dict[str, Any] = {"evidence": learnt, "group": 32, "bits": 3, "sym": sym, "solver": "nearest"}
    result = dither.quantize(BUNDLED, "gptq", tmp_path / "by-size", act_order=True, **made)
    config = json.loads((tmp_path / "by-size" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] is True
    with safe_open(tmp_path / "by-size" / "model.safetensors", "np") as file:
        groups_C = file.get_tensor("model.layers.1.mlp.down_proj.g_idx")
    store = dither.EvidenceStore.open(learnt)
    seen = store("blk.1.ffn_down.weight")
    assert seen is not None
    order_C = np.argsort(-seen.mean_square_C, kind="stable")
    assert np.array_equal(groups_C[order_C], np.arange(768) // 32)
    original, found = (
        {t.name: t.read(0, t.rows).astype(np.float64) for t in dither.open_model(folder).tensors}
        for folder in (BUNDLED, tmp_path / "by-size")
    )
    for name, tensor in result.tensors.items():
        lost = float(np.square(found[name] - original[name]).sum())
        assert lost == pytest.approx(tensor["squared_error"], rel=1e-4, abs=1e-9), name
    solved = dither.quantize(
        BUNDLED, "gptq", tmp_path / "fed", act_order=True, **made | {"solver": "gptq", "group": 128}
    )
    assert solved.solvers == {"gptq": 28}


def test_only_gptq_has_groups_by_what_columns_matter(learnt: Path, tmp_path: Path) -> None:
    for to in ("awq", "w4a16", "Q4_0"):
        with pytest.raises(UsageError, match="--act-order: has no place in"):
            dither.quantize(BUNDLED, to, tmp_path / "q", act_order=True, evidence=learnt)
    with pytest.raises(UsageError, match="needs evidence"):
        dither.quantize(BUNDLED, "gptq", tmp_path / "q", act_order=True)


def test_a_rewritten_model_keeps_its_dtype(learnt: Path, tmp_path: Path) -> None:
    """Whatever a transform makes of tensors on the way."""
    made: dict[str, Any] = {"evidence": learnt, "solver": "nearest"}
    plain = dither.quantize(BUNDLED, "awq", tmp_path / "plain", transforms=(), **made)
    scaled = dither.quantize(BUNDLED, "awq", tmp_path / "scaled", **made)
    assert weights(tmp_path / "plain") == weights(tmp_path / "scaled")
    assert {t.type for t in scaled.plan.tensors} == {t.type for t in plain.plan.tensors}
    found = dither.measure([tmp_path / "plain", tmp_path / "scaled"], BUNDLED, tokens=2048, save=False)
    assert found[1].kl_mean < found[0].kl_mean


@pytest.mark.parametrize("kind", ["uint8-channel-bf16", "int8-g32-bf16"])
def test_integers_that_no_byte_kernel_multiplies_are_packed_beside_w8a8(kind: str, tmp_path: Path) -> None:
    """int-quantized has a scale per row and no zero point: another grid of eight bits is stored in words."""
    dither.quantize(BUNDLED, "w8a8", tmp_path / "q", tensors=[("ffn_down", kind)])
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert sorted(group["format"] for group in config["config_groups"].values()) == ["int-quantized", "pack-quantized"]
    originals = {tensor.name: tensor for tensor in dither.open_model(BUNDLED).tensors}
    for tensor in dither.open_model(tmp_path / "q").tensors:
        w_RC, original_RC = (t.read(0, t.rows) for t in (tensor, originals[tensor.name]))
        assert np.linalg.norm(w_RC - original_RC) < 0.01 * np.linalg.norm(original_RC), tensor.name


def norms(folder: Path) -> dict[str, list[float]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layernorm" in name]  # noqa: SIM118 - no mapping
        return {name: file.get_tensor(name).float().tolist() for name in names}


def test_what_is_called_awq_has_awqs_scales(learnt: Path, tmp_path: Path) -> None:
    """They are folded into the norms before the matrices, where any reader sees them, unless nobody wants them."""
    made: dict[str, Any] = {"evidence": learnt, "group": 64}
    result = dither.quantize(BUNDLED, "awq", tmp_path / "awq", **made)
    without = dither.quantize(BUNDLED, "awq", tmp_path / "without", transforms=(), **made)
    matrix = dither.quantize(BUNDLED, "awq", tmp_path / "matrix", group=64, imatrix=learnt / "imatrix.gguf")
    original = norms(BUNDLED)
    assert norms(tmp_path / "without") == original
    for folder in ("awq", "matrix"):
        scaled = [name for name, gain in norms(tmp_path / folder).items() if gain != original[name]]
        assert len(scaled) > len(original) / 2
    assert [made.method for made in (result, without, matrix)] == ["awq + gptq", "gptq", "awq + nearest"]
    for folder, method, beware in (("awq", "awq + gptq", False), ("without", "gptq", True)):
        found = dither.inspect(tmp_path / folder)
        assert found.made_by["method"] == method
        assert any("Its layout is AWQ's" in note for note in found.notes) is beware
        card = (tmp_path / folder / "README.md").read_text()
        assert f"| method | {method} |" in card and ("Its layout is AWQ's" in card) is beware


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_plain_rounding_is_not_called_by_a_methods_name(to: str, tmp_path: Path) -> None:
    result = dither.quantize(BUNDLED, to, tmp_path / "q")
    assert result.method == result.to_json()["method"] == "plain rounding"
    said = f"Its layout is {to.upper()}'s, its codes are not: plain rounding chose them."
    assert any(note.startswith(said) and "dither calibrate" in note for note in result.notes)
    assert any(note.startswith(said) for note in dither.inspect(tmp_path / "q").notes)
    assert said in (tmp_path / "q" / "README.md").read_text()
    assert json.loads((tmp_path / "q" / "dither.json").read_text())["recipe"]["method"] == "plain rounding"
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert to == "awq" or config["meta"]["method"] == "plain rounding"
    again = dither.convert(tmp_path / "q", tmp_path / "again", to)  # the same codes, which nobody rounded now
    assert again.rounded == 0 and not any("Its layout is" in note for note in again.result.notes)


def test_formats_called_after_their_numbers_promise_no_method(tmp_path: Path) -> None:
    for to in ("w4a16", "nf4", "fp8"):
        result = dither.quantize(BUNDLED, to, tmp_path / to)
        assert result.method == "plain rounding"
        assert not any("Its layout is" in note for note in (*result.notes, *dither.inspect(tmp_path / to).notes))
    assert dither.quantize(BUNDLED, "safetensors", tmp_path / "numbers").method == ""
