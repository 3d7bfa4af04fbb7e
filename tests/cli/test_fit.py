"""`dither fit` as a person and a script meet it, and `dither.fit` on machines that are made up."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from fitting_util import llama_31_8b
from typer.testing import CliRunner, Result

import dither
from dither.capacity.machine import Device, Machine
from dither.cli.fit import fit as command
from dither.errors import UsageError
from dither.types import Tensor

app = typer.Typer(rich_markup_mode=None)
app.command()(command)
GIB = 2**30
DEMO = Path(dither.__file__).parent / "demo_model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def laptop(ram: int = 16, gpu: int = 0, bandwidth: float = 60e9) -> Machine:
    cards = (Device("NVIDIA RTX 4060", gpu * GIB, "told", 272e9, "literature"),) if gpu else ()
    return Machine("made up", 8, Device("RAM", ram * GIB, "told", bandwidth, "measured"), cards)


# llama.cpp, tools/quantize/README.md: bits per weight of Llama-3.1-8B by type
PUBLISHED_BITS = {
    "Q8_0": 8.5008, "Q6_K": 6.5633, "Q5_K_M": 5.7036, "Q5_K_S": 5.5704, "Q4_K_M": 4.8944, "Q4_K_S": 4.6672,
    "IQ4_XS": 4.4597, "Q3_K_L": 4.2979, "IQ3_M": 3.7628, "Q2_K": 3.1593, "IQ2_XXS": 2.3824,
}  # fmt: skip


def test_weights_are_those_that_llama_quantize_publishes() -> None:
    found = {c.type: c for c in dither.fit(llama_31_8b(), machine=laptop()).candidates}
    for name, bits in PUBLISHED_BITS.items():
        assert found[name].bits_per_weight == pytest.approx(bits, rel=0.005), name
    assert found["Q4_K_M"].memory.cache == GIB


def test_a_tensor_with_an_unknown_name_is_read_once_per_token() -> None:
    plain = replace(llama_31_8b(), kind="gguf")
    unknown = Tensor("model.layers.0.mixer.A_log", (4, 256), "F32", 4096, plain.tensors[0].read)
    models = plain, replace(plain, tensors=(*plain.tensors, unknown))
    without, beside = (next(c for c in dither.fit(model, machine=laptop()).candidates if c.file) for model in models)
    assert beside.active - without.active == beside.memory.weights - without.memory.weights == 4096


def by_type(found: dither.Fit) -> dict[str, str]:
    return {candidate.type: candidate.verdict.word for candidate in found.candidates}


def test_verdicts_follow_the_machine() -> None:
    words = by_type(dither.fit(llama_31_8b(), machine=laptop(ram=8, gpu=6)))
    assert (words["F32"], words["Q8_0"], words["Q4_K_S"], words["IQ3_XXS"]) == (
        "from disk",
        "part in RAM",
        "part in RAM",
        "GPU",
    )
    partly = next(c for c in dither.fit(llama_31_8b(), machine=laptop(8, 6)).candidates if c.type == "Q8_0")
    assert 0 < (partly.verdict.gpu_layers or 0) < 32
    without = dither.fit(llama_31_8b(), machine=laptop(ram=8))
    assert by_type(without)["Q4_K_M"] == "RAM" and by_type(without)["Q8_0"] == "from disk"
    nothing = dither.fit(llama_31_8b(), machine=laptop(ram=1))
    assert set(by_type(nothing).values()) == {"no"} and not nothing.fits and nothing.chosen is None


def test_the_recommendation_is_the_least_loss_at_reading_speed() -> None:
    fast = dither.fit(llama_31_8b(), machine=laptop(ram=64, bandwidth=400e9))
    assert fast.chosen == "Q8_0" and "in RAM" in fast.recommendation
    slow = dither.fit(llama_31_8b(), machine=laptop(ram=64, bandwidth=100e9))
    rows = {c.type: c.verdict.speed for c in slow.candidates}
    # 60 of 100 GB/s over 5.21 GiB less 0.34 of embedding and half a gibibyte of cache, 2.6 ms beside: 99 ms
    assert slow.chosen == "Q5_K_S"
    crawling = dither.fit(llama_31_8b(), machine=laptop(ram=64, bandwidth=10e9))
    assert crawling.chosen == "IQ4_XS"  # the smallest that is still good
    assert rows["Q4_K_M"] and rows["Q4_K_M"].low < rows["Q4_K_M"].likely < rows["Q4_K_M"].high
    assert any("slower than people read" in why for _, why in slow.ruled_out)
    assert any("slower still" in why for _, why in crawling.ruled_out)


def test_quality_is_literature_until_this_model_was_measured() -> None:
    found = dither.fit(llama_31_8b(), machine=laptop())
    row = next(c for c in found.candidates if c.type == "Q4_K_M").to_json()
    assert (row["kl"], row["tags"]["kl"]) == (0.031273, "literature")
    assert set(row["tags"].values()) <= {"measured", "estimated", "literature"}


def test_a_measurement_beside_the_model_wins(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from dither.measuring import schema

    folder = Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
    made = dither.quantize(folder, "Q4_0", tmp_path / "tiny-Q4_0.gguf")
    intervals = {
        name + end: 0.02
        for name in (
            "kl_mean",
            "kl_median",
            "kl_p90",
            "kl_p99",
            "kl_p999",
            "kl_max",
            "same_top",
            "delta_p_mean",
            "delta_p_rms",
            "ppl",
            "ppl_reference",
            "ppl_ratio",
        )
        for end in ("", "_low", "_high")
    }
    parameters = dither.inspect(tmp_path / "tiny-Q4_0.gguf").parameters
    stored = int(parameters * made.bits_per_weight / 8)
    measurement = schema.Measurement(
        tool="test",
        file="tiny-Q4_0.gguf",
        type="Q4_0",
        bytes=stored,
        bpw=made.bits_per_weight,
        reference="tiny",
        data="a tale",
        data_sha256="0",
        context=64,
        sequences=1,
        tokens=8,
        **intervals,
    )
    schema.save(measurement, schema.path_for(tmp_path / "tiny-Q4_0.gguf"))
    rows = {c.type: c.quality for c in dither.fit(folder, machine=laptop()).candidates}
    assert rows["Q4_0"] and (rows["Q4_0"].tag, rows["Q4_0"].kl) == ("measured", 0.02)
    assert rows["Q4_1"] is None or rows["Q4_1"].tag == "literature"
    own = dither.fit(tmp_path / "tiny-Q4_0.gguf", machine=laptop())
    assert own.candidates[0].quality and own.candidates[0].quality.tag == "measured"
    assert own.chosen == "Q4_0" and own.commands[0].startswith("dither chat")
    other = Path(shutil.copytree(checkpoint, tmp_path / "another"))
    quality = {c.type: c.quality for c in dither.fit(other, machine=laptop()).candidates}["Q4_0"]
    assert quality is None or quality.tag == "literature"


def test_fallbacks_are_counted_and_take_the_published_loss_away(odd_checkpoint: Path) -> None:
    plan = dither.preview(odd_checkpoint, "Q4_K_M")
    row = next(c for c in dither.fit(odd_checkpoint, machine=laptop()).candidates if c.type == "Q4_K_M")
    assert row.memory.weights == plan.tensor_bytes
    assert row.quality is None and "cannot be Q4_K" in row.notes[0]


def test_people_read_a_table_of_eighty_columns() -> None:
    made = run(DEMO, "--memory", "16GiB", "--vram", "0")
    assert made.exit_code == 0, made.output
    assert max(map(len, made.stdout.splitlines())) <= 80
    assert "…" not in made.stdout and "Take Q8_0" in made.stdout
    assert "dither quantize" in made.stdout and "(told)" in made.stdout


def test_the_table_keeps_its_numbers_whole_on_a_laptop_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from dither.cli import fit as module

    for machine in (laptop(ram=16, gpu=8), laptop(ram=16), laptop(ram=1)):
        console = Console(width=80, record=True, file=io.StringIO())
        monkeypatch.setattr(module, "out", console)
        module.show(dither.fit(llama_31_8b(), machine=machine))
        text = console.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_json_is_one_document_errors_included() -> None:
    made = run(DEMO, "--memory", "16GiB", "--vram", "8GiB", "--kv", "q8_0", "--slots", 2, "--json")
    document = json.loads(made.stdout)
    assert document["fits"] and document["slots"] == 2 and document["machine"]["memory"]["bytes"] == 16 * GIB
    assert document["machine"]["gpus"][0]["tags"]["bytes"] == "told"
    wrong = run(DEMO, "--memory", "much", "--json")
    assert wrong.exit_code == 2 and json.loads(wrong.stdout)["error"]["thing"] == "--memory much"


def test_exit_3_when_nothing_fits() -> None:
    made = run(DEMO, "--memory", "1MiB", "--vram", "0")
    assert made.exit_code == 3 and "Nothing fits" in made.stdout
    as_json = run(DEMO, "--memory", "1MiB", "--vram", "0", "--json")
    assert as_json.exit_code == 3 and json.loads(as_json.stdout)["fits"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "-3GiB"),
        ("--memory", "0"),
        ("--memory", "inf"),
        ("--memory", "nan"),
        ("--memory", "9" * 400),
        ("--memory", ""),
        ("--vram", "-1"),
        ("-c", "0"),
        ("-c", "-5"),
        ("--kv", "q5_9"),
        ("--slots", "0"),
    ],
)
def test_nonsense_is_named_with_the_way_out(arguments: tuple[str, str]) -> None:
    made = run(DEMO, *arguments)
    assert made.exit_code == 2, made.output
    assert "error:" in made.stderr and made.stdout == ""


def test_a_cache_type_that_heads_do_not_fit_is_refused() -> None:
    from fitting_util import outlined

    model = outlined(
        "llama",
        {"token_embd.weight": (100, 80)},
        block_count=1,
        embedding_length=80,
        feed_forward_length=160,
        attention__head_count=2,
    )
    with pytest.raises(UsageError, match="heads of 40 numbers"):
        dither.fit(model, kv="q8_0", machine=laptop())


def test_a_family_that_dither_cannot_convert_is_judged(tmp_path: Path) -> None:
    folder = deepseek(tmp_path)
    found = dither.fit(folder, machine=laptop())
    assert found.arch == "deepseek2" and found.fits
    # 3 layers that cache 32 + 16 numbers as keys
    assert found.candidates[0].memory.cache == 8192 * 3 * 48 * 2
    assert any("cannot convert" in note for note in found.notes)
    assert any("further tokens" in note for note in found.notes)
    assert "convert_hf_to_gguf" in found.commands[0]


def deepseek(folder: Path) -> Path:
    """DeepSeek-V3's names in a small size: latent attention, one dense layer, experts, an extra layer."""
    import numpy as np
    from safetensors.numpy import save_file

    shapes = {"model.embed_tokens.weight": (256, 256), "lm_head.weight": (256, 256), "model.norm.weight": (256,)}
    for i in range(4):
        block = f"model.layers.{i}."
        shapes |= {
            f"{block}self_attn.q_a_proj.weight": (64, 256),
            f"{block}self_attn.q_b_proj.weight": (192, 64),
            f"{block}self_attn.kv_a_proj_with_mqa.weight": (48, 256),
            f"{block}self_attn.kv_b_proj.weight": (4 * (32 + 32), 32),
            f"{block}self_attn.o_proj.weight": (256, 128),
            f"{block}input_layernorm.weight": (256,),
        }
        experts = ["mlp."] if i == 0 else [f"mlp.experts.{e}." for e in range(4)] + ["mlp.shared_experts."]
        for expert in experts:
            shapes |= {
                f"{block}{expert}gate_proj.weight": (128, 256),
                f"{block}{expert}up_proj.weight": (128, 256),
                f"{block}{expert}down_proj.weight": (256, 128),
            }
        if i:
            shapes[block + "mlp.gate.weight"] = (4, 256)
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_torch_stays_out() -> None:
    code = (
        "import sys, dither; dither.fit(sys.argv[1], memory='8GiB');"
        "sys.exit(bool({'torch', 'transformers', 'xllamacpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(DEMO)]).returncode == 0
