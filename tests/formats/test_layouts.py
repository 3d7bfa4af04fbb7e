"""GPU layouts against the code of those who defined them, and against literal bits.

References: GPTQModel's QuantLinear and AWQ unpacking, compressed-tensors' compressors, bitsandbytes'
de-quantization.  Each is skipped where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from dither.errors import DitherError, FormatError, UnsupportedError, UsageError
from dither.formats.layouts import (
    Affine,
    Int8,
    Micro,
    Table4,
    awq,
    bnb,
    compressed,
    float8,
    gptq,
    integers,
    micro,
    numbers,
)
from dither.formats.layouts.recode import recode
from dither.formats.layouts.words import pack_words, unpack_words, words

SAFETENSORS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}


def check_parts(parts: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Mapping[str, np.ndarray]) -> None:
    """What was promised is what was packed, and nothing else."""
    assert {suffix: (np.dtype(SAFETENSORS[kind]), shape) for suffix, (kind, shape) in parts.items()} == {
        suffix: (array.dtype, array.shape) for suffix, array in arrays.items()
    }
    assert all(array.flags.c_contiguous for array in arrays.values())


def affine(
    rows: int, columns: int, group: int, bits: int, *, zeros: tuple[int, int] | None = None, kind: str = "F16"
) -> Affine:
    rng = np.random.default_rng(rows + columns + bits)
    groups = columns // group
    low, high = zeros or (1 << (bits - 1), (1 << (bits - 1)) + 1)
    scale_OG = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
    scale_OG = torch.tensor(scale_OG).to(torch.float16 if kind == "F16" else torch.bfloat16).float().numpy()
    return Affine(
        rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8),
        scale_OG,
        rng.integers(low, high, (rows, groups), dtype=np.uint8),
    )


def same(found: Affine, expected: Affine, start: int = 0, stop: int | None = None) -> None:
    assert np.array_equal(found.codes_OI, expected.codes_OI[start:stop])
    assert np.array_equal(found.scale_OG, expected.scale_OG[start:stop])
    assert np.array_equal(found.zero_OG, expected.zero_OG[start:stop])


def values(w: Affine) -> np.ndarray:
    """The definition, weight by weight, in float64."""
    groups = w.scale_OG.shape[1]
    columns = w.codes_OI.shape[1]
    g_I = w.group_of_I if w.group_of_I is not None else np.arange(columns) // (columns // groups)
    return w.scale_OG[:, g_I].astype(np.float64) * (w.codes_OI.astype(int) - w.zero_OG[:, g_I].astype(int))


# ------------------------------------------------------------------------------------------ streams of bits


def test_three_bits_straddle_words() -> None:
    # code 10 begins in the two highest bits of word 0: 0b101 → 01 there, 1 at the bottom of word 1
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 10], codes[0, 0] = 0b101, 0b011
    assert pack_words(codes, 3).tolist() == [[0b01 << 30 | 0b011, 0b1, 0]]


@given(st.integers(1, 8), st.integers(1, 130), st.data())
def test_any_span_of_a_stream_comes_back(bits: int, count: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(count)
    codes = rng.integers(0, 1 << bits, (3, count), dtype=np.uint8)
    packed = pack_words(codes, bits)
    assert packed.shape == (3, words(count, bits))
    as_one = [sum(int(c) << (i * bits) for i, c in enumerate(row)) for row in codes]
    assert [sum(int(w) << (32 * i) for i, w in enumerate(row)) for row in packed] == as_one
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert np.array_equal(unpack_words(packed, bits, start, stop), codes[:, start:stop])


def test_number_types_are_torchs() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    for table, kind in ((numbers.e4m3(), torch.float8_e4m3fn), (numbers.e8m0(), torch.float8_e8m0fnu)):
        assert np.array_equal(table.astype(np.float32), byte.view(kind).float().numpy(), equal_nan=True)
    with pytest.raises(UsageError, match="BF16"):
        numbers.narrow(np.array([1.001], np.float32), "BF16")
    with pytest.raises(UsageError, match="F16"):
        numbers.narrow(np.array([1e6], np.float32), "F16")
    with pytest.raises(UsageError, match="F32"):
        numbers.narrow(np.array([np.nan], np.float32), "F32")


# -------------------------------------------------------------------------------------------------- GPTQ


@pytest.fixture
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    return pytest.importorskip("gptqmodel")


def gptq_dequantized(arrays: Mapping[str, np.ndarray], bits: int, group: int, v1: bool) -> np.ndarray:
    """GPTQModel's own kernel on these tensors, float16."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    columns, rows = len(arrays["g_idx"]), arrays["scales"].shape[1]
    module = TorchLinear(bits=bits, group_size=group, sym=False, desc_act=True, in_features=columns, out_features=rows)
    for suffix, array in arrays.items():
        assert getattr(module, suffix).shape == array.shape, suffix
        setattr(module, suffix, torch.from_numpy(array.copy()))
    if v1:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return module.dequantize_weight().T.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
