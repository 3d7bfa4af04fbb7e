"""Who loads what: the facts written down beside each scheme, against transformers with the format's package.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_util import random_model, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

import dither
from dither.engines import check
from dither.engines.llama_start import EngineError
from dither.errors import SourceError, UnsupportedError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # loads models with transformers
transformers.logging.set_verbosity_error()

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MIXTURES = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True
    ),
}
TOKENS = torch.tensor([[(37 * i) % 290 + 2 for i in range(24)]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("mixtures")
    configs = {**MIXTURES, "llama": LlamaConfig(**SMALL)}
    return {
        name: save_model(random_model(config).bfloat16(), place / name.replace(" ", "-"))
        for name, config in configs.items()
    }


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(TOKENS).logits[0]
    return found.float()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("to", ["w8a16", "mxfp4", "fp8-block"])
def test_mixtures_that_transformers_computes(name: str, to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    dither.quantize(folders[name], to, tmp_path / "out")
    dither.convert(tmp_path / "out", tmp_path / "numbers")
    expected, found = logits(tmp_path / "numbers"), logits(tmp_path / "out")
    assert float((found - expected).std() / expected.std()) < 0.1  # a router near a tie may fall the other way


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_mixtures_that_nobody_loads_are_refused(name: str, to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be loaded by transformers"):
        dither.quantize(folders[name], to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_with_experts_as_numbers_they_are_loaded(to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dither.quantize(folders["mixtral"], to, tmp_path / "out", tensors=[("_exps", "BF16")], check=to == "int8")
    dither.convert(tmp_path / "out", tmp_path / "numbers")
    expected, found = logits(tmp_path / "numbers"), logits(tmp_path / "out")
    assert float((found - expected).std() / expected.std()) < 0.1


@pytest.mark.parametrize("to", ["w8a8", "nvfp4"])
def test_mixtures_that_only_vllm_loads_say_so(to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The facts themselves are held here too: should a release of transformers load them, this test is the first to
    know."""
    pytest.importorskip("compressed_tensors")
    result = dither.quantize(folders["qwen3 moe"], to, tmp_path / "out")
    assert any("transformers does not run" in note and "it is for vLLM" in note for note in result.notes)
    with pytest.raises(UsageError, match="needs vLLM"):
        dither.quantize(folders["qwen3 moe"], to, tmp_path / "other", check=True)
    dither.convert(tmp_path / "out", tmp_path / "numbers")
    try:
        found = logits(tmp_path / "out")
    except RuntimeError:
        assert to == "w8a8"
    else:
        expected = logits(tmp_path / "numbers")
        assert to == "nvfp4" and float((found - expected).std() / expected.std()) > 0.5


@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
def test_what_is_computed_in_bfloat16_is_stored_in_it(to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    dither.convert(folders["llama"], tmp_path / "f32", dtype="f32")
    result = dither.quantize(tmp_path / "f32", to, tmp_path / "out")
    assert any("become BF16" in note for note in result.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.isfinite(logits(tmp_path / "out")).all()
    with pytest.raises(UsageError, match="--dtype f16"):
        dither.quantize(tmp_path / "f32", to, tmp_path / "other", dtype="F16")


def test_a_config_of_another_shape_is_refused_before_work(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers' class takes heads of 32; the weights have them, config.json says that there are biases besides."""
    (tmp_path / "model").mkdir()
    for file in folders["llama"].iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    dither.quantize(tmp_path / "model", "fp8", tmp_path / "out")  # says that there are none, as there are none
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_bias"] is False
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_checked_file_gets_its_name_and_says_who_loaded_it(folders: dict[str, Path], tmp_path: Path) -> None:
    result = dither.quantize(folders["llama"], "Q8_0", tmp_path / "model.gguf", check=True)
    assert result.checked is not None and result.checked.engine == "llama.cpp"
    said = result.to_json()["check"]
    assert 0 <= said["token"] < 300 and said["seconds"] > 0
    assert dither.quantize(folders["llama"], "Q8_0", tmp_path / "b.gguf").to_json()["check"] is None


def test_a_file_that_does_not_load_gets_no_name(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that no table knows: the number of heads that keys have, spoilt behind the checks."""
    from dither.quantizing import job

    asked = job.engines.check

    def spoilt(engine: str, path: Path, threads: int) -> Any:
        raw = bytearray(path.read_bytes())
        at = raw.index(b"llama.attention.head_count_kv") + len(b"llama.attention.head_count_kv") + 4
        raw[at] = 3
        path.write_bytes(raw)
        return asked(engine, path, threads)

    monkeypatch.setattr(job.engines, "check", spoilt)
    with pytest.raises(EngineError, match=r"llama\.cpp does not run it: .*shape"):
        dither.quantize(folders["llama"], "Q8_0", tmp_path / "model.gguf", check=True)
    assert not (tmp_path / "model.gguf").exists() and (tmp_path / "model.gguf.part").exists()


def test_tensors_that_a_gguf_lacks_are_refused_before_work(folders: dict[str, Path], tmp_path: Path) -> None:
    from families_util import write_gguf

    from dither.models.source import open_model

    model = open_model(folders["llama"])
    less = tuple(tensor for tensor in model.tensors if tensor.name != "output_norm.weight")
    write_gguf(type(model)(**{**vars(model), "tensors": less}), tmp_path / "less.gguf")
    with pytest.raises(SourceError, match=r"output_norm\.weight: is missing: llama\.cpp's graph of Llama"):
        dither.quantize(tmp_path / "less.gguf", "Q4_0", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out.gguf*"))


def test_engines_are_looked_for_before_work() -> None:
    assert check.choose(("llama.cpp",), "") == "llama.cpp"
    with pytest.raises(UsageError, match="nobodys_package is not installed"):
        check.choose(("transformers",), "nobodys_package")


def test_a_child_answers_what_this_process_would(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line, where torch is not loaded: a bias that config.json promises and nobody stores."""
    from dither.containers.folders import consumers
    from dither.models.arch.written import written
    from dither.models.source import open_model

    model = open_model(folders["llama"])
    family, entries = written(model)
    config = {**json.loads((folders["llama"] / "config.json").read_text()), "mlp_bias": True}
    reason = r"ffn_gate\.bias: is missing: transformers' class for Llama"
    with pytest.raises(SourceError, match=reason):
        consumers.check_network(family, config, model, entries)
    monkeypatch.delitem(consumers.sys.modules, "torch")
    with pytest.raises(SourceError, match=reason):
        consumers.check_network(family, config, model, entries)
