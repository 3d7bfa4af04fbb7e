"""Quantized checkpoints as sources: what is read is what the file stands for, and lies are errors.

A folder packed by our layouts (which test_layouts holds against their authors' code) is opened beside a dense
twin; peers load or write the same folders where they are installed.

Legend: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packed_util import Parts, as_tensors, quantized_folder
from safetensors.torch import load_file, save_file

import dither
from conftest import write_checkpoint
from dither.errors import DitherError, FormatError, UnsupportedError
from dither.formats.layouts import Affine, Int8, Micro, Table4, awq, bnb, compressed, float8, gptq, integers, micro
from dither.models.checkpoint import open_checkpoint
from dither.models.packed.matrix import PackedTensor
from dither.models.packed.settings import matches

GROUP = 32


def grid(w: np.ndarray, bits: int, symmetric: bool, group: int = GROUP) -> Affine:
    """Nearest rounding, with scales that every number type has."""
    rows, columns = w.shape
    w_OGC = w.reshape(rows, columns // group, group)
    most = (1 << bits) - 1
    if symmetric:
        scale = np.abs(w_OGC).max(axis=2) / (most // 2 + 0.5)
        zero = np.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(w_OGC.min(axis=2), 0), np.maximum(w_OGC.max(axis=2), 0)
        scale = (high - low) / most
        zero = np.round(-low / scale)
    scale = torch.tensor(scale).bfloat16().half().float().numpy()
    codes = np.clip(np.round(w_OGC / scale[..., None]) + zero[..., None], 0, most)
    return Affine(codes.reshape(rows, columns).astype(np.uint8), scale, zero.astype(np.uint8))


def pack_gptq(bits: int, v1: bool, symmetric: bool, reorder: bool = False) -> Any:
    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        weight = grid(w, bits, symmetric)
        if reorder:
            order = np.random.default_rng(0).permutation(w.shape[1]) // GROUP
            weight = Affine(weight.codes_OI, weight.scale_OG, weight.zero_OG, order.astype(np.int32))
        if v1 and not symmetric:
            weight = Affine(weight.codes_OI, weight.scale_OG, np.maximum(weight.zero_OG, 1))
        return gptq.pack(weight, bits, v1), weight.values()

    return pack


def pack_awq(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    weight = grid(w, 4, symmetric=False)
    return awq.pack(weight), weight.values()


def pack_compressed(bits: int, symmetric: bool, group: int = GROUP) -> Any:
    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        weight = grid(w, bits, symmetric, min(group, w.shape[1]))
        return compressed.pack(weight, bits, symmetric=symmetric), weight.values()

    return pack


def int8_of(w: np.ndarray) -> Int8:
    scale = torch.tensor(np.abs(w).max(axis=1, keepdims=True) / 127).bfloat16().float().numpy()
    return Int8(np.clip(np.round(w / scale), -128, 127).astype(np.int8), scale)


def pack_int8(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    return integers.pack(int8_of(w), "int-quantized"), int8_of(w).values()


def pack_llm_int8(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    parts = integers.pack(int8_of(w), "llm-int8")
    return parts, integers.unpack(parts, 0, len(w)).values()


def pack_float8(kind: str) -> Any:
    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        codes = torch.tensor(w * 8).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        shape = (-(-w.shape[0] // 128), -(-w.shape[1] // 128)) if kind == "block" else (w.shape[0], 1)
        block = (128, 128) if kind == "block" else (1, w.shape[1])
        scale = (2.0 ** -np.random.default_rng(0).integers(2, 5, shape)).astype(np.float32)
        numbers = torch.tensor(codes).view(torch.float8_e4m3fn).float().numpy()
        spread = scale[np.arange(w.shape[0]) // block[0]][:, np.arange(w.shape[1]) // block[1]]
        return float8.pack(codes, scale, kind), numbers * spread

    return pack


def pack_micro(kind: str) -> Any:
    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        rng = np.random.default_rng(len(w))
        codes = rng.integers(0, 16, w.shape, dtype=np.uint8)
        low, high = (115, 125) if kind == "MXFP4" else (40, 90)
        scale = rng.integers(low, high, (len(w), w.shape[1] // micro.GROUPS[kind]), dtype=np.uint8)
        weight = Micro(codes, scale, None if kind == "MXFP4" else 64.0)
        return micro.pack(weight), weight.values()

    return pack


def pack_mxfp6(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """Written out: sign, two bits of exponent (bias 1), three of mantissa; the first code lowest."""
    rng = np.random.default_rng(len(w))
    codes = rng.integers(0, 64, w.shape)
    exponent, mantissa = codes >> 3 & 3, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8, 2.0 ** (exponent - 1) * (1 + mantissa / 8))
    scale = rng.integers(115, 125, (len(w), w.shape[1] // 32), dtype=np.uint8)
    values = np.where(codes < 32, 1, -1) * magnitude * np.repeat(2.0 ** (scale - 127.0), 32, axis=1)
    bits = (codes[..., None] >> np.arange(6) & 1).astype(np.uint8).reshape(len(w), -1)
    packed = np.packbits(bits, axis=1, bitorder="little")
    return {"weight_packed": packed, "weight_scale": scale}, values.astype(np.float32)


def pack_mxfp8(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    codes = torch.tensor(w * 8).to(torch.float8_e4m3fn)
    scale = np.random.default_rng(len(w)).integers(120, 126, (len(w), w.shape[1] // 32), dtype=np.uint8)
    values = codes.float().numpy() * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)
    return {"weight": codes.view(torch.uint8).numpy(), "weight_scale": scale}, values


def pack_modelopt(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """NVFP4 with a scale of the tensor that multiplies, under plain names, and a scale of activations."""
    parts, _ = pack_micro("NVFP4")(module, w)
    twice = np.array(0.0123, np.float32)
    renamed = {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": twice,
        "input_scale": np.array(0.5, np.float32),
    }
    scale = torch.from_numpy(parts["weight_scale"]).view(torch.float8_e4m3fn).float() * 0.0123
    codes = np.stack([parts["weight_packed"] & 15, parts["weight_packed"] >> 4], axis=2).reshape(w.shape)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    return renamed, grid[codes] * np.repeat(scale.numpy(), 16, axis=1)


def pack_bnb(quant_type: str, nested: bool) -> Any:
    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        rng = np.random.default_rng(len(w))
        codes = rng.integers(0, 16, w.shape, dtype=np.uint8)
        absmax = np.abs(w.reshape(len(w), -1, 64)).max(axis=2)
        parts = bnb.pack(Table4(codes, absmax, quant_type), nested=nested)
        state = bnb.read_state(parts[f"weight.quant_state.bitsandbytes__{quant_type}"].tobytes(), module)
        return parts, bnb.unpack(parts, state, 0, len(w)).values()

    return pack


def groups(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def compressed_config(format: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups(**weights),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
F8 = {"weight": torch.float8_e4m3fn}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
# name → how it is packed, config.json's description, 8-bit floats, what it is called, a file beside
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, torch.dtype], str, str]] = {
    "gptq": (pack_gptq(4, True, True), GPTQ, {}, "int4-g32", ""),
    "gptq asymmetric": (
        pack_gptq(4, False, False),
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        {},
        "uint4-g32",
        "",
    ),
    "gptq 3 bits, reordered": (
        pack_gptq(3, False, False, reorder=True),
        GPTQ | {"bits": 3, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
        {},
        "uint3-g32",
        "",
    ),
    "gptq 8 bits, v1": (pack_gptq(8, True, False), GPTQ | {"bits": 8, "sym": False}, {}, "uint8-g32", ""),
    "gptq 2 bits": (pack_gptq(2, True, True), GPTQ | {"bits": 2}, {}, "int2-g32", ""),
    "autogptq": (
        pack_gptq(4, True, True),
        {"bits": 4, "group_size": GROUP, "sym": True},
        {},
        "int4-g32",
        "quantize_config.json",
    ),
    "auto-round as gptq": (
        pack_gptq(4, True, True),
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {},
        "int4-g32",
        "",
    ),
    "auto-round": (
        pack_gptq(4, False, False),
        GPTQ | {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2", "sym": False},
        {},
        "uint4-g32",
        "",
    ),
    "auto-round as awq": (
        pack_awq,
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4},
        {},
        "uint4-g32",
        "",
    ),
    "awq": (
        pack_awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        {},
        "uint4-g32",
        "",
    ),
    "autoawq": (
        pack_awq,
        {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"},
        {},
        "uint4-g32",
        "quant_config.json",
    ),
    "pack-quantized": (pack_compressed(4, True), compressed_config("pack-quantized", **INT4), {}, "int4-g32", ""),
    "pack-quantized asymmetric": (
        pack_compressed(4, False),
        compressed_config("pack-quantized", **INT4 | {"symmetric": False}),
        {},
        "uint4-g32",
        "",
    ),
    "pack-quantized 8 bits": (
        pack_compressed(8, True, 1 << 20),
        compressed_config("pack-quantized", num_bits=8, symmetric=True, strategy="channel"),
        {},
        "int8-channel",
        "",
    ),
    "int-quantized": (
        pack_int8,
        compressed_config("int-quantized", num_bits=8, strategy="channel"),
        {},
        "int8-channel",
        "",
    ),
    "float-quantized": (
        pack_float8("channel"),
        compressed_config("float-quantized", num_bits=8, type="float"),
        F8,
        "F8_E4M3",
        "",
    ),
    "fp8": (pack_float8("block"), {"quant_method": "fp8"}, F8, "F8_E4M3", ""),
    "mxfp4": (
        pack_micro("MXFP4"),
        compressed_config("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        {},
        "MXFP4",
        "",
    ),
    "nvfp4": (
        pack_micro("NVFP4"),
        compressed_config("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        {"weight_scale": torch.float8_e4m3fn},
        "NVFP4",
        "",
    ),
    "mxfp6": (
        pack_mxfp6,
        compressed_config("mxfp6-pack-quantized", num_bits=6, type="float", group_size=32),
        {},
        "MXFP6",
        "",
    ),
    "mxfp8": (
        pack_mxfp8,
        compressed_config("mxfp8-quantized", num_bits=8, type="float", group_size=32),
        F8,
        "F8_E4M3",
        "",
    ),
    "modelopt": (
        pack_modelopt,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        {"weight_scale": torch.float8_e4m3fn},
        "NVFP4",
        "",
    ),
    "modelopt, beside": (
        pack_modelopt,
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
        {"weight_scale": torch.float8_e4m3fn},
        "NVFP4",
        "hf_quant_config.json",
    ),
    "modelopt, mixed": (
        pack_mxfp8,
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"model.layers.0.mlp.up_proj": {"quant_algo": "MXFP8"}},
        },
        F8,
        "F8_E4M3",
        "",
    ),
    "nf4": (pack_bnb("nf4", False), NF4, {}, "nf4-g64", ""),
    "nf4 twice": (pack_bnb("nf4", True), NF4, {}, "nf4-g64-dq", ""),
    "fp4": (pack_bnb("fp4", False), NF4, {}, "fp4-g64", ""),
    "llm.int8": (pack_llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "int8-channel", ""),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "tiny", hidden=64, ffn=192, layers=1)


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_folder_opens_as_the_model_it_stands_for(dense: Path, tmp_path: Path, case: str) -> None:
    pack, config, floats, kind, beside = CASES[case]
    folder = quantized_folder(dense, tmp_path / "tiny", pack, config, floats, beside)
    found, twin = dither.open_model(folder), dither.open_model(tmp_path / "tiny-twin")
    assert [(t.name, t.shape) for t in found.tensors] == [(t.name, t.shape) for t in twin.tensors]
    file = load_file(folder / "model.safetensors")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in file.items()}
    for tensor, expected in zip(found.tensors, twin.tensors, strict=True):
        w_OI = expected.read(0, expected.rows)
        read = tensor.read(0, tensor.rows)
        assert read.dtype == np.float32 and read.flags.c_contiguous and read.flags.writeable
        assert np.array_equal(read, w_OI), tensor.name
        third = tensor.rows // 3
        assert np.array_equal(tensor.read(third, 2 * third + 1), w_OI[third : 2 * third + 1]), tensor.name
        packed = any(part in tensor.name for part in ("attn_q.", "attn_k.", "attn_v.", "attn_output", "ffn_"))
        if packed and "norm" not in tensor.name:
            assert tensor.stored == kind
    up = open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    if kind != "F8_E4M3":
        parts = [name for name in sizes if ".up_proj." in name and not name.endswith("input_scale")]
        assert up.nbytes == sum(sizes[name] for name in parts)
        assert any(kind in note for note in found.notes)
        inspected = dither.inspect(folder)
        assert inspected.types[kind]["tensors"] == 7
    assert any("de-quantized as they are read" in note for note in found.notes)


def test_it_quantizes_to_gguf_and_says_what_it_was_made_from(dense: Path, tmp_path: Path) -> None:
    folder = quantized_folder(dense, tmp_path / "tiny", pack_compressed(4, True), CASES["pack-quantized"][1])
    results = [
        dither.quantize(source, "Q8_0", tmp_path / f"{source.name}.gguf") for source in (folder, tmp_path / "tiny-twin")
    ]
    assert any("quantized already (int4-g32)" in note for note in results[0].notes)
    assert not any("quantized already" in note for note in results[1].notes)
    made, twin = (dither.open_model(tmp_path / name) for name in ("tiny.gguf", "tiny-twin.gguf"))
    for tensor, expected in zip(made.tensors, twin.tensors, strict=True):
        assert np.array_equal(tensor.read(0, tensor.rows), expected.read(0, expected.rows))


def test_a_layer_that_was_left_alone_is_read_as_it_is(dense: Path, tmp_path: Path) -> None:
    folder = quantized_folder(dense, tmp_path / "tiny", *CASES["gptq"][:2])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{suffix}"]
    tensors[f"{name}.weight"] = torch.ones(192, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    stored = open_checkpoint(folder).tensors[f"{name}.weight"]
    assert stored.dtype == "BF16" and (stored.read(3, 5) == 1).all()
    tensors[f"{name}.qweight"] = torch.zeros(8, 192, dtype=torch.int32)
    tensors[f"{name}.qzeros"], tensors[f"{name}.scales"] = torch.zeros(2, 24).int(), torch.ones(2, 192)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj\.weight: is there as it is and again"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("shape", "kind"), [((), "tensor"), ((1,), "tensor"), ((1, 1), "tensor"), ((192,), "channel")])
def test_scales_of_a_packed_matrix_have_several_shapes(
    folders: dict[str, Path], tmp_path: Path, shape: tuple[int, ...], kind: str
) -> None:
    weight = grid(np.random.default_rng(0).normal(size=(192, 64)), 4, True, 64)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    packed_codes = as_tensors(compressed.pack(weight, 4))["weight_packed"]
    parts = {"weight_packed": packed_codes, "weight_scale": scale, "weight_zero_point": None}
    folder = changed(folders["pack-quantized asymmetric"], tmp_path / "one", parts, config_groups=groups(num_bits=4))
    stored = open_checkpoint(folder).tensors[f"{UP}.weight"]
    assert stored.dtype == f"int4-{kind}"
    expected = (weight.codes_OI.astype(np.float32) - 8) * scale.numpy().reshape(-1, 1)
    assert np.array_equal(stored.read(0, 192), expected)
    assert np.array_equal(stored.read(7, 9), expected[7:9]) and stored.read(5, 5).shape == (0, 64)


def test_settings_of_single_layers(dense: Path, tmp_path: Path) -> None:
    """Bits by GPTQModel's rules and AutoRound's, and by the shapes where none speaks."""

    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        bits = 8 if "down_proj" in module else 2 if "up_proj" in module else 4
        return pack_gptq(bits, True, True)(module, w)

    rules = {r"+:.*\.down_proj": {"bits": 8}, "-:lm_head": {}, r".*up_proj$": {"bits": 2, "sym": False}}
    extra = {"model.layers.0.mlp.up_proj": {"bits": 2, "sym": False}}
    for at, config in enumerate(
        (GPTQ | {"dynamic": rules}, GPTQ | {"quant_method": "auto-round", "extra_config": extra, "backend": "gptq"})
    ):
        folder = quantized_folder(dense, tmp_path / f"tiny{at}", pack, config)
        tensors = open_checkpoint(folder).tensors
        assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "int8-g32"
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == "uint2-g32"
        assert tensors["model.layers.0.mlp.gate_proj.weight"].dtype == "int4-g32"
        twin = open_checkpoint(tmp_path / f"tiny{at}-twin").tensors
        for name, tensor in twin.items():
            assert np.array_equal(tensors[name].read(0, tensor.rows), tensor.read(0, tensor.rows)), name


def test_groups_of_layers_in_one_file(dense: Path, tmp_path: Path) -> None:
    """A name counts before a pattern, a pattern before a class, whatever their order; F8 lies beside."""

    def pack(module: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        if "mlp.up_proj" in module:
            return pack_compressed(8, True)(module, w)
        if "mlp" in module:
            return pack_compressed(3, True)(module, w)
        if "v_proj" in module:
            return pack_float8("channel")(module, w)
        return pack_compressed(4, True)(module, w)

    config = compressed_config("mixed-precision", **INT4)
    config["config_groups"] |= {
        "b": {"targets": [r"re:.*\.mlp\..*"], "weights": INT4 | {"num_bits": 3}, "format": "pack-quantized"},
        "c": {"targets": ["model.layers.0.mlp.up_proj"], "weights": INT4 | {"num_bits": 8}},
        "d": {"targets": [r"re:.*v_proj"], "weights": {"num_bits": 8, "type": "float"}, "format": "float-quantized"},
    }
    folder = quantized_folder(dense, tmp_path / "tiny", pack, config, F8)
    tensors, twin = (open_checkpoint(path).tensors for path in (folder, tmp_path / "tiny-twin"))
    assert {tensor.dtype for tensor in tensors.values()} >= {"int3-g32", "int8-g32", "int4-g32", "F8_E4M3"}
    for name, tensor in twin.items():
        assert np.array_equal(tensors[name].read(0, tensor.rows), tensor.read(0, tensor.rows)), name


def packed(folder: Path) -> PackedTensor:
    tensor = open_checkpoint(folder).tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(tensor, PackedTensor)
    return tensor


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("gptq", ("Q4_0", "Q4_1")),
        ("pack-quantized", ("Q4_0", "Q4_1")),
        ("gptq 2 bits", ("Q4_0", "Q4_1")),
        ("gptq 3 bits, reordered", ()),
        ("gptq 8 bits, v1", ()),
        ("nf4", ()),
        ("llm.int8", ()),
        ("mxfp4", ()),
    ],
)
def test_what_is_a_ggml_grid_is_recoded_to_it(dense: Path, tmp_path: Path, case: str, kinds: tuple[str, ...]) -> None:
    gguf = pytest.importorskip("gguf")
    pack, config, floats, _, _ = CASES[case]
    tensor = packed(quantized_folder(dense, tmp_path / "tiny", pack, config, floats))
    for kind in ("Q4_0", "Q4_1"):
        raw = tensor.recode(kind, 5, 40)
        assert (raw is not None) == (kind in kinds)
        if raw is not None:
            assert np.array_equal(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]), tensor.read(5, 40))


# ------------------------------------------------------------------------------------------------- hostile


@pytest.fixture(scope="module")
def folders(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    wanted = (
        "gptq",
        "awq",
        "pack-quantized asymmetric",
        "int-quantized",
        "nvfp4",
        "mxfp6",
        "modelopt",
        "nf4 twice",
        "llm.int8",
    )
    return {case: quantized_folder(dense, root / str(at), *CASES[case][:3]) for at, case in enumerate(wanted)}


UP = "model.layers.0.mlp.up_proj"


def changed(folder: Path, target: Path, changes: Mapping[str, Any], **config: Any) -> Path:
    """A copy with other parts of one layer (None takes one away) and other settings."""
    target.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for suffix, value in changes.items():
        name = f"{UP}.{suffix}"
        tensors.pop(name, None) if value is None else tensors.update({name: value})
    save_file(tensors, target / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"] |= config
    (target / "config.json").write_text(json.dumps(whole))
    return target


I32, F16 = torch.int32, torch.float16
LIES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("gptq", {"qzeros": None}, {}, "lacks its part qzeros"),
    ("gptq", {"scales": torch.ones(2, 191, dtype=F16)}, {}, "do not belong together"),
    ("gptq", {"scales": torch.ones(0, 192, dtype=F16)}, {}, "do not belong together"),
    ("gptq", {"qzeros": torch.zeros(2, 23, dtype=I32)}, {}, "fit none of"),
    ("gptq", {"qweight": torch.zeros(7, 192, dtype=I32)}, {}, "with 64 columns"),
    ("gptq", {"g_idx": torch.zeros(50, dtype=I32)}, {}, "with 50 columns"),
    ("gptq", {"g_idx": torch.zeros(0, dtype=I32)}, {}, r"shape \[0\], where \[64\] is due"),
    (
        "gptq",
        {"g_idx": None, "scales": torch.ones(3, 192).half(), "qzeros": torch.zeros(3, 24, dtype=I32)},
        {},
        "64 columns in 3 groups",
    ),
    ("gptq", {"qweight": torch.zeros(8, 192)}, {}, "is F32 of shape"),
    ("gptq", {}, {"bits": "4"}, "bits is '4'"),
    ("gptq", {}, {"bits": 10**300}, "bits is 1000"),
    ("gptq", {}, {"group_size": -2}, "group_size is -2"),
    ("gptq", {}, {"group_size": 0}, "groups of no columns"),
    ("gptq", {}, {"sym": "yes"}, "sym is 'yes'"),
    ("gptq", {}, {"dynamic": {"(a+)+$": {"bits": 4}}}, "could take forever"),
    ("gptq", {}, {"dynamic": {"(": {"bits": 4}}}, "which is none"),
    ("gptq", {}, {"checkpoint_format": 3}, "checkpoint_format is 3"),
    ("awq", {"scales": torch.ones(3, 192, dtype=F16)}, {}, "where"),
    ("awq", {"qweight": torch.zeros(64, 23, dtype=I32)}, {}, r"\[64, 24\] is due"),
    ("pack-quantized asymmetric", {"weight_shape": torch.tensor([192, 65])}, {}, "do not belong together"),
    ("pack-quantized asymmetric", {"weight_shape": torch.tensor([-1, 64])}, {}, "weight_shape"),
    ("pack-quantized asymmetric", {"weight_shape": torch.tensor([192, 2**62])}, {}, "weight_shape"),
    ("pack-quantized asymmetric", {"weight_zero_point": None}, {}, "lacks its part weight_zero_point"),
    ("pack-quantized asymmetric", {"weight_zero_point": torch.zeros(23, 2, dtype=I32)}, {}, "24, 2"),
    ("pack-quantized asymmetric", {"weight_scale": torch.ones(191, 2)}, {}, "192 rows, but scales"),
    ("pack-quantized asymmetric", {"weight_scale": None}, {}, "lacks its part weight_scale"),
    ("pack-quantized asymmetric", {}, {"config_groups": groups(**INT4 | {"num_bits": 9})}, "has 9 bits"),
    ("pack-quantized asymmetric", {}, {"config_groups": groups(**INT4 | {"num_bits": 5})}, "5 bits in"),
    ("pack-quantized asymmetric", {}, {"config_groups": groups(**INT4 | {"group_size": -7})}, "size is -7"),
    ("pack-quantized asymmetric", {}, {"config_groups": {"g": {"targets": ["Conv"]}}}, "no group of"),
    ("pack-quantized asymmetric", {}, {"config_groups": [1]}, "no groups"),
    ("pack-quantized asymmetric", {}, {"config_groups": {"g": {"targets": ["re:" + "a?" * 30]}}}, "forever"),
    ("int-quantized", {"weight_scale": torch.ones(191, 1)}, {}, "192 rows, but scales"),
    ("int-quantized", {"weight_zero_point": torch.zeros(5, dtype=torch.int8)}, {}, "zero points"),
    ("nvfp4", {"weight_global_scale": None}, {}, "lacks its one weight_global_scale"),
    ("nvfp4", {"weight_packed": torch.zeros(192, 31, dtype=torch.uint8)}, {}, "is no NVFP4"),
    ("mxfp6", {"weight_scale": torch.zeros(192, 4, dtype=torch.uint8)}, {}, "is due"),
    ("modelopt", {"weight_scale_2": torch.zeros(2)}, {}, r"a weight_scale_2 of F32 and shape \[2\]"),
    ("modelopt", {"weight": torch.zeros(192, 31, dtype=torch.uint8)}, {}, "is no NVFP4"),
    ("modelopt", {"weight_scale": torch.zeros(192, 4)}, {}, "is F32 of shape"),
    ("modelopt", {"weight_scale": None}, {}, "lacks its part weight_scale"),
    ("nf4 twice", {"weight.absmax": None}, {}, "lacks its part weight.absmax"),
    ("nf4 twice", {"weight.absmax": torch.zeros(191, dtype=torch.uint8)}, {}, "192"),
    ("nf4 twice", {"weight.nested_absmax": torch.zeros(2)}, {}, "is due"),
    ("nf4 twice", {"weight.nested_quant_map": torch.zeros(16)}, {}, "256"),
    ("nf4 twice", {"weight": torch.zeros(6143, 1, dtype=torch.uint8)}, {}, "6143 bytes of codes"),
    ("llm.int8", {"SCB": torch.ones(191)}, {}, "is due"),
]


@pytest.mark.parametrize("lie", range(len(LIES)))
def test_parts_that_do_not_fit_are_errors(folders: dict[str, Path], tmp_path: Path, lie: int) -> None:
    case, parts, config, message = LIES[lie]
    folder = changed(folders[case], tmp_path / "lie", parts, **config)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


WHEN_READ: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"scales": torch.full((2, 192), torch.nan, dtype=F16)}, "scale that is NaN"),
    ("gptq", {"g_idx": torch.full((64,), 2, dtype=I32)}, "columns of groups 2 to 2, but 2 groups"),
    ("gptq", {"g_idx": torch.full((64,), -1, dtype=I32)}, "columns of groups -1"),
    ("awq", {"scales": torch.full((2, 192), torch.inf, dtype=F16)}, "scale that is NaN"),
    ("int-quantized", {"weight_scale": torch.full((192, 1), torch.nan)}, "scale that is NaN"),
    ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "scale that is NaN"),
    ("nf4 twice", {"weight.nested_absmax": torch.tensor([torch.nan])}, "scale that is NaN"),
    ("nf4 twice", {"weight.quant_map": torch.ones(16)}, "quant_map of its own"),
    ("llm.int8", {"SCB": torch.full((192,), torch.nan)}, "scale that is NaN"),
    ("llm.int8", {"weight_format": torch.tensor(2, dtype=torch.uint8)}, "order of old GPUs"),
]


@pytest.mark.parametrize("lie", range(len(WHEN_READ)))
def test_numbers_that_make_no_sense_are_errors(folders: dict[str, Path], tmp_path: Path, lie: int) -> None:
    case, parts, message = WHEN_READ[lie]
    tensor = open_checkpoint(changed(folders[case], tmp_path / "lie", parts)).tensors[f"{UP}.weight"]
    with pytest.raises((FormatError, UnsupportedError), match=rf"up_proj\.weight: .*{message}"):
        tensor.read(0, 10)


ODD = st.sampled_from(
    [None, True, 0, -1, 5, 2**70, 1.5, "", "gptq", "re:.*", [], {}, [{}], {"g": {}}, {"g": {"targets": [3]}}]
)
KEYS = st.sampled_from(
    [
        "bits",
        "w_bit",
        "group_size",
        "sym",
        "dynamic",
        "checkpoint_format",
        "version",
        "format",
        "config_groups",
        "sparsity_config",
        "extra_config",
        "quant_method",
        "packing_format",
        "data_type",
        "transform_config",
        "quant_algo",
        "quantized_layers",
    ]
)


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        ({"quant_algo": "W4A16_AWQ"}, {}, "as w4a16_awq, which is not read"),
        ({"quant_algo": None}, {}, "as nothing that is named"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {UP: {"quant_algo": "INT4"}}}, {}, "as int4"),
        ({}, {"pre_quant_scale": torch.ones(64)}, "scale their inputs"),
    ],
)
def test_what_modelopt_rewrote_otherwise_is_refused(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, Any], parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(changed(folders["modelopt"], tmp_path / "other", parts, **config))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["gptq", "awq", "pack-quantized asymmetric", "modelopt", "nf4 twice"]), st.dictionaries(KEYS, ODD)
)
def test_any_settings_are_read_or_refused(
    folders: dict[str, Path], tmp_path: Path, case: str, config: dict[str, Any]
) -> None:
    folder = changed(folders[case], tmp_path / "odd", {}, **config)
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            tensor.read(0, tensor.rows)
    except DitherError:
        pass


def test_a_weight_of_no_numbers_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["int-quantized"], tmp_path / "empty", {"weight": torch.zeros(0)})
    tensor = open_checkpoint(folder).tensors[f"{UP}.weight"]
    assert tensor.read(0, tensor.rows).shape == (1, 0)


SHAPES = st.lists(st.integers(0, 70), min_size=0, max_size=3)
KINDS = st.sampled_from([I32, F16, torch.uint8, torch.int8, torch.float32, torch.int64, torch.bfloat16])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_parts_of_any_shape_are_read_or_refused(folders: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(sorted(folders)))
    names = load_file(folders[case] / "model.safetensors")
    suffixes = sorted(name[len(UP) + 1 :] for name in names if name.startswith(UP))
    suffix = data.draw(st.sampled_from(suffixes))
    part = torch.full(data.draw(SHAPES), 7).to(data.draw(KINDS))
    try:
        checkpoint = open_checkpoint(changed(folders[case], tmp_path / "odd", {suffix: part}))
        tensor = checkpoint.tensors[f"{UP}.weight"]
        tensor.check_readable()
        tensor.read(0, tensor.rows)
    except (DitherError, KeyError):  # where the marker's own name went, there is no such tensor
        pass


def test_tools_that_leave_no_word_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.W_q": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="HQQ"):
        open_checkpoint(tmp_path)
    codes = torch.zeros(4, 4, dtype=torch.uint32)
    mlx = {"a.weight": codes, "a.scales": torch.ones(4, 1), "a.biases": torch.ones(4, 1)}
    save_file(mlx, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="MLX"):
        open_checkpoint(tmp_path)


def test_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(110, 130, (2, 6, 3), dtype=np.uint8)
    parts = as_tensors({"m.down_proj_blocks": blocks, "m.down_proj_scales": scales})
    save_file(parts, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    tensor = open_checkpoint(tmp_path).tensors["m.down_proj.weight"]
    assert tensor.shape == (2, 6, 96) and tensor.rows == 12 and tensor.dtype == "MXFP4"
    expected = micro.unpack_experts({"blocks": blocks, "scales": scales}, 0, 12).values()
    assert np.array_equal(tensor.read(3, 9), expected[3:9])
    del parts["m.down_proj_scales"]
    save_file(parts, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"m\.down_proj\.weight: lacks its part scales"):
        open_checkpoint(tmp_path)


def test_patterns_of_strangers() -> None:
    assert matches(r"model\.layers\.[0-9]+\.(gate|up)_proj", "model.layers.12.up_proj.x", "t")
    assert not matches("layers", "model.layers", "t")  # from the beginning, as the tools do
    for pattern in ("(a+)+b", "(a|aa)*b", "(x+x+)+y", "a?" * 30 + "a" * 30, ".*" * 9, r"(a)\1", "x" * 2000):
        with pytest.raises(FormatError, match="forever"):
            matches(pattern, "a" * 40, "t")
    with pytest.raises(FormatError, match="too long a name"):
        matches("a", "a" * 300, "t")