def test_gptq_is_what_gptqmodel_reads(gptqmodel: Any, bits: int, v1: bool) -> None:
    weight = affine(96, 128, 32, bits, zeros=(int(v1), 1 << bits))
    order = np.random.default_rng(0).permutation(128)
    weight = Affine(weight.codes_OI, weight.scale_OG, weight.zero_OG, (np.arange(128) // 32)[order])
    arrays = gptq.pack(weight, bits, v1)
    check_parts(gptq.parts(96, 128, bits, 32), arrays)
    expected = gptq_dequantized(arrays, bits, 32, v1)
    assert np.array_equal(values(weight).astype(np.float16), expected)
    for start, stop in ((0, 96), (0, 0), (17, 63), (33, 96)):
        found = gptq.unpack(arrays, start, stop, bits=bits, v1=v1, columns=128)
        same(found, weight, start, stop)
        assert np.array_equal(found.group_of_I, weight.group_of_I)
        assert np.array_equal(found.values().astype(np.float16), expected[start:stop])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v1_with_carries_reads_as_gptqmodel_reads_it(gptqmodel: Any, bits: int) -> None:
    """Zero points of all ones, as a careless writer leaves them."""
    weight = affine(64, 64, 32, bits, zeros=(0, 1 << bits))
    arrays = gptq.pack(weight, bits, v1=False)
    expected = gptq_dequantized(arrays, bits, 32, v1=True)
    for start, stop in ((0, 64), (5, 40)):
        found = gptq.unpack(arrays, start, stop, bits=bits, v1=True, columns=64)
        assert np.array_equal(found.values().astype(np.float16), expected[start:stop])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_packs_the_same_bits(gptqmodel: Any, bits: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    weight = affine(64, 96, 32, bits, zeros=(1, 1 << bits))
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = torch.tensor(values(weight), dtype=torch.float32)
    module = TorchLinear(bits=bits, group_size=32, sym=False, desc_act=False, in_features=96, out_features=64)
    g_idx = torch.arange(96, dtype=torch.int32) // 32
    scale, zero = torch.tensor(weight.scale_OG), torch.tensor(weight.zero_OG.astype(np.int32))
    module.pack_original(linear, scale, zero, g_idx)
    for suffix, array in gptq.pack(weight, bits, v1=False).items():
        assert np.array_equal(getattr(module, suffix).numpy(), array), suffix


def test_gptq_refuses_what_it_has_no_room_for() -> None:
    weight = affine(32, 64, 32, 4, zeros=(0, 1))
    with pytest.raises(UnsupportedError, match=r"from 1 to 16, not 0 to 0"):
        gptq.pack(weight, 4, v1=True)
    assert gptq.pack(weight, 4, v1=False)["qzeros"].any() == 0
    with pytest.raises(UnsupportedError, match="12 × 64 as GPTQ with 4 bits: packs 8 rows"):
        gptq.parts(12, 64, 4, 32)
    with pytest.raises(UnsupportedError, match="packs 32 rows"):
        gptq.parts(16, 64, 3, 32)
    with pytest.raises(UnsupportedError, match="no multiple of 48"):
        gptq.parts(32, 64, 4, 48)
    with pytest.raises(UnsupportedError, match="5 bits"):
        gptq.parts(32, 64, 5, 32)


# --------------------------------------------------------------------------------------------------- AWQ


def test_awq_is_the_published_order() -> None:
    weight = affine(16, 64, 32, 4, zeros=(0, 16))
    arrays = awq.pack(weight)
    check_parts(awq.parts(16, 64, 32), arrays)
    for name, plain in (("qweight", weight.codes_OI.T), ("qzeros", weight.zero_OG.T)):
        word = int(arrays[name][1].view(np.uint32)[1])
        assert [word >> (4 * i) & 15 for i in range(8)] == plain[1, 8 + np.array([0, 2, 4, 6, 1, 3, 5, 7])].tolist()
    for start, stop in ((0, 16), (3, 11), (8, 8), (9, 16)):
        same(awq.unpack(arrays, start, stop), weight, start, stop)
    with pytest.raises(UnsupportedError, match="12 × 64 as AWQ: packs 8 rows"):
        awq.parts(12, 64, 32)
    with pytest.raises(UnsupportedError, match="no multiple of 48"):
        awq.parts(16, 64, 48)


def test_awq_is_what_gptqmodel_reads(gptqmodel: Any) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = affine(48, 128, 64, 4, zeros=(0, 16))
    arrays = {name: torch.from_numpy(array) for name, array in awq.pack(weight).items()}
    expected = dequantize_gemm(arrays["qweight"], arrays["qzeros"], arrays["scales"], 4, 64).T.numpy()
    assert np.array_equal(values(weight).astype(np.float16), expected)


# ---------------------------------------------------------------------------------------- compressed-tensors


def as_torch(arrays: Mapping[str, np.ndarray], parts: Mapping[str, tuple[str, Any]]) -> dict[str, torch.Tensor]:
    views = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    found = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return {
        name: tensor.view(views[parts[name][0]]) if parts[name][0] in views else tensor
        for name, tensor in found.items()
    }


def scheme(**weights: Any) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(**weights)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


def decompressed(format: str, state: dict[str, torch.Tensor], scheme: Any) -> np.ndarray:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(format)
    return compressor.decompress(state, scheme)["weight"].float().numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
def test_pack_quantized_is_what_compressed_tensors_reads(bits: int, symmetric: bool, group: int) -> None:
    strategy = {"strategy": "channel"} if group == 96 else {"strategy": "group", "group_size": group}
    ours = scheme(num_bits=bits, symmetric=symmetric, **strategy)
    zeros = None if symmetric else (0, 1 << bits)
    weight = affine(70, 96, group, bits, zeros=zeros)
    arrays = compressed.pack(weight, bits, symmetric=symmetric, scale="F32")
    parts = compressed.parts(70, 96, bits, group, symmetric=symmetric, scale="F32")
    check_parts(parts, arrays)
    expected = decompressed("pack-quantized", as_torch(arrays, parts), ours)
    assert np.array_equal(values(weight).astype(np.float32), expected)
    for start, stop in ((0, 70), (31, 66), (64, 70)):
        found = compressed.unpack(arrays, start, stop, bits=bits, columns=96)
        same(found, weight, start, stop)
        assert np.array_equal(found.values(), expected[start:stop])


def test_pack_quantized_as_compressed_tensors_writes_it() -> None:
    from_peer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (5, 75), dtype=np.int8)  # ten words, the last with three codes
    packed = from_peer.pack_to_int32(torch.from_numpy(codes), 4).numpy()
    weight = Affine((codes + 8).astype(np.uint8), np.ones((5, 1), np.float32), np.full((5, 1), 8, np.uint8))
    arrays = compressed.pack(weight, 4)
    assert np.array_equal(arrays["weight_packed"], packed)
    assert np.array_equal(compressed.unpack(arrays, 0, 5, bits=4, columns=75).values(), codes)


def test_pack_quantized_refuses() -> None:
    weight = affine(32, 64, 32, 4, zeros=(3, 9))
    with pytest.raises(UnsupportedError, match="zero point of 8 only"):
        compressed.pack(weight, 4)
    reordered = Affine(weight.codes_OI, weight.scale_OG, weight.zero_OG, np.arange(64, dtype=np.int32) % 2)
    with pytest.raises(UnsupportedError, match="reordered"):
        compressed.pack(reordered, 4)
    with pytest.raises(UnsupportedError, match="reordered"):
        awq.pack(reordered)
    with pytest.raises(UnsupportedError, match="no multiple of 48"):
        compressed.parts(32, 64, 4, 48)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_is_what_compressed_tensors_reads(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    ours = scheme(num_bits=8, symmetric=symmetric, strategy="channel")
    zero = None if symmetric else rng.integers(-128, 128, (7, 1), dtype=np.int8)
    weight = Int8(rng.integers(-128, 128, (7, 33), dtype=np.int8), rng.uniform(0.1, 1, (7, 1)).astype(np.float32), zero)
    arrays = integers.pack(weight, "int-quantized", scale="F32")
    parts = integers.parts(7, 33, "int-quantized", symmetric=symmetric, scale="F32")
    check_parts(parts, arrays)
    expected = decompressed("int-quantized", as_torch(arrays, parts), ours)
    assert np.array_equal(integers.unpack(arrays, 0, 7).values(), expected)
    assert np.array_equal(integers.unpack(arrays, 2, 5).values(), expected[2:5])


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_float_quantized_is_what_compressed_tensors_reads(kind: str) -> None:
    rng = np.random.default_rng(0)
    extra = {"block_structure": [128, 128]} if kind == "block" else {}
    ours = scheme(num_bits=8, type="float", symmetric=True, strategy=kind, **extra)
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    codes = w.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    grid = {"block": (3, 2), "channel": (300, 1), "tensor": (1, 1)}[kind]
    block = {"block": (128, 128), "channel": (1, 200), "tensor": (300, 200)}[kind]
    scale = rng.uniform(0.1, 1, grid).astype(np.float32)
    arrays = float8.pack(codes, scale, kind)
    parts = float8.parts(300, 200, kind)
    check_parts(parts, arrays)
    state = as_torch(arrays, parts)
    state["weight_scale"] = state.pop("weight_scale_inv", state.get("weight_scale"))
    expected = decompressed("float-quantized", state, ours)
    spread = scale[np.arange(300) // block[0]][:, np.arange(200) // block[1]]
    assert np.array_equal(w.to(torch.float8_e4m3fn).float().numpy() * spread, expected)


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_micro_floats_are_what_compressed_tensors_reads(kind: str) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (6, 96), dtype=np.uint8)
    if kind == "MXFP4":
        ours = scheme(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
        weight = Micro(codes, rng.integers(110, 140, (6, 3), dtype=np.uint8))
    else:
        ours = scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
        weight = Micro(codes, rng.integers(1, 127, (6, 6), dtype=np.uint8), global_scale=37.25)
    arrays = micro.pack(weight)
    parts = micro.parts(6, 96, kind)
    check_parts(parts, arrays)
    expected = decompressed(f"{kind.lower()}-pack-quantized", as_torch(arrays, parts), ours)
    found = micro.unpack(arrays, 0, 6).values()
    if kind == "MXFP4":
        assert np.array_equal(found, expected)
    else:  # the peer computes in bfloat16
        assert np.allclose(found, expected, rtol=2**-7, atol=0)
    exact = weight.scales().astype(np.float64).repeat(32 if kind == "MXFP4" else 16, axis=1)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert np.allclose(found, exact * magnitudes[codes & 7] * np.where(codes & 8, -1, 1), rtol=1e-7, atol=0)
    assert np.array_equal(micro.unpack(arrays, 2, 5).values(), found[2:5])
    with pytest.raises(UnsupportedError, match="whole groups"):
        micro.parts(6, 100, kind)


def test_experts_of_gpt_oss_are_what_transformers_reads() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = rng.integers(110, 140, (3, 8, 2), dtype=np.uint8)
    expected = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    stacked = expected.transpose(1, 2).reshape(24, 64).numpy()  # it turns each expert's matrix over
    parts = {"blocks": blocks, "scales": scales}
    assert np.array_equal(micro.unpack_experts(parts, 0, 24).values(), stacked)
    assert np.array_equal(micro.unpack_experts(parts, 5, 19).values(), stacked[5:19])


# ------------------------------------------------------------------------------------------- bitsandbytes


def test_the_dynamic_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.array_equal(bnb.dynamic_map(), functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_what_bitsandbytes_reads(quant_type: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(0)
    absmax = rng.uniform(0.5, 2, (48, 20)).astype(np.float32)
    weight = Table4(rng.integers(0, 16, (48, 1280), dtype=np.uint8), absmax, quant_type)
    arrays = bnb.pack(weight, nested=nested, dtype="float32")
    parts = bnb.parts(48, 1280, quant_type, nested=nested, dtype="float32")
    check_parts(parts, arrays)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    packed = tensors.pop("weight")
    state = functional.QuantState.from_dict(
        {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}, torch.device("cpu")
    )
    expected = functional.dequantize_4bit(packed, state).numpy()
    raw = arrays[f"weight.quant_state.bitsandbytes__{quant_type}"].tobytes()
    ours = bnb.read_state(raw, "state")
    found = bnb.unpack(arrays, ours, 0, 48).values()
    assert ours.shape == (48, 1280)
    assert np.array_equal(found, expected)
    assert np.array_equal(bnb.unpack(arrays, ours, 7, 30).values(), expected[7:30])
    assert np.allclose(found, weight.values(), rtol=0.1 if nested else 0)
    with pytest.raises(UnsupportedError, match="no multiple of 64"):
        bnb.parts(48, 100, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(48, 1280), (50, 70), (3, 33)])
def test_four_bits_as_bitsandbytes_writes_them(quant_type: str, nested: bool, shape: tuple[int, int]) -> None:
    """Also where blocks cross rows, and with an odd number of weights."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=nested, blocksize=64)
    arrays = {f"weight.{name}": tensor.numpy() for name, tensor in state.as_dict(packed=True).items()}
    arrays["weight"] = packed.numpy()
    expected = functional.dequantize_4bit(packed, state).numpy()
    ours = bnb.read_state(arrays[f"weight.quant_state.bitsandbytes__{quant_type}"].tobytes(), "state")
    rows = shape[0]
    assert np.array_equal(bnb.unpack(arrays, ours, 0, rows).values(), expected)
    assert np.array_equal(bnb.unpack(arrays, ours, 1, rows - 1).values(), expected[1:-1])


def test_nesting_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    codes, largest, offset = bnb.nest(absmax.numpy())
    peer, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    assert abs(offset - float(absmax.mean())) < 1e-6
    assert np.array_equal(largest, state.absmax.numpy())
    assert np.array_equal(codes, peer.numpy())


def test_llm_int8_is_what_bitsandbytes_reads() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).half()
    codes, stats, _ = functional.int8_vectorwise_quant(w)
    expected = functional.int8_vectorwise_dequant(codes, stats).numpy()
    arrays = {"weight": codes.numpy(), "SCB": stats.numpy(), "weight_format": np.array(0, np.uint8)}
    found = integers.unpack(arrays, 0, 9)
    assert np.allclose(found.values(), expected, rtol=3e-7, atol=0)
    again = integers.pack(found, "llm-int8")
    check_parts(integers.parts(9, 40, "llm-int8"), again)
    assert np.allclose(again["SCB"], arrays["SCB"], rtol=2e-7) and np.array_equal(again["weight"], codes)
    with pytest.raises(UnsupportedError, match="no zero points"):
        integers.pack(Int8(found.codes_OI, found.scale_OG, np.zeros((9, 1), np.int8)), "llm-int8")


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}
ODD = st.sampled_from([None, True, -1, 0, 1, 1.5, 10**400, 1e308, "nf4", [], [1, 2], [1, -1], [[1], 2], {}])


@given(st.dictionaries(st.sampled_from([*STATE, "nested_blocksize", "nested_offset"]), ODD))
def test_a_strange_state_is_refused_or_sensible(changes: dict[str, Any]) -> None:
    try:
        state = bnb.read_state(json.dumps(STATE | changes).encode(), "state")
    except FormatError:
        return
    assert state.quant_type in ("nf4", "fp4") and state.block > 0 and all(n > 0 for n in state.shape)
    assert np.isfinite(np.float32(state.nested_offset)) and state.nested_block >= 0


def test_a_damaged_state_is_named() -> None:
    for raw in (b"", b"{", b"[]", b"{" * 5000, bytes(80), b'{"shape": ' + b"9" * 5000 + b"}"):
        with pytest.raises(FormatError, match=r"up\.quant_state"):
            bnb.read_state(raw, "up.quant_state")


# -------------------------------------------------------------------------------------- GGUF's own blocks


def dequantized(raw: np.ndarray, kind: str) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_groups_are_q4_0_to_the_bit(bits: int) -> None:
    weight = affine(24, 256, 64, bits)
    for kind in ("Q4_0", "Q4_1"):
        raw = recode(weight, kind)
        assert raw is not None and raw.dtype == np.uint8
        assert np.array_equal(dequantized(raw, kind), values(weight).astype(np.float32))


def test_affine_groups_are_q4_1_where_the_lowest_is_a_float16() -> None:
    weight = affine(24, 256, 32, 4, zeros=(0, 16))
    assert recode(weight, "Q4_0") is None and recode(weight, "Q4_1") is None
    powers = np.ldexp(np.float32(1), np.random.default_rng(0).integers(-9, 0, (24, 8))).astype(np.float32)
    exact = Affine(weight.codes_OI, powers, weight.zero_OG)
    raw = recode(exact, "Q4_1")
    assert raw is not None
    assert np.array_equal(dequantized(raw, "Q4_1"), values(exact).astype(np.float32))


def test_other_grids_are_not_recoded() -> None:
    weight = affine(24, 192, 48, 4)
    assert recode(weight, "Q4_0") is None  # a block would have two scales
    assert recode(affine(24, 256, 64, 8), "Q4_0") is None
    plain = affine(24, 256, 64, 4)
    assert recode(plain, "Q8_0") is None
    finer = Affine(plain.codes_OI, plain.scale_OG * np.float32(1.0001), plain.zero_OG)
    assert recode(finer, "Q4_0") is None
    huge = Affine(plain.codes_OI, plain.scale_OG * np.float32(1e7), plain.zero_OG)
    assert recode(huge, "Q4_0") is None
    reordered = Affine(plain.codes_OI, plain.scale_OG, plain.zero_OG, np.arange(256, dtype=np.int32) % 4)
    assert recode(reordered, "Q4_0") is None


def test_every_layout_says_what_it_is() -> None:
    folder = Path(bnb.__file__).parent
    for path in folder.glob("*.py"):
        assert path.read_text().startswith('"""') and len(path.read_text().splitlines()) < 400
    assert issubclass(UnsupportedError, DitherError)
