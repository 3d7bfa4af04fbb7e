"""Quantized folders between Dither and the tools that define them.

bitsandbytes writes what is opened here; compressed-tensors, GPTQModel and transformers load what our layouts
wrote and de-quantize it themselves.  Each is skipped where it is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_util import quantized_folder
from test_packed import CASES
from transformers import AutoModelForCausalLM

from conftest import write_checkpoint
from dither.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "tiny", hidden=128, ffn=256, layers=1)


def check_same(folder: Path, weight_of: Any, kind: torch.dtype | None, share: float = 1e-7) -> None:
    """Every projection: rounded to `kind` where the peer rounds once, else within `share` of the largest."""
    seen = 0
    for name, tensor in open_checkpoint(folder).tensors.items():
        if "_proj" in name:
            read = torch.from_numpy(tensor.read(0, tensor.rows))
            expected = weight_of(name.removesuffix(".weight"))
            if kind is not None:
                assert torch.equal(read.to(kind).float(), expected.float()), name
            else:
                error = (read - expected.detach().float()).abs().max() / read.abs().max()
                assert error <= share, (name, error)
            seen += 1
    assert seen == 7


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
)
def test_what_bitsandbytes_saves(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)

    def weight_of(module: str) -> torch.Tensor:
        weight = model.get_submodule(module).weight
        if "load_in_4bit" in options:
            return functional.dequantize_4bit(weight.data, weight.quant_state)
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)

    check_same(tmp_path, weight_of, torch.bfloat16 if "load_in_4bit" in options else None)


@pytest.mark.parametrize(
    "case",
    [
        "pack-quantized",
        "pack-quantized asymmetric",
        "pack-quantized 8 bits",
        "int-quantized",
        "float-quantized",
        "mxfp4",
        "nvfp4",
        "mxfp6",
        "mxfp8",
    ],
)
def test_what_compressed_tensors_loads(dense: Path, tmp_path: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder = quantized_folder(dense, tmp_path / "tiny", *CASES[case][:3])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    check_same(folder, lambda module: model.get_submodule(module).weight.detach(), torch.bfloat16)


def test_what_transformers_loads_of_fp8(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = quantized_folder(dense, tmp_path / "tiny", *CASES["fp8"][:3])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    check_same(folder, lambda module: model.get_submodule(module).weight.detach(), torch.bfloat16)


@pytest.mark.slow  # compiles kernels
@pytest.mark.parametrize("case", ["gptq", "gptq asymmetric", "gptq 3 bits, reordered", "gptq 8 bits, v1", "awq"])
def test_what_gptqmodel_loads(dense: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    folder = quantized_folder(dense, tmp_path / "tiny", *CASES[case][:2])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)

    def weight_of(module: str) -> torch.Tensor:
        """What the layer does to every unit vector: its kernels may keep the codes in another order."""
        layer = model.get_submodule(module)
        return layer(torch.eye(layer.in_features, dtype=torch.float16)).T

    # test_layouts compares to the bit; these kernels round to bfloat16 on the way
    check_same(folder, weight_of, None, share=2**-7)
